import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from tiny_chat import make_model, one_thread, save_adapter

from fastmem.models import MemoryDirectory
from fastmem.models import sessions as sessions_module

pytest.importorskip("transformers")
__all__ = ["one_thread"]

NAMES = ("alice", "Alice", "bob", "../../etc/passwd", "a/b", "a_b", "", ".", "ä" * 300, "nul\0", "x" * 500)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(save_adapter(tmp_path_factory.mktemp("adapter")))


@pytest.fixture
def store(model, tmp_path):
    model.clear_memory()
    return MemoryDirectory(tmp_path / "store", model)


def tell(store, model, session, text):
    with store.open(session):
        return model.generate(text, session=session)


def tokens(store, model, session):
    with store.open(session, save=False):
        return {row["token"] for row in model.held(session, 100)} if session in model.model.memory else set()


def test_each_session_has_its_own_file(store, model):
    tell(store, model, "alice", "my name is alice")
    tell(store, model, "bob", "my name is bob")
    assert model.model.memory.names == ()  # the model lets go of what is saved
    assert store.sessions() == ("alice", "bob") and "alice" in store and "carol" not in store
    assert "alice" in tokens(store, model, "alice") and "bob" not in tokens(store, model, "alice")
    assert "bob" in tokens(store, model, "bob") and "alice" not in tokens(store, model, "bob")
    assert tokens(store, model, "carol") == set()
    tell(store, model, "alice", "i live in lisbon")
    assert {"alice", "lisbon"} <= tokens(store, model, "alice")


def test_no_name_leaves_the_directory_or_meets_another(store, model):
    files = [store.file_of(name) for name in NAMES]
    assert {file.parent for file in files} == {store.path}
    assert len({file.name.lower() for file in files}) == len(NAMES)  # also where case does not count
    assert all(len(file.name) < 100 and file.name.isascii() for file in files)
    for name in NAMES:
        tell(store, model, name, "hello")
    assert store.sessions() == tuple(sorted(NAMES))
    assert {p.name for p in store.path.parent.iterdir()} == {"store"}


def test_delete(store, model):
    tell(store, model, "alice", "my name is alice")
    store.delete("alice")
    assert store.sessions() == () and "alice" not in store and tokens(store, model, "alice") == set()
    with pytest.raises(KeyError, match="unknown session 'alice'; known: none"):
        store.delete("alice")
    with pytest.raises(KeyError, match="unknown session 'alice'"):
        store.save("alice")


def test_a_turn_that_fails_saves_nothing(store, model):
    tell(store, model, "alice", "my name is alice")
    before = store.file_of("alice").read_bytes()
    with pytest.raises(RuntimeError, match="on the way"), store.open("alice"):
        model.generate("my name is bob", session="alice")
        raise RuntimeError("on the way")
    assert store.file_of("alice").read_bytes() == before and model.model.memory.names == ()


def test_reading_alone_writes_nothing(store, model):
    tell(store, model, "alice", "my name is alice")
    before = {p.name: p.stat().st_mtime_ns for p in store.path.iterdir()}
    with store.open("alice", save=False):
        model.generate("my name is bob", session="alice")
    assert {p.name: p.stat().st_mtime_ns for p in store.path.iterdir()} == before
    assert "bob" not in tokens(store, model, "alice")


def test_a_full_disk_loses_nothing(store, model, monkeypatch):
    tell(store, model, "alice", "my name is alice")
    before = store.file_of("alice").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sessions_module, "atomic_write", full)
        with pytest.raises(OSError, match="memory of 'alice' not saved: No space left on device; what was saved") as e:
            tell(store, model, "alice", "i live in lisbon")
    assert e.value.errno == 28 and "\n" not in str(e.value)
    assert store.file_of("alice").read_bytes() == before
    tell(store, model, "alice", "my dog is rex")  # the turn that could not be saved was kept
    assert {"alice", "lisbon", "rex"} <= tokens(store, model, "alice")


