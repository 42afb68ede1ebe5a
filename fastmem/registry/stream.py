"""A registry for programs of any language: one JSON object per line comes in, one per line is answered, in order.

    {"op": "register", "signature": {"severity": "major", "error_type": "removal", "context": "task",
                                     "affected_categories": ["spatial"], "delta": 0.6}, "fix": {"fix_type": "add"}}
    {"op": "lookup", "signature": {...}, "id": 7}

`op` is lookup, register, success, failure, epoch or stats; `id`, any JSON value, comes back in the answer. An answer
has "ok": true and, by `op`, "fix" (null: not known), "known" (whether the error was), "pruned" and "epoch", or "stats";
or "ok": false and "error", and the stream goes on. Lines without anything on them are passed over.

What is there to read is read at once and answered at once, so a caller who waits for each answer gets it, and one who
sends many lines pays for one write and, in a file, one commit for all of them. A change is answered when it is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any, BinaryIO

from fastmem.registry.decay import FAILURE_LOSS, SUCCESS_GAIN
from fastmem.registry.fix import Fix
from fastmem.registry.fix_registry import FixRegistry
from fastmem.registry.taxonomy import ErrorSeverity, ErrorSignature, ErrorType

_BLOCK = 1 << 20  # bytes that are asked for at once
_LONGEST = 1 << 24  # bytes of a line
_REMEMBERED = 1 << 16  # signatures, and fixes, whose parsed or encoded form is kept
_LARGE = sys.float_info.max  # JSON's 1e999 is read as infinity, and its integers may be larger than any float
_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError)


def serve(registry: FixRegistry, lines_in: BinaryIO, lines_out: BinaryIO) -> int:
    """Answer events until the input ends.

    The fixes that are held must not be changed from elsewhere meanwhile: their JSON is made once.

    Args:
        lines_in: where events come from; its `read1(n)` returns what is there, and waits only if nothing is.
        lines_out: where answers go; flushed after each block of input.

    Returns:
        How many events were answered.
    """
    server = _Server(registry)
    events = 0
    rest = b""
    skipping = False  # the rest of a line that was too long
    while data := lines_in.read1(_BLOCK):  # type: ignore[attr-defined]
        if skipping:
            _, newline, data = data.partition(b"\n")
            skipping = not newline
        block, newline, rest = (rest + data).rpartition(b"\n")
        answers = server.answers(block) if newline else []
        if len(rest) > _LONGEST:
            rest, skipping = b"", True
            answers.append(_refusal(ValueError(f"a line is longer than {_LONGEST} bytes")))
        events += _write(answers, lines_out)
    return events + _write(server.answers(rest), lines_out)


def _write(answers: list[str], lines_out: BinaryIO) -> int:
    if answers:
        lines_out.write(("\n".join(answers) + "\n").encode())
        lines_out.flush()
    return len(answers)


class _Server:
    def __init__(self, registry: FixRegistry) -> None:
        self.registry = registry
        self._signatures: dict[tuple[str, ...], ErrorSignature] = {}
        self._fixes: dict[int, tuple[Fix, str]] = {}  # by id; the fix is kept so that no other can have its id
        self._changes: dict[str, Callable[[dict[str, Any]], str]] = {
            "register": self._register,
            "success": self._success,
            "failure": self._failure,
            "epoch": self._epoch,
        }

    def answers(self, block: bytes) -> list[str]:
        """One answer for each line that is not empty."""
        answers: list[str] = []
        changes: list[tuple[int, str]] = []  # place and start of the answers that hold only once changes are written
        lookup, changing = self._lookup, self._changes
        for line in _lines(block):
            head = "{"
            try:
                event = _decode(line)
                if type(event) is not dict:
                    raise ValueError(f"expected an object, got {line.strip()[:80]}")
                if "id" in event:
                    head = f'{{"id":{_encode(event["id"])},'
                op = event.get("op")
                if op == "lookup":
                    answers.append(head + lookup(event))
                elif type(op) is str and op in changing:
                    answer = changing[op](event)
                    changes.append((len(answers), head))
                    answers.append(head + answer)
                elif op == "stats":
                    answers.append(f'{head}"ok":true,"stats":{_encode(self.registry.get_stats())}}}')
                else:
                    known = ", ".join(("lookup", *changing, "stats"))
                    raise ValueError(f"op: expected one of {known}, got {op!r}")
            except _ERRORS as error:
                if line.strip():
                    answers.append(_refusal(error, head))
        if changes:
            try:
                self.registry._written()
            except _ERRORS as error:  # they are part of what the next block writes, but nobody can rely on it
                for place, head in changes:
                    answers[place] = _refusal(error, head)
        return answers

    def _lookup(self, event: dict[str, Any]) -> str:
        fix = self.registry.lookup(self._signature(event))
        if fix is None:
            return '"ok":true,"fix":null}'
        known = self._fixes.get(id(fix))
        return f'"ok":true,"fix":{known[1] if known else self._encoded(fix)}}}'

    def _register(self, event: dict[str, Any]) -> str:
        if "fix" not in event:
            raise ValueError("fix is missing")
        signature, fix = self._signature(event), Fix.from_dict(event["fix"])
        # A number that JSON cannot hold, such as 1e999, is refused before anything is changed.
        self.registry._learn(signature, fix, self._encoded(fix))
        return '"ok":true}'

    def _success(self, event: dict[str, Any]) -> str:
        known = self.registry._succeed(self._signature(event), SUCCESS_GAIN)
        return '"ok":true,"known":true}' if known else '"ok":true,"known":false}'

    def _failure(self, event: dict[str, Any]) -> str:
        known = self.registry._fail(self._signature(event), FAILURE_LOSS)
        return '"ok":true,"known":true}' if known else '"ok":true,"known":false}'

    def _epoch(self, event: dict[str, Any]) -> str:
        pruned = self.registry._advance()
        return f'"ok":true,"pruned":{pruned},"epoch":{self.registry.current_epoch}}}'

    def _signature(self, event: dict[str, Any]) -> ErrorSignature:
        """The event's signature. The same one is made once, whatever its delta, which no registry looks at."""
        try:
            data = event["signature"]
            severity, error_type, context = data["severity"], data["error_type"], data["context"]
            categories, delta = data["affected_categories"], data["delta"]
            if type(categories) is list and type(delta) in (float, int) and -_LARGE < delta < _LARGE:
                signature = self._signatures.get((severity, error_type, context, *categories))
                if signature is not None:
                    return signature
        except KeyError as error:
            raise ValueError(f"{error.args[0]} is missing") from None
        except TypeError:  # no object, or an entry that cannot be hashed: named below
            if not isinstance(data, dict):
                raise ValueError(f"signature: expected an object, got {data!r}") from None
        if type(categories) is not list:
            raise ValueError(f"affected_categories: expected a list, got {categories!r}")
        if type(delta) is bool:
            raise ValueError(f"delta: expected a number, got {delta!r}")
        signature = ErrorSignature(
            _member(ErrorSeverity, "severity", severity),
            _member(ErrorType, "error_type", error_type),
            context,
            categories,
            delta,
        )
        if len(self._signatures) >= _REMEMBERED:
            self._signatures.clear()
        self._signatures[(severity, error_type, context, *categories)] = signature
        return signature

    def _encoded(self, fix: Fix) -> str:
        if len(self._fixes) >= _REMEMBERED:
            self._fixes.clear()
        text = fix.to_json()
        self._fixes[id(fix)] = fix, text
        return text


