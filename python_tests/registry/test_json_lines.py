from __future__ import annotations

import dataclasses
import io
import json

import pytest
from operations import Pair, fix, signature

from fastmem import cli
from fastmem.registry import DecayConfig, ErrorSeverity, ErrorSignature, ErrorType, FixRegistry
from fastmem.registry.json_lines import decay_rule, export, load

DECAY = DecayConfig(exponential_rate=0.9, linear_rate=0.003, min_strength=0.05)


def exported(registry: FixRegistry) -> str:
    file = io.StringIO()
    assert export(registry, file) == len(registry)
    return file.getvalue()


def worked_on(registry: FixRegistry) -> Pair:
    pair = Pair(registry, seed=4, names=60)
    for _ in range(600):
        pair.step()
    assert len(registry) > 20 and registry.current_epoch > 5
    return pair


@pytest.fixture(params=["memory", "file", "redis"])
def empty(request, tmp_path):
    """An empty registry of each kind."""
    if request.param == "memory":
        yield FixRegistry(decay_config=DECAY)
        return
    server = request.getfixturevalue("redis_server") if request.param == "redis" else None
    with FixRegistry(server.url if server else tmp_path / "fixes.db", DECAY) as registry:
        yield registry


def test_a_registry_comes_back_as_it_was(empty):
    """Every field, the clock, the counts; and both go on alike."""
    pair = worked_on(FixRegistry(decay_config=DECAY))
    before = pair.registry
    text = exported(before)
    assert decay_rule(io.StringIO(text)) == DECAY
    assert load(empty, io.StringIO(text)) == len(before)
    assert empty.entries == before.entries
    pair.registry = empty
    pair.compare()
    for _ in range(300):
        pair.step()
    pair.compare()


def test_a_file_has_what_was_brought_in(tmp_path):
    pair = worked_on(FixRegistry(decay_config=DECAY))
    with FixRegistry(tmp_path / "fixes.db", DECAY) as registry:
        load(registry, io.StringIO(exported(pair.registry)))
    with FixRegistry(tmp_path / "fixes.db") as registry:
        assert registry.entries == pair.registry.entries
        pair.registry = registry
        pair.compare()


def test_what_the_registry_knows_wins(empty):
    source = FixRegistry(decay_config=DECAY)
    source.register_many([signature(n) for n in range(4)], [fix(n) for n in range(4)])
    source.report_success(signature(2))
    for _ in range(5):
        source.advance_epoch()
    source.lookup(signature(3))
    empty.register(signature(1), fix(100))
    empty.report_failure(signature(1))
    for _ in range(7):
        empty.advance_epoch()
    mine = empty.entry(signature(1))
    assert load(empty, io.StringIO(exported(source))) == 3
    assert load(empty, io.StringIO(exported(source))) == 0  # again: nothing
    assert empty.entry(signature(1)) == mine
    stats = empty.get_stats()
    assert (stats["current_epoch"], stats["hits"], stats["total_entries"]) == (7, 0, 4)
    entry, was = empty.entry(signature(2)), source.entry(signature(2))
    assert (entry.strength, entry.success_count) == (was.strength, 1)
    assert (entry.creation_epoch, entry.last_success_epoch) == (2, 2)  # as old as it was: 5 epochs
    assert empty.entry(signature(3)).last_access_epoch == 7


def test_a_younger_clock_makes_no_epoch_before_its_first():
    source, target = FixRegistry(), FixRegistry()
    source.register(signature(0), fix(0))
    for _ in range(5):
        source.advance_epoch()
    target.advance_epoch()
    load(target, io.StringIO(exported(source)))
    assert target.entry(signature(0)).creation_epoch == 0 and target.current_epoch == 1


def lines_of_an_export() -> list[str]:
    registry = FixRegistry()
    registry.register_many([signature(n) for n in range(3)], [fix(n) for n in range(3)])
    registry.register(ErrorSignature(ErrorSeverity.MAJOR, ErrorType.REMOVAL, "a\nb:['x']\u2028é", ["c'd"], 0.6), fix(9))
    return exported(registry).splitlines(keepends=True)


def edited(number: int, **changes):
    lines = lines_of_an_export()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | changes) + "\n"
    return lines


@pytest.mark.parametrize(
    "lines, words",
    [
        ([], "line 1: not an export"),
        (["{}\n"], "line 1: not an export"),
        (["hello\n"], "line 1: Expecting"),
        (edited(1, schema=2), "line 1: schema 2"),
        (edited(1, epoch=-1), "line 1: epoch"),
        (edited(1, epoch=2**31), "line 1: epoch"),
        (edited(1, decay={"exponential_rate": 2}), "line 1: decay: exponential_rate"),
        (edited(1, decay=None), "line 1: decay"),
        (lines_of_an_export()[:-1], "line 6: the file was cut short"),
        (lines_of_an_export()[:3] + lines_of_an_export()[4:], "line 5: expected 3 entries, as there are lines, got 4"),
        (lines_of_an_export() + ["{}\n"], "line 7: expected nothing"),
        ([*lines_of_an_export()[:2], '{"signature": \n'], "line 3: Expecting"),
        ([*lines_of_an_export()[:2], "[]\n"], "line 3: line: unexpected"),
        (edited(3, extra=1), "line 3: unknown field 'extra'"),
        (edited(4, signature="x"), "line 4: no signature"),
        (edited(4, signature=7), "line 4: signature"),
        (edited(4, error_signature_hash="0" * 16), "line 4: error_signature_hash"),
        (edited(4, strength=1.5), "line 4: strength"),
        (edited(4, strength=True), "line 4: strength"),
        (edited(4, success_count=-1), "line 4: success_count"),
        (edited(4, creation_epoch=None), "line 4: creation_epoch"),
        (edited(4, last_access_epoch=1), "line 4: last_access_epoch"),
        (edited(4, fix={"fix_type": "magic"}), "line 4: fix_type"),
        (edited(4, fix=3), "line 4: fix: expected an object"),
    ],
)
def test_errors_name_the_line(lines, words):
    registry = FixRegistry()
    with pytest.raises(ValueError) as caught:
        load(registry, lines)
    assert words in str(caught.value)
    assert len(registry) == 0


def test_more_than_the_capacity_is_refused():
    with pytest.raises(ValueError, match="registry is full: 2 entries"):
        load(FixRegistry(capacity=2), lines_of_an_export())


def test_commands(tmp_path, capsys, redis_server):
    """A file to text, text to a server with the file's rule, and back into another file."""
    with FixRegistry(tmp_path / "one.db", DECAY) as registry:
        pair = worked_on(registry)
    text, other = tmp_path / "one.jsonl", tmp_path / "two.db"
    assert cli.main(["registry", "export", str(tmp_path / "one.db"), str(text)]) == 0
    assert cli.main(["registry", "import", redis_server.url, str(text)]) == 0
    assert cli.main(["registry", "export", redis_server.url, str(tmp_path / "two.jsonl")]) == 0
    assert cli.main(["registry", "import", str(other), str(tmp_path / "two.jsonl")]) == 0
    entries = len(pair.model.entries)
    assert f"{entries} new entries, {entries} in all" in capsys.readouterr().err
    with FixRegistry(other) as registry:
        assert dataclasses.astuple(registry.decay_config) == dataclasses.astuple(DECAY)
        pair.registry = registry
        pair.compare()
    assert cli.main(["registry", "export", str(other), "-"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(text.read_text().splitlines())
    assert cli.main(["registry", "export", str(tmp_path / "three.db"), "-"]) == 1
    assert not (tmp_path / "three.db").exists()
    assert "three.db" in capsys.readouterr().err
