"""A registry's file: made as a whole, owned by one, its errors in one line."""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import ClassVar

from fastmem._registry import leak
from fastmem.registry.decay import DecayConfig

try:
    import fcntl
except ImportError:  # Windows, where closing a file drops no lock
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1
_APPLICATION = 0x66_6D_66_78  # "fmfx", where SQLite keeps a file's application
_NOT_WRITABLE = "the file or its folder cannot be written"

_TABLES = """
CREATE TABLE registry (
    id INTEGER PRIMARY KEY CHECK (id = 1), epoch INTEGER NOT NULL, hits INTEGER NOT NULL, misses INTEGER NOT NULL,
    exponential_rate REAL NOT NULL, linear_rate REAL NOT NULL, min_strength REAL NOT NULL);
CREATE TABLE fixes (
    id INTEGER PRIMARY KEY, signature TEXT NOT NULL, fix TEXT NOT NULL, strength REAL NOT NULL,
    touched INTEGER NOT NULL, created INTEGER NOT NULL, last_success INTEGER, last_access INTEGER,
    successes INTEGER NOT NULL, failures INTEGER NOT NULL);
"""


def prepare(path: Path, config: DecayConfig | None) -> None:
    """Make sure that `path` is a registry: make a new one where there is nothing."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and path.stat().st_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = Path(f"{path}-wal")
    if journal.exists() and journal.stat().st_size:
        raise ValueError(f"{journal} is left of a registry that is gone; bring that back, or remove this too")
    # Made whole under another name: whoever finds the file finds a registry, whenever this process dies.
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}")
    try:
        with clear_errors(path), closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            rule = config or DecayConfig()
            connection.executescript(f"PRAGMA application_id={_APPLICATION}; PRAGMA user_version={SCHEMA}; {_TABLES}")
            connection.execute(
                "INSERT INTO registry VALUES (1, 0, 0, 0, ?, ?, ?)",
                (rule.exponential_rate, rule.linear_rate, rule.min_strength),
            )
        if path.exists():  # empty, such as mkstemp leaves it
            os.replace(temporary, path)
        else:
            _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:  # another process was first
        pass
    except OSError:  # a file system without links
        os.rename(temporary, path)


def check_version(version: int, path: Path) -> None:
    """Raise ValueError for a file of a newer fastmem."""
    if version > SCHEMA:
        raise ValueError(f"{path} was written by a newer fastmem (schema {version}; this one knows {SCHEMA})")


class RegistryFile:
    """A registry's file, owned: no other `RegistryFile` has it, in this process or another, until it is closed.

    SQLite locks its files too, but POSIX drops such a lock as soon as anything in the process closes the file. So the
    owner also holds `flock`, which only its own descriptor can drop.
    """

    _open: ClassVar[weakref.WeakValueDictionary[tuple[int, int], RegistryFile]] = (
        weakref.WeakValueDictionary()
    )  # by inode

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connection: sqlite3.Connection | None = None
        self._process = os.getpid()
        self._handle: int | None = None
        status = path.stat()
        self._identity = (status.st_dev, status.st_ino)
        if self._identity in self._open:
            raise _in_use(path)  # a second descriptor is not even opened
        if not (os.access(path, os.W_OK) and os.access(path.absolute().parent, os.W_OK)):  # SQLite writes beside it too
            raise PermissionError(errno.EACCES, _NOT_WRITABLE, str(path))
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            if fcntl is not None:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _check_header(os.read(self._handle, 100), path)
        except BaseException as error:
            os.close(self._handle)
            self._handle = None
            raise (_in_use(path) if isinstance(error, BlockingIOError) else error) from None
        self._open[self._identity] = self

    def connect(self) -> sqlite3.Connection:
        """SQLite's connection to it, which has the file for itself."""
        with clear_errors(self.path):
            uri = f"{self.path.absolute().as_uri()}?mode=rw"
            self.connection = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None, check_same_thread=False)
            self.connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute("PRAGMA cache_size=-65536")  # 64 MiB: a large batch is written once
            with transaction(self.connection):  # takes SQLite's lock, and keeps it
                pass
            return self.connection

    def close(self) -> None:
        """Let go of the file; once. What a forked child has inherited is its parent's, and stays as it is."""
        handle, self._handle = self._handle, None
        if handle is None or os.getpid() != self._process:
            return
        if self.connection is not None:
            self.connection.close()
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_UN)  # also where a forked child has inherited the descriptor
        os.close(handle)
        self._open.pop(self._identity, None)

    __del__ = close

    @classmethod
    def _forked(cls) -> None:
        # Closed in the child, even by its end, a connection would take the parent's journal away.
        for file in list(cls._open.values()):
            leak(file.connection)
        cls._open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=RegistryFile._forked)


def _in_use(path: Path) -> OSError:
    return OSError(errno.EBUSY, "in use by another registry", str(path))


def _check_header(header: bytes, path: Path) -> None:
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise ValueError(f"{path} is not a fastmem registry")
    if int.from_bytes(header[68:72], "big") != _APPLICATION:
        raise ValueError(f"{path} is another program's SQLite file, not a fastmem registry")
    check_version(int.from_bytes(header[60:64], "big"), path)


class transaction:
    """BEGIN, and COMMIT or ROLLBACK."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __enter__(self) -> None:
        self._roll_back()  # what an interrupt between BEGIN and the body may have left
        self.connection.execute("BEGIN EXCLUSIVE")

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            try:
                self.connection.execute("COMMIT")
                return
            except BaseException:
                self._roll_back()
                raise
        self._roll_back()

    def _roll_back(self) -> None:
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")


class clear_errors:
    """SQLite's errors as one line that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, sqlite3.Error):
            return
        name = getattr(error, "sqlite_errorname", "") or str(error)  # names come with Python 3.11
        for words, make in _ERRORS:
            if any(word in name or word in str(error) for word in words):
                raise make(str(self.path)) from error
        raise OSError(errno.EIO, f"SQLite: {error}", str(self.path)) from error


def _os_error(code: int, text: str | None = None) -> Callable[[str], OSError]:
    return lambda path: OSError(code, text or os.strerror(code), path)


_ERRORS: tuple[tuple[tuple[str, ...], Callable[[str], Exception]], ...] = (
    (("SQLITE_FULL", "is full"), _os_error(errno.ENOSPC)),
    (("SQLITE_BUSY", "SQLITE_LOCKED", "is locked"), lambda path: _in_use(Path(path))),
    (("SQLITE_READONLY", "readonly"), _os_error(errno.EROFS, _NOT_WRITABLE)),
    (("SQLITE_CANTOPEN", "unable to open"), _os_error(errno.EACCES, "cannot be opened")),
    (("SQLITE_PERM",), _os_error(errno.EACCES)),
    (
        (
            "SQLITE_CORRUPT",
            "SQLITE_NOTADB",
            "malformed",
            "not a database",
            "no such table",
            "no such column",
            "decode to UTF-8",
        ),
        lambda path: ValueError(f"{path} is damaged: SQLite cannot read it"),
    ),
)
