from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
import time

import pytest
from operations import Pair, fix, signature

from fastmem.registry import DecayConfig, FixRegistry
from fastmem.registry import stream as stream_module
from fastmem.registry.stream import serve


def event(op: str, number: int | None = None, **more):
    if number is not None:
        one = signature(number)
        names = ("context", "affected_categories", "delta")
        data = {name: getattr(one, name) for name in names}
        more["signature"] = {"severity": one.severity.value, "error_type": one.error_type.value, **data}
    return {"op": op, **more}


class Pipe(io.BytesIO):
    """Gives at most so many bytes at once, as a pipe does."""

    def __init__(self, content: bytes, most: int) -> None:
        super().__init__(content)
        self.most = most

    def read1(self, size: int = -1) -> bytes:
        return super().read1(min(size, self.most))


def answers(registry: FixRegistry, lines, most: int = 1 << 20) -> list[dict]:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    out = io.BytesIO()
    count = serve(registry, Pipe(text.encode("utf-8", "surrogateescape"), most), out)
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert count == len(found)
    return found


def test_each_event_is_answered():
    registry = FixRegistry(decay_config=DecayConfig(exponential_rate=0.5, linear_rate=0.0, min_strength=0.4))
    events = [
        event("lookup", 1),
        event("register", 1, fix=fix(1).to_dict()),
        event("lookup", 1, id="a"),
        event("success", 1, id=[1, None, "é"]),
        event("failure", 2),
        event("epoch", id=None),
        event("stats", id=1.5),
        event("epoch"),
    ]
    found = answers(registry, events)
    stats = found.pop(6)
    assert stats["id"] == 1.5 and stats["stats"]["total_entries"] == 1 and stats["stats"]["hits"] == 1
    assert found == [
        {"ok": True, "fix": None},
        {"ok": True},
        {"id": "a", "ok": True, "fix": json.loads(fix(1).to_json())},
        {"id": [1, None, "é"], "ok": True, "known": True},
        {"ok": True, "known": False},
        {"id": None, "ok": True, "pruned": 0, "epoch": 1},
        {"ok": True, "pruned": 1, "epoch": 2},
    ]


@pytest.mark.parametrize("most", [1, 7, 1000, 1 << 20])
def test_blocks_of_any_size_leave_the_registry_that_calls_leave(most):
    """The same operations as calls and as lines, cut anywhere."""
    pair = Pair(FixRegistry(), seed=1, names=30)
    draw, lines = pair.random, []
    for _ in range(400):
        number = draw.randrange(30)
        known = pair.signatures[number]
        op = draw.choice(("register", "lookup", "lookup", "success", "failure", "epoch"))
        if op == "register":
            pair.model.register(known.text, fix(number))
            lines.append(event(op, number, fix=fix(number).to_dict()))
        elif op == "epoch":
            pair.model.advance_epoch()
            lines.append(event(op))
        else:
            name = op if op == "lookup" else f"report_{op}"
            getattr(pair.model, name)(known.text)
            lines.append(event(op, number, id=len(lines)))
    found = answers(pair.registry, lines, most)
    assert all(answer["ok"] for answer in found)
    assert [answer.get("id") for answer in found] == [line.get("id") for line in lines]
    pair.compare()


def changed(**changes):
    line = event("lookup", 1)
    line["signature"] |= changes
    return line


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "Expecting"),
        ("nonsense", "no JSON"),
        ("[1]", "expected an object"),
        ('{"op": "stats"} {"op": "stats"}', "more than one"),
        ('{"op": "stats", "id": NaN}', "NaN"),
        ('{"op": "stats", "id": 1e999}', "JSON compliant"),
        ("[" * 100_000, "recursion"),
        ('{"op": "\udcff"}', "utf-8"),
        ({}, "op: expected one of lookup"),
        ({"op": ["lookup"]}, "op: expected one of lookup"),
        ({"op": "remove"}, "got 'remove'"),
        ({"op": "lookup"}, "signature is missing"),
        ({"op": "lookup", "signature": None}, "signature: expected an object"),
        ({"op": "lookup", "signature": "x"}, "signature: expected an object"),
        ({"op": "lookup", "signature": {}}, "severity is missing"),
        (changed(severity="awful"), "severity: expected one of catastrophic"),
        (changed(severity=["major"]), "severity: expected one of catastrophic"),
        (changed(error_type=None), "error_type: expected one of removal"),
        (changed(context=3), "context"),
        (changed(context="\ud800"), "UTF-8"),
        (changed(affected_categories="spatial"), "affected_categories: expected a list"),
        (changed(affected_categories=[1]), "affected_categories"),
        (changed(affected_categories=[["a"]]), "affected_categories"),
        (changed(delta="big"), "delta: expected a number"),
        (changed(delta=True), "delta: expected a number"),
        (changed(delta=10**400), "finite number"),
        (event("register", 1), "fix is missing"),
        (event("register", 1, fix={"fix_type": "magic"}), "fix_type: expected one of add"),
        (event("register", 1, fix=[]), "fix: expected an object"),
        (json.dumps(event("register", 1, fix={"fix_type": "add", "elements_to_add": {"a": 7}})).replace("7}", "1e999}"),
         "finite number"),
    ],
)  # fmt: skip
def test_a_bad_line_is_refused_and_the_stream_goes_on(line, words):
    registry = FixRegistry()
    good = event("register", 2, fix=fix(2).to_dict())
    found = answers(registry, [event("lookup", 1), good, "", " \r", line, event("lookup", 2, id=1), line])
    assert [answer["ok"] for answer in found] == [True, True, False, True, False]
    assert words in found[2]["error"] and found[2] == found[4]
    assert found[3]["fix"] == json.loads(fix(2).to_json())
    assert len(registry) == 1


