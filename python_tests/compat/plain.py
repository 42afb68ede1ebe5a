"""What mamba-ssm and causal-conv1d compute, written out in float64 from their documentation; (B, D, L) layout."""

import inspect

import torch
from torch.nn import functional as F


def wide(x):
    if x is None:
        return None
    return x.to(torch.complex128) if x.is_complex() else x.double()


def per_channel(x, A, length):
    """(B or 1, D, N, L) from any form of B and C."""
    if x.ndim == 2:
        return wide(x)[None, :, :, None]
    if A.is_complex() and not x.is_complex():
        x = torch.complex(wide(x[..., 0::2]), wide(x[..., 1::2]))
    x = wide(x)
    x = x[:, None] if x.ndim == 3 else x
    return x.repeat_interleave(A.shape[0] // x.shape[1], 1)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, starts=()):
    """(y, last state)"""
    L = u.shape[2]
    B, C = (per_channel(x, A, L).expand(-1, -1, -1, L) for x in (B, C))
    u, delta, A, D, z, delta_bias = map(wide, (u, delta, A, D, z, delta_bias))
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    h = torch.zeros(len(u), *A.shape, dtype=A.dtype)
    ys = []
    for t in range(L):
        h = torch.zeros_like(h) if t in starts else h
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt * u)[:, :, t, None] * B[..., t]
        y = (h * C[..., t]).sum(-1)
        ys.append(2 * y.real if y.is_complex() else y)
    y = torch.stack(ys, 2)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """(y, new state), with or without heads."""
    state, x, dt, A, B, C, D, z, dt_bias = map(wide, (state, x, dt, A, B, C, D, z, dt_bias))
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    if state.ndim == 3:
        B, C = B[:, None], C[:, None]
    else:
        B, C = (v.repeat_interleave(state.shape[1] // v.shape[1], 1)[:, :, None] for v in (B, C))
    new = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B
    y = (new * C).sum(-1)
    y = y if D is None else y + D * x
    return (y if z is None else y * F.silu(z)), new


def conv(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """(y, last W - 1 inputs)"""
    x, weight, bias, initial_states = map(wide, (x, weight, bias, initial_states))
    W, L = weight.shape[1], x.shape[2]
    before = x.new_zeros(*x.shape[:2], W - 1) if initial_states is None else initial_states
    full = torch.cat([before, x], 2)
    y = torch.zeros_like(x)
    for t in range(L):
        for w in range(W):
            s = t + w - (W - 1)  # the step that tap w sees
            seen = full[:, :, t + w] * weight[:, w]
            if seq_idx is not None:
                owner = seq_idx[:, max(s, 0)] if s >= 0 or initial_states is not None else torch.full((len(x),), -2)
                seen = seen * (owner == seq_idx[:, t])[:, None]
            y[:, :, t] += seen
    y = y if bias is None else y + bias[:, None]
    y = F.silu(y) if activation else y
    if seq_idx is not None:
        y = y * (seq_idx >= 0)[:, None]
    return y, full[:, :, full.shape[2] - (W - 1) :]


def error(ours, truth):
    return ((wide(ours) - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def names_of_arguments(function):
    return " ".join(inspect.signature(function).parameters)
