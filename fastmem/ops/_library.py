"""Schemas of all raw ops, in one place. Raw ops know nothing of autograd; the files beside this one wrap them."""

import torch

lib = torch.library.Library("fastmem", "DEF")

# causal_conv1d: shapes as in _causal_conv1d_autograd.py. Results: y and the final state; the backward gives the gradients
# of x, weight, bias and initial_state, of no elements for what is None.
lib.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens, "
    "bool silu) -> (Tensor, Tensor)"
)
lib.define(
    "causal_conv1d_backward(Tensor grad_y, Tensor grad_final, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? initial_state, Tensor? reset, Tensor? cu_seqlens, bool silu) -> (Tensor, Tensor, Tensor, Tensor)"
)
lib.define(
    "causal_conv1d_step(Tensor state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> (Tensor, Tensor)"
)
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
