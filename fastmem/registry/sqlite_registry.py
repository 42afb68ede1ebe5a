"""The registry in a SQLite file: the table answers, the file remembers.

Every change of the table is noted in its journal. A write takes the journal, writes what these places hold now, and
commits; a thread that waited for another's commit finds its own change in it and is done (group commit). A row's id is
the entry's place in the table, so what was pruned is deleted by id and a page is written where it was.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmem.registry.decay import DecayConfig
from fastmem.registry.fix import Fix
from fastmem.registry.fix_registry import FixEntry, FixRegistry, _checked_fix, _checked_signature
from fastmem.registry.sqlite_file import SCHEMA, RegistryFile, check_version, clear_errors, prepare, transaction
from fastmem.registry.taxonomy import ErrorSignature, parse_text, stored_signature

_NEVER = 2**32 - 1  # the table's epoch that never was

_COLUMNS = "id, signature, strength, touched, created, last_success, last_access, successes, failures, fix"
_INSERT = f"INSERT OR REPLACE INTO fixes ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_UPDATE = "UPDATE fixes SET strength=?, touched=?, last_success=?, last_access=?, successes=?, failures=? WHERE id=?"

# schema -> the statements that make it the next one
MIGRATIONS: dict[int, str] = {}


class SqliteFixRegistry(FixRegistry):
    """`FixRegistry(path)`. One process has the file at a time; a second one is refused.

    A call that changes something returns when its change is in the file. If writing fails (OSError), the change is kept
    in memory and is part of the next write that succeeds. Which entries were only looked up, and the counts of hits and
    misses, are written by `close`.

    A decay rule given for an existing file replaces the file's: strengths as they are now go on under the new rule.
    """

    def _open(self, config: DecayConfig | None, durability: str) -> None:
        self._connection: sqlite3.Connection | None = None
        self._begin(config or DecayConfig())  # so that a registry whose file fails is still one
        path = Path(str(self.location))
        prepare(path, config)
        self._path = path
        self._process = os.getpid()
        # Of a kind that knows its owner, see `_turn`. The connection; and an entry with its JSON.
        self._writing, self._ordering = threading.RLock(), threading.RLock()
        self._encoded: dict[int, str] = {}  # place -> fix, of those not written yet
        self._file = RegistryFile(path)
        try:
            connection = self._file.connect()
            with clear_errors(path):
                connection.execute(f"PRAGMA synchronous={'FULL' if durability == 'full' else 'NORMAL'}")
                _migrate(connection, path)
                self._load(connection, config)
            self._connection = connection
            self._written()  # a new rule, and what it pruned
        except BaseException:
            self._connection = None
            self._file.close()
            raise

    def _load(self, connection: sqlite3.Connection, config: DecayConfig | None) -> None:
        epoch, hits, misses, stored = _registry_row(connection, self._path)
        rule = config or stored
        self._begin(rule)
        if rule != stored:  # the stored rule says how strong they are now
            now = FixRegistry(decay_config=stored)
            now._resume(epoch, 0, 0)
        self._resume(epoch, hits, misses)
        _close_up(connection)
        for row in connection.execute(f"SELECT {_COLUMNS} FROM fixes ORDER BY id"):
            place, text, fix, history = _checked_row(row, epoch, self._path)
            signature = stored_signature(text)
            if rule != stored:
                now._clear()
                now._restore(0, signature, fix, *history)
                known = now._row(signature)
                assert known is not None
                history = (known[4], epoch, *history[2:])
            if not self._restore(place, signature, fix, *history):
                raise ValueError(f"{self._path} is damaged: the signature of fix {place} is there twice")
            if self._similar is not None:
                self._similar.add(signature)
        if rule != stored:
            self._give_back([row[0] for row in self._iter_rows()])
        self._resume(epoch, hits, misses)  # prunes what a write cut short may have left
        self._stored = (epoch, stored)

    def _learn(self, signature: ErrorSignature, fix: Fix, encoded: str | None = None) -> None:
        encoded = encoded or _checked_fix(fix).to_json()
        with _turn(self._ordering):
            self._encoded[self._insert(_checked_signature(signature), fix)] = encoded
            if self._similar is not None:
                self._similar.add(signature)

    def register_many(self, signatures: Sequence[ErrorSignature], fixes: Sequence[Fix]) -> None:
        signatures, fixes = list(signatures), list(fixes)
        encoded = [(fix if fix.__class__ is Fix else _checked_fix(fix)).to_json() for fix in fixes]
        with _turn(self._ordering):
            self._encoded.update(zip(self._insert_many(signatures, fixes), encoded, strict=True))
            if self._similar is not None:
                for signature in signatures:
                    self._similar.add(signature)
        self._written()

    def _adopt(self, entries: Sequence[FixEntry]) -> int:
        with _turn(self._ordering):
            return super()._adopt(entries)

    def _restored(self, place: int, fix: Fix) -> None:
        self._encoded[place] = fix.to_json()
        super()._restored(place, fix)

    def _written(self) -> None:
        with _turn(self._writing):
            connection = self._usable()
            places: list[int] = []
            encoded: dict[int, str] = {}
            try:
                with _turn(self._ordering):
                    self._take_changed(places)
                    rows = self._stored_rows(places)
                    encoded, self._encoded = self._encoded, {}
                epoch = self._counts()[2]  # after the rows: none of them is younger
                if not places and (epoch, self.decay_config) == self._stored:
                    return
                with clear_errors(self._path), transaction(connection):
                    self._write_rows(connection, places, rows, encoded)
                    _write_registry(connection, epoch, self.decay_config)
            except BaseException:
                with self._ordering:  # it may be ours still
                    self._give_back(places)
                    self._encoded = encoded | self._encoded
                raise
            self._stored = (epoch, self.decay_config)

    def _write_rows(
        self, connection: sqlite3.Connection, places: list[int], rows: Sequence[Any], encoded: dict[int, str]
    ) -> None:
        # A row begins with its place. Without JSON only its history is new.
        inserts = ((*row, encoded[row[0]]) for row in rows if row is not None and row[0] in encoded)
        updates = [(row[2], row[3], *row[5:], row[0]) for row in rows if row is not None and row[0] not in encoded]
        deletes = [(place,) for place, row in zip(places, rows, strict=True) if row is None]
        connection.executemany("DELETE FROM fixes WHERE id=?", deletes)
        if updates and connection.executemany(_UPDATE, updates).rowcount < len(updates):
            self._write_whole(connection, [update[-1] for update in updates])
        connection.executemany(_INSERT, inserts)

    def _write_whole(self, connection: sqlite3.Connection, places: list[int]) -> None:
        """Rows of which some are not in the file: an interrupt came between an entry and its JSON."""
        known = {place for (place,) in connection.execute("SELECT id FROM fixes")}
        missing = [place for place in places if place not in known]
        for stored, row in zip(self._stored_rows(missing), self._rows(missing), strict=True):
            if stored is not None and row is not None:
                connection.execute(_INSERT, (*stored, row[3].to_json()))

    def _usable(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ValueError(f"{self.location}: the registry is closed")
        if os.getpid() != self._process:
            raise RuntimeError(f"{self.location}: opened before a fork; a child process must open the registry itself")
        return self._connection

    def close(self) -> None:
        """Write the accesses and counts, and let go of the file. Closing twice is fine; changing it then is not."""
        if self._connection is None or os.getpid() != self._process:
            return
        try:
            self._written()
        finally:
            with _turn(self._writing):
                connection, self._connection = self._connection, None
                if connection is not None:
                    with closing(self._file):
                        self._note_accesses(connection)

    def _note_accesses(self, connection: sqlite3.Connection) -> None:
        hits, misses, *_ = self._counts()
        accessed = [(row[9], row[0]) for row in self._rows(self._take_accessed()) if row is not None]
        with clear_errors(self._path):
            with transaction(connection):
                connection.executemany("UPDATE fixes SET last_access=? WHERE id=?", accessed)
                connection.execute("UPDATE registry SET hits=?, misses=?", (hits, misses))
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@dataclass(frozen=True)
class CheckResult:
    """What `check` found.

    Attributes:
        entries: rows that are sound.
        epoch: the file's epoch.
        problems: one line for each fault; empty: the file is sound.
    """

    entries: int
    epoch: int
    problems: list[str]


def check(path: str | os.PathLike[str]) -> CheckResult:
    """Read a registry's file from end to end and say what is wrong with it. Changes nothing.

    Raises:
        ValueError: no registry, or one of a newer version.
        OSError: missing, unreadable or in use.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    problems: list[str] = []
    entries = epoch = 0
    with closing(RegistryFile(path)) as file:
        try:
            connection = file.connect()
            with clear_errors(path):
                problems += [line for (line,) in connection.execute("PRAGMA integrity_check") if line != "ok"]
                epoch, *_ = _registry_row(connection, path)
                seen: set[str] = set()
                for row in connection.execute(f"SELECT {_COLUMNS} FROM fixes"):
                    try:
                        text = _checked_row(row, epoch, path)[1]
                        parse_text(text)
                    except ValueError as error:
                        problems.append(str(error))
                        continue
                    if text in seen:
                        problems.append(f"{path} is damaged: the signature of fix {row[0]} is there twice")
                        continue
                    seen.add(text)
                    entries += 1
        except ValueError as error:
            problems.append(str(error))
    return CheckResult(entries, epoch, problems)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    check_version(version, path)
    while version < SCHEMA:
        if version not in MIGRATIONS:
            raise ValueError(f"{path} has schema {version}, which no fastmem wrote")
        with transaction(connection):
            for statement in MIGRATIONS[version].split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={version + 1}")
        version += 1


