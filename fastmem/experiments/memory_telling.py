"""How turns reach memory without their context: each passes the frozen base alone, behind a cached chat prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastmem.models.chat import Batch, ChatFormat
from fastmem.models.kv_cache import cache_among, cache_name
from fastmem.models.memory_model import MemoryModel
from fastmem.models.sessions import stack_states
from fastmem.nn import DualMemoryLayer, DualMemoryState
from fastmem.nn.decaying_buffer import empty_bank
from fastmem.ops.gated_write import Bank
from fastmem.tasks.conversations import Turn


def padded(rows: Sequence[tuple[Tensor, Tensor] | None], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts (B, T, D), contents (B, T, D) and mask (B, T) of rows of different lengths; None is an empty row."""
    D = next(row[1].shape[1] for row in rows if row is not None)
    nothing = torch.zeros(0, D, device=device)
    pairs = [(nothing, nothing) if row is None else row for row in rows]
    lengths = torch.tensor([len(v) for _, v in pairs], device=device)
    context, content = (pad_sequence([p[j].float() for p in pairs], batch_first=True) for j in range(2))
    return context, content, torch.arange(content.shape[1], device=device) < lengths[:, None]


class TurnReader:
    """Runs turns through the base and hands out what the memory layers would write.

    Nothing is read while a turn is told, so what a turn writes depends on its text alone.
    """

    def __init__(self, model: MemoryModel, chat: ChatFormat) -> None:
        self.model, self.chat = model, chat
        self._cache_name = cache_name(model.base)
        self._prefix: list[tuple[Tensor, Tensor]] | None = None
        self._before: list[Tensor] | None = None

    def _cached_prefix(self, rows: int) -> Any:
        """A KV cache of what the template puts before every turn; nothing is written or read there."""
        from transformers import DynamicCache

        if self._prefix is None:
            ids = torch.tensor([self.chat.prefix], device=self.model.device)
            with torch.no_grad(), self.model.disable_memory():
                output = self.model.base(input_ids=ids, use_cache=True, **{self._cache_name: DynamicCache()})
            cache = cache_among(output)
            self._prefix = [(layer.keys, layer.values) for layer in cache.layers]
        cache = DynamicCache()
        for i, (k, v) in enumerate(self._prefix):
            cache.update(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1), i)
        return cache

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Arguments of the base for a right-padded batch without its prefix."""
        rows, start = batch.input_ids.shape[0], len(self.chat.prefix)
        before = batch.attention_mask.new_ones(rows, start)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": torch.cat([before, batch.attention_mask], 1),
            self._cache_name: self._cached_prefix(rows),
            "use_cache": True,
        }

    def _hidden_before(self) -> list[Tensor]:
        """(1, 1, hidden_dim) per memory layer: the state before the user's first word."""
        if self._before is None:
            ids = torch.tensor([self.chat.prefix], device=self.model.device)
            self._before = [h[:, -1:] for h in self.model.record(input_ids=ids)[0]]
        return self._before

    def record(self, texts: Sequence[str]) -> tuple[Batch, list[Tensor], Tensor]:
        """The turns as tokens (R, T), the context of each token per layer, and the tokens' content.

        Returns:
            The batch, right-padded and without prefix; contexts, (R, T, hidden_dim) each; values (R, T, hidden_dim).
        """
        batch = self.chat.batch(list(texts), prefix=False, suffix=False, padding_side="right").to(self.model.device)
        hidden, values = self.model.record(**self.inputs(batch))
        contexts = []
        for layer, x, before in zip(self.model.memory_layers, hidden, self._hidden_before(), strict=True):
            first = layer.normalise(before).expand(x.shape[0], 1, -1)
            contexts.append(torch.cat([first, layer.normalise(x)[:, :-1]], 1))
        return batch, contexts, values


