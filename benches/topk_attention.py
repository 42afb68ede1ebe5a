"""topk_attention: many queries over a bank, one query over a long one, and plain attention over all slots."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches._harness import Candidate, Group, Ratio, Work, forward_backward, on_gpu, rows
from fastmem.ops.topk_attention import topk_attention


def inputs(B: int, H: int, Q: int, S: int, E: int, unit: bool = False):
    def make(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        shapes = ((B, H, Q, E), (B, H, S, E), (B, H, S, E))
        q, k, v = (torch.randn(*shape, generator=generator, device=device) for shape in shapes)
        return (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v) if unit else (q, k, v)

    return make


def ours(top_k: int | None, similarity: str = "cosine"):
    return lambda q, k, v: topk_attention(q, k, v, top_k=top_k, similarity=similarity)


def eager(top_k: int):
    """As one would write it: normalise, matmul, topk, softmax, gather."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q.shape[-1] ** 0.5 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
        best, slots = scores.topk(top_k, dim=-1)
        chosen = torch.gather(
            v.unsqueeze(2).expand(*slots.shape[:3], *v.shape[2:]),
            3,
            slots.unsqueeze(-1).expand(*slots.shape, v.shape[-1]),
        )
        return (best.softmax(-1).unsqueeze(-1) * chosen).sum(3)

    return run


def truth(top_k: int | None, similarity: str = "cosine"):
    return lambda *x: topk_attention(*(t.double() for t in x), top_k=top_k, similarity=similarity, backend="reference")


def work(B: int, H: int, Q: int, S: int, E: int, passes: int = 1) -> Work:
    bank, queries = 2 * B * H * S * E * 4, 2 * B * H * Q * E * 4
    return Work(bytes=passes * (bank + queries), ops=passes * 2 * B * H * Q * S * E)


def search(top_k: int) -> Candidate:
    """faiss's exact inner-product search over keys of norm 1; the same slots must come out."""
    import faiss

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Any]:
        index = faiss.IndexFlatIP(k.shape[-1])
        index.add(k[0, 0].numpy())
        return index, q[0, 0].numpy()

    return Candidate(
        run=lambda index, q: index.search(q, top_k),
        prepare=prepare,
        output=lambda found: torch.from_numpy(found[1]).double(),
    )


def found(top_k: int):
    return lambda q, k, v: topk_attention(q, k, v, top_k=top_k, similarity="dot", return_indices=True)


def agrees(reference):
    """Like the comparison with a reference, but a tie within rounding at the k-th place may fall either way: of a
    thousand queries (rows of the output), one may see another last slot than in float64."""

    def check(result: Any, inputs: tuple) -> None:
        expected = reference(*inputs)
        got, expected = (x if isinstance(x, tuple) else (x,) for x in (result, expected))
        row = (got[0].double() - expected[0]).norm(dim=-1) / expected[0].norm(dim=-1)
        share = (row > 1e-5).double().mean().item()
        assert share <= 1e-3, f"{share:.1%} of the queries differ"
        for index, (g, e) in enumerate(zip(got[1:], expected[1:], strict=True)):
            error = ((g.double() - e).norm() / e.norm()).item()
            assert error <= 2e-2, f"gradient {index}: relative error {error:.1e}"

    return check


MANY, ONE = (8, 8, 128, 4096, 64), (1, 1, 1, 65536, 128)
MANY_FORWARD = Group(
    name="topk_attention B8 H8 Q128 S4096 E64 k32 fp32",
    inputs=inputs(*MANY),
    candidates={"fastmem": ours(32), "eager": eager(32)},
    check=agrees(truth(32)),
    work=work(*MANY),
)
MANY_TRAINING = Group(
    name="topk_attention forward + backward B8 H8 Q128 S4096 E64 k32 fp32",
    inputs=inputs(*MANY),
    candidates={"fastmem": forward_backward(ours(32)), "eager": forward_backward(eager(32))},
    check=agrees(forward_backward(truth(32))),
    work=work(*MANY, passes=2),
)
ONE_QUERY = Group(
    name="topk_attention B1 H1 Q1 S65536 E128 k32 fp32",
    inputs=inputs(*ONE),
    candidates={"fastmem": ours(32), "eager": eager(32)},
    reference=truth(32),
    work=work(*ONE),
)
SEARCH = Group(
    name="topk_attention dot, unit keys B1 H1 Q1 S65536 E128 k32 fp32",
    inputs=inputs(*ONE, unit=True),
    candidates={
        "fastmem": Candidate(found(32), output=lambda r: r[1][0, 0].double()),
        "faiss": search(32),
    },
    reference=lambda *x: topk_attention(*x, top_k=32, similarity="dot", return_indices=True, backend="reference")[1][
        0, 0
    ].double(),
    work=work(*ONE),
)


def plain(B: int, H: int, Q: int, S: int, E: int) -> Group:
    return Group(
        name=f"topk_attention all slots, dot B{B} H{H} Q{Q} S{S} E{E} fp32",
        inputs=inputs(B, H, Q, S, E),
        candidates={"fastmem": ours(None, "dot"), "sdpa": F.scaled_dot_product_attention},
        reference=truth(None, "dot"),
        work=work(B, H, Q, S, E),
    )


PLAIN = [plain(*MANY), plain(*ONE), plain(8, 8, 128, 512, 64), plain(8, 1, 1, 385, 192)]


GPU_FORWARD, GPU_TRAINING, GPU_PLAIN = (
    [on_gpu(MANY_FORWARD), on_gpu(ONE_QUERY)],
    on_gpu(MANY_TRAINING),
    on_gpu(PLAIN[0]),
)


@rows(MANY_FORWARD, ONE_QUERY, SEARCH, *PLAIN, *GPU_FORWARD, GPU_PLAIN)
def test_forward(benchmark, group, candidate): ...


@rows(MANY_TRAINING, GPU_TRAINING)
def test_training(benchmark, group, candidate): ...


RATIOS = [
    Ratio(MANY_FORWARD, "fastmem", {"eager": 5.0}),
    Ratio(MANY_TRAINING, "fastmem", {"eager": 3.0}),
    Ratio(ONE_QUERY, "fastmem", {"eager": 8.0}),
    Ratio(SEARCH, "fastmem", {"faiss": 1.0}),
    *(Ratio(group, "fastmem", {"sdpa": 1.0}) for group in PLAIN),
    *(Ratio(group, "fastmem", {"eager": 1.0}) for group in (*GPU_FORWARD, GPU_TRAINING)),
    Ratio(GPU_PLAIN, "fastmem"),  # sdpa serves both: what a call of ours adds
]
