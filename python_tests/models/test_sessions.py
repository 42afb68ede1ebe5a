"""Memory contents: kept apart by session, saved whole or not at all, refused where they do not belong."""

import copy
import errno
import hashlib
import os
import stat
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_bases import assert_same_memory, make_base, make_model, prompt, tensors_of
from tiny_chat import one_thread

from fastmem._files import atomic_write
from fastmem.models.sessions import FORMAT, checksum

__all__ = ["one_thread"]
pytest.importorskip("transformers")


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def told(model):
    """Two sessions that were told different things."""
    model(input_ids=torch.cat([prompt(1), prompt(2)]), sessions=["alice", "bob"])
    return model


def logits(model, session, ids=None):
    with torch.no_grad():
        return model(input_ids=prompt(0) if ids is None else ids, sessions=[session], update_memory=False).logits


def test_sessions_never_mix(told):
    both = tensors_of(told, "alice"), tensors_of(told, "bob")
    assert not torch.equal(logits(told, "alice"), logits(told, "bob"))
    bob = logits(told, "bob")
    told(input_ids=prompt(3), sessions=["alice"])
    assert_same_memory(told, "bob", both[1], 0)
    assert torch.equal(logits(told, "bob"), bob)
    alone = make_model()
    alone(input_ids=prompt(1), sessions=["alice"])
    assert_same_memory(alone, "alice", both[0], 1e-5)
    with torch.no_grad():
        twice = torch.cat([prompt(0)] * 2)
        swapped = told(input_ids=twice, sessions=["bob", "nobody"], update_memory=False).logits
        torch.testing.assert_close(swapped[:1], bob, rtol=1e-4, atol=1e-4)
        assert torch.equal(swapped[1:], told.base(input_ids=twice).logits[1:])


def test_reading_opens_no_session(told):
    logits(told, "carol")
    assert told.memory.names == ("alice", "bob") and "carol" not in told.memory


def test_clear(told):
    told.memory.clear("alice")
    assert told.memory.names == ("bob",)
    assert torch.equal(logits(told, "alice"), told.base(input_ids=prompt(0)).logits)
    told.memory.clear()
    assert told.memory.names == ()


def test_unknown_session_is_one_line_that_names_the_known(told, tmp_path):
    for ask in (
        told.memory.inspect,
        told.memory.clear,
        told.memory.states_of,
        lambda name: told.memory.decay(1, name),
        lambda name: told.memory.save(tmp_path / "m", ["bob", name]),
    ):
        with pytest.raises(KeyError, match="unknown session 'carol'; known: alice, bob"):
            ask("carol")
    assert list(tmp_path.iterdir()) == []


def test_decay_reads_weaker_until_the_buffer_is_empty(told):
    config = told.config
    before = told.memory.inspect("alice")
    bob = tensors_of(told, "bob")
    told.memory.decay(3, "alice")
    assert_same_memory(told, "bob", bob, 0)
    after = told.memory.inspect("alice")
    for old, new in zip(before["layers"], after["layers"], strict=True):
        expected = [s * config.decay_rate**3 for s in old["buffer"]["strength"]]
        assert new["buffer"]["strength"] == pytest.approx(expected, abs=1e-4)
        assert new["buffer"]["age"] == [age + 3 for age in old["buffer"]["age"]]
        assert new["store"]["strength"] == old["store"]["strength"]
    told.memory.decay(200)
    for session in told.memory.names:
        for layer in told.memory.inspect(session)["layers"]:
            assert layer["buffer"]["live"] == 0 and layer["store"]["live"] > 0
    with pytest.raises(ValueError, match="cycles: expected 0 to 1e9, got -1"):
        told.memory.decay(-1)


def test_reads_are_counted(told):
    before = told.memory.inspect("alice")["layers"][0]["store"]["reads"]
    told(input_ids=prompt(4), sessions=["alice"], write_mask=torch.zeros(1, 10, dtype=torch.bool))
    after = told.memory.inspect("alice")["layers"][0]["store"]["reads"]
    assert sum(before) == 0 and 0 < sum(after) <= 10 + 1e-3


def test_put_and_copy_are_independent(told):
    told.memory.copy("alice", "carol")
    told.memory.put(["dave"], told.memory.states_of("alice"))
    expected = tensors_of(told, "alice")
    told(input_ids=prompt(5), sessions=["alice"])
    for name in ("carol", "dave"):
        assert_same_memory(told, name, expected, 0)


