"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def atomic_write(path: str | Path, content: bytes, *, private: bool = False) -> None:
    """Replace a file as a whole or not at all: after an error the old one is still there.

    Args:
        path: the file; its directory is made where it is missing.
        content: what it is to hold.
        private: whether only its owner may read it (mode 600); otherwise the umask decides.

    Raises:
        OSError: if the content cannot be written (a full disk, no permission); names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_temporary_prefix(path) + secrets.token_hex(6))
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def remove_left_over(path: str | Path) -> None:
    """Remove what writes of this file that were killed half way have left beside it."""
    path = Path(path)
    prefix = _temporary_prefix(path)
    for file in path.parent.iterdir():
        if file.name.startswith(prefix) and len(file.name) == len(prefix) + 12:
            file.unlink(missing_ok=True)


def _temporary_prefix(path: Path) -> str:
    name = path.name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")  # file systems count bytes
    return f".{name}."


def atomic_files(directory: str | Path, files: dict[str, bytes]) -> None:
    """Write several files, each atomically, into a directory that is made where it is missing."""
    for name, content in files.items():
        atomic_write(Path(directory) / name, content)
