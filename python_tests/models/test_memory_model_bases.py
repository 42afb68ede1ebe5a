"""What a MemoryModel promises on every kind of decoder."""

import pytest
import torch
from tiny_bases import CLASSES, assert_same_memory, make_base, make_model, prompt, tensors_of
from tiny_chat import one_thread

__all__ = ["one_thread"]
pytest.importorskip("transformers")
NEW = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=CLASSES)
def model(request):
    return make_model(make_base(request.param))


def logits_of(base, ids):
    with torch.no_grad():
        return base(input_ids=ids).logits


@torch.no_grad()
def test_an_empty_memory_is_the_base_bit_for_bit(model):
    ids = prompt(0)
    expected = logits_of(model.base, ids)
    assert torch.equal(model(input_ids=ids, update_memory=False).logits, expected)
    assert torch.equal(model(input_ids=ids).logits, expected)  # written, but what a pass writes it does not read
    assert model.memory.inspect()["layers"][0]["buffer"]["live"] > 0
    assert not torch.equal(model(input_ids=ids, update_memory=False).logits, expected)


@torch.no_grad()
def test_disabled_is_the_base_bit_for_bit(model):
    ids = prompt(0)
    expected = logits_of(model.base, ids), model.base.generate(ids, **NEW)
    model(input_ids=prompt(1))
    held = tensors_of(model, "default")
    with model.disable_memory():
        assert torch.equal(model(input_ids=ids).logits, expected[0])
        assert torch.equal(model.generate(ids, **NEW), expected[1])
    assert_same_memory(model, "default", held, 0)
    assert (model(input_ids=ids, update_memory=False).logits - expected[0]).abs().max() > 1e-3


@torch.no_grad()
def test_the_base_itself_knows_of_no_memory(model):
    ids = prompt(0)
    expected = logits_of(model.base, ids)
    model(input_ids=prompt(1))
    assert torch.equal(logits_of(model.base, ids), expected)
    logits_of(model.base, prompt(2, batch=3))
    assert model.memory.names == ("default",)


@torch.no_grad()
def test_greedy_decoding_with_a_cache_is_the_argmax_of_whole_passes(model):
    model(input_ids=prompt(1), sessions=["a"])
    ids = prompt(0)
    said = model.generate(ids, sessions=["a"], update_memory=False, **NEW)
    whole = model(input_ids=said, sessions=["a"], update_memory=False).logits
    assert torch.equal(whole[:, ids.shape[1] - 1 : -1].argmax(-1), said[:, ids.shape[1] :])
    without = model.base.generate(ids, **NEW)
    assert not torch.equal(said, without)


@torch.no_grad()
def test_left_padding_equals_each_row_alone(model):
    lengths, names = (10, 7, 4), ["a", "b", "c"]
    ids, mask = torch.zeros(3, 10, dtype=torch.int64), torch.zeros(3, 10, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, 10 - length :], mask[row, 10 - length :] = prompt(row, length), 1
    alone = {}
    for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
        model(input_ids=prompt(10 + row, 9), sessions=[name])
        alone[name] = model.generate(prompt(row, length), sessions=[name], **NEW)[0, length:], tensors_of(model, name)
    model.memory.clear()
    for row, name in enumerate(names):
        model(input_ids=prompt(10 + row, 9), sessions=[name])
    said = model.generate(ids, attention_mask=mask, sessions=names, **NEW)[:, 10:]
    for row, name in enumerate(names):
        assert torch.equal(said[row], alone[name][0]), name
        assert_same_memory(model, name, alone[name][1])


@torch.no_grad()
def test_beams_of_two_prompts_equal_each_alone(model):
    beams = NEW | {"num_beams": 3}
    ids = torch.cat([prompt(0), prompt(1)])
    alone = []
    for row, name in enumerate("ab"):
        model(input_ids=prompt(10 + row), sessions=[name])
        said = model.generate(ids[row : row + 1], sessions=[name], **beams)
        alone.append((said[0], tensors_of(model, name)))
    model.memory.clear()
    for row, name in enumerate("ab"):
        model(input_ids=prompt(10 + row), sessions=[name])
    said = model.generate(ids, sessions=["a", "b"], **beams)
    for row, name in enumerate("ab"):
        assert torch.equal(said[row], alone[row][0])
        assert_same_memory(model, name, alone[row][1])
    assert model.memory.names == ("a", "b")


@torch.no_grad()
def test_what_is_generated_is_not_stored(model):
    ids = prompt(0)
    model.generate(ids, **NEW)
    after_generate = tensors_of(model, "default")
    model.memory.clear()
    model(input_ids=ids)
    assert_same_memory(model, "default", after_generate, 1e-5)


@torch.no_grad()
def test_adapter_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["memory_adapter.safetensors", "memory_config.json"]
    again = type(model).from_pretrained(model.base, tmp_path)
    assert not again.training and again.config == model.config
    for name, x in model.layers.state_dict().items():
        assert torch.equal(again.layers.state_dict()[name], x), name
    model(input_ids=prompt(1))
    again(input_ids=prompt(1))
    ids = prompt(0)
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", CLASSES)
def test_a_bfloat16_base_keeps_its_memory_in_float32(kind):
    model = make_model(make_base(kind, torch.bfloat16))
    expected = logits_of(model.base, prompt(0))
    assert torch.equal(model(input_ids=prompt(0)).logits, expected)
    assert {x.dtype for x in tensors_of(model, "default").values()} == {torch.float32}
    assert {p.dtype for p in model.layers.parameters()} == {torch.float32}
    changed = model(input_ids=prompt(1), update_memory=False).logits
    assert changed.dtype == expected.dtype and not torch.equal(changed, logits_of(model.base, prompt(1)))