class TestFiles:
    def test_round_trip_in_another_model(self, told, tmp_path):
        told.memory.save(tmp_path / "new" / "m")
        other = make_model(make_base())
        assert other.memory.load(tmp_path / "new" / "m") == ("alice", "bob")
        for name in ("alice", "bob"):
            assert_same_memory(other, name, tensors_of(told, name), 0)
            assert torch.equal(logits(other, name), logits(told, name))

    def test_one_session_alone(self, told, tmp_path):
        told.memory.save(tmp_path / "bob", ["bob"])
        told.memory.save(tmp_path / "both")
        assert (tmp_path / "bob").stat().st_size < 0.6 * (tmp_path / "both").stat().st_size
        bob = tensors_of(told, "bob")
        told(input_ids=prompt(3, batch=2), sessions=["alice", "bob"])
        alice = tensors_of(told, "alice")
        assert told.memory.load(tmp_path / "bob") == ("bob",)
        assert_same_memory(told, "alice", alice, 0)
        assert_same_memory(told, "bob", bob, 0)

    def test_nothing_and_odd_names(self, model, told, tmp_path):
        empty = make_model()
        empty.memory.save(tmp_path / "none")
        assert empty.memory.load(tmp_path / "none") == ()
        names = ["a/b", "../x", "ünï \n", "1/0.buffer.keys"]
        for k, name in enumerate(names):
            model(input_ids=prompt(k), sessions=[name])
        model.memory.save(tmp_path / "odd", names)
        other = make_model()
        assert other.memory.load(tmp_path / "odd") == tuple(names)
        for name in names:
            assert_same_memory(other, name, tensors_of(model, name), 0)

    def test_memories_are_private_and_adapters_follow_the_umask(self, told, tmp_path):
        old = os.umask(0o022)
        try:
            told.memory.save(tmp_path / "m")
            told.save_pretrained(tmp_path / "adapter")
            os.umask(0o027)
            told.save_pretrained(tmp_path / "shared")
        finally:
            os.umask(old)

        def modes(*paths):
            return {stat.S_IMODE(p.stat().st_mode) for p in paths}

        assert modes(tmp_path / "m") == {0o600}
        assert modes(*(tmp_path / "adapter").iterdir()) == {0o644}
        assert modes(*(tmp_path / "shared").iterdir()) == {0o640}

    def full_disk(self, monkeypatch, at):
        def fail(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, at, fail)

    @pytest.mark.parametrize("at", ["fsync", "replace"])
    def test_a_full_disk_leaves_the_old_file(self, told, tmp_path, monkeypatch, at):
        path = tmp_path / "m"
        told.memory.save(path)
        before, held = path.read_bytes(), tensors_of(told, "alice")
        told(input_ids=prompt(3), sessions=["alice"])
        with monkeypatch.context() as patch:
            self.full_disk(patch, at)
            with pytest.raises(OSError, match=r"No space left on device.*m'") as caught:
                told.memory.save(path)
        assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m"]
        told.memory.load(path)
        assert_same_memory(told, "alice", held, 0)

    def test_an_old_file_survives_a_failing_adapter_save(self, told, tmp_path, monkeypatch):
        told.save_pretrained(tmp_path)
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with torch.no_grad():
            told.memory_layers[0].attention.out_gain.add_(1)
        with monkeypatch.context() as patch:
            self.full_disk(patch, "fsync")
            with pytest.raises(OSError, match="No space"):
                told.save_pretrained(tmp_path)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

    def test_missing_file(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match="no memory file here"):
            model.memory.load(tmp_path / "nowhere")

    def refused(self, model, path, message):
        held = {name: tensors_of(model, name) for name in model.memory.names}
        with pytest.raises(ValueError, match=message) as caught:
            model.memory.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert model.memory.names == tuple(held)
        for name, tensors in held.items():
            assert_same_memory(model, name, tensors, 0)

    @pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
    def test_truncated(self, told, tmp_path, keep):
        told.memory.save(tmp_path / "m")
        content = (tmp_path / "m").read_bytes()
        (tmp_path / "m").write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
        self.refused(told, tmp_path / "m", "damaged or not a memory file")

    def test_foreign(self, told, tmp_path):
        (tmp_path / "text").write_text("My name is Alice.\n" * 100)
        self.refused(told, tmp_path / "text", "damaged or not a memory file")
        save_file({"x": torch.ones(2)}, tmp_path / "tensors")
        self.refused(told, tmp_path / "tensors", "not a fastmem memory file")
        save_file({"x": torch.ones(2)}, tmp_path / "half", metadata={"format": FORMAT})
        self.refused(told, tmp_path / "half", "damaged or not a memory file")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"memory_dim": 16}, r"of another model \(memory_dim: 16, here 32\)"),
            ({"buffer_slots": 13}, r"buffer_slots: 13, here 12"),
            ({"store_slots": 0}, r"store_slots: 0, here 6"),
            ({"memory_layer_positions": (0, 2, 3)}, r"memory_layer_positions: \[0, 2, 3\], here \[1, 2, 3\]"),
            ({"seed": 9}, r"of another model \(weights: "),
        ],
    )
    def test_of_another_model(self, told, tmp_path, changes, message):
        other = make_model(**changes)
        other(input_ids=prompt(1), sessions=["alice"])
        other.memory.save(tmp_path / "m")
        self.refused(told, tmp_path / "m", message)

    def test_an_adapter_kept_in_float16_reads_the_memories_of_its_float32_self(self, told, tmp_path):
        told.memory.save(tmp_path / "m")
        told.save_pretrained(tmp_path / "half", torch.float16)
        other = type(told).from_pretrained(make_base(), tmp_path / "half")
        assert other.memory.load(tmp_path / "m") == ("alice", "bob")

    def test_wrong_widths_inside_of_a_file(self, told, tmp_path):
        told.memory.save(tmp_path / "m", ["alice"])
        with safe_open(tmp_path / "m", "pt") as file:
            meta, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        meta.pop("sha256")
        key = "0/1.store.values"

        def forge(changed, name):
            save_file(changed, tmp_path / name, metadata=meta | {"sha256": checksum(changed, meta)})

        forge(tensors | {key: tensors[key][..., :-1].contiguous()}, "narrow")
        self.refused(told, tmp_path / "narrow", r"store.values of layer 1 is \(1, 6, 63\)")
        forge(tensors | {key: tensors[key].half()}, "half")
        self.refused(told, tmp_path / "half", "float16")
        tensors.pop(key)
        forge(tensors, "less")
        self.refused(told, tmp_path / "less", "damaged")


