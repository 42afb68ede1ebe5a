"""A memory layer for a frozen network: a decaying buffer and a surprise-gated store behind one gated read."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmem.nn._checks import check_tensor
from fastmem.nn.decaying_buffer import DecayingBuffer
from fastmem.nn.memory_config import MemoryConfig
from fastmem.nn.memory_cross_attention import MemoryCrossAttention, MemoryView
from fastmem.nn.surprise_gated_store import SurpriseGatedStore
from fastmem.ops.gated_write import Bank, SurpriseStats, Written


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class DualMemoryState(NamedTuple):
    """What B memories hold."""

    buffer: Bank
    store: Bank
    stats: SurpriseStats


class DualMemoryWritten(NamedTuple):
    """What one call wrote where."""

    buffer: Written
    store: Written


class DualMemoryLayer(nn.Module):
    """Stores tokens under the context that led to them, and gives them back where the context returns.

    The key of token t is W_k LN(x_{t-1}) + W_c v_t: what the network knew just before it, and what came then (W_c is 0
    at the start). The value v_t is the token's content: its input embedding where the layer sits in a language model,
    else LN(x_t). A later position with a similar state finds the token that followed. W_c keeps apart what follows
    alike contexts: "I am new" does not overwrite "I am Sarah", "No, I am Anna" does.

    In one call: surprise, decay, read, buffer write, store write. The read comes before the writes, so no token can
    read what came after it. Weights are float32, or all float64.

    Args:
        config: sizes and rates.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        self.key_proj = nn.Linear(config.hidden_dim, config.memory_dim)
        self.content_proj = nn.Linear(config.hidden_dim, config.memory_dim, bias=False)
        nn.init.zeros_(self.content_proj.weight)
        self.buffer = DecayingBuffer(config)
        self.store = SurpriseGatedStore(config)
        self.attention = MemoryCrossAttention(config)

    def empty(self, batch: int) -> DualMemoryState:
        """The state of `batch` memories that hold nothing, where the layer is."""
        device = self.key_proj.weight.device
        return DualMemoryState(self.buffer.empty(batch, device), *self.store.empty(batch, device))

    def normalise(self, x: Tensor) -> Tensor:
        """LN(x) without affine, fp32 (float64 for float64), of x (..., hidden_dim): what keys, queries and surprise
        are made from."""
        return F.layer_norm(_at_least_float32(x), x.shape[-1:])

    @torch.no_grad()
    def calibrate(self, x: Tensor, shrinkage: float = 0.02) -> None:
        """Start keys and queries from the same whitening of typical hidden states x (N, hidden_dim).

        Hidden states of a language model all point about the same way. In the `memory_dim` leading principal
        directions, each scaled to unit variance (plus `shrinkage` of the mean variance), unrelated contexts have a
        cosine near 0, related ones near 1, before any training. `attention.residual_rms` becomes the median root mean
        square of x.

        Args:
            x: (N, hidden_dim), N well above memory_dim.
            shrinkage: added to each variance, in units of their mean: directions that hardly vary are not blown up.
        """
        n = self.normalise(x)
        mean = n.mean(0)
        variance, directions = torch.linalg.eigh(torch.cov((n - mean).T))
        keep = slice(-self.config.memory_dim, None)
        whiten = directions[:, keep] / (variance[keep] + shrinkage * variance[keep].mean()).sqrt()
        for proj in (self.key_proj, self.attention.q_proj):
            proj.weight.copy_(whiten.T)
            proj.bias.copy_(-mean @ whiten)
        self.attention.residual_rms.copy_(x.float().square().mean(-1).sqrt().median())

    def decay(self, state: DualMemoryState, cycles: int | Tensor = 1) -> DualMemoryState:
        """Let cycles pass: what the buffer holds fades, what the store holds ages.

        Args:
            state: B memories.
            cycles: how many pass; a tensor (B, 1) gives each memory its own number.

        Raises:
            ValueError: if cycles are negative.
        """
        return state._replace(buffer=self.buffer.decay(state.buffer, cycles), store=self.store.age(state.store, cycles))

    def keys(self, context: Tensor, values: Tensor) -> Tensor:
        """Unit keys (..., memory_dim) of tokens with these contexts and contents (..., hidden_dim)."""
        return F.normalize(self.key_proj(context) + self.content_proj(values), dim=-1)

    def write(
        self, state: DualMemoryState, context: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> tuple[DualMemoryState, DualMemoryWritten]:
        """Write tokens in order into both tiers.

        Args:
            state: B memories.
            context: (B, T, hidden_dim) LN of the hidden state before each token.
            values: (B, T, hidden_dim) content of each token.
            mask: (B, T) bool, true where a token may be written; None: everywhere.

        Returns:
            The new state, and what was written where.

        Raises:
            TypeError, ValueError: state, values or mask is of the wrong type, dtype or shape.
        """
        values = _at_least_float32(values)
        keys = self.keys(context, values)
        surprise = self.store.surprise(context, values)
        buffer, to_buffer = self.buffer.write(state.buffer, keys, values, mask)
        store, stats, to_store = self.store.write(state.store, state.stats, keys, values, surprise, mask)
        return DualMemoryState(buffer, store, stats), DualMemoryWritten(to_buffer, to_store)

    def view(self, state: DualMemoryState) -> MemoryView:
        """B memories as `read` sees them; make it once and read many times."""
        return self.attention.view(state.buffer, state.store)

    def read(self, x: Tensor, view: MemoryView, mask: Tensor | None = None) -> Tensor:
        """Read alone.

        Args:
            x: (B, T, hidden_dim) hidden states, any float dtype.
            view: of B memories, or of one that all read.
            mask: (B, T) bool, true where a token reads; None: everywhere.

        Returns:
            (B, T, hidden_dim) like x, and exactly x where nothing is stored or a token does not read.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, dtype or shape.
        """
        return self.attention(x, self.normalise(x), view, mask)

    def forward(
        self,
        x: Tensor,
        state: DualMemoryState,
        *,
        values: Tensor | None = None,
        previous: Tensor | None = None,
        write_mask: Tensor | None = None,
        read_mask: Tensor | None = None,
        update: bool = True,
    ) -> tuple[Tensor, DualMemoryState]:
        """Read what earlier calls stored, then store this call's tokens.

        Args:
            x: (B, T, hidden_dim) hidden states, any float dtype.
            state: B memories, from `empty` or an earlier call.
            values: (B, T, hidden_dim) content of each token; None: LN(x).
            previous: (B, hidden_dim) hidden state before the first token; None: there is none, so it is not written.
            write_mask: (B, T) bool, true where a token may be written; None: everywhere.
            read_mask: (B, T) bool, true where a token reads; None: everywhere.
            update: whether to decay, write and count reads.

        Returns:
            (B, T, hidden_dim) like x, and the new state.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, dtype or shape.
        """
        self._check(x, state, values, previous, write_mask, read_mask)
        if update:
            state = self.decay(state)
        n = self.normalise(x)
        view = self.view(state)
        y = self.attention(x, n, view, read_mask)
        if not update:
            return y, state
        mass = self.attention.attention_mass(n, view, read_mask)[:, self.config.buffer_slots :]
        state = state._replace(store=self.store.count_reads(state.store, mass))
        first = n[:, :1] if previous is None else self.normalise(previous)[:, None]
        if previous is None:
            write_mask = (
                torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if write_mask is None else write_mask
            )
            write_mask = write_mask & (torch.arange(x.shape[1], device=x.device) > 0)
        state, _ = self.write(state, torch.cat([first, n[:, :-1]], 1), n if values is None else values, write_mask)
        return y, state

    def _check(
        self,
        x: Tensor,
        state: DualMemoryState,
        values: Tensor | None,
        previous: Tensor | None,
        write_mask: Tensor | None,
        read_mask: Tensor | None,
    ) -> None:
        D = self.config.hidden_dim
        check_tensor("x", x, ("B", "T", D))
        B, T = x.shape[:2]
        for name, given, shape in (("values", values, (B, T, D)), ("previous", previous, (B, D))):
            if given is not None:
                check_tensor(name, given, shape)
        for name, mask in (("write_mask", write_mask), ("read_mask", read_mask)):
            if mask is not None:
                check_tensor(name, mask, (B, T), mask=True)
        for name, given in (("x", x), ("values", values), ("previous", previous)):
            if given is not None:
                self._check_dtype(name, given)
        if not isinstance(state, DualMemoryState):
            raise TypeError(f"state: expected a DualMemoryState, got {type(state).__name__}")
        self._check_bank("state.buffer", state.buffer, B, self.config.buffer_slots)
        self._check_bank("state.store", state.store, B, self.config.store_slots)
        for part, given in zip(SurpriseStats._fields, state.stats, strict=True):
            check_tensor(f"state.stats.{part}", given, (B,))

    def _check_bank(self, name: str, bank: Bank, B: int, S: int) -> None:
        widths = {"keys": (self.config.memory_dim,), "values": (self.config.hidden_dim,)}
        for part, given in zip(Bank._fields, bank, strict=True):
            check_tensor(f"{name}.{part}", given, (B, S, *widths.get(part, ())))

    def _check_dtype(self, name: str, x: Tensor) -> None:
        """Memory is computed in float32, with float64 weights in float64."""
        kept = self.key_proj.weight.dtype
        if _at_least_float32(x[:0]).dtype == kept or torch.is_autocast_enabled(x.device.type):
            return
        if kept not in (torch.float32, torch.float64):
            raise TypeError(f"key_proj.weight: expected torch.float32, which memory is computed in, got {kept}")
        narrow = " or a narrower float dtype" if kept == torch.float32 else ""
        raise TypeError(f"{name}: expected {kept}{narrow}, as the layer's weights are, got {x.dtype}")
