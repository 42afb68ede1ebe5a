"""causal_conv1d_fn and causal_conv1d_update with causal-conv1d's signatures and (B, D, L) layout.

Any width goes, and second derivatives are exact. The `_ref` functions are the same calls made of plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmem.ops._direct import untracked
from fastmem.ops.causal_conv1d import causal_conv1d, causal_conv1d_step


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A causal convolution of each channel with taps of its own.

    Args:
        x: (B, D, L).
        weight: (D, W).
        bias: (D,) or None.
        seq_idx: (B, L) int: which sequence a step belongs to; steps of one sequence lie next to each other and see only
            each other. Below 0: padding, whose output is 0.
        initial_states: (B, D, W - 1) the inputs before the first, or None: zeros.
        return_final_states: also return the last W - 1 inputs.
        final_states_out: (B, D, W - 1) where these are written, or None.
        activation: None, "silu" or "swish".

    Returns:
        (B, D, L) in the dtype of x; with return_final_states also (B, D, W - 1).

    Raises:
        NotImplementedError: another activation.
        TypeError, ValueError: an argument is of the wrong type or shape.
    """
    return _conv(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation, "auto")


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` by the definition, in plain PyTorch."""
    arguments = (seq_idx, initial_states, return_final_states, final_states_out, activation)
    return _conv(x, weight, bias, *arguments, "reference")


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    return_final_states: bool,
    final_states_out: Tensor | None,
    activation: str | None,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    if x.ndim != 3:
        raise ValueError(f"x: expected (B, D, L), got {tuple(x.shape)}")
    if seq_idx is not None and seq_idx.shape != (x.shape[0], x.shape[2]):
        raise ValueError(f"seq_idx: expected ({x.shape[0]}, {x.shape[2]}), got {tuple(seq_idx.shape)}")
    y, final = causal_conv1d(
        x.transpose(1, 2),
        weight,
        bias,
        activation=_activation(activation),
        initial_state=None if initial_states is None else initial_states.transpose(1, 2),
        return_final_state=True,
        reset=None if seq_idx is None else starts(seq_idx),
        backend=backend,
    )
    y, final = y.transpose(1, 2), final.transpose(1, 2)
    if seq_idx is not None:
        y = y.masked_fill((seq_idx < 0)[:, None], 0)
    if not return_final_states:
        return y
    return y, final if final_states_out is None else final_states_out.copy_(final)


def starts(seq_idx: Tensor) -> Tensor:
    """(B, L) bool, true where another sequence starts."""
    return torch.cat([torch.zeros_like(seq_idx[:, :1], dtype=torch.bool), seq_idx[:, 1:] != seq_idx[:, :-1]], 1)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """The convolution's next steps; their inputs are written into `conv_state`.

    Args:
        x: (B, D), or (B, D, S) for S steps.
        conv_state: (B, D, K), K at least W - 1, the last K inputs; changed.
        weight: (D, W).
        bias: (D,) or None.
        activation: None, "silu" or "swish".
        cache_seqlens: (B,) int: `conv_state` is a ring then, and the next input goes to place cache_seqlens % K.
        conv_state_indices: (B,) int: row b of x goes with conv_state[index b]; `conv_state` may have any number of rows
            then. A negative index marks a row of padding: its output is 0.

    Returns:
        (B, D) or (B, D, S), in the dtype of x.

    Raises:
        NotImplementedError: another activation.
        TypeError, ValueError: an argument is of the wrong type or shape.
    """
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices, "auto")


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` by the definition, in plain PyTorch."""
    return _update(x, conv_state, weight, bias, activation, cache_seqlens, None, "reference")


def _update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    indices: Tensor | None,
    backend: str,
) -> Tensor:
    steps = x[..., None] if x.ndim == 2 else x
    W = weight.shape[-1]
    if steps.ndim != 3:
        raise ValueError(f"x: expected (B, D) or (B, D, S), got {tuple(x.shape)}")
    B, D, S = steps.shape
    if conv_state.ndim != 3 or conv_state.shape[1] != D or conv_state.shape[2] < W - 1:
        raise ValueError(
            f"conv_state: expected (B, {D}, K) with K at least {W - 1} to match x {tuple(x.shape)} and "
            f"weight {tuple(weight.shape)}, got {tuple(conv_state.shape)}"
        )
    if indices is None and len(conv_state) != B:
        raise ValueError(f"conv_state: expected {B} rows like x, got {tuple(conv_state.shape)}")
    for name, v in (("cache_seqlens", cache_seqlens), ("conv_state_indices", indices)):
        if v is not None and v.shape != (B,):
            raise ValueError(f"{name}: expected ({B},) to match x {tuple(x.shape)}, got {tuple(v.shape)}")

    K = conv_state.shape[2]
    if indices is not None:
        held = conv_state[indices.long().clamp(min=0)]
    else:  # what a backward pass needs of `conv_state` must be a copy: it is written to
        held = conv_state if untracked(x, conv_state, weight, bias) else conv_state.clone()
    if cache_seqlens is None:
        before = held[..., K - (W - 1) :]
        new = torch.cat([held, steps.to(held.dtype)], -1)[..., -K:] if K else held
    else:
        before = held.gather(2, _ring(cache_seqlens, torch.arange(1 - W, 0, device=x.device), held))
        last = torch.arange(S, device=x.device)[-K:]  # more would go around the ring
        new = held.scatter(2, _ring(cache_seqlens, last, held), steps[..., -K:].to(held.dtype))

    fused = _activation(activation)
    before = before.to(x.dtype).transpose(1, 2)
    if S == 1:
        y = causal_conv1d_step(before, steps[..., 0], weight, bias, activation=fused, backend=backend)[0][..., None]
    else:
        inputs = steps.transpose(1, 2)
        y = causal_conv1d(inputs, weight, bias, activation=fused, initial_state=before, backend=backend)
        y = y.transpose(1, 2)
    if indices is None:
        conv_state.copy_(new)
    else:
        live = indices >= 0
        conv_state[indices[live].long()] = new[live]
        y = y.masked_fill(~live[:, None, None], 0)
    return y.view(x.shape) if x.ndim == 2 else y


def _ring(cache_seqlens: Tensor, offsets: Tensor, held: Tensor) -> Tensor:
    """Places in a ring (B, D, len(offsets)), for gather and scatter."""
    places = (cache_seqlens.long()[:, None] + offsets).remainder(held.shape[2])
    return places[:, None].expand(-1, held.shape[1], -1)


def _activation(activation: str | None) -> str | None:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    return None if activation is None else "silu"


__all__ = ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"]
