"""mamba-ssm's Mamba block: `fastmem.nn.Mamba` with mamba-ssm's way of decoding."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmem import nn as fastmem_nn
from fastmem.compat.causal_conv1d import causal_conv1d_update
from fastmem.compat.mamba_ssm.ops.triton.selective_state_update import selective_state_update


class Mamba(fastmem_nn.Mamba):
    """`fastmem.nn.Mamba` whose states lie in caches that are changed in place.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias,
            device, dtype: as in `fastmem.nn.Mamba`.
        use_fast_path: taken and not used.
        layer_idx: the key of this layer's states in `inference_params.key_value_memory_dict`.
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
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (d_model, d_state, d_conv, expand, dt_rank)
        dt = (dt_min, dt_max, dt_init, dt_scale, dt_init_floor)
        super().__init__(*sizes, *dt, conv_bias, bias, device=device, dtype=dtype)
        self.use_fast_path = use_fast_path
        self.layer_idx = layer_idx
        self.activation = "silu"
        self.act = nn.SiLU()

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:  # type: ignore[override]
        """A whole sequence, or one step where `inference_params.seqlen_offset` is above 0.

        Args:
            hidden_states: (B, L, d_model); L = 1 for a step.
            inference_params: an `InferenceParams`; this layer's states are taken from it and changed in place.

        Returns:
            (B, L, d_model).

        Raises:
            ValueError: the input's shape is wrong, or the block has no layer_idx.
        """
        self._check(hidden_states, 3, "hidden_states")
        if inference_params is None:
            return super().forward(hidden_states)
        conv_state, ssm_state = self._get_states_from_cache(inference_params, len(hidden_states))
        if inference_params.seqlen_offset > 0:
            return self.step(hidden_states, conv_state, ssm_state)[0]
        xz = self.in_proj(hidden_states)
        out, state = self._mix(xz, None, None, None)
        inputs = xz[..., : self.d_inner].transpose(1, 2)
        conv_state.copy_(F.pad(inputs, (self.d_conv - inputs.shape[-1], 0)))  # cuts where there are more
        ssm_state.copy_(state.ssm)
        return out

    def step(  # type: ignore[override]
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step; the states are changed in place.

        Args:
            hidden_states: (B, 1, d_model).
            conv_state: (B, d_inner, d_conv) the last inputs of the convolution.
            ssm_state: (B, d_inner, d_state).

        Returns:
            (B, 1, d_model) and the two states.

        Raises:
            TypeError, ValueError: an argument is of the wrong type or shape.
        """
        self._check(hidden_states, 3, "hidden_states")
        if hidden_states.shape[1] != 1:
            raise ValueError(f"hidden_states: expected (B, 1, {self.d_model}), got {tuple(hidden_states.shape)}")
        u, z = self.in_proj(hidden_states[:, 0]).chunk(2, -1)
        u = causal_conv1d_update(u, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, "silu")
        delta, A, B, C = self._parameters_at(u)
        y = selective_state_update(ssm_state, u, delta, A, B, C, self.D, z, self.dt_proj.bias, dt_softplus=True)
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Empty states (conv (B, d_inner, d_conv), ssm (B, d_inner, d_state)) for `batch_size` sequences, in `dtype`
        or, where that is None, that of the weights; max_seqlen does not matter to them."""
        conv, ssm = self.conv1d.weight, self.dt_proj.weight
        return (
            conv.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype),
            ssm.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype),
        )

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("layer_idx: a block needs one to find its states in inference_params")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in cache[self.layer_idx]:
                state.zero_()
        return cache[self.layer_idx]


__all__ = ["Mamba"]