def test_atomic_write_cleans_up_after_an_interrupt(tmp_path, monkeypatch):
    atomic_write(tmp_path / "x", b"old")

    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_flipped_bit_is_noticed(told, tmp_path):
    path = tmp_path / "a.safetensors"
    told.memory.save(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x40
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged"):
        told.memory.load(path)


def test_no_flipped_bit_of_the_header_changes_what_is_loaded(told, tmp_path):
    """One bit in each byte of the metadata (session, model, the checksum itself), and in each ninth of the rest."""
    path = tmp_path / "a.safetensors"
    told.memory.save(path, ["alice"])
    expected = tensors_of(told, "alice")
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    start = whole.index(b'"__metadata__"')
    metadata = range(start, whole.index(b"}}", start))
    places = sorted({*metadata, *range(8, 8 + size, 9)})
    refused = 0
    for at in places:
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        path.write_bytes(bytes(content))
        told.memory.clear()
        try:
            loaded = told.memory.load(path)
        except ValueError as error:
            assert "\n" not in str(error) and told.memory.names == ()
            refused += 1
        else:
            assert loaded == ("alice",), content[at - 20 : at + 20]
            assert_same_memory(told, "alice", expected, 0)
    assert refused > 0.9 * len(places) > 500


def test_metadata_that_was_changed_is_refused(told, tmp_path):
    path = tmp_path / "a.safetensors"
    told.memory.save(path)
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for changed in (
        meta | {"sessions": '["bob", "alice"]'},
        meta | {"sessions": '["alice", "eve"]'},
        meta | {"sessions": '["alice"]'},
        meta | {"model": meta["model"].replace('"llama"', '"gpt2"')},
        meta | {"more": "text"},
        meta | {"format": "fastmem memory 1"},
    ):
        assert changed != meta
        save_file(tensors, path, metadata=changed)
        with pytest.raises(ValueError, match=r"damaged \(its checksum does not fit its content\)"):
            told.memory.load(path)


def as_format_1(path):
    """Rewrite a memory file as the first format had it."""
    with safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    save_file(tensors, path, metadata=meta | {"format": "fastmem memory 1", "sha256": digest.hexdigest()})


def test_the_first_format_is_read(told, tmp_path):
    path = tmp_path / "a.safetensors"
    told.memory.save(path)
    as_format_1(path)
    other = make_model()
    assert other.memory.load(path) == ("alice", "bob")
    for name in ("alice", "bob"):
        assert_same_memory(other, name, tensors_of(told, name), 0)
    with pytest.raises(ValueError, match=r"of another model \(buffer_slots: 12, here 13\)"):
        make_model(buffer_slots=13).memory.load(path)
    content = bytearray(path.read_bytes())
    content[-100] ^= 0x40
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="damaged"):
        other.memory.load(path)


