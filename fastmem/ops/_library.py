"""Schemas of all raw ops, in one place. Raw ops know nothing of autograd; the files beside this one wrap them."""

import torch

lib = torch.library.Library("fastmem", "DEF")

# causal_conv1d: shapes as in _causal_conv1d_autograd.py. Results: y and the final state; the backward gives the
# gradients of x, weight, bias and initial_state, of no elements for what is None.
lib.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens, "
    "bool silu) -> (Tensor, Tensor)"
)
lib.define(
    "causal_conv1d_backward(Tensor grad_y, Tensor grad_final, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens, bool silu) -> (Tensor, Tensor, Tensor, Tensor)"
)
lib.define("causal_conv1d_step(Tensor state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> (Tensor, Tensor)")
lib.define("causal_conv1d_step_(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor")

# gated_write: sizes and `rule` as in gated_write.py and _gated_write_reference.py. Results: the new bank (5), the new
# statistics (3, zeros without a gate), slot, blend, surprise, threshold, and where the gradient of each written
# strength goes (int8: 0 nowhere, 1 the old strength, 2 the token's surprise).
lib.define(
    "gated_write(Tensor bank_keys, Tensor bank_values, Tensor strength, Tensor access, Tensor age, Tensor keys, "
    "Tensor values, Tensor? surprise, Tensor? mean, Tensor? var, Tensor? count, Tensor? mask, float[] rule) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
lib.define(
    "gated_write_replay(Tensor bank_keys, Tensor bank_values, Tensor strength, Tensor keys, Tensor values, "
    "Tensor surprise, Tensor slot, Tensor blend, Tensor route) -> (Tensor, Tensor, Tensor)"
)
lib.define(
    "gated_write_backward(Tensor grad_keys, Tensor grad_values, Tensor grad_strength, Tensor slot, Tensor blend, "
    "Tensor route) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

# topk_attention: scale (B or 1, H or 1), bias and mask (B or 1, H or 1, S), all of k, v likewise; `factor` multiplies
# scale. Results: out, indices, weights. The backward gives the gradients of q, k, v, scale and bias, each an empty
# tensor unless `wanted`.
lib.define(
    "topk_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? scale, Tensor? bias, Tensor? mask, int top_k, "
    "float factor, bool cosine) -> (Tensor, Tensor, Tensor)"
)
lib.define(
    "topk_attention_backward(Tensor grad_out, Tensor grad_weights, Tensor q, Tensor k, Tensor v, Tensor? scale, "
    "Tensor? bias, Tensor indices, Tensor weights, float factor, bool cosine, bool[] wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)

# The same with every usable slot instead of top_k. Results: out, and the log of each query's sum of exponentials.
lib.define(
    "dense_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? scale, Tensor? bias, Tensor? mask, float factor, "
    "bool cosine) -> (Tensor, Tensor)"
)
lib.define(
    "dense_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? scale, Tensor? bias, "
    "Tensor? mask, Tensor out, Tensor lse, float factor, bool cosine, bool[] wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)"
)

# selective_scan: u, delta, z (R, L, D); A (P, D, N), D and delta_bias (P, D); B, C (R, L, G, N); states (S, D, N), S
# being R times the number of packed sequences of a row. There are P sets of parameters: sequence i uses set
# i // (S / P). Results: y, the final state, and the states at the chunk boundaries that a backward starts from
# (R, L // chunk, N, D), the last two empty unless saved. The backward gives the gradients of u, delta, A, B, C, D, z,
# delta_bias and initial_state, empty for what was absent or is not `wanted`. The tangent takes a direction for each of
# these nine (None is zero) and gives the derivative along it of y, of the final state (empty without grad_final) and of
# the nine gradients.
_SCAN_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens, bool delta_softplus"
)
_SCAN_GRADIENTS = ", ".join(["Tensor"] * 9)
lib.define(f"selective_scan_forward({_SCAN_INPUTS}, bool save_final, bool save_carries) -> (Tensor, Tensor, Tensor)")
lib.define(
    f"selective_scan_backward(Tensor grad_y, Tensor? grad_final, Tensor carries, bool[] wanted, {_SCAN_INPUTS}) "
    f"-> ({_SCAN_GRADIENTS})"
)
lib.define(
    "selective_scan_tangent(Tensor? to_u, Tensor? to_delta, Tensor? to_A, Tensor? to_B, Tensor? to_C, Tensor? to_D, "
    "Tensor? to_z, Tensor? to_delta_bias, Tensor? to_initial_state, Tensor grad_y, Tensor? grad_final, bool[] wanted, "
    f"{_SCAN_INPUTS}) -> (Tensor, Tensor, {_SCAN_GRADIENTS})"
)
# One step: state (B, D, N), changed in place; u, delta, z (B, D); B, C (B, G, N). Result: y.
lib.define(
    "selective_scan_step_(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? z, Tensor? delta_bias, bool delta_softplus) -> Tensor"
)
