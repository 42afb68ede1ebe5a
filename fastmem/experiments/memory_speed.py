"""How fast memory is: generate() with and without it, and the kernels against a loop over tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastmem.models.chat import ChatFormat
from fastmem.models.memory_model import MemoryModel
from fastmem.nn.decaying_buffer import empty_bank
from fastmem.ops.gated_write import gated_write
from fastmem.ops.topk_attention import topk_attention


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int, most: int = 20) -> dict[str, float]:
    """Median seconds of each, taken in turn so that a noisy moment hits all alike.

    In a round a fast candidate runs as often as fits in the time of the slowest, at most `most` times, so that one
    interruption does not stand for it.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}

    def timed(run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    once = {name: min(timed(run), timed(run)) for name, run in candidates.items()}  # warm
    repeats = {name: max(1, min(most, round(max(once.values()) / x))) for name, x in once.items()}
    for turn in range(rounds):
        names = list(candidates)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name] += [timed(candidates[name]) for _ in range(repeats[name])]
    return {name: statistics.median(x) for name, x in times.items()}


def generation_speed(model: MemoryModel, chat: ChatFormat, tokens: int = 48, rounds: int = 9) -> dict[str, float]:
    """Tokens per second of generate() for one prompt, base and with a memory that holds something."""
    told = chat.batch(["My name is Alice and I live in Lisbon, where I work as a gardener."]).to(model.device)
    asked = chat.batch(["Write a short story about a lighthouse."]).to(model.device)
    arguments: dict[str, Any] = {
        "input_ids": asked.input_ids,
        "attention_mask": asked.attention_mask,
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": chat.pad,
    }
    with torch.no_grad():
        model(
            input_ids=told.input_ids,
            attention_mask=told.attention_mask,
            write_mask=told.user,
            sessions=["generation speed"],
        )

    def base() -> None:
        with model.disable_memory():
            model.base.generate(**arguments)

    def memory() -> None:
        model.generate(**arguments, sessions=["generation speed"], write_mask=asked.user)

    seconds = interleaved({"base": base, "memory": memory}, rounds)
    model.memory.clear("generation speed")
    return {
        "tokens_per_s_base": tokens / seconds["base"],
        "tokens_per_s_memory": tokens / seconds["memory"],
        "generate_speed_ratio": seconds["base"] / seconds["memory"],
    }


@torch.no_grad()
def loop_speed(tokens: int = 512, width: int = 576, batch: int = 1, rounds: int = 7) -> dict[str, float]:
    """Writing and reading `tokens` tokens, buffer 256 and store 128 slots: kernels against a Python loop per token.

    The loop writes by the reference and reads by PyTorch, one token at a time, as a model that remembers token by token
    must.
    """
    generator = torch.Generator().manual_seed(0)
    keys, values, queries = (torch.randn(batch, tokens, width, generator=generator) for _ in range(3))
    surprise = torch.rand(batch, tokens, generator=generator)
    settings: tuple[dict[str, Any], dict[str, Any]] = (
        {},
        {
            "boost": None,
            "min_strength": 0.0,
            "match_threshold": 0.8,
            "alpha_evict": 1.0,
            "retention": (0.5, 0.3, 0.001),
        },
    )
    banks = [empty_bank(batch, slots, width, width) for slots in (256, 128)]

    def kernels() -> None:
        buffer, _, _ = gated_write(banks[0], keys, values, **settings[0])
        store, _, _ = gated_write(banks[1], keys, values, surprise, **settings[1])
        k, v = torch.cat([buffer.keys, store.keys], 1), torch.cat([buffer.values, store.values], 1)
        strength = torch.cat([buffer.strength, store.strength], 1)
        topk_attention(queries[:, None], k[:, None], v[:, None], bias=strength.log())

    def loop() -> None:
        buffer, store, stats = banks[0], banks[1], None
        for t in range(tokens):
            one = slice(t, t + 1)
            buffer, _, _ = gated_write(buffer, keys[:, one], values[:, one], backend="reference", **settings[0])
            store, stats, _ = gated_write(
                store, keys[:, one], values[:, one], surprise[:, one], stats, backend="reference", **settings[1]
            )
            k, v = torch.cat([buffer.keys, store.keys], 1), torch.cat([buffer.values, store.values], 1)
            scores = F.normalize(queries[:, one], dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2) * width**0.5
            strength = torch.cat([buffer.strength, store.strength], 1)
            (scores + strength.log()[:, None]).softmax(-1) @ v

    seconds = interleaved({"kernels": kernels, "loop": loop}, rounds)
    return {
        "write_read_kernels_ms": 1e3 * seconds["kernels"],
        "write_read_loop_ms": 1e3 * seconds["loop"],
        "write_read_speedup": seconds["loop"] / seconds["kernels"],
    }
