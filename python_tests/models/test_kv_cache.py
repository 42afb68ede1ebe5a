"""The KV cache is found by whatever name transformers gives it."""

import pytest
import torch
from tiny_bases import CLASSES, make_base, prompt

from fastmem.models.kv_cache import cache_among, cache_name, cached_length

pytest.importorskip("transformers")
NEW = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_of_every_architecture(kind):
    base, lengths = make_base(kind), []
    base.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(cached_length(cache_among(kwargs), 10 + len(lengths) - 1)),
        with_kwargs=True,
    )
    first = base.generate(prompt(0), return_dict_in_generate=True, **NEW)
    assert lengths == [0, 10, 11]
    again = base(prompt(1, 1), **{cache_name(base): cache_among(first)})
    assert lengths[3] == 12 and cache_among(again) is not None


class _OneName:
    def __init__(self, name):
        self.forward = {
            "cache": lambda input_ids, cache=None: None,
            "past_key_values": lambda input_ids, past_key_values=None: None,
            "cache_params": lambda input_ids, cache_params=None: None,
        }[name]


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_of_every_name(name):
    held = object()
    assert cache_name(_OneName(name)) == name
    assert cache_among({"input_ids": 1, name: held}) is held
    assert cache_among({"cache": None, name: held}) is held and cache_among({name: None}) is None
    assert cached_length(None, 5) == 0
