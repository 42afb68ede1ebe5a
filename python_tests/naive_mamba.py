"""The Mamba block written out step by step in plain PyTorch, for tests; nothing of fastmem in it."""

import torch
from torch.nn import functional as F


def naive_mamba(block, x, state=None, starts=()):
    """Output (B, L, d_model) and last state (conv, ssm) of a block's weights on x (B, L, d_model).

    state: what to start from; starts: steps before which everything is forgotten.
    """
    B, L, _ = x.shape
    inner, N = block.A_log.shape
    W = block.conv1d.weight.shape[-1]
    R = block.dt_proj.weight.shape[1]
    A = -block.A_log.exp()
    window = x.new_zeros(B, inner, W) if state is None else F.pad(state[0].transpose(1, 2), (1, 0))
    h = x.new_zeros(B, inner, N) if state is None else state[1]
    ys = []
    for t in range(L):
        if t in starts:
            window, h = torch.zeros_like(window), torch.zeros_like(h)
        u, z = block.in_proj(x[:, t]).chunk(2, -1)
        window = torch.cat([window[..., 1:], u[..., None]], -1)
        u = (window * block.conv1d.weight[:, 0]).sum(-1)
        if block.conv1d.bias is not None:
            u = u + block.conv1d.bias
        u = F.silu(u)
        dt, b, c = block.x_proj(u).split([R, N, N], -1)
        dt = F.softplus(block.dt_proj(dt))
        h = torch.exp(dt[..., None] * A) * h + (dt * u)[..., None] * b[:, None]
        y = (h * c[:, None]).sum(-1) + block.D * u
        ys.append(block.out_proj(y * F.silu(z)))
    return torch.stack(ys, 1), (window[..., 1:].transpose(1, 2), h)
