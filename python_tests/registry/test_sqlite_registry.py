from __future__ import annotations

import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from operations import CONFIGS, Pair, fix, signature

from fastmem.registry import DecayConfig, Fix, FixRegistry, FixType, sqlite_registry
from fastmem.registry.sqlite_registry import check

HERE = Path(__file__).parent


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fixes.db"


def run_model(path: Path, config: DecayConfig | None, steps: int, names: int, seed: int, reopenings: int) -> None:
    """Random operations on a file and on the plain model, with the file reopened at random points."""
    registry = FixRegistry(path, config, durability="normal")
    pair = Pair(registry, seed, names)
    reopen_at = set(random.Random(seed).sample(range(steps), reopenings))
    for step in range(steps):
        pair.step()
        if step in reopen_at:
            pair.registry.close()
            pair.registry = FixRegistry(path, durability="normal")
            pair.compare()
    pair.compare()
    pair.registry.close()
    assert check(path).problems == []
    assert check(path).entries == len(pair.model.entries)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_file_answers_as_the_plain_model(path, config):
    run_model(path, DecayConfig(**config), steps=3000, names=150, seed=1, reopenings=12)


def test_a_hundred_thousand_operations(path):
    run_model(path, None, steps=100_000, names=3000, seed=2, reopenings=20)


def test_what_was_registered_is_there_again(path):
    with FixRegistry(path, DecayConfig(min_strength=0.2)) as registry:
        registry.register(signature(1), fix(1))
        registry.report_success(signature(1))
        registry.lookup(signature(2))
        registry.advance_epoch()
        before = registry.entry(signature(1))
    with FixRegistry(path) as again:
        assert again.decay_config == DecayConfig(min_strength=0.2)
        assert again.entry(signature(1)) == before
        assert (again.get_stats()["misses"], again.current_epoch) == (1, 1)
        assert again.lookup(signature(1)) == fix(1)


def test_another_rule_goes_on_from_the_strengths_of_now(path):
    with FixRegistry(path) as registry:
        registry.register(signature(1), fix(1))
        for _ in range(10):
            registry.advance_epoch()
        strength = registry.entry(signature(1)).strength
    with FixRegistry(path, DecayConfig(0.5, 0.0, 0.01)) as registry:
        assert registry.entry(signature(1)).strength == strength
        registry.advance_epoch()
        assert registry.entry(signature(1)).strength == strength / 2
    with FixRegistry(path) as registry:
        assert registry.decay_config.exponential_rate == 0.5
        assert registry.entry(signature(1)).strength == strength / 2


def test_a_fix_is_written_as_it_was_when_registered(path):
    changing = fix(1)
    with FixRegistry(path) as registry:
        registry.register(signature(1), changing)
        changing.elements_to_add["other"] = float("nan")
        registry.report_success(signature(1))
        with pytest.raises(ValueError, match=r"^elements_to_add: expected .*finite number"):
            registry.register(signature(2), changing)
        for field, wrong in (("decomposition", "split"), ("elements_to_add", ["retry"]), ("category_moves", {"a": 1})):
            other = fix(3)
            setattr(other, field, wrong)
            with pytest.raises(ValueError, match=field):
                registry.register_many([signature(3), signature(2)], [fix(3), other])
        assert signature(2) not in registry
    with FixRegistry(path) as registry:
        assert registry.lookup(signature(1)) == fix(1)