@contextlib.contextmanager
def full_disk(error=None):
    """Within this context no memory can be saved."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device") if error is None else error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions_module, "atomic_write", full)
        yield


def not_saved(store, model, session, text):
    """A turn that is through, but whose memory cannot be saved."""
    with full_disk(), pytest.raises(OSError, match="not saved"):
        tell(store, model, session, text)


def held(model, session):
    return {row["token"] for row in model.held(session, 100)}


def on_disk(store, model):
    """What is in the files, as another process finds it: session -> tokens."""
    other = MemoryDirectory(store.path, model)
    return {name: tokens(other, model, name) for name in other.sessions()}


def test_a_failed_turn_after_a_failed_save_is_not_saved_by_the_next(store, model):
    tell(store, model, "alice", "hello")
    not_saved(store, model, "alice", "i live in lisbon")
    with pytest.raises(RuntimeError, match="on the way"), store.open("alice"):
        model.generate("my name is bob", session="alice")
        raise RuntimeError("on the way")
    tell(store, model, "alice", "my dog is rex")
    found = on_disk(store, model)["alice"]
    assert {"hello", "lisbon", "rex"} <= found and "bob" not in found


def test_reading_after_a_failed_save_is_not_saved_by_the_next(store, model):
    tell(store, model, "alice", "hello")
    not_saved(store, model, "alice", "i live in lisbon")
    with store.open("alice", save=False):
        assert "lisbon" in held(model, "alice")  # it goes on from what was kept
        model.generate("my name is bob", session="alice")
    tell(store, model, "alice", "my dog is rex")
    found = on_disk(store, model)["alice"]
    assert {"hello", "lisbon", "rex"} <= found and "bob" not in found


def test_the_next_save_holds_what_several_failed_ones_held(store, model):
    for text in ("hello", "i live in lisbon", "my favorite color is green"):
        not_saved(store, model, "alice", text)  # there is no file yet
    assert store.sessions() == ()
    tell(store, model, "bob", "my name is bob")  # another session takes no part
    tell(store, model, "alice", "my dog is rex")
    assert {"hello", "lisbon", "green", "rex"} <= on_disk(store, model)["alice"]
    assert model.model.memory.names == () and store._unsaved == {}


def test_what_another_process_saved_in_between_stands(store, model, caplog):
    tell(store, model, "alice", "hello")
    not_saved(store, model, "alice", "i live in lisbon")
    tell(MemoryDirectory(store.path, model), model, "alice", "my dog is rex")
    tell(store, model, "alice", "my name is bob")
    found = on_disk(store, model)["alice"]
    assert {"hello", "rex", "bob"} <= found and "lisbon" not in found
    (record,) = caplog.records
    said = record.getMessage()
    assert said == f"{store.path}: what could not be saved of 'alice' is dropped: its file was changed since"


def test_what_another_process_deleted_in_between_stays_deleted(store, model):
    tell(store, model, "alice", "hello")
    not_saved(store, model, "alice", "i live in lisbon")
    MemoryDirectory(store.path, model).delete("alice")
    assert tokens(store, model, "alice") == set()
    tell(store, model, "alice", "my dog is rex")
    assert not {"hello", "lisbon"} & on_disk(store, model)["alice"]


def test_a_save_of_ones_own_that_failed_is_not_lost(store, model):
    with store.open("alice"):
        model.generate("hello", session="alice")
        with full_disk(), pytest.raises(OSError, match="not saved"):
            store.save("alice")
        model.generate("i live in lisbon", session="alice")
    assert {"hello", "lisbon"} <= on_disk(store, model)["alice"]
    model.generate("my dog is rex", session="carol")
    with full_disk(), pytest.raises(OSError, match="not saved"):
        store.save("carol")
    tell(store, model, "carol", "my favorite color is green")
    assert {"rex", "green"} <= on_disk(store, model)["carol"]


def test_an_interrupt_while_saving_loses_nothing(store, model):
    tell(store, model, "alice", "hello")
    with full_disk(KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        tell(store, model, "alice", "i live in lisbon")
    tell(store, model, "alice", "my dog is rex")
    assert {"hello", "lisbon", "rex"} <= on_disk(store, model)["alice"]


def test_what_is_forgotten_after_a_failed_save_does_not_come_back(store, model):
    tell(store, model, "alice", "hello")
    not_saved(store, model, "alice", "i live in lisbon")
    with store.open("alice"):
        model.clear_memory("alice")
    assert "alice" not in store and tokens(store, model, "alice") == set()
    not_saved(store, model, "alice", "i live in lisbon")
    store.delete("alice")  # there is no file, but something to forget
    assert tokens(store, model, "alice") == set() and model.model.memory.names == ()


def test_loading_drops_what_was_not_saved(store, model):
    tell(store, model, "alice", "hello")
    not_saved(store, model, "alice", "i live in lisbon")
    assert store.load("alice") and "lisbon" not in held(model, "alice")
    not_saved(store, model, "bob", "my name is bob")
    assert not store.load("bob") and "bob" not in model.model.memory


def test_a_session_that_is_open_is_not_opened_again(store, model):
    tell(store, model, "alice", "hello")
    with store.open("alice"):
        model.generate("my dog is rex", session="alice")
        for again in (
            lambda: tell(store, model, "alice", "my name is bob"),
            lambda: tokens(store, model, "alice"),
            lambda: store.delete("alice"),
            lambda: store.export_to("alice", store.path / "copy"),
        ):
            with pytest.raises(RuntimeError, match="session 'alice' is open already"):
                again()
        assert "rex" in held(model, "alice")
        tell(store, model, "bob", "my name is bob")
    assert {"hello", "rex"} <= on_disk(store, model)["alice"]


@pytest.mark.parametrize("save", [True, False])
def test_a_thread_waits_for_the_turn_of_another(store, model, save):
    """Also one that only reads: the model has one memory of a session, not one for each thread."""
    found, started = [], threading.Event()

    def other():
        started.set()
        with store.open("alice", save=save):
            found.append(held(model, "alice"))
            model.generate("my name is bob", session="alice")

    thread = threading.Thread(target=other)
    with store.open("alice"):
        model.generate("my dog is rex", session="alice")
        thread.start()
        started.wait()
        time.sleep(0.1)
        assert found == [] and "rex" in held(model, "alice")
    thread.join(60)
    assert "rex" in found[0]
    assert ("bob" in on_disk(store, model)["alice"]) == save


def test_a_thread_does_not_wait_for_ever(store, model):
    errors = []

    def other():
        try:
            tokens(store, model, "alice")
        except TimeoutError as error:
            errors.append(str(error))

    store.patience = 0.1
    with store.open("alice"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(60)
    assert errors == [f"{store.path}: session 'alice' has been in use elsewhere for 0.1 s"]


class TestExportAndImport:
    def test_round_trip(self, store, model, tmp_path):
        tell(store, model, "alice", "my dog is rex")
        store.export_to("alice", tmp_path / "a.memory")
        tell(store, model, "alice", "my name is bob")
        assert store.import_from(tmp_path / "a.memory") == ("alice",)
        found = on_disk(store, model)["alice"]
        assert "rex" in found and "bob" not in found and model.model.memory.names == ()

    def test_several_sessions(self, store, model, tmp_path):
        for name in ("bob", "alice"):
            model.generate(f"my name is {name}", session=name)
        model.save_memory(tmp_path / "both.memory")
        model.clear_memory()
        assert store.import_from(tmp_path / "both.memory") == ("bob", "alice")
        found = on_disk(store, model)
        assert "alice" in found["alice"] and "bob" in found["bob"] and "bob" not in found["alice"]
        assert model.model.memory.names == ()

    def test_what_could_not_be_saved(self, store, model, tmp_path):
        tell(store, model, "alice", "hello")
        not_saved(store, model, "alice", "i live in lisbon")
        store.export_to("alice", tmp_path / "a.memory")
        tell(store, model, "alice", "my dog is rex")
        not_saved(store, model, "alice", "my name is bob")
        assert store.import_from(tmp_path / "a.memory") == ("alice",)
        found = on_disk(store, model)["alice"]
        assert {"hello", "lisbon"} <= found and not {"rex", "bob"} & found
        with full_disk(), pytest.raises(OSError, match="memory of 'alice' not saved"):
            store.import_from(tmp_path / "a.memory")
        tell(store, model, "alice", "my dog is rex")
        assert {"hello", "lisbon", "rex"} <= on_disk(store, model)["alice"]

    def test_they_wait_for_a_turn_elsewhere(self, store, model, tmp_path):
        tell(store, model, "alice", "my dog is rex")
        tell(store, model, "bob", "my name is bob")
        store.export_to("alice", tmp_path / "a.memory")
        before = store.file_of("alice").read_bytes()
        store.patience = 0.1
        with MemoryDirectory(store.path, model).open("alice"):  # the locks are those of another process
            for call in (
                lambda: store.export_to("alice", tmp_path / "again"),
                lambda: store.import_from(tmp_path / "a.memory"),
            ):
                with pytest.raises(TimeoutError, match="session 'alice' has been in use elsewhere for"):
                    call()
            assert not (tmp_path / "again").exists() and store.file_of("alice").read_bytes() == before
            store.export_to("bob", tmp_path / "bob")
        store.export_to("alice", tmp_path / "again")

    def test_errors_change_nothing(self, store, model, tmp_path):
        tell(store, model, "alice", "my dog is rex")
        with pytest.raises(KeyError, match="unknown session 'bob'; known: alice"):
            store.export_to("bob", tmp_path / "b")
        with pytest.raises(FileNotFoundError, match="nothing: no memory file here"):
            store.import_from(tmp_path / "nothing")
        (tmp_path / "text").write_text("hello")
        whole = store.file_of("alice").read_bytes()
        (tmp_path / "half").write_bytes(whole[:-50])
        (tmp_path / "flipped").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        for name in ("text", "half", "flipped"):
            with pytest.raises(ValueError, match=f"{name}: damaged"):
                store.import_from(tmp_path / name)
        assert store.file_of("alice").read_bytes() == whole and model.model.memory.names == ()
        assert not store._open


def test_a_disk_that_fills_while_writing(store, model, monkeypatch):
    tell(store, model, "alice", "my name is alice")
    before = store.file_of("alice").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="not saved: No space left on device"):
            tell(store, model, "alice", "i live in lisbon")
    assert store.file_of("alice").read_bytes() == before
    assert [p.name for p in store.path.iterdir() if not p.name.endswith((".memory", ".lock"))] == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(store, model):
    tell(store, model, "alice", "my name is alice")
    store.path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="memory of 'bob' not saved: Permission denied"):
            tell(store, model, "bob", "hello")
        assert "alice" in tokens(store, model, "alice")
    finally:
        store.path.chmod(0o700)


def test_files_that_are_no_memory(store, model, tmp_path):
    tell(store, model, "alice", "my name is alice")
    tell(store, model, "bob", "my name is bob")
    file = store.file_of("alice")
    whole = file.read_bytes()
    for content, said in (
        (whole[:-50], "damaged or not a memory file"),
        (whole[:5], "damaged or not a memory file"),
        (b"", "damaged or not a memory file"),
        (b"hello" * 50, "damaged or not a memory file"),
        (store.file_of("bob").read_bytes(), r"expected the memory of 'alice' alone, found \['bob'\]"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said) as caught:
            tokens(store, model, "alice")
        assert "\n" not in str(caught.value) and model.model.memory.names == ()
        assert store.sessions() == ("bob",)
        assert file.read_bytes() == content
    file.write_bytes(whole)
    assert "alice" in tokens(store, model, "alice")


def test_a_memory_of_another_model(store, model, tmp_path):
    tell(store, model, "alice", "my name is alice")
    other = make_model(save_adapter(tmp_path / "wider", memory_dim=16))
    with pytest.raises(ValueError, match=r"of another model \(memory_dim: 32, here 16\)"):
        tokens(MemoryDirectory(store.path, other), other, "alice")


def test_the_path_is_a_file(model, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(FileExistsError):
        MemoryDirectory(tmp_path / "taken", model)


def test_the_same_user_twice_waits_or_gives_up(store, model):
    second = MemoryDirectory(store.path, make_model(), patience=0.2)
    with (
        store.open("alice"),
        pytest.raises(TimeoutError, match="session 'alice' has been in use elsewhere for"),
        second.open("alice"),
    ):
        raise AssertionError("both hold it")
    with store.open("alice"), second.open("bob"):
        pass


def test_two_processes_at_once(store, model, tmp_path):
    adapter = save_adapter(tmp_path / "adapter")
    code = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from tiny_chat import make_model
        from fastmem.models import MemoryDirectory
        model = make_model(sys.argv[2], max_new_tokens=1)
        store = MemoryDirectory(sys.argv[3], model)
        for session in ("a", "both") * 4:
            with store.open(session):
                model.generate("my name is alice", session=session)
        """
    )
    job = subprocess.Popen([sys.executable, "-c", code, Path(__file__).parent.parent, adapter, store.path])
    mine, end = 0, time.monotonic() + 300
    while job.poll() is None and time.monotonic() < end:
        tell(store, model, "b", "my name is bob")
        tell(store, model, "both", "my name is bob")
        mine += 1
        time.sleep(0.05)
    assert job.wait(1) == 0
    assert store.sessions() == ("a", "b", "both")
    assert "bob" not in tokens(store, model, "a") and "alice" not in tokens(store, model, "b")
    assert "alice" in tokens(store, model, "a")
    with store.open("both", save=False):
        ages = [int(s.buffer.age[0].max()) for s in model.model.memory.states_of("both")]
    assert max(ages) == mine + 4  # slots that were never written count every turn: none of either is lost


