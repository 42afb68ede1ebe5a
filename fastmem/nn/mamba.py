"""The Mamba block: a gated selective scan behind a short causal convolution."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmem.nn._checks import check_count, check_layer_takes, check_number, check_tensor
from fastmem.ops.causal_conv1d import DTYPES, causal_conv1d, causal_conv1d_step
from fastmem.ops.selective_scan import selective_scan, selective_scan_step


class MambaState(NamedTuple):
    """What a block carries from one call to the next, B sequences of it."""

    conv: Tensor  # (B, d_conv - 1, d_inner) the last inputs of the convolution
    ssm: Tensor  # (B, d_inner, d_state), float32 (float64 in a float64 block)


def check_sizes(d_model: object, d_state: object, d_conv: object, expand: object, dt_rank: object) -> None:
    """Refuse sizes that no block can have.

    Raises:
        TypeError: one is no number.
        ValueError: one is too small.
    """
    for name, x in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv)):
        check_count(name, x)
    if dt_rank != "auto":
        if isinstance(dt_rank, str):
            raise ValueError(f"dt_rank: expected 'auto' or an int, got {dt_rank!r}")
        check_count("dt_rank", dt_rank)
    check_number("expand", expand)
    if int(expand * d_model) < 1:  # type: ignore[operator]
        raise ValueError(f"expand: expected at least one inner channel, int(expand * {d_model}), got {expand}")


class Mamba(nn.Module):
    """The block of Gu and Dao's Mamba, with the parameter names and the initialisation of mamba-ssm.

    Weights of mamba-ssm and of Hugging Face's `mixer` load by name. The pass over a whole sequence and the steps
    through it agree, gradients flow through the state that is carried, and second derivatives are exact.

    Args:
        d_model: width of input and output.
        d_state: states per channel.
        d_conv: taps of the convolution.
        expand: inner channels per channel of the input; d_inner = int(expand * d_model).
        dt_rank: rank of the step size's projection; "auto": d_model / 16, rounded up.
        dt_min, dt_max: the step size at the start lies between these, log-uniformly.
        dt_init: how dt_proj.weight starts, "random" or "constant".
        dt_scale: scale of dt_proj.weight at the start.
        dt_init_floor: least step size at the start.
        conv_bias: whether the convolution has a bias.
        bias: whether in_proj and out_proj have one.
        device, dtype: of the parameters; A_log and D are float32 at the start.

    Raises:
        TypeError, ValueError: a size, a number or the dtype is none that a block can have.

    Source: Gu and Dao, Mamba (arXiv:2312.00752), figure 3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model, d_state, d_conv, expand, dt_rank)
        check_number("dt_min", dt_min, above=0)
        check_number("dt_max", dt_max, above=0)
        if dt_min > dt_max:
            raise ValueError(f"dt_max: expected at least dt_min, {dt_min}, got {dt_max}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init: expected 'random' or 'constant', got {dt_init!r}")
        check_number("dt_scale", dt_scale)
        check_number("dt_init_floor", dt_init_floor)
        if dtype not in (None, *DTYPES):
            raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = inner = int(expand * d_model)
        self.dt_rank: int = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank

        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, device=device, dtype=dtype)
        # A module for its names and its initialisation; `causal_conv1d` reads its parameters.
        self.conv1d = nn.Conv1d(
            inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias, device=device, dtype=dtype
        )
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False, device=device, dtype=dtype)
        self.dt_proj = nn.Linear(self.dt_rank, inner, device=device, dtype=dtype)
        kept = torch.float64 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.float32
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, device=device, dtype=kept).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner, device=device, dtype=kept))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, device=device, dtype=dtype)
        self._initialise_dt(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        """Marks that training scripts written for mamba-ssm look for."""
        self.A_log._no_weight_decay = self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_parameters()  # copies and pickles of parameters lose what is written on them

    @torch.no_grad()
    def _initialise_dt(self, dt_min: float, dt_max: float, scheme: str, scale: float, floor: float) -> None:
        """softplus(dt_proj.bias) is log-uniform in [dt_min, dt_max]; the weight keeps the variance of its input."""
        spread = self.dt_rank**-0.5 * scale
        if scheme == "constant":
            nn.init.constant_(self.dt_proj.weight, spread)
        else:
            nn.init.uniform_(self.dt_proj.weight, -spread, spread)
        bias = self.dt_proj.bias
        low, high = math.log(dt_min), math.log(dt_max)
        dt = (torch.rand(bias.shape, device=bias.device) * (high - low) + low).exp().clamp(min=floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus undone

    def empty_state(self, batch: int) -> MambaState:
        """The state before the first step of `batch` sequences: zeros."""
        weight = self.in_proj.weight
        conv = weight.new_zeros(batch, self.d_conv - 1, self.d_inner)
        ssm = weight.new_zeros(batch, self.d_inner, self.d_state, dtype=self._A().dtype)
        return MambaState(conv, ssm)

    @overload
    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        return_state: Literal[True],
    ) -> tuple[Tensor, MambaState]: ...

    def forward(
        self,
        x: Tensor,
        state: MambaState | None = None,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MambaState]:
        """Pass over whole sequences.

        Args:
            x: (B, L, d_model).
            state: what an earlier call returned, to go on from; None: the start.
            reset: (B, L) bool, true where a new sequence starts and nothing from before may be seen.
            cu_seqlens: (n + 1,) int, B = 1: bounds of n sequences packed one after the other. States are (n, ...) then.
            return_state: also return the state after the last step.

        Returns:
            (B, L, d_model), and the state when asked.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or shape.
        """
        self._check(x, 3)
        y, new = self._mix(self.in_proj(x), state, reset, cu_seqlens)
        return (y, new) if return_state else y

    def _mix(
        self, xz: Tensor, state: MambaState | None, reset: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MambaState]:
        """From what in_proj gave (B, L, 2 d_inner) to the output and the new state."""
        u, z = xz.chunk(2, -1)
        if state is not None:
            packed = isinstance(cu_seqlens, Tensor) and cu_seqlens.ndim == 1  # the ops say what is wrong with another
            state = self._checked(state, len(cu_seqlens) - 1 if packed else len(u), u)  # type: ignore[arg-type]
        u, conv = causal_conv1d(
            u,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            activation="silu",
            initial_state=None if state is None else state.conv.to(u.dtype),  # autocast has a dtype of its own
            return_final_state=True,
            reset=reset,
            cu_seqlens=cu_seqlens,
        )
        delta, A, B, C = self._parameters_at(u)
        y, ssm = selective_scan(
            u,
            delta,
            A,
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            initial_state=None if state is None else state.ssm,
            return_final_state=True,
            reset=reset,
            cu_seqlens=cu_seqlens,
        )
        return self.out_proj(y), MambaState(conv, ssm)

    def step(self, x: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One step.

        Args:
            x: (B, d_model).
            state: what `forward`, `step` or `empty_state` returned; left as it is.

        Returns:
            (B, d_model) and the new state.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or shape.
        """
        self._check(x, 2)
        u, z = self.in_proj(x).chunk(2, -1)
        state = self._checked(state, len(u), u)
        u, conv = causal_conv1d_step(
            state.conv.to(u.dtype), u, self.conv1d.weight[:, 0], self.conv1d.bias, activation="silu"
        )
        y, ssm = selective_scan_step(
            state.ssm, u, *self._parameters_at(u), self.D, z, self.dt_proj.bias, delta_softplus=True
        )
        return self.out_proj(y), MambaState(conv, ssm)

    def _parameters_at(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """delta (its bias is added in the scan), A, B and C."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        return F.linear(dt, self.dt_proj.weight), self._A(), B, C

    def _A(self) -> Tensor:
        return -(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float()).exp()

    def _check(self, x: Tensor, ndim: int, name: str = "x") -> None:
        check_tensor(name, x, ("B", "L", self.d_model) if ndim == 3 else ("B", self.d_model))
        check_layer_takes(name, x, self.in_proj)

    def _checked(self, state: object, count: int, u: Tensor) -> MambaState:
        """A MambaState of `count` sequences that goes with u, also from a plain pair."""
        if not (isinstance(state, tuple) and len(state) == 2 and all(isinstance(x, Tensor) for x in state)):
            raise TypeError(f"state: expected a MambaState, got {type(state).__name__}")
        conv, ssm = state
        check_tensor("state.conv", conv, (count, self.d_conv - 1, self.d_inner))
        check_tensor("state.ssm", ssm, (count, self.d_inner, self.d_state))
        if (ssm.dtype == torch.float64) != (u.dtype == torch.float64):
            kept = torch.float64 if u.dtype == torch.float64 else torch.float32
            raise TypeError(f"state.ssm: expected {kept}, as the block computes in {u.dtype}, got {ssm.dtype}")
        return MambaState(conv, ssm)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, d_inner={self.d_inner}"