def test_threads_share_commits(path):
    registry = FixRegistry(path)
    commits = []
    registry._connection.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)
    threads = [
        threading.Thread(
            target=lambda start=start: [registry.register(signature(n), fix(n)) for n in range(start, start + 50)]
        )
        for start in range(0, 400, 50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(commits) <= 400
    registry.close()
    with FixRegistry(path) as again:
        assert all(again.lookup(signature(n)) == fix(n) for n in range(400))


def test_capacity_survives_in_the_file(path):
    with FixRegistry(path, capacity=10) as registry:
        for number in range(100):
            registry.register(signature(number), fix(number))
        kept = set(registry.entries)
    with FixRegistry(path) as registry:
        assert set(registry.entries) == kept and len(kept) == 10
    with FixRegistry(path, capacity=4) as registry:
        fewer = set(registry.entries)
        assert len(fewer) == 4 and fewer < kept
    assert check(path).entries == 4


def test_similar_signatures_are_found_after_opening(path):
    with FixRegistry(path) as registry:
        registry.register(signature(1), fix(1))
    with FixRegistry(path, approximate=True) as registry:
        assert registry.match(signature(8)).level in ("context", "type")


# ---- one owner


def test_a_second_registry_is_refused(path):
    with FixRegistry(path) as registry:
        with pytest.raises(OSError, match=f"in use.*{path.name}"):
            FixRegistry(path)
        code = f"from fastmem.registry import *; FixRegistry({str(path)!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert other.returncode == 1 and "in use by another registry" in other.stderr.splitlines()[-1]
        registry.register(signature(1), fix(1))
    with FixRegistry(path) as registry:
        assert signature(1) in registry


def test_a_forked_child_does_not_write(path):
    registry = FixRegistry(path)
    child = os.fork()
    if child == 0:
        try:
            registry.register(signature(1), fix(1))
        except RuntimeError as error:
            os._exit(7 if "fork" in str(error) else 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    registry.register(signature(2), fix(2))
    registry.close()
    registry.close()
    with pytest.raises(ValueError, match="closed"):
        registry.register(signature(3), fix(3))
    assert check(path).entries == 1


@pytest.mark.parametrize(
    "end", ["sys.exit(0)", "del registry; gc.collect(); os._exit(0)", "registry.close(); sys.exit(0)"]
)
def test_a_child_s_end_takes_nothing_from_its_parent(path, end):
    code = f"""
import gc, os, sys
sys.path.insert(0, {str(HERE)!r})
from operations import *
registry = FixRegistry({str(path)!r})
registry.register(signature(1), fix(1))
if os.fork() == 0:
    {end}
os.wait()
registry.register(signature(2), fix(2))
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with FixRegistry(path) as registry:
        assert registry.lookup(signature(1)) == fix(1) and registry.lookup(signature(2)) == fix(2)


def test_a_registry_that_nobody_holds_lets_go_of_its_file(path):
    FixRegistry(path).register(signature(1), fix(1))
    with FixRegistry(path) as registry:
        assert signature(1) in registry
        with pytest.raises(RuntimeError, match="made already"):
            registry.__init__(path)
        assert signature(1) in registry


def test_a_transaction_that_an_interrupt_left_open_is_taken_back(path):
    registry = FixRegistry(path)
    registry._connection.execute("BEGIN EXCLUSIVE")
    registry._connection.execute("DELETE FROM fixes")
    registry.register(signature(1), fix(1))
    registry.close()
    with FixRegistry(path) as registry:
        assert registry.lookup(signature(1)) == fix(1)


def test_interrupts_leave_a_registry_that_works(path):
    """Whatever a handler raises into: what was acknowledged is in the file, and the next calls do their work."""
    code = f"""
import signal, sys
sys.path.insert(0, {str(HERE)!r})
from operations import *
class Stop(Exception): pass
inside = False
def stop(*_):
    global inside
    if inside:
        inside = False
        raise Stop
registry = FixRegistry({str(path)!r}, durability="normal")
signal.signal(signal.SIGALRM, stop)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.002)
acknowledged, successes = [], []
for number in range(1500):
    try:
        inside = True
        registry.register(signature(number), fix(number))
        inside = False
        acknowledged.append(number)
    except Stop:
        pass
    try:
        inside = True
        known = registry.report_success(signature(number))
        inside = False
        if known: successes.append(number)
    except Stop:
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
registry.register(signature(5000), fix(5000))
print(*acknowledged)
print(*successes)
registry.close()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    acknowledged, successes = ([int(number) for number in line.split()] for line in out.stdout.splitlines())
    assert 0 < len(acknowledged) <= 1500
    with FixRegistry(path) as registry:
        assert all(registry.lookup(signature(n)) == fix(n) for n in [*acknowledged, 5000])
        assert all(registry.entry(signature(n)).success_count >= 1 for n in successes)


def test_an_entry_whose_json_was_lost_is_written_from_its_fix(path):
    with FixRegistry(path) as registry:
        registry._insert(signature(1), fix(1))  # as an interrupt leaves it
        registry.register(signature(2), fix(2))
        assert registry.report_success(signature(1))
    with FixRegistry(path) as registry:
        assert registry.lookup(signature(1)) == fix(1) and registry.entry(signature(1)).success_count == 1


def test_a_handler_in_the_middle_of_a_write_is_refused_and_does_not_hang(path):
    code = f"""
import signal, sys
sys.path.insert(0, {str(HERE)!r})
from operations import *
registry = FixRegistry({str(path)!r})
signal.signal(signal.SIGALRM, lambda *_: (registry.close(), sys.exit(0)))
signal.setitimer(signal.ITIMER_REAL, 0.05)
for number in range(10**6):
    registry.register(signature(number), fix(number))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0 or "in the middle of a write" in out.stderr
    assert check(path).problems == []


def test_a_journal_without_its_file_is_not_taken_for_a_new_one_s(path):
    registry = FixRegistry(path)
    registry.register(signature(1), fix(1))
    path.unlink()
    with pytest.raises(ValueError, match="wal is left of a registry that is gone"):
        FixRegistry(path)


def test_a_file_that_was_larger_is_closed_up(path):
    make(path, entries=20)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE fixes SET id = id + 400000000 WHERE id > 10")
    connection.commit()
    connection.close()
    with FixRegistry(path) as registry:
        assert registry.get_stats()["memory_bytes"] < 10_000_000
        assert all(registry.lookup(signature(n)) == fix(n) for n in range(20))
        registry.report_success(signature(15))
    with FixRegistry(path) as registry:
        assert registry.entry(signature(15)).success_count == 1 and len(registry) == 20


def test_paths_of_every_kind(tmp_path):
    with FixRegistry(bytes(tmp_path / "fixes.db")) as registry:
        registry.register(signature(1), fix(1))
    assert os.listdir(tmp_path) == ["fixes.db"]


# ---- bad files


def make(path: Path, entries: int = 200) -> bytes:
    with FixRegistry(path) as registry:
        registry.register_many([signature(n) for n in range(entries)], [fix(n) for n in range(entries)])
    return path.read_bytes()


def test_foreign_files_stay_as_they_are(path):
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE notes (text)")
    other.commit()
    other.close()
    for content, words in ((path.read_bytes(), "another program"), (b"hello" * 50, "not a fastmem registry")):
        path.write_bytes(content)
        for function in (FixRegistry, check):
            with pytest.raises(ValueError, match=words):
                function(path)
        assert path.read_bytes() == content


def test_a_newer_file_is_refused(path):
    make(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    content = path.read_bytes()
    for function in (FixRegistry, check):
        with pytest.raises(ValueError, match=r"newer fastmem \(schema 9"):
            function(path)
    assert path.read_bytes() == content


def test_an_older_file_is_brought_up(path, monkeypatch):
    make(path)
    connection = sqlite3.connect(path)
    connection.execute("ALTER TABLE fixes DROP COLUMN last_access")
    connection.execute("PRAGMA user_version = 0")
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match="schema 0"):
        FixRegistry(path)
    monkeypatch.setitem(sqlite_registry.MIGRATIONS, 0, "ALTER TABLE fixes ADD COLUMN last_access INTEGER")
    with FixRegistry(path) as registry:
        assert len(registry) == 200 and registry.lookup(signature(3)) == fix(3)
    monkeypatch.undo()
    assert check(path).problems == []


@pytest.mark.parametrize("seed", range(12))
def test_damage_is_named_and_left_alone(path, seed):
    """Bytes overwritten or cut: opening gives one clear line or, where no row was hit, the right answers."""
    content = bytearray(make(path))
    generator = random.Random(seed)
    if seed % 3 == 0:
        content = content[: generator.randrange(200, len(content) - 100)]
    else:
        start = generator.randrange(100, len(content) - 600)
        content[start : start + 500] = generator.randbytes(500)
    path.write_bytes(content)
    try:
        registry = FixRegistry(path)
    except ValueError as error:
        assert str(path) in str(error) and "damaged" in str(error)
        assert path.read_bytes() == bytes(content)
        assert check(path).problems
        return
    for number in range(200):
        assert registry.lookup(signature(number)) in (None, fix(number))
    registry.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE fixes SET fix = '{' WHERE id = 5",
        'UPDATE fixes SET fix = \'{"fix_type":"wish"}\' WHERE id = 5',
        "UPDATE fixes SET strength = 7.0 WHERE id = 5",
        "UPDATE fixes SET touched = -1 WHERE id = 5",
        "UPDATE fixes SET created = 99 WHERE id = 5",
        "UPDATE fixes SET id = 5000000000 WHERE id = 5",
        "UPDATE fixes SET signature = (SELECT signature FROM fixes WHERE id = 6) WHERE id = 5",
        "UPDATE fixes SET signature = x'00ff' WHERE id = 5",
        "DELETE FROM registry",
        "DROP TABLE fixes",
    ],
)
def test_impossible_values_are_named(path, change):
    make(path)
    connection = sqlite3.connect(path)
    connection.execute(change)
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match="damaged"):
        FixRegistry(path)
    assert check(path).problems


def test_places_that_cannot_be(tmp_path):
    with pytest.raises(IsADirectoryError):
        FixRegistry(tmp_path)
    with pytest.raises(FileNotFoundError):
        check(tmp_path / "none.db")
    with FixRegistry(tmp_path / "new" / "folder" / "fixes.db") as registry:
        registry.register(signature(1), fix(1))
    empty = tmp_path / "empty.db"
    empty.touch()
    with FixRegistry(empty) as registry:
        registry.register(signature(1), fix(1))
    assert check(empty).entries == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere")
def test_a_read_only_file(tmp_path):
    path = tmp_path / "fixes.db"
    content = make(path)
    path.chmod(0o444)
    tmp_path.chmod(0o555)
    code = f"from fastmem.registry import *; FixRegistry({str(path)!r})"
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        for folder in [tmp_path, *tmp_path.parents[:2]]:
            folder.chmod(folder.stat().st_mode | 0o055)
        command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    finally:
        tmp_path.chmod(0o755)
    assert result.returncode == 1, result.stderr
    assert "cannot be" in result.stderr.splitlines()[-1] and path.name in result.stderr.splitlines()[-1]
    assert path.read_bytes() == content


# ---- a full disk


def test_a_full_disk_loses_nothing(path):
    registry = FixRegistry(path)
    registry.register(signature(1), fix(1))
    (pages,) = registry._connection.execute("PRAGMA page_count").fetchone()
    registry._connection.execute(f"PRAGMA max_page_count={pages}")
    big = Fix(FixType.COMPLETE_DEFINITION, definition_supplement="x" * 100_000)
    with pytest.raises(OSError, match=r"No space left.*fixes\.db"):
        registry.register(signature(2), big)
    with pytest.raises(OSError, match="No space left"):
        registry.advance_epoch()
    assert registry.lookup(signature(1)) == fix(1)
    registry._connection.execute("PRAGMA max_page_count=1000000")
    registry.register(signature(3), fix(3))  # takes the others along
    registry._file.close()  # no orderly end
    with FixRegistry(path) as again:
        assert again.lookup(signature(2)) == big
        assert len(again) == 3 and again.current_epoch == 1


def test_a_disk_that_fills_up_for_real(path):
    """A file size limit in a child process: an error in one line, and what was acknowledged is in the file."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(HERE)!r})
from operations import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
registry = FixRegistry({str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
for number in range(100_000):
    try:
        registry.register(signature(number), fix(number))
    except OSError as error:
        print(number, error)
        break
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number = int(result.stdout.split()[0])
    assert number > 10 and path.name in result.stdout and resource.RLIMIT_FSIZE is not None
    with FixRegistry(path) as registry:
        assert all(registry.lookup(signature(n)) == fix(n) for n in range(number))
    assert check(path).problems == []


# ---- kill -9

WRITER = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
from operations import *
registry = FixRegistry(sys.argv[1], durability=sys.argv[3])
number = int(sys.argv[2])
while True:
    registry.register(signature(number), fix(number))
    if number % 7 == 0:
        registry.report_success(signature(number))
    os.write(1, b"%d\\n" % number)
    number += 1
"""


def kill_rounds(folder: Path, rounds: int, seed: int) -> None:
    generator = random.Random(seed)
    path, start = folder / "fixes.db", 0
    for round_number in range(rounds):
        if round_number % 10 == 0:  # a new file: the kill may fall into its making
            path, start = folder / f"fixes{round_number}.db", 0
        durability = generator.choice(("full", "normal"))  # a killed process loses nothing in either
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(start), durability], stdout=subprocess.PIPE
        )
        begun = b""
        try:
            if generator.random() < 0.7:
                begun = writer.stdout.readline()
            threading.Event().wait(generator.random() * 0.12)
        finally:
            writer.kill()
        rest = (begun + writer.communicate()[0]).split(b"\n")[:-1]
        acknowledged = max([start - 1, *(int(line) for line in rest)])
        if not path.exists():
            assert acknowledged == start - 1
            continue
        with FixRegistry(path) as registry:
            held = len(registry)
            assert held in (acknowledged + 1, acknowledged + 2)  # the one on its way may be there or not
            for number in range(held):
                entry = registry.entry(signature(number))
                assert entry.fix == fix(number)
                # the one that was on its way is registered once more by the next writer
                reports = (1, 2) if number % 7 == 0 else (0,)
                assert number > acknowledged or entry.success_count in reports
        start = acknowledged + 1
        assert check(path).problems == []


def test_kill_9(tmp_path):
    kill_rounds(tmp_path, rounds=50, seed=0)


@pytest.mark.slow
def test_kill_9_a_thousand_times(tmp_path):
    kill_rounds(tmp_path, rounds=1000, seed=1)
