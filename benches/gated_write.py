"""gated_write: a prompt of 512 tokens into 256 slots, with and without its backward pass, and one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from benches._harness import Group, Ratio, Work, on_gpu, rows
from fastmem.ops.gated_write import Bank, SurpriseStats, gated_write

BUFFER = {"boost": 0.5, "min_strength": 0.01}
STORE = {
    "boost": None,
    "min_strength": 0.0,
    "alpha_match": 0.3,
    "alpha_evict": 1.0,
    "retention": (0.5, 0.3, 0.001),
    "match_threshold": 0.8,
}


def inputs(B: int, T: int, S: int, E: int):
    """A full bank; half of the tokens are new, half resemble a slot."""

    def make(device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        bank_keys, keys = normal(B, S, E), normal(B, T, E)
        of_slot = torch.gather(bank_keys, 1, (uniform(B, T, 1) * S).long().expand(B, T, E))
        keys = torch.where(uniform(B, T, 1) < 0.5, keys, of_slot + 0.3 * keys)
        bank = (bank_keys, normal(B, S, E), 0.05 + 0.9 * uniform(B, S), torch.zeros_like(bank_keys[..., 0]))
        return *bank, bank[3].clone(), keys, normal(B, T, E), uniform(B, T)

    return make


def fresh(like: Tensor) -> SurpriseStats:
    return SurpriseStats(*(like.new_zeros(like.shape[0]) for _ in range(3)))


def op(setting: dict, backend: str):
    """gated_write on a set of tensors; (new keys, values, strength, where written)."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        bank, keys, values, surprise = Bank(*tensors[:5]), *tensors[5:]
        gate = (surprise, fresh(keys)) if setting["boost"] is None else ()
        new, _, written = gated_write(bank, keys, values, *gate, backend=backend, **setting)
        return *new[:3], written.slot

    return run


def exact(setting: dict):
    """The float64 reference; any other decision than its own shows in the contents and in the slots."""
    run = op(setting, "reference")
    return lambda *tensors: run(*(x.double() for x in tensors))


def eager_loop(setting: dict):
    """The same rule as one would write it in PyTorch for inference: token by token, in place, without gradients."""
    numbers = {"match_threshold": 0.5, "alpha_match": 0.1, "alpha_evict": 0.3, "retention": (1.0, 0.0, 0.0)} | setting
    boost, (r0, r1, r2) = numbers["boost"], numbers["retention"]

    @torch.no_grad()
    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        K, V, strength, access, age = (x.clone() for x in tensors[:5])
        keys, values, surprise = tensors[5:]
        B, T, _ = keys.shape
        S, row = K.shape[1], torch.arange(B, device=K.device)
        units = torch.nn.functional.normalize(K, dim=-1)
        unit_keys = torch.nn.functional.normalize(keys, dim=-1)
        slots = torch.full((B, T), -1, device=K.device)
        mean, var, count = fresh(keys)
        for t in range(T):
            live = (strength >= numbers["min_strength"]) & (strength > 0)
            cosine = torch.bmm(units, unit_keys[:, t, :, None])[..., 0].masked_fill_(~live, -torch.inf)
            c, best = cosine.max(1)
            write, s = torch.ones_like(c, dtype=torch.bool), surprise[:, t]
            if boost is None:
                s = torch.maximum(s, 2 * torch.where(c > 0.3, 1 - c, 0))
                theta = (mean + var.sqrt()) * (1 + 0.5 * live.sum(1) / S)
                write = s > torch.where(count == 0, 0, theta)
                d = s - mean
                var = torch.where(count == 0, 0, 0.9 * (var + 0.1 * d * d))
                mean = torch.where(count == 0, s, mean + 0.1 * d)
                count = count + 1
            matched = c >= numbers["match_threshold"]
            weakest = (r0 * strength + r1 * access.log1p() - r2 * age).argmin(1)
            dead = (~live).to(torch.int8)
            some_dead = dead.any(1)
            slot = torch.where(matched, best, torch.where(some_dead, dead.argmax(1), weakest))
            a = torch.where(matched, numbers["alpha_match"], torch.where(some_dead, 1.0, numbers["alpha_evict"]))
            a = torch.where(write, a, 0.0)[:, None]
            K[row, slot] = torch.lerp(K[row, slot], keys[:, t], a)
            V[row, slot] = torch.lerp(V[row, slot], values[:, t], a)
            units[row, slot] = torch.nn.functional.normalize(K[row, slot], dim=-1)
            old = torch.where(live[row, slot], strength[row, slot], 0)
            new = torch.where(matched, torch.maximum(old, s), s) if boost is None else (old + boost).clamp(max=1)
            strength[row, slot] = torch.where(write, new, strength[row, slot])
            access[row, slot] = torch.where(write & ~matched, 0, access[row, slot])
            age[row, slot] = torch.where(write, 0, age[row, slot])
            slots[:, t] = torch.where(write, slot, -1)
        return K, V, strength, slots

    return run