def test_what_is_forgotten_inside_does_not_come_back(store, model):
    tell(store, model, "alice", "my name is bob")
    with store.open("alice"):
        model.clear_memory("alice")
    assert "alice" not in store
    assert tokens(store, model, "alice") == set()


def test_another_adapter_does_not_cost_a_file(tmp_path):
    adapter = save_adapter(tmp_path / "adapter")
    model = make_model(adapter)
    store = MemoryDirectory(tmp_path / "store", model)
    tell(store, model, "alice", "my name is alice")
    with pytest.raises(RuntimeError, match="'alice' not saved: the model's adapter was changed"), store.open("alice"):
        model.load_checkpoint(adapter)
    with store.open("alice"):
        pass
    assert "alice" in tokens(store, model, "alice")


def test_delete_removes_what_a_killed_save_left(store, model):
    tell(store, model, "frank", "my name is frank")
    tell(store, model, "frank 2", "my name is frank")
    for session in ("frank", "frank 2"):
        file = store.file_of(session)
        file.with_name(f".{file.name}.0123456789ab").write_bytes(b"half a memory")
    store.delete("frank")
    left = [file.name for file in store.path.iterdir() if "frank" in file.name and not file.name.endswith(".lock")]
    assert sorted(left) == sorted([store.file_of("frank 2").name, f".{store.file_of('frank 2').name}.0123456789ab"])