class Teller(TurnReader):
    """Tells many conversations to many sessions at once; a text that comes again is not computed again."""

    def __init__(self, model: MemoryModel, chat: ChatFormat, rows: int = 64) -> None:
        super().__init__(model, chat)
        self._rows = rows
        self._known: dict[str, tuple[list[Tensor], Tensor]] = {}

    def known(self, text: str) -> tuple[list[Tensor], Tensor]:
        """Context per layer (T, hidden_dim) and content (T, hidden_dim) of a turn that was learnt."""
        return self._known[text]

    def learn(self, texts: Sequence[str]) -> None:
        """Run these turns through the base and keep what they would write."""
        new = sorted({t for t in texts if t not in self._known}, key=lambda t: (len(t), t))
        for i in range(0, len(new), self._rows):
            some = new[i : i + self._rows]
            batch, contexts, values = self.record(some)
            for row, text in enumerate(some):
                own = batch.user[row]
                self._known[text] = ([c[row][own] for c in contexts], values[row][own])

    @torch.no_grad()
    def tell(self, sessions: Sequence[str], talks: Sequence[Sequence[Turn]]) -> None:
        """Write each conversation, turn by turn, into its fresh session."""
        self.learn([t.text for turns in talks for t in turns])
        states: list[DualMemoryState] = []
        for layer in self.model.memory_layers:
            states.append(layer.empty(len(talks)))
        for t in range(max(map(len, talks))):
            now = [self._known[turns[t].text] if t < len(turns) else None for turns in talks]
            for i, layer in enumerate(self.model.memory_layers):
                context, content, mask = padded([k and (k[0][i], k[1]) for k in now], self.model.device)
                states[i], _ = layer.write(layer.decay(states[i]), context, content, mask)
        self.model.memory.put(sessions, states)

    @torch.no_grad()
    def tell_ring(self, sessions: Sequence[str], talks: Sequence[Sequence[Turn]]) -> None:
        """The control: sessions hold the latest tokens, as many as the memory has slots, all equally strong."""
        self.learn([t.text for turns in talks for t in turns])
        config = self.model.config
        slots = config.buffer_slots + config.store_slots
        for session, turns in zip(sessions, talks, strict=True):
            known = [self._known[t.text] for t in turns]
            values = torch.cat([v for _, v in known])[-slots:].float()
            states = []
            for i, layer in enumerate(self.model.memory_layers):
                context = torch.cat([c[i] for c, _ in known])[-slots:].float()
                ring = empty_bank(1, slots, config.memory_dim, config.hidden_dim, self.model.device)
                keys = layer.keys(context, values)
                n = len(keys)
                ring.keys[0, :n], ring.values[0, :n], ring.strength[0, :n] = keys, values, 1.0
                states.append(self._as_tiers(layer, ring))
            self.model.memory.put([session], states)

    def _as_tiers(self, layer: DualMemoryLayer, ring: Bank) -> DualMemoryState:
        """A ring as one state: its slots fill the buffer's places, then the store's, with the buffer's weighting."""
        empty, split = layer.empty(1), self.model.config.buffer_slots
        return DualMemoryState(Bank(*(x[:, :split] for x in ring)), Bank(*(x[:, split:] for x in ring)), empty.stats)

    def empty_store(self, sessions: Sequence[str]) -> None:
        """Leave only the buffer."""
        for session in sessions:
            states = []
            for layer, state in zip(self.model.memory_layers, self.model.memory.states_of(session), strict=True):
                states.append(state._replace(store=layer.empty(1).store))
            self.model.memory.put([session], states)

    @torch.no_grad()
    def reply_perplexity(self, replies: Sequence[tuple[str, str]], sessions: Sequence[str] | None) -> float:
        """Perplexity per token of (prompt, reply) pairs, the sessions' memories read in turn; None: without memory."""
        total, count = 0.0, 0
        for i in range(0, len(replies), self._rows):
            some = replies[i : i + self._rows]
            batch = self.chat.batch([p for p, _ in some], [r for _, r in some]).to(self.model.device)
            arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            if sessions is None:
                with self.model.disable_memory():
                    logits = self.model.base(**arguments).logits
            else:
                states = [self.model.memory.states_of(sessions[(i + j) % len(sessions)]) for j in range(len(some))]
                stacked = [stack_states(layer) for layer in zip(*states, strict=True)]
                with self.model.reading(stacked, batch.attention_mask.bool()):
                    logits = self.model.base(**arguments).logits
            says = batch.answer[:, 1:]
            total += F.cross_entropy(logits[:, :-1][says].float(), batch.input_ids[:, 1:][says], reduction="sum").item()
            count += int(says.sum())
        return float(torch.tensor(total / count).exp())
