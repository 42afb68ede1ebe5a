"""Reading: hidden states attend to memory slots, and take in what they find through a gate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmem.nn._checks import check_layer_takes, check_tensor
from fastmem.nn.memory_config import MemoryConfig
from fastmem.ops.gated_write import Bank
from fastmem.ops.topk_attention import topk_attention

_GAIN = 10.0  # scalars move slowly under Adam; this makes one unit of out_gain ten times the stream's own size


class MemoryView(NamedTuple):
    """What a read sees, made once per change of the memory. S is all slots and one null slot; H heads."""

    keys: Tensor
    """(B, H, S, memory_dim / H)"""
    values: Tensor
    """(B, H, S, hidden_dim / H)"""
    bias: Tensor
    """(B, H, S) weighted log strength; -inf: empty."""
    live: Tensor
    """(B,) bool, whether anything is stored."""
    scale: Tensor
    """(H,) what cosines are multiplied by."""
    gain: Tensor
    """() what the read is multiplied by, beside the gate."""

    def repeat(self, times: int) -> MemoryView:
        """Each memory `times` times in a row."""
        keys, values, bias, live = (
            x.repeat_interleave(times, 0) for x in (self.keys, self.values, self.bias, self.live)
        )
        return MemoryView(keys, values, bias, live, self.scale, self.gain)


class MemoryCrossAttention(nn.Module):
    """Multi-head cosine attention over [buffer; store], gated, added to the stream.

    y = x + sigmoid(W2 gelu(W1 [n; m])) * gain * W_o m, with n = LN(x), m the read, gain 0 at the start. The score of a
    slot is scale_h * cos(q, K) + w_h * log(strength), so what has decayed weighs less. Keys were projected when they
    were written, so reading projects the queries alone. A null slot of learned score takes what matches nothing.
    A memory that holds nothing returns exactly x.

    Args:
        config: sizes and temperature.
    """

    residual_rms: Tensor

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        D, H = config.hidden_dim, config.num_heads
        self.config = config
        self.q_proj = nn.Linear(D, config.memory_dim)
        self.log_scale = nn.Parameter(torch.full((H,), math.log(12.0)))
        self.null_score = nn.Parameter(torch.full((H,), 4.0))
        self.strength_weight = nn.Parameter(torch.tensor([[1.0], [0.5]]).repeat(1, H))  # buffer, store; see softplus
        self.out_proj = nn.Linear(D, D, bias=False)
        self.out_gain = nn.Parameter(torch.zeros(()))
        openness = nn.Linear(config.gate_dim, 1)
        self.gate = nn.Sequential(nn.Linear(2 * D, config.gate_dim), nn.GELU(), openness)
        nn.init.eye_(self.out_proj.weight)
        nn.init.constant_(openness.bias, 2.0)
        self.register_buffer("residual_rms", torch.ones(()))

    def view(self, buffer: Bank, store: Bank) -> MemoryView:
        """Lay the two banks side by side for reading.

        Args:
            buffer: B memories, of any number of slots: keys memory_dim wide, values hidden_dim.
            store: likewise, of the same B memories.

        Returns:
            The view, in which gradients flow to keys, values and strengths. Slots of strength 0 are not seen.
        """
        H = self.config.num_heads
        B, _, E = buffer.keys.shape
        weight = F.softplus(self.strength_weight)
        tiers = []
        for bank, w in zip((buffer, store), weight, strict=True):
            live = bank.strength > 0
            log = torch.where(live, bank.strength, torch.ones_like(bank.strength)).log()
            tiers.append(torch.where(live[:, None], w[:, None] * log[:, None], -torch.inf))
        bias = torch.cat([*tiers, (self.null_score * self._sharpness())[None, :, None].expand(B, -1, -1)], -1)
        null_key, null_value = buffer.keys.new_zeros(B, 1, E), buffer.values.new_zeros(B, 1, buffer.values.shape[2])
        keys = torch.cat([buffer.keys, store.keys, null_key], 1)
        values = torch.cat([buffer.values, store.values, null_value], 1)
        live = (buffer.strength > 0).any(1) | (store.strength > 0).any(1)
        return MemoryView(
            keys.unflatten(2, (H, -1)).transpose(1, 2),
            values.unflatten(2, (H, -1)).transpose(1, 2),
            bias,
            live,
            self.log_scale.exp() * self._sharpness(),
            _GAIN * self.residual_rms * self.out_gain,
        )

    def _sharpness(self) -> float:
        return 1.0 / self.config.temperature

    def forward(self, x: Tensor, n: Tensor, view: MemoryView, mask: Tensor | None = None) -> Tensor:
        """Read.

        Args:
            x: (B, T, hidden_dim) the stream, any float dtype.
            n: (B, T, hidden_dim) LN(x) in fp32.
            view: the memory; B of them, or one that all read.
            mask: (B, T) bool, true where a token reads; None: everywhere.

        Returns:
            (B, T, hidden_dim) in x's dtype; exactly x where nothing is stored or a token does not read.

        Raises:
            TypeError, ValueError: an argument is of the wrong type, dtype or shape.
        """
        self._check(x, n, view, mask)
        q = self.q_proj(n).to(view.keys.dtype)  # autocast has a dtype of its own
        q = q.unflatten(2, (self.config.num_heads, -1)).transpose(1, 2)
        read = topk_attention(q, view.keys, view.values, top_k=self.config.top_k, scale=view.scale, bias=view.bias)
        m = read.transpose(1, 2).flatten(2)
        gate = torch.sigmoid(self.gate(torch.cat([n, m], -1)))
        y = x + (gate * view.gain * self.out_proj(m)).to(x.dtype)
        reads = view.live[:, None] if mask is None else view.live[:, None] & mask
        return torch.where(reads[..., None], y, x)

    def _check(self, x: Tensor, n: Tensor, view: MemoryView, mask: Tensor | None) -> None:
        D, H = self.config.hidden_dim, self.config.num_heads
        check_tensor("x", x, ("B", "T", D))
        check_tensor("n", n, (*x.shape[:2], D))
        check_layer_takes("n", n, self.q_proj)
        if not isinstance(view, MemoryView):
            raise TypeError(f"view: expected a MemoryView, got {type(view).__name__}")
        check_tensor("view.keys", view.keys, ("B", H, "S", self.config.memory_dim // H))
        check_tensor("view.values", view.values, ("B", H, "S", D // H))
        if len(view.keys) not in (1, len(x)):
            raise ValueError(f"view: expected {len(x)} memories, one for each row of x, or 1, got {len(view.keys)}")
        if mask is not None:
            check_tensor("mask", mask, tuple(x.shape[:2]), mask=True)

    @torch.no_grad()
    def attention_mass(self, n: Tensor, view: MemoryView, mask: Tensor | None = None) -> Tensor:
        """How much each slot is read.

        Args:
            n: (B, T, hidden_dim) LN(x) in fp32.
            view: the memory.
            mask: (B, T) bool, true where a token reads; None: everywhere.

        Returns:
            (B, S - 1), the buffer's slots before the store's: attention summed over the tokens that read, mean over
            heads. What goes to the null slot is left out, so a row sums to at most the number of tokens that read.
        """
        q = F.normalize(self.q_proj(n).unflatten(2, (self.config.num_heads, -1)).transpose(1, 2), dim=-1)
        scores = q @ F.normalize(view.keys, dim=-1).transpose(-1, -2)
        scores = scores * view.scale[:, None, None] + view.bias[:, :, None]
        weights = scores.softmax(-1)[..., :-1].mean(1).nan_to_num(0)  # a token that is no number reads nothing
        if mask is not None:
            weights = weights * mask[..., None]
        return weights.sum(1)