def _registry_row(connection: sqlite3.Connection, path: Path) -> tuple[int, int, int, DecayConfig]:
    row = connection.execute(
        "SELECT epoch, hits, misses, exponential_rate, linear_rate, min_strength FROM registry"
    ).fetchone()
    if row is None or not all(isinstance(count, int) and count >= 0 for count in row[:3]) or row[0] >= _NEVER:
        raise ValueError(f"{path} is damaged: its epoch and counts cannot be read")
    return row[0], row[1], row[2], DecayConfig(*row[3:])


def _close_up(connection: sqlite3.Connection) -> None:
    """Give the rows of a file that was once much larger new places, since the table takes memory for each place."""
    count, most = connection.execute("SELECT count(*), max(id) FROM fixes").fetchone()
    if most is None or not 4 * count + 65536 < most < _NEVER - 1:
        return
    with transaction(connection):
        ids = [row[0] for row in connection.execute("SELECT id FROM fixes ORDER BY id")]
        connection.executemany("UPDATE fixes SET id=? WHERE id=?", enumerate(ids))


def _checked_row(row: Sequence[Any], epoch: int, path: Path) -> tuple[int, str, Fix, tuple[float, ...]]:
    """(place, canonical text, fix, history for the table)."""
    place, text, strength, touched, created, last_success, last_access, successes, failures, fix = row
    numbers = (place, touched, created, successes, failures)
    epochs = (touched, created, *(e for e in (last_success, last_access) if e is not None))
    sound = (
        isinstance(text, str)
        and isinstance(fix, str)
        and isinstance(strength, float)
        and 0.0 <= strength <= 1.0
        and all(isinstance(number, int) and 0 <= number < 2**32 - 2 for number in numbers)
        and all(isinstance(past, int) and 0 <= past <= epoch for past in epochs)
    )
    if not sound:
        raise ValueError(f"{path} is damaged: fix {place} has values that none can have")
    try:
        decoded = Fix.from_json(fix)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: fix {place} cannot be read ({error})") from None
    never = tuple(_NEVER if past is None else past for past in (last_success, last_access))
    return place, text, decoded, (strength, touched, created, *never, successes, failures)


def _write_registry(connection: sqlite3.Connection, epoch: int, rule: DecayConfig) -> None:
    connection.execute(
        "UPDATE registry SET epoch=?, exponential_rate=?, linear_rate=?, min_strength=?",
        (epoch, rule.exponential_rate, rule.linear_rate, rule.min_strength),
    )


def _turn(lock: Any) -> Any:
    """An RLock to be taken by `with`, which no signal comes between; refused where its own thread has it.

    That is how the handler of a signal, or a finalizer, asks in the middle of a write.
    """
    if lock._is_owned():
        raise RuntimeError("the registry was called, by a signal handler or a finalizer, in the middle of a write")
    return lock
