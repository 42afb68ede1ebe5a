"""A directory of memories, one file per session: many users, many processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastmem._files import remove_left_over
from fastmem.models.memory_model import MemoryModel
from fastmem.models.sessions import Sessions, session_names

if TYPE_CHECKING:
    from fastmem.models.memory_augmented_model import MemoryAugmentedModel

SUFFIX = ".memory"


class MemoryDirectory:
    """Memories on disk, by session; the model holds one only while it is used.

        with directory.open("alice"):
            answer, info = model.generate("Hello! My name is Alice.", session="alice")

    A file holds one session and is written whole or not at all. Sessions never share a file, so processes that serve
    different users do not disturb each other; turns of the same user wait for each other.

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
        self._unsaved: set[str] = set()
        self._known_memory: Sessions | None = None  # what `_unsaved` speaks of: another adapter brings another one

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
        """Put a session's memory into the model, in place of what the model holds of it.

        Returns:
            Whether there was a file; without one the session is empty.

        Raises:
            ValueError: if the file is damaged, of another model, or of another session; nothing has changed then.
        """
        file = self.file_of(session)
        if not file.is_file():
            self._release(session)
            return False
        names = _sessions_in(file)
        if names != [session]:
            raise ValueError(f"{file}: expected the memory of {session!r} alone, found {names}")
        self._memory.load(file)
        self._unsaved.discard(session)
        return True

    def save(self, session: str) -> None:
        """Write what the model holds of a session to its file.

        Raises:
            KeyError: if the model holds nothing of it.
            OSError: if it cannot be written; the file of before is intact, and the model still holds the memory.
        """
        try:
            self._memory.save(self.file_of(session), [session])
        except OSError as error:
            raise self._not_saved(session, error) from None
        self._unsaved.discard(session)

    def delete(self, session: str) -> None:
        """Remove a session's memory from disk and from the model.

        Raises:
            KeyError: if there is none.
        """
        with self._locked(session):
            known = session in self or session in self._memory
            self.file_of(session).unlink(missing_ok=True)
            remove_left_over(self.file_of(session))
            self._release(session)
        if not known:
            raise KeyError(f"unknown session {session!r}; known: {', '.join(self.sessions()) or 'none'}")

    @contextlib.contextmanager
    def open(self, session: str, *, save: bool = True) -> Iterator[None]:
        """Within this context the model holds the session's memory; at the end it is saved and let go.

        After an error inside, nothing is saved. Where saving fails, the model keeps the memory, and the next `open` or
        `save` tries again.

        Args:
            session: whose memory.
            save: whether to save at the end; without, nothing is locked or written.

        Raises:
            ValueError: as `load`.
            OSError: as `save`.
            TimeoutError: if another process has had this session open for longer than `patience`.
            RuntimeError: if the model's adapter was changed inside; nothing is saved then.
        """
        with self._locked(session) if save else contextlib.nullcontext():
            if self._known_memory is not self._memory:
                self._unsaved.clear()
                self._known_memory = self._memory
            if session not in self._unsaved:
                self.load(session)
            held = session in self._memory
            try:
                yield
                if self._known_memory is not self._memory:
                    raise RuntimeError(f"{session!r} not saved: the model's adapter was changed while it was open")
            except BaseException:
                if session not in self._unsaved:
                    self._release(session)
                raise
            if save and session in self._memory:
                self._unsaved.add(session)
                self.save(session)
            elif save and held:  # what was forgotten inside must not come back
                self.file_of(session).unlink(missing_ok=True)
            if session not in self._unsaved:
                self._release(session)

    @contextlib.contextmanager
    def _locked(self, session: str) -> Iterator[None]:
        from filelock import FileLock, Timeout  # torch depends on it

        lock = FileLock(self.path / f".{_digest(session)}.lock")
        try:
            lock.acquire(timeout=self.patience)
        except Timeout:
            raise TimeoutError(
                f"{self.path}: session {session!r} has been in use elsewhere for {self.patience:g} s"
            ) from None
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

    def _release(self, session: str) -> None:
        self._unsaved.discard(session)
        if session in self._memory:
            self._memory.clear(session)


def _digest(session: str) -> str:
    return hashlib.sha256(session.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _sessions_in(file: Path) -> list[str]:
    """Names in a memory file, by its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            meta = opened.metadata() or {}
        return session_names(file, meta)
    except (SafetensorError, KeyError, json.JSONDecodeError, EOFError, RecursionError) as error:
        raise ValueError(f"{file}: damaged or not a memory file ({type(error).__name__}: {error})") from None