def test_a_newer_format_is_named(told, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({}, path, metadata={"format": "fastmem memory 3", "sessions": "[]", "model": "{}", "sha256": ""})
    with pytest.raises(ValueError, match=r"not a fastmem memory file \(format 'fastmem memory 3'\)"):
        told.memory.load(path)


@pytest.mark.parametrize("names", ["5", "null", "[5]", '{"alice": 1}', '["a", "a"]'])
def test_odd_session_names_in_a_file_are_refused(told, tmp_path, names):
    path = tmp_path / "a.safetensors"
    save_file({}, path, metadata={"format": FORMAT, "sessions": names, "model": "{}", "sha256": ""})
    with pytest.raises(ValueError, match="damaged"):
        told.memory.load(path)


def test_sessions_are_strings_and_cycles_whole_numbers(told):
    with pytest.raises(TypeError, match="sessions"):
        told(input_ids=prompt(1), sessions=[1])
    for cycles in (float("nan"), float("inf"), 1.5, True):
        with pytest.raises(TypeError, match="cycles"):
            told.memory.decay(cycles)
    with pytest.raises(ValueError, match="cycles"):
        told.memory.decay(10**400)


def test_a_copy_has_memories_of_its_own(told):
    other = copy.deepcopy(told)
    before = tensors_of(told, "alice")
    assert torch.equal(logits(other, "alice"), logits(told, "alice"))
    other(input_ids=prompt(7), sessions=["alice"])
    assert_same_memory(told, "alice", before, 0)
    assert not torch.equal(logits(other, "alice"), logits(told, "alice"))


def test_memory_stays_float32_under_a_cast():
    model = make_model().to(torch.bfloat16)
    model(input_ids=prompt(1), sessions=["alice"])
    assert {p.dtype for p in model.layers.parameters()} == {torch.float32}
    assert model.memory.inspect("alice")["layers"][0]["buffer"]["live"] > 0


def test_a_copied_session_is_a_memory_of_its_own(told, tmp_path):
    told.memory.copy("alice", "twin")
    told.memory.save(tmp_path / "all")
    other = make_model()
    other.memory.load(tmp_path / "all")
    assert_same_memory(other, "twin", tensors_of(told, "alice"), 0)


def test_what_was_loaded_does_not_hang_on_its_file(told, tmp_path):
    told.memory.save(tmp_path / "all")
    expected = tensors_of(told, "alice")
    other = make_model()
    other.memory.load(tmp_path / "all")
    size = (tmp_path / "all").stat().st_size
    with open(tmp_path / "all", "r+b") as file:
        file.write(b"\xff" * size)
    assert_same_memory(other, "alice", expected, 0)


def test_an_empty_session_is_saved(tmp_path):
    model = make_model()
    model.memory.put(["alice"], [layer.empty(1) for layer in model.memory_layers])
    model.memory.save(tmp_path / "file")
    other = make_model()
    other.memory.load(tmp_path / "file")
    assert_same_memory(other, "alice", tensors_of(model, "alice"), 0)


def test_threads_take_turns():
    model, errors = make_model(), []

    def talk(name, seed):
        try:
            for _ in range(5):
                model(input_ids=prompt(seed), sessions=[name])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=talk, args=(["alice", "bob", "carol"][i], i)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, name in enumerate(["alice", "bob", "carol"]):
        alone = make_model()
        for _ in range(5):
            alone(input_ids=prompt(i), sessions=[name])
        assert_same_memory(model, name, tensors_of(alone, name), 1e-5)


def test_a_name_that_fits_in_bytes_only_just(tmp_path):
    file = tmp_path / ("名" * 84)
    atomic_write(file, b"content")
    assert file.read_bytes() == b"content"
    with pytest.raises(OSError, match="名"):
        atomic_write(tmp_path / ("名" * 86), b"content")
