"""How memory layers learn: tell, forget the context, ask; gradients run through what was written."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmem.experiments.memory_telling import Teller, padded
from fastmem.models.chat import ChatFormat
from fastmem.models.memory_model import MemoryModel
from fastmem.nn import DualMemoryLayer, DualMemoryState
from fastmem.tasks import conversations, facts
from fastmem.tasks.conversations import Conversation, Turn

SURPRISING, EXPECTED = 3.5, 0.9  # root mean square error of the surprise predictor: facts above, the rest below
SAME_ADDRESS, OTHER_ADDRESS = 0.9, 0.5  # cosine of keys: one kind of fact above, other tokens below


@dataclass(frozen=True)
class Question:
    """A question to the memory of conversation `owner`."""

    text: str
    answer: str
    owner: int


@dataclass(frozen=True)
class _Block:
    """Tokens written together: contexts per layer (T, D), values (T, D), value (T,) true on what is worth keeping."""

    turns: int
    contexts: list[Tensor]
    values: Tensor
    value: Tensor
    kind: str | None


class MemoryTrainer(nn.Module):
    """The loss of a batch of conversations.

    Each turn passes the frozen base without context; its tokens are written in order. Then questions pass the base
    behind the same memory, and the answer's cross-entropy flows back through the read, the banks and the writes. Three
    terms join it: on unrelated prompts the model stays what it was (divergence from the base); what is worth
    remembering surprises, what is not does not; keys of one kind of fact are alike, so that a correction finds
    what it corrects, and unlike all others.

    Args:
        model: the memory model; its base should be in bfloat16 where the hardware has it.
        chat: its chat format.
        replies: (prompt, the base's own reply) pairs for the divergence term.
    """

    def __init__(self, model: MemoryModel, chat: ChatFormat, replies: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__()
        self.layers = model.layers
        self.reader = Teller(model, chat)  # holds the model outside of the module tree: only the layers are trained
        self.chat = chat
        self.replies = list(replies)

    @property
    def model(self) -> MemoryModel:
        """The memory model."""
        return self.reader.model

    def _value_tokens(self, turn: Turn, length: int) -> Tensor:
        """(length,) bool, true on the tokens of the value that the turn tells."""
        mask = torch.zeros(length, dtype=torch.bool)
        if turn.value is None:
            return mask
        start = turn.text.rindex(turn.value)
        encoded = self.chat.tokenizer(turn.text, add_special_tokens=False, return_offsets_mapping=True)
        for i, (a, b) in enumerate(encoded["offset_mapping"]):
            mask[i] = a < start + len(turn.value) and b > start
        return mask

    def _blocks(self, talks: Sequence[Conversation]) -> list[list[_Block]]:
        """What each conversation writes, in order; chatter that follows chatter is one block."""
        telling = [turn for talk in talks for turn in talk.turns if turn.value is not None]
        batch, contexts, values = self.reader.record([t.text for t in telling])
        rows = iter(range(len(telling)))
        self.reader.learn([turn.text for talk in talks for turn in talk.turns if turn.value is None])
        out = []
        for talk in talks:
            blocks: list[_Block] = []
            for turn in talk.turns:
                if turn.value is not None:
                    row = next(rows)
                    own = batch.user[row]
                    value = self._value_tokens(turn, int(own.sum())).to(values.device)
                    blocks.append(_Block(1, [c[row][own] for c in contexts], values[row][own], value, turn.kind))
                    continue
                known, content = self.reader.known(turn.text)
                plain = torch.zeros(len(content), dtype=torch.bool, device=content.device)
                count = 1
                if blocks and blocks[-1].kind is None:
                    last = blocks.pop()
                    known = [torch.cat(x) for x in zip(last.contexts, known, strict=True)]
                    content, plain = torch.cat([last.values, content]), torch.cat([last.value, plain])
                    count += last.turns
                blocks.append(_Block(count, known, content, plain, None))
            out.append(blocks)
        return out

    def tell(self, talks: Sequence[Conversation]) -> tuple[list[DualMemoryState], dict[str, Tensor]]:
        """Write conversations into fresh memories, one each.

        Returns:
            One state per memory layer, batched over conversations, gaps included; and the terms of the loss that
            concern writing.
        """
        talk_blocks = self._blocks(talks)
        blocks = [block for blocks in talk_blocks for block in blocks]
        values, value = torch.cat([b.values for b in blocks]), torch.cat([b.value for b in blocks])
        telling = [b for b in blocks if b.kind is not None]
        device = values.device
        gaps = torch.tensor([talk.gap for talk in talks], device=device)
        terms = {"surprise": torch.zeros((), device=device), "address": torch.zeros((), device=device)}
        states = []
        for i, layer in enumerate(self.model.memory_layers):
            state = layer.empty(len(talks))
            for t in range(max(map(len, talk_blocks))):
                now = [blocks[t] if t < len(blocks) else None for blocks in talk_blocks]
                turns = torch.tensor([0 if b is None else b.turns for b in now], device=device)
                context, content, mask = padded([None if b is None else (b.contexts[i], b.values) for b in now], device)
                state, _ = layer.write(layer.decay(state, turns[:, None]), context, content, mask)
            states.append(layer.decay(state, gaps[:, None]))
            context = torch.cat([b.contexts[i] for b in blocks])
            terms["surprise"] = terms["surprise"] + self._surprise_term(layer, context, values, value)
            at = [int(b.value.int().argmax()) for b in telling]
            first = layer.keys(
                torch.stack([b.contexts[i][t] for b, t in zip(telling, at, strict=True)]).float(),
                torch.stack([b.values[t] for b, t in zip(telling, at, strict=True)]).float(),
            )
            kinds = [b.kind for b in telling]
            terms["address"] = terms["address"] + self._address_term(
                first, kinds, layer.keys(context[~value], values[~value])
            )
        return states, terms

    @staticmethod
    def _surprise_term(layer: DualMemoryLayer, context: Tensor, values: Tensor, value: Tensor) -> Tensor:
        s = layer.store.surprise(context, values)
        return F.relu(SURPRISING - s[value]).square().mean() + F.relu(s[~value] - EXPECTED).square().mean()

    @staticmethod
    def _address_term(keys: Tensor, kinds: Sequence[str | None], others: Tensor) -> Tensor:
        """Keys (n, memory_dim) of the facts' first tokens against each other and against all other tokens' keys."""
        same = torch.tensor([[a == b for b in kinds] for a in kinds], device=keys.device)
        cosine = keys @ keys.T
        pull = F.relu(SAME_ADDRESS - cosine[same]).square().mean()
        push = F.relu(cosine[~same] - OTHER_ADDRESS).square()
        away = F.relu(keys @ others.T - OTHER_ADDRESS).square()
        return pull + 2 * push.sum() / max(1, push.numel()) + 2 * away.mean() + away.amax(1).mean()

    def ask(
        self, questions: Sequence[Question], states: list[DualMemoryState], reads_question: bool
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the answers, and whether greedy decoding would give each whole answer.

        Args:
            questions: what is asked of which memory.
            states: from `tell`.
            reads_question: whether the question's own tokens read memory, or only what comes after them (as when the
                question is written).
        """
        logits, targets, row_of = self._answer(
            [(q.text, q.answer) for q in questions], [q.owner for q in questions], states, reads_question
        )
        right = (logits.argmax(-1) == targets).float()
        whole = torch.ones(len(questions), device=right.device).scatter_reduce(0, row_of, right, "amin")
        return F.cross_entropy(logits, targets), whole

    def _reply_beside(self, talk: Conversation, rng: random.Random) -> tuple[str, str]:
        """A prompt that has nothing to do with what was told; half the time it asks for a value of the same pool."""
        asked = facts.impersonal_questions().get(facts.pool_of(rng.choice(talk.facts).kind), ())
        alike = [pair for pair in self.replies if pair[0] in asked]
        return rng.choice(alike if alike and rng.random() < 0.5 else self.replies)

    def stay(self, replies: Sequence[tuple[str, str]], owners: Sequence[int], states: list[DualMemoryState]) -> Tensor:
        """Divergence from the base on unrelated prompts and replies, over a memory that holds something else.

        Once as a conversation, at the reply; once as plain text without the chat's marks, everywhere.
        """
        with torch.no_grad(), self.model.disable_memory():
            target, _, _ = self._answer(replies, owners, None, True)
            plain_target = self._plain(replies, owners, None)
        logits, _, _ = self._answer(replies, owners, states, True)
        return _divergence(logits, target) + _divergence(self._plain(replies, owners, states), plain_target)

    def _plain(
        self, replies: Sequence[tuple[str, str]], owners: Sequence[int], states: list[DualMemoryState] | None
    ) -> Tensor:
        """Logits (n, vocabulary) at all tokens of the texts without a chat's marks."""
        texts = [f"{p} {r}" for p, r in replies]
        encoded = self.chat.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        ids, mask = (encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        hidden = self._hidden(inputs, owners, states, mask.bool())
        return self.model.base.get_output_embeddings()(hidden[mask.bool()]).float()

    def _hidden(
        self, inputs: dict[str, Any], owners: Sequence[int], states: list[DualMemoryState] | None, reads: Tensor
    ) -> Tensor:
        """Last hidden states of the base, reading the owners' memories; of the bare base where states is None."""
        base = self.model.base
        body = base.get_decoder() if hasattr(base, "get_decoder") else base.base_model
        if states is None:
            return body(**inputs).last_hidden_state
        index = torch.tensor(list(owners), device=reads.device)
        with self.model.reading([_select(s, index) for s in states], reads):
            return body(**inputs).last_hidden_state

    def _answer(
        self,
        pairs: Sequence[tuple[str, str]],
        owners: Sequence[int],
        states: list[DualMemoryState] | None,
        reads_question: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n, vocabulary) and targets (n,) of all answer tokens, and which row each belongs to."""
        model = self.model
        batch = self.chat.batch([p for p, _ in pairs], [a for _, a in pairs], prefix=False, padding_side="right")
        batch = batch.to(model.device)
        reads = batch.attention_mask.bool() if reads_question else batch.attention_mask.bool() & ~batch.user
        hidden = self._hidden(self.reader.inputs(batch), owners, states, reads)
        says = batch.answer[:, 1:]
        logits = model.base.get_output_embeddings()(hidden[:, :-1][says]).float()
        row_of = torch.arange(len(pairs), device=model.device)[:, None].expand_as(says)[says]
        return logits, batch.input_ids[:, 1:][says], row_of

    def forward(self, talks: Sequence[Conversation], rng: random.Random, num_questions: int = 2) -> dict[str, Tensor]:
        """All terms of the loss of a batch, and the share of questions answered right."""
        states, terms = self.tell(talks)
        questions = []
        for owner, talk in enumerate(talks):
            asked = sorted(talk.facts, key=lambda f: (f.kind not in talk.corrected, rng.random()))
            questions += [Question(f.question, f.answer, owner) for f in asked[:num_questions]]
        terms["answer"], right = self.ask(questions, states, rng.random() < 0.5)
        terms["right"] = right.mean()
        terms["stay"] = terms["answer"].new_zeros(())
        if self.replies:
            owners = rng.sample(range(len(talks)), max(1, len(talks) // 2))
            terms["stay"] = self.stay([self._reply_beside(talks[i], rng) for i in owners], owners, states)
        terms["loss"] = terms["answer"] + terms["stay"] + 0.1 * terms["surprise"] + terms["address"]
        return terms


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")


def _map_state(state: DualMemoryState, f: Any) -> DualMemoryState:
    return DualMemoryState(
        type(state.buffer)(*map(f, state.buffer)),
        type(state.store)(*map(f, state.store)),
        type(state.stats)(*map(f, state.stats)),
    )


def _select(state: DualMemoryState, index: Tensor) -> DualMemoryState:
    return _map_state(state, lambda x: x[index])


def draw_training_conversation(rng: random.Random, names: tuple[str, ...], chatter: Sequence[str]) -> Conversation:
    """What training shows: one to six facts, some made-up values, some corrections, little chatter or much."""
    return conversations.draw(
        "train",
        rng,
        num_facts=rng.randint(1, 6),
        num_chatter=rng.randint(0, 3) if rng.random() < 0.6 else rng.randint(8, 40),
        correct=0.15,
        invented=0.3,
        names=names,
        always_name=rng.random() < 0.75,
        chatter=chatter,
        tails=0.4,
        casual=0.25,
    )


def chatter_pool(rng: random.Random, count: int = 600) -> list[str]:
    """Chatter for training; a fixed pool, since each turn costs a pass of the base only once."""
    return [facts.chatter("train", rng) for _ in range(count)]


def calibration_texts(rng: random.Random, count: int = 200) -> list[str]:
    """Typical turns, from training data alone."""
    out = []
    for i in range(count):
        kind = rng.choice(facts.kinds())
        fact = facts.fact(kind, facts.draw_value(kind, "train", rng, 0.3), rng)
        out.append((fact.statement, facts.chatter("train", rng), f"{fact.question} {fact.answer}")[i % 3])
    return out
