"""A directory of memories, one file per session: many users, many processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastmem._files import remove_left_over
from fastmem.models.memory_model import MemoryModel
from fastmem.models.sessions import Sessions, session_names
from fastmem.nn import DualMemoryState

if TYPE_CHECKING:
    from fastmem.models.memory_augmented_model import MemoryAugmentedModel

SUFFIX = ".memory"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Unsaved:
    """What a session held when it could not be saved."""

    memory: Sessions
    """Whose it is: another adapter brings another one."""
    states: list[DualMemoryState]
    stamp: tuple[int, ...] | None
    """Of the session's file then."""


class MemoryDirectory:
    """Memories on disk, by session; the model holds one only while it is used.

        with directory.open("alice"):
            answer, info = model.generate("Hello! My name is Alice.", session="alice")

    A file holds one session and is written whole or not at all. Sessions never share a file, so processes that serve
    different users do not disturb each other; turns of the same user wait for each other, threads of a process too.

    What could not be saved (a full disk) is kept, and the next `open` of the session goes on from it, so that the next
    save that succeeds holds it too. Where another process has saved or deleted the session in between, that stands, and
    what was kept is dropped with a warning.

    Args:
        path: the directory; made where it is missing.
        model: the model whose memories these are.
        patience: seconds to wait for another process that serves the same session.

    Raises:
        OSError: if the directory cannot be made.
    """

    def __init__(self, path: str | Path, model: MemoryModel | MemoryAugmentedModel, *, patience: float = 60.0) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.patience = patience
        self._model = model
        self._unsaved: dict[str, _Unsaved] = {}
        self._open: dict[str, int] = {}  # sessions that a thread has to itself
        self._open_changed = threading.Condition()

    @property
    def _memory(self) -> Sessions:
        inner = self._model if isinstance(self._model, MemoryModel) else self._model.model
        return inner.memory

    def file_of(self, session: str) -> Path:
        """Where a session's memory is kept, whether there is any yet. No two sessions share a file."""
        return self.path / f"{re.sub(r'[^A-Za-z0-9_-]', '_', session)[:40]}-{_digest(session)}{SUFFIX}"

    def __contains__(self, session: str) -> bool:
        return self.file_of(session).is_file()

    def sessions(self) -> tuple[str, ...]:
        """Sessions that have a file, sorted; files that are no memory are passed over."""
        found = []
        for file in self.path.glob(f"*{SUFFIX}"):
            with contextlib.suppress(ValueError, OSError):
                names = _sessions_in(file)
                if len(names) == 1 and self.file_of(names[0]).name == file.name:
                    found.append(names[0])
        return tuple(sorted(found))

    def load(self, session: str) -> bool:
        """Put a session's memory into the model, in place of what the model holds of it and of what was not saved.

        Returns:
            Whether there was a file; without one the session is empty.

        Raises:
            ValueError: if the file is damaged, of another model, or of another session; nothing has changed then.
        """
        file = self.file_of(session)
        if not file.is_file():
            self._unsaved.pop(session, None)
            self._restore(session)
            return False
        names = _sessions_in(file)
        if names != [session]:
            raise ValueError(f"{file}: expected the memory of {session!r} alone, found {names}")
        self._memory.load(file)
        self._unsaved.pop(session, None)
        return True

    def save(self, session: str) -> None:
        """Write what the model holds of a session to its file. `open` does it under the session's lock.

        Raises:
            KeyError: if the model holds nothing of it.
            OSError: if it cannot be written; the file of before is intact, and the model still holds the memory.
        """
        memory, file = self._memory, self.file_of(session)
        states = memory.states_of(session)
        try:
            memory.save(file, [session])
        except BaseException as error:
            self._unsaved[session] = _Unsaved(memory, states, _stamp(file))
            if isinstance(error, OSError):
                raise self._not_saved(session, error) from None
            raise
        self._unsaved.pop(session, None)

    def delete(self, session: str) -> None:
        """Remove a session's memory from disk and from the model.

        Raises:
            KeyError: if there is none.
            TimeoutError, RuntimeError: as `open`.
        """
        with self._alone(session), self._locked(session):
            known = session in self or session in self._memory or session in self._unsaved
            self.file_of(session).unlink(missing_ok=True)
            remove_left_over(self.file_of(session))
            self._unsaved.pop(session, None)
            self._restore(session)
        if not known:
            raise self._unknown(session)

    @contextlib.contextmanager
    def open(self, session: str, *, save: bool = True) -> Iterator[None]:
        """Within this context the model holds the session's memory; at the end it is saved and let go.

        After an error inside, and without `save`, all that was done inside is undone. Where saving fails, the model
        keeps the memory, and the next `open` goes on from it.

        Args:
            session: whose memory.
            save: whether to save at the end; without, other processes are not waited for, and nothing is written.

        Raises:
            ValueError: as `load`.
            OSError: as `save`.
            TimeoutError: if another process or thread has had this session open for longer than `patience`.
            RuntimeError: if this thread has it open already, or if the model's adapter was changed inside; nothing is
                saved then.
        """
        with self._alone(session), self._locked(session) if save else contextlib.nullcontext():
            memory = self._memory
            self._fetch(session)
            held = session in memory
            try:
                yield
                if memory is not self._memory:
                    raise RuntimeError(f"{session!r} not saved: the model's adapter was changed while it was open")
                if save and session in memory:
                    self.save(session)
                elif save and held:  # what was forgotten inside must not come back
                    self.file_of(session).unlink(missing_ok=True)
                    self._unsaved.pop(session, None)
            finally:
                self._restore(session)

    def export_to(self, session: str, path: str | Path) -> None:
        """Write a session's memory to a file outside of the directory, under the session's lock.

        Raises:
            KeyError: if there is no such session.
            ValueError: as `load`.
            OSError: if the file cannot be written; an older one is intact.
            TimeoutError, RuntimeError: as `open`.
        """
        with self._alone(session), self._locked(session):
            self._fetch(session)
            try:
                if session not in self._memory:
                    raise self._unknown(session)
                self._memory.save(path, [session])
            finally:
                self._restore(session)

    def import_from(self, path: str | Path) -> tuple[str, ...]:
        """Keep the sessions of a memory file here, under their locks, in place of what there was. Returns their names.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, foreign, or of another model; nothing has changed then.
            OSError: as `save`, for the first session that cannot be saved; those before it are.
            TimeoutError, RuntimeError: as `open`.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no memory file here")
        names = _sessions_in(path)
        with contextlib.ExitStack() as stack:
            for name in sorted(names):  # in one order: two imports never wait for each other
                stack.enter_context(self._alone(name))
                stack.enter_context(self._locked(name))
            loaded = self._memory.load(path)
            try:
                if list(loaded) != names:
                    raise ValueError(f"{path}: was replaced while it was read")
                for name in names:
                    self.save(name)
            finally:
                for name in loaded:
                    self._restore(name)
        return loaded

    def _fetch(self, session: str) -> None:
        """Put into the model what a turn begins with: what could not be saved if it still stands, else the file."""
        unsaved = self._unsaved.get(session)
        if unsaved is not None:
            if unsaved.memory is self._memory and unsaved.stamp == _stamp(self.file_of(session)):
                self._memory.put([session], unsaved.states)
                return
            what = "its file" if unsaved.memory is self._memory else "the adapter"
            log.warning("%s: what could not be saved of %r is dropped: %s was changed since", self.path, session, what)
        self.load(session)

    def _restore(self, session: str) -> None:
        """Leave in the model what could not be saved, and of all others nothing."""
        unsaved = self._unsaved.get(session)
        if unsaved is not None and unsaved.memory is self._memory:
            self._memory.put([session], unsaved.states)
        elif session in self._memory:
            self._memory.clear(session)

    @contextlib.contextmanager
    def _alone(self, session: str) -> Iterator[None]:
        """One thread of this process at a time."""
        me = threading.get_ident()
        with self._open_changed:
            if self._open.get(session) == me:
                raise RuntimeError(f"session {session!r} is open already")
            if not self._open_changed.wait_for(lambda: session not in self._open, self.patience):
                raise self._busy(session)
            self._open[session] = me
        try:
            yield
        finally:
            with self._open_changed:
                del self._open[session]
                self._open_changed.notify_all()

    @contextlib.contextmanager
    def _locked(self, session: str) -> Iterator[None]:
        from filelock import FileLock, Timeout  # torch depends on it

        lock = FileLock(self.path / f".{_digest(session)}.lock")
        try:
            lock.acquire(timeout=self.patience)
        except Timeout:
            raise self._busy(session) from None
        except OSError as error:
            raise self._not_saved(session, error) from None
        try:
            yield
        finally:
            lock.release()

    def _not_saved(self, session: str, error: OSError) -> OSError:
        reason = os.strerror(error.errno) if error.errno else str(error)
        return type(error)(
            error.errno or 0,
            f"memory of {session!r} not saved: {reason}; what was saved before is intact",
            str(self.path),
        )

    def _busy(self, session: str) -> TimeoutError:
        return TimeoutError(f"{self.path}: session {session!r} has been in use elsewhere for {self.patience:g} s")

    def _unknown(self, session: str) -> KeyError:
        return KeyError(f"unknown session {session!r}; known: {', '.join(self.sessions()) or 'none'}")


def _digest(session: str) -> str:
    return hashlib.sha256(session.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _stamp(file: Path) -> tuple[int, ...] | None:
    """Changes whenever a file is written anew; None: there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _sessions_in(file: Path) -> list[str]:
    """Names in a memory file, by its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            meta = opened.metadata() or {}
        return session_names(file, meta)
    except (SafetensorError, KeyError, json.JSONDecodeError, EOFError, RecursionError) as error:
        raise ValueError(f"{file}: damaged or not a memory file ({type(error).__name__}: {error})") from None
