"""How a benchmark is written here.

A `Group` is one op at one size: the candidates (ours and the peers), the tensors that all of them get, the reference
that their results must match, and the least work that any of them could do. A file `benches/<op>.py` states its groups
once and gets both kinds of measurement from them:

    from benches._harness import Candidate, Group, Ratio, Work, forward_backward, rows

    def inputs(device, generator):
        return tuple(torch.randn(8, 64, generator=generator, device=device) for _ in range(2))

    ADD = Group(
        name="add B8 N64 fp32",
        inputs=inputs,                              # one fresh set; the harness makes several and rotates them
        candidates={
            "fastmem": fastmem.add,                 # called with the set: fastmem.add(a, b)
            "eager": torch.add,
            "peer": Candidate(peer.query, prepare=peer.build, output=torch.from_numpy),
        },
        reference=lambda a, b: (a.double() + b.double()),
        work=Work(bytes=3 * 8 * 64 * 4, ops=8 * 64, dtype=torch.float32),
    )

    @rows(ADD, ...)                                 # one pytest-benchmark row per group and candidate
    def test_forward(benchmark, group, candidate): ...      # the body stays `...`

    RATIOS = [Ratio(ADD, ours="fastmem", at_least={"eager": 3.0, "peer": 1.0})]

`pytest benches/<op>.py --benchmark-only` times rows one after the other; `python -m benches ratios` runs every module's
`RATIOS` with the candidates interleaved, and that is where any claimed ratio comes from. Both refuse a candidate whose
result is further from the reference than `Group.tolerance`. A group with `device="cuda"` is left out where there is no
GPU.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmem import _native, _system

ROTATED_BYTES = 256 << 20  # the sets together exceed any cache
MAX_SETS = 16


@dataclass(frozen=True)
class Work:
    """The least that one call must do.

    Attributes:
        bytes: bytes that must move between memory and the chip (inputs once, outputs once).
        ops: floating-point operations (a multiply-add counts two).
        dtype: the type whose matmul rate bounds `ops`.
        exponentials: how many must be computed: on a CPU at the rate of fastmem's own, on a GPU at that of its
            special-function units.
    """

    bytes: float
    ops: float
    dtype: torch.dtype = torch.float32
    exponentials: float = 0


@dataclass(frozen=True)
class Candidate:
    """A way to do the op.

    Attributes:
        run: timed; called as run(*prepare(*inputs)).
        prepare: once per set of tensors, not timed: an index to build, a layout to change.
        output: turns the result into the reference's form before the comparison, not timed.
    """

    run: Callable[..., Any]
    prepare: Callable[..., tuple] | None = None
    output: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Group:
    """One op at one size.

    Attributes:
        name: op, sizes and dtype, such as "topk_attention B8 H8 Q128 S4096 E64 k32 fp32".
        inputs: (device, generator) -> one set of arguments, drawn on that device, the CPU.
        candidates: name -> callable or Candidate; the first is ours.
        reference: the truth for one set: a tensor or a tuple of tensors; None entries are not compared.
        work: the least that a call must do.
        device: "cpu" or "cuda".
        tolerance: largest relative error, norm of difference over norm, of each tensor.
        check: (result, inputs) -> None, raising AssertionError; replaces the comparison where there is no reference.
    """

    name: str
    inputs: Callable[[torch.device, torch.Generator], tuple]
    candidates: Mapping[str, Callable[..., Any] | Candidate]
    work: Work
    reference: Callable[..., Any] | None = None
    device: str = "cpu"
    tolerance: float = 1e-5
    check: Callable[[Any, tuple], None] | None = None

    def __post_init__(self) -> None:
        if (self.reference is None) == (self.check is None):
            raise ValueError(f"{self.name}: expected a reference or a check, and not both")


def on_gpu(group: Group, **changes: Any) -> Group:
    """The same measurement on a CUDA device, with `changes` of its fields."""
    return replace(group, name=f"{group.name} cuda", device="cuda", **changes)


@dataclass(frozen=True)
class Ratio:
    """A claim about a group: time of each peer over time of `ours`, and how large it should be.

    Attributes:
        group: what is measured.
        ours: the candidate of ours.
        at_least: peer -> the smallest ratio wanted; peers not named are measured all the same.
        at_most_s: the longest time of `ours` that is wanted, in seconds.
        seconds: about how long to measure; every candidate gets at least `min_rounds`.
        min_rounds: fewest interleaved rounds.
    """

    group: Group
    ours: str
    at_least: Mapping[str, float] = field(default_factory=dict)
    at_most_s: float | None = None
    seconds: float = 10.0
    min_rounds: int = 5

    def __post_init__(self) -> None:
        for name in (self.ours, *self.at_least):
            if name not in self.group.candidates:
                raise ValueError(f"{self.group.name}: no candidate {name!r} among {', '.join(self.group.candidates)}")


def ratio_of_present(group: Group, bars: Mapping[str, float]) -> Ratio:
    """The claim of those bars whose peers are installed."""
    return Ratio(group, next(iter(group.candidates)), {n: bar for n, bar in bars.items() if n in group.candidates})


class WrongResult(AssertionError):
    """A candidate's result does not match the reference, so its time counts for nothing."""


