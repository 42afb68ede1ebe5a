"""Hugging Face transformers' Mamba on fastmem: a prompt's pass and a training step, against transformers alone.

One model of 4 layers with random weights, and its copy that is accelerated; transformers runs its own PyTorch loop
where neither mamba-ssm nor kernels are installed. The pass over a prompt is the one that `generate` makes: a cache is
filled, and only the last token's logits are computed. The vocabulary is small, so that in training four layers weigh
against the head about as the layers of a whole model do.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benches._harness import Group, Ratio, Work, rows

HIDDEN, LAYERS, VOCABULARY = 768, 4, 4096
INNER, STATES, RANK, TAPS = 2 * HIDDEN, 16, HIDDEN // 16, 4
PER_LAYER = HIDDEN * 2 * INNER + INNER * (TAPS + RANK + 2 * STATES) + RANK * INNER + INNER * HIDDEN + INNER * STATES


@cache
def models() -> tuple[Any, Any, Any]:
    """(transformers alone, the same on fastmem, the truth in float64)."""
    from transformers.models.mamba import MambaConfig, MambaForCausalLM
    from transformers.utils import logging

    from fastmem.integrations.transformers import accelerate

    logging.set_verbosity_error()  # it says that it is slow
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=STATES)
    alone = MambaForCausalLM(config).eval()
    return alone, accelerate(copy.deepcopy(alone)), accelerate(copy.deepcopy(alone).double())


def tokens(L: int):
    return lambda device, generator: (torch.randint(VOCABULARY, (1, L), generator=generator, device=device),)


def prefill(which: int):
    @torch.no_grad()
    def run(ids: Tensor) -> Tensor:
        return models()[which].eval()(ids, use_cache=True, logits_to_keep=1).logits

    return run


def training_step(which: int):
    """Loss, gradients of all weights; the loss and those of the first and the last layer are compared."""

    def run(ids: Tensor) -> tuple[Tensor, ...]:
        model = models()[which].train()
        loss = model(ids, labels=ids).loss
        names = ("in_proj", "x_proj", "dt_proj", "out_proj")
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        by_parameter = dict(zip(map(id, model.parameters()), gradients, strict=True))
        mixers = [model.backbone.layers[i].mixer for i in (0, -1)]
        kept = [getattr(mixer, name).weight for mixer in mixers for name in names]
        kept += [parameter for mixer in mixers for parameter in (mixer.A_log, mixer.D, mixer.conv1d.weight)]
        return loss.detach(), *(by_parameter[id(parameter)] for parameter in kept)

    return run


def group(name: str, way, L: int, training: bool) -> Group:
    """Weights are read once, and twice more with their gradients written in training."""
    weights, logits = LAYERS * PER_LAYER + HIDDEN * VOCABULARY, L if training else 1
    ops = 2 * LAYERS * PER_LAYER * L + 2 * HIDDEN * VOCABULARY * logits
    return Group(
        name=f"transformers Mamba {name} L{L} hidden {HIDDEN} layers {LAYERS} vocabulary {VOCABULARY} fp32",
        inputs=tokens(L),
        candidates={"fastmem": way(1), "transformers alone": way(0)},
        reference=way(2),
        work=Work(bytes=4 * weights * (3 if training else 1), ops=ops * (3 if training else 1)),
        tolerance=1e-4,
    )


PROMPT, LONG_PROMPT = (group("prompt", prefill, L, training=False) for L in (512, 2048))
TRAINING = group("training step", training_step, 512, training=True)


@rows(PROMPT, LONG_PROMPT)
def test_prompt(benchmark, group, candidate): ...


@rows(replace(TRAINING, candidates={"fastmem": training_step(1)}))  # the other takes a minute and more
def test_training_step(benchmark, group, candidate): ...


RATIOS = [
    Ratio(PROMPT, "fastmem", {"transformers alone": 3.0}),
    Ratio(LONG_PROMPT, "fastmem", {"transformers alone": 4.0}),
    Ratio(TRAINING, "fastmem", {"transformers alone": 4.0}, min_rounds=3),
]