def test_the_id_of_a_bad_event_comes_back():
    assert answers(FixRegistry(), [{"op": "lookup", "id": 9}]) == [
        {"id": 9, "ok": False, "error": "signature is missing"}
    ]


def test_a_line_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(stream_module, "_LONGEST", 1000)
    long = json.dumps(event("lookup", 1) | {"id": "x" * 5000})
    found = answers(FixRegistry(), [event("lookup", 1, id=1), long, event("lookup", 1, id=2)], most=100)
    assert [answer.get("id") for answer in found] == [1, None, 2]
    assert "longer than" in found[1]["error"]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(stream_module, "_REMEMBERED", 8)
    registry = FixRegistry()
    lines = [event("register", n, fix=fix(n).to_dict()) for n in range(100)]
    found = answers(registry, lines + [event("lookup", n) for n in range(100)])
    assert [answer["fix"] for answer in found[100:]] == [json.loads(fix(n).to_json()) for n in range(100)]


class Failing(FixRegistry):
    commits = 0
    broken = False

    def _written(self) -> None:
        self.commits += 1
        if self.broken:
            raise OSError("the disk is full")


def test_a_block_is_written_once_and_acknowledged_after():
    registry = Failing()
    lines = [event("register", n, fix=fix(n).to_dict(), id=n) for n in range(50)]
    assert all(answer["ok"] for answer in answers(registry, lines))
    assert registry.commits == 1
    registry.broken = True
    found = answers(
        registry, [event("success", 1, id=1), event("lookup", 1, id=2), event("lookup", 99), event("epoch")]
    )
    assert [answer["ok"] for answer in found] == [False, True, True, False]
    assert found[0] == {"id": 1, "ok": False, "error": "the disk is full"}


def test_a_file_keeps_what_was_acknowledged(tmp_path):
    """Killed after the answer and before the end of the input."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmem.cli", "registry", "stream", str(tmp_path / "fixes.db")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    lines = [event("register", n, fix=fix(n).to_dict()) for n in range(300)] + [event("success", 3), event("epoch")]
    process.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    process.stdin.flush()
    for _ in lines:
        assert json.loads(process.stdout.readline())["ok"]
    process.kill()
    process.wait()
    with FixRegistry(tmp_path / "fixes.db") as registry:
        assert len(registry) == 300 and registry.current_epoch == 1
        assert registry.entry(signature(3)).success_count == 1
        assert registry.lookup(signature(299)) == fix(299)


def test_a_caller_who_waits_gets_each_answer_at_once():
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmem.cli", "registry", "stream"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    out = process.stdout.fileno()
    for number in range(5):
        process.stdin.write(json.dumps(event("lookup", 1, id=number)).encode() + b"\n")
        process.stdin.flush()
        assert select.select([out], [], [], 30)[0], "no answer"
        assert json.loads(os.read(out, 65536)) == {"id": number, "ok": True, "fix": None}
    process.stdin.write(b'{"op": "epoch"}')  # the last line needs no newline
    process.stdin.close()
    assert json.loads(process.stdout.read()) == {"ok": True, "pruned": 0, "epoch": 1}
    assert process.wait(30) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes that do not block")
def test_an_input_that_does_not_block_is_waited_for():
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmem.cli", "registry", "stream"], stdin=ours, stdout=subprocess.PIPE
    )
    os.close(ours)
    assert process.stdout is not None
    for _ in range(2):
        os.write(theirs, b'{"op": "epoch"}\n')
        assert json.loads(process.stdout.readline())["ok"]
        time.sleep(0.2)  # nothing is there to read
    os.close(theirs)
    assert process.wait(60) == 0
    process.stdout.close()


def test_a_stream_to_redis(redis_server):
    with FixRegistry(redis_server.url) as registry:
        found = answers(registry, [event("register", 1, fix=fix(1).to_dict()), event("lookup", 1), event("lookup", 2)])
        assert [answer.get("fix") for answer in found] == [None, json.loads(fix(1).to_json()), None]


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_closed_end_is_one_clear_line(closed):
    command = f'"{sys.executable}" -m fastmem registry stream {closed}'
    found = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert found.returncode == 1 and "standard input or output is closed" in found.stderr.splitlines()[-1]