def forward_backward(run: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """`run` followed by a backward pass from the sum of its (first) result's squares, halved.

    Returns a callable of the same arguments that gives (out, gradient of each float tensor argument).
    """

    def both(*args: Any) -> tuple[Tensor, ...]:
        leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        out = run(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        return out.detach(), *torch.autograd.grad(out, wanted, out.detach())

    return both


def as_candidate(candidate: Callable[..., Any] | Candidate) -> Candidate:
    return candidate if isinstance(candidate, Candidate) else Candidate(candidate)


def available(group: Group) -> bool:
    return group.device == "cpu" or torch.cuda.is_available()


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- tensors, and the check of results --------------------------------------------------------------------------------


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64."""
    got, expected = got.double(), expected.double()
    norm = expected.norm().item()
    return (got - expected).norm().item() / (norm if norm > 0 else 1.0)


def compare(got: Any, expected: Any, tolerance: float) -> None:
    """Raise WrongResult unless every tensor of `got` is within `tolerance` of its counterpart."""
    gots = got if isinstance(got, tuple | list) else (got,)
    expecteds = expected if isinstance(expected, tuple | list) else (expected,)
    if len(gots) != len(expecteds):
        raise WrongResult(f"expected {len(expecteds)} results, got {len(gots)}")
    for index, (g, e) in enumerate(zip(gots, expecteds, strict=True)):
        if e is None:
            continue
        if g.shape != e.shape:
            raise WrongResult(f"result {index}: expected shape {tuple(e.shape)}, got {tuple(g.shape)}")
        error = relative_error(g, e)
        if not error <= tolerance:  # NaN fails as well
            raise WrongResult(f"result {index}: relative error {error:.2e} is more than {tolerance:.0e}")


class Sets:
    """A group's tensors: several sets, rotated from call to call, and the reference's answer to the first."""

    def __init__(self, group: Group) -> None:
        self.group = group
        generator = torch.Generator().manual_seed(0)

        def inputs() -> tuple:
            """Drawn on the CPU, so that a GPU gets the same."""
            made = group.inputs(torch.device("cpu"), generator)
            return tuple(x.to(group.device) if isinstance(x, Tensor) else x for x in made)

        self.inputs = [inputs()]
        size = sum(a.nbytes for a in self.inputs[0] if isinstance(a, Tensor))
        count = min(MAX_SETS, max(2, -(-ROTATED_BYTES // max(1, size))))
        self.inputs += [inputs() for _ in range(count - 1)]
        self.expected = group.reference(*self.inputs[0]) if group.reference else None

    def calls(self, name: str) -> Callable[[], Any]:
        """A callable of no arguments that runs candidate `name` on the next set; its first result is checked here."""
        candidate = as_candidate(self.group.candidates[name])
        prepared = [candidate.prepare(*args) if candidate.prepare else args for args in self.inputs]
        result = candidate.run(*prepared[0])
        result = candidate.output(result) if candidate.output else result
        try:
            if self.group.check:
                self.group.check(result, self.inputs[0])
            else:
                compare(result, self.expected, self.group.tolerance)
        except AssertionError as error:
            raise WrongResult(f"{self.group.name}, {name}: {error}") from None
        del result
        turn, run, count = 0, candidate.run, len(prepared)

        def call() -> Any:
            nonlocal turn
            turn = turn + 1 if turn + 1 < count else 0
            return run(*prepared[turn])

        return call


_kept: list[Sets] = []


def sets_of(group: Group) -> Sets:
    """The sets of `group`, kept until another group is asked for."""
    if not _kept or _kept[0].group is not group:
        _kept.clear()
        gc.collect()
        _kept.append(Sets(group))
    return _kept[0]


# --- timing -----------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Seconds per call over `repeats` calls."""
    sync(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    sync(device)
    return (time.perf_counter() - start) / repeats


def repeats_for(call: Callable[[], Any], device: str, sample_s: float = 2e-3) -> int:
    """How many calls make a sample long enough for the clock. Warms the candidate up as well."""
    if timed(call, 1, device) > 100 * sample_s:
        return 1
    return max(1, min(10_000, round(sample_s / max(timed(call, 2, device), 1e-9))))


def interleave(
    candidates: Mapping[str, Callable[[], Any]], *, device: str = "cpu", seconds: float = 10.0, min_rounds: int = 5
) -> dict[str, list[float]]:
    """Time candidates in turn, so that all of them see the same state of the machine: A B C, B C A, C A B, ...

    Each round starts with another candidate, since the first one runs on caches that the clean-up has left cold.

    Args:
        candidates: name -> callable of no arguments.
        device: "cpu" or "cuda"; on a GPU each sample waits for the device.
        seconds: about how long to measure in all.
        min_rounds: every candidate is sampled at least so often, however slow.

    Returns:
        name -> seconds per call, one entry per round; the same index is the same round.
    """
    repeats = {name: repeats_for(call, device) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    rounds, names = 0, list(candidates)
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < min_rounds or (time.perf_counter() < end and rounds < 1000):
            start = rounds % len(names)
            for name in names[start:] + names[:start]:
                samples[name].append(timed(candidates[name], repeats[name], device))
            rounds += 1
            if rounds % 16 == 0:
                gc.collect()
    finally:
        if collecting:
            gc.enable()
    return samples


# --- floors -----------------------------------------------------------------------------------------------------------


def _best_time(call: Callable[[], Any], device: str, rounds: int = 7) -> float:
    repeats = repeats_for(call, device, sample_s=2e-2)
    return min(timed(call, repeats, device) for _ in range(rounds))


@cache
def bandwidth(device: str, threads: int) -> float:
    """Memory bandwidth in bytes per second: the best of a copy, an addition and a sum over 512 MiB tensors."""
    count = (512 << 20) // 4
    a, b = torch.zeros(count, device=device), torch.empty(count, device=device)
    return max(
        2 * a.nbytes / _best_time(lambda: b.copy_(a), device, 5),
        2 * a.nbytes / _best_time(lambda: torch.add(a, 1.0, out=b), device, 5),
        a.nbytes / _best_time(a.sum, device, 5),
    )


@cache
def matmul_rate(device: str, threads: int, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square torch.matmul in `dtype`."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * size**3 / _best_time(lambda: torch.matmul(a, a, out=out), device, 5)


def exponentials(count: int, device: str = "cpu") -> float:
    """That many exponentials of floats in cache or registers, on all of the device: what bounds a scan."""
    if device == "cuda":
        from benches._exponentials import launch

        return launch(count)
    assert _native.kernels is not None
    return _native.kernels.exponentials(count, torch.get_num_threads())


@cache
def exponential_rate(device: str, threads: int) -> float:
    """Exponentials per second."""
    count = 1 << (34 if device == "cuda" else 24)
    return count / _best_time(lambda: exponentials(count, device), device)


def floor_seconds(work: Work, device: str) -> float:
    """The time that no implementation can beat: the largest of bytes, operations and exponentials over their rates."""
    threads = torch.get_num_threads()
    floors = [work.bytes / bandwidth(device, threads), work.ops / matmul_rate(device, threads, work.dtype)]
    if work.exponentials:
        floors.append(work.exponentials / exponential_rate(device, threads))
    return max(floors)


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with its instruction set and thread count."""
    if device == "cuda":
        return _system.gpu_name() or "cuda"
    return _system.cpu_device(torch.get_num_threads())


def facts(group: Group, seconds: float) -> dict[str, Any]:
    """What a measured time of `group` means: device, versions, work, what was achieved and percent of the floor."""
    work, threads = group.work, torch.get_num_threads()
    return {
        "device": device_name(group.device),
        "isa": _native.isa,
        "threads": threads,
        "versions": _system.versions(),
        "git": _system.git_commit(),
        "dtype": str(work.dtype).removeprefix("torch."),
        "bytes": work.bytes,
        "ops": work.ops,
        "gb_per_s": work.bytes / seconds / 1e9,
        "gflop_per_s": work.ops / seconds / 1e9,
        "floor_s": floor_seconds(work, group.device),
        "percent_of_floor": 100 * floor_seconds(work, group.device) / seconds,
        "bandwidth_gb_per_s": bandwidth(group.device, threads) / 1e9,
        "matmul_gflop_per_s": matmul_rate(group.device, threads, work.dtype) / 1e9,
    }


# --- the two ways to run a group --------------------------------------------------------------------------------------


def rows(*groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of (benchmark, group, candidate) into one pytest-benchmark row per group and candidate."""
    parameters = [
        pytest.param(
            group,
            name,
            id=f"{group.name}-{name}",
            marks=[] if group.device == "cpu" else [pytest.mark.gpu],
        )
        for group in groups
        for name in group.candidates
    ]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def test(benchmark: Any, group: Group, candidate: str) -> None:
            measure_row(benchmark, group, candidate)

        test.__name__, test.__doc__, test.__module__ = function.__name__, function.__doc__, function.__module__
        return pytest.mark.parametrize(("group", "candidate"), parameters)(test)

    return decorate


def measure_row(benchmark: Any, group: Group, candidate: str, seconds: float = 1.0) -> None:
    """Fill one pytest-benchmark row; fails if the result is wrong, skips where the device is missing."""
    if not available(group):
        pytest.skip("no CUDA device")
    call = sets_of(group).calls(candidate)

    def waited() -> None:
        call()
        sync(group.device)

    repeats = repeats_for(waited, group.device, sample_s=1e-3)
    each = timed(waited, 1, group.device) * repeats
    benchmark.group = group.name
    benchmark.pedantic(waited, rounds=max(3, min(200, round(seconds / each))), iterations=repeats)
    benchmark.extra_info.update(facts(group, benchmark.stats.stats.median), candidate=candidate)


def measure_ratio(ratio: Ratio) -> dict[str, Any]:
    """Run a claim with its candidates interleaved.

    Returns:
        a JSON-ready dict: median seconds and quartiles per candidate, and per peer the ratio of medians, the quartiles
        of the ratio within rounds, the bar and whether it was met.
    """
    group = ratio.group
    sets = sets_of(group)
    calls = {name: sets.calls(name) for name in group.candidates}
    samples = interleave(calls, device=group.device, seconds=ratio.seconds, min_rounds=ratio.min_rounds)
    ours = samples[ratio.ours]
    medians = {name: statistics.median(values) for name, values in samples.items()}
    peers = {}
    for name, values in samples.items():
        if name == ratio.ours:
            continue
        low, _, high = statistics.quantiles([theirs / mine for theirs, mine in zip(values, ours, strict=True)], n=4)
        value, bar = medians[name] / medians[ratio.ours], ratio.at_least.get(name)
        peers[name] = {
            "ratio": value,
            "low": low,
            "high": high,
            "bar": bar,
            "met": None if bar is None else value >= bar,
        }
    return {
        "name": group.name,
        "ours": ratio.ours,
        "rounds": len(ours),
        "sets": len(sets.inputs),
        "median_s": medians,
        "quartiles_s": {name: statistics.quantiles(values, n=4)[::2] for name, values in samples.items()},
        "peers": peers,
        "time_bar_s": ratio.at_most_s,
        "time_met": None if ratio.at_most_s is None else medians[ratio.ours] <= ratio.at_most_s,
        **facts(group, medians[ratio.ours]),
    }
