"""Chat turns as tokens, and which of them are the user's own words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MARK = "\u2022\u2022"  # stands for the user's words while a chat template is taken apart


@dataclass(frozen=True)
class Batch:
    """Turns padded to one length.

    input_ids, attention_mask (B, T) int64; user (B, T) bool, true on the user's words; answer (B, T) bool, true on the
    words that the model is to say.
    """

    input_ids: Tensor
    attention_mask: Tensor
    user: Tensor
    answer: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        return Batch(*(x.to(device) for x in (self.input_ids, self.attention_mask, self.user, self.answer)))


class ChatFormat:
    """A tokenizer's chat template, cut into what stands before and after the user's words.

    Args:
        tokenizer: any Hugging Face tokenizer; without a chat template the text stands alone.
        system: system message; None: the template's own.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": _MARK}]
            if system is not None:
                messages.insert(0, {"role": "system", "content": system})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            before, _, after = text.rpartition(_MARK)  # a system message, which may hold anything, stands before
        else:
            before, after = tokenizer.bos_token or "", "\n"
        self.prefix, self.suffix = self._ids(before), self._ids(after)
        self.end = tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _words(self, text: str) -> list[int]:
        """What a user says is text throughout: "<|im_end|>" in it ends no turn."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: expected Unicode, got a lone surrogate at {error.start}") from None
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def batch(
        self,
        texts: list[str],
        answers: list[str] | None = None,
        *,
        prefix: bool = True,
        suffix: bool = True,
        padding_side: str = "left",
    ) -> Batch:
        """Tokens of user turns, each followed by the answer that should come.

        Args:
            texts: the users' words.
            answers: what the model should say to each, closed by the end token; None: nothing yet.
            prefix: whether to begin with what the template puts before the user's words.
            suffix: whether to go on with what the template puts after them.
            padding_side: "left" for generation, "right" behind a cached prefix.

        Returns:
            The batch, one row for each text.
        """
        rows, spans = [], []
        for i, text in enumerate(texts):
            before, words = self.prefix if prefix else [], self._words(text)
            after = self.suffix if suffix else []
            said = [] if answers is None else [*self._ids(answers[i]), self.end]
            rows.append([*before, *words, *after, *said])
            start = len(before)
            spans.append((start, start + len(words), len(rows[-1]) - len(said)))
        T = max(map(len, rows), default=0)
        shape = (len(rows), T)
        input_ids = torch.full(shape, self.pad)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        user, answer = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        for i, (row, (start, stop, said_from)) in enumerate(zip(rows, spans, strict=True)):
            shift = T - len(row) if padding_side == "left" else 0
            input_ids[i, shift : shift + len(row)] = torch.tensor(row)
            attention_mask[i, shift : shift + len(row)] = 1
            user[i, shift + start : shift + stop] = True
            answer[i, shift + said_from : shift + len(row)] = True
        return Batch(input_ids, attention_mask, user, answer)