def with_gradients(run):
    """Forward, then backward from a fixed gradient (the old bank) of the new bank."""

    def both(*tensors: Tensor) -> tuple[Tensor, ...]:
        differentiable = (0, 1, 2, 5, 6)
        leaves = [x.detach().requires_grad_(i in differentiable) for i, x in enumerate(tensors)]
        *new, slot = run(*leaves)
        gradients = torch.autograd.grad(new, [leaves[i] for i in differentiable], [x.detach() for x in tensors[:3]])
        return *(x.detach() for x in new), slot, *gradients

    return both


def work(B: int, T: int, S: int, E: int, backward: bool = False) -> Work:
    """Banks in and out and tokens in; every token's cosine to every slot."""
    bank, tokens = B * S * 2 * E * 4, B * T * 2 * E * 4
    return Work(bytes=(2 + 2 * backward) * bank + (1 + backward) * tokens, ops=2 * B * T * S * E)


def group(name: str, setting: dict, B: int, T: int, S: int = 256, E: int = 576, gradients: bool = False) -> Group:
    candidates = {"fastmem": op(setting, "auto"), "reference": op(setting, "reference")}
    reference = exact(setting)
    if gradients:
        candidates = {k: with_gradients(v) for k, v in candidates.items()}
        reference = with_gradients(reference)
    else:
        candidates["eager loop"] = eager_loop(setting)
    return Group(
        name=f"gated_write {name} B{B} T{T} S{S} E{E} fp32",
        inputs=inputs(B, T, S, E),
        candidates=candidates,
        reference=reference,
        work=work(B, T, S, E, gradients),
    )


BUFFER_PROMPT, STORE_PROMPT = group("buffer", BUFFER, 8, 512), group("store", STORE, 8, 512)
BUFFER_TRAINING = group("buffer forward + backward", BUFFER, 8, 512, gradients=True)
STORE_TRAINING = group("store forward + backward", STORE, 8, 512, gradients=True)
BUFFER_TOKEN, STORE_TOKEN = group("buffer", BUFFER, 1, 1), group("store", STORE, 1, 1)


GPU_PROMPTS, GPU_TRAININGS = (
    [on_gpu(g) for g in groups] for groups in ((BUFFER_PROMPT, STORE_PROMPT), (BUFFER_TRAINING, STORE_TRAINING))
)


@rows(BUFFER_PROMPT, STORE_PROMPT, *GPU_PROMPTS)
def test_prompt(benchmark, group, candidate): ...


@rows(BUFFER_TRAINING, STORE_TRAINING, *GPU_TRAININGS)
def test_training(benchmark, group, candidate): ...


@rows(BUFFER_TOKEN, STORE_TOKEN)
def test_single_token(benchmark, group, candidate): ...


RATIOS = [
    Ratio(BUFFER_PROMPT, "fastmem", {"reference": 50.0}),
    Ratio(STORE_PROMPT, "fastmem", {"reference": 50.0}),
    Ratio(BUFFER_TRAINING, "fastmem", {"reference": 50.0}),
    Ratio(STORE_TRAINING, "fastmem", {"reference": 50.0}),
    Ratio(BUFFER_TOKEN, "fastmem", {"reference": 1.0}),
    Ratio(STORE_TOKEN, "fastmem", {"reference": 1.0}),
    *(Ratio(group, "fastmem", {"reference": 50.0}) for group in (*GPU_PROMPTS, *GPU_TRAININGS)),
]