def _lines(block: bytes) -> list[Any]:
    try:
        return block.decode().split("\n")
    except UnicodeDecodeError:  # which of the lines it is, the parser will say
        return block.split(b"\n")


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


_scan = json.JSONDecoder(parse_constant=_no_number).scan_once  # type: ignore[attr-defined]
_SPACE = " \t\r"


def _decode(line: Any) -> Any:
    """One JSON value. What json.loads does, less its search for an encoding, which takes as long as a short event."""
    if type(line) is bytes:
        line = line.decode()
    try:
        value, end = _scan(line, 0)
    except StopIteration:
        line = line.strip(_SPACE)
        try:
            value, end = _scan(line, 0)
        except StopIteration:
            raise ValueError(f"no JSON: {line[:80]}") from None
    if end != len(line) and line[end:].strip(_SPACE):
        raise ValueError(f"more than one JSON value: {line[:80]}")
    return value


def _encode(value: Any) -> str:
    return str(value) if type(value) is int else json.dumps(value, separators=(",", ":"), allow_nan=False)


def _member(kind: type[Enum], name: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise ValueError(f"{name}: expected one of {known}, got {value!r}") from None


def _refusal(error: BaseException, head: str = "{") -> str:
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f'{head}"ok":false,"error":{json.dumps(words)}}}'
