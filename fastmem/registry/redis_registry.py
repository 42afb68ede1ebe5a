"""A registry in a Redis server, for many processes. Every operation is one script of redis_registry.lua there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from fastmem.registry.decay import DecayConfig
from fastmem.registry.fix import Fix
from fastmem.registry.fix_registry import FixEntry, FixRegistry, _checked_signature
from fastmem.registry.taxonomy import text_key

if TYPE_CHECKING:
    from fastmem._registry import Row, Signature

_CHUNK = 500  # signatures in one call of a script, so that other clients have their turn in between
_EXPECTED = (
    "expected redis://[user:password@]host[:port][/number], rediss:// likewise, or unix:///path, with ?prefix=NAME"
)


class RedisFixRegistry(FixRegistry):
    """A `FixRegistry` that many processes share; `FixRegistry("redis://host/0")` makes one.

    The server's clock of epochs is everyone's: one client advances it for all. Each method is atomic but for
    `register_many` and `lookup_many`, which go in chunks of 500. What survives a crash of the server is up to
    its own settings; `durability` changes nothing.

    The decay rule is the first client's. `capacity` is each client's own: its registrations make room first, by
    dropping what would die first and, of that, what had no event for longest. A fix that is looked up is an equal one,
    not the object that was registered. In `get_stats`, "memory_bytes" is an estimate from some entries and includes the
    fixes; "registrations" and "pruned" count since the registry was begun.

    Args:
        location: redis://[user:password@]host[:port][/number], rediss://... or unix:///path. The query may hold
            `prefix` and redis-py's own options, such as `socket_timeout` (seconds; 30 unless said).
        prefix: what all keys of the registry begin with, followed by a colon. None: the location's, or "fastmem".
        decay_config, capacity: as of FixRegistry.

    Raises:
        ImportError: redis-py is not installed.
        ValueError: a bad argument, `approximate`, another decay rule than the registry's, keys that are no registry's,
            or one that a newer fastmem made.
        ConnectionError: the server cannot be reached, or was lost: then an operation under way may or may not have
            been done, and is not tried again. The next call connects anew.
        OSError: the server refuses, for example because it is out of memory.
    """

    def __init__(
        self,
        location: str | os.PathLike[str] | None = None,
        decay_config: DecayConfig | None = None,
        *,
        capacity: int | None = None,
        approximate: bool = False,
        durability: str = "full",
        prefix: str | None = None,
    ) -> None:
        super().__init__(None, decay_config, capacity=capacity, durability=durability)
        if approximate:
            raise ValueError("approximate: a registry in Redis finds equal signatures only")
        try:
            import redis
        except ImportError:
            raise ImportError('a registry in Redis needs the redis package: pip install "fastmem[redis]"') from None
        url, self.location, prefix_of_url = _parsed(str(location))
        self._prefix = prefix or prefix_of_url or "fastmem"
        self._keys = [f"{self._prefix}:registry", f"{self._prefix}:deaths"]
        self._errors = redis.exceptions
        options: dict[str, Any] = {"socket_timeout": 30, "socket_connect_timeout": 5}
        try:
            self._client: Any = redis.Redis.from_url(
                url, decode_responses=True, retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0), **options
            )
        except ValueError as error:
            raise ValueError(f"{self.location}: {error}") from None
        self._script = self._client.register_script(_source())
        # Whoever states no rule takes the one that is there.
        rule = self._run("open", "exact" if decay_config else "any")
        self.decay_config = DecayConfig(*map(float, rule))

    def _run(self, operation: str, *arguments: Any) -> Any:
        if self._client is None:
            raise ValueError(f"{self.location}: the registry is closed")
        config = self.decay_config
        rule = [f"{value:.17g}" for value in (config.exponential_rate, config.linear_rate, config.min_strength)]
        head: Any = (operation, f"{self._prefix}:entry:", *rule, self.capacity or 0)
        return self._asked(lambda: self._script(self._keys, (*head, *arguments)))

    def _asked(self, ask: Any) -> Any:
        """The server's answer; its errors in Python's own types, with its address."""
        errors = self._errors
        try:
            return ask()
        except (errors.ConnectionError, errors.TimeoutError) as error:
            raise ConnectionError(
                f"{self.location}: {_line(error)}; whether a change under way was made is not known"
            ) from error
        except errors.ResponseError as error:
            raise self._refusal(str(error)) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.location}: keys under {self._prefix!r} hold what is no text: {error}") from error
        except TypeError as error:  # an option in the address that redis-py does not know
            raise ValueError(f"{self.location}: {_line(error)}") from error

    def _refusal(self, message: str) -> Exception:
        ours = re.search("FASTMEM<(.*)>", message, re.DOTALL)
        if ours is None and "WRONGTYPE" not in message:
            return OSError(f"{self.location}: {message.splitlines()[0]}")
        what, _, detail = ours[1].partition(": ") if ours else ("foreign", "", f"something under {self._prefix!r}")
        if what == "newer":
            return ValueError(f"{self.location}: the registry has schema {detail}, made by a newer fastmem")
        if what == "rule":
            rule = ", ".join(f"{float(number):g}" for number in detail.split())
            return ValueError(
                f"decay_config: {self.location} has the rule ({rule}), which cannot change; got {self.decay_config}"
            )
        return ValueError(f"{self.location}: {detail} is not of a fix registry; choose another prefix")

    # What the table does in memory, done there.

    def lookup(self, signature: Signature) -> Fix | None:
        """The fix registered for this error, or None. Notes the epoch of the access."""
        text = _checked_signature(signature).text
        return self._decoded(text, self._run("lookup", text)[0])

    def _lookup_signatures(self, signatures: list[Any]) -> list[Any]:
        texts = [_checked_signature(signature).text for signature in signatures]
        found: list[Any] = []
        for start in range(0, len(texts), _CHUNK):
            some = texts[start : start + _CHUNK]
            found += map(self._decoded, some, self._run("lookup", *some))
        return found

    def lookup_many(self, signatures: Any) -> list[Fix | None]:
        """The fixes of a list of ErrorSignatures, None where there is none. Keys alone cannot be looked up in Redis."""
        if not isinstance(signatures, (list, tuple)):
            raise ValueError("signatures: a registry in Redis looks up lists of ErrorSignatures, not keys")
        return self._lookup_signatures(list(signatures))

    def fix(self, handle: int) -> Fix | None:
        raise ValueError("fix: a registry in Redis has no handles")

    def __contains__(self, signature: object) -> bool:
        return self._row(_checked_signature(signature)) is not None

    def __len__(self) -> int:
        return int(self._run("counts")[3])

    def _row(self, signature: Signature) -> Row | None:
        return self._rows_of([signature.text])[0]

    def _rows_of(self, texts: Sequence[str]) -> list[Row | None]:
        def row(text: str, values: list[Any] | None) -> Row | None:
            if values is None:
                return None
            fix, now, then, touched, created, success, access, successes, failures = values
            strengths = (float(now), float(then))
            epochs = (int(touched), int(created), _epoch(success), _epoch(access))
            return 0, text_key(text), text, self._decoded(text, fix), *strengths, *epochs, int(successes), int(failures)

        return list(map(row, texts, self._run("rows", *texts)))

    def _iter_rows(self) -> Iterator[Row]:
        seen: set[int] = set()  # a scan may show an entry twice
        cursor = 0
        while True:
            place = cursor
            cursor, members = self._asked(lambda place=place: self._client.zscan(self._keys[1], place, count=_CHUNK))
            texts = [member[16:] for member, _ in members]
            for row in self._rows_of(texts) if texts else ():
                if row is not None and row[1] not in seen:
                    seen.add(row[1])
                    yield row
            if cursor == 0:
                return

    def _insert(self, signature: Signature, fix: object) -> int:
        self._run("register", signature.text, _encoded(fix))
        return 0  # entries have no places there

    def _insert_many(self, signatures: list[Any], fixes: list[Any]) -> list[int]:
        if len(signatures) != len(fixes):
            raise ValueError("fixes: expected one for each signature")
        texts = [_checked_signature(signature).text for signature in signatures]
        pairs = list(zip(texts, map(_encoded, fixes), strict=True))
        for start in range(0, len(pairs), _CHUNK):
            self._run("register", *(item for pair in pairs[start : start + _CHUNK] for item in pair))
        return []

    def _succeed(self, signature: Signature, gain: float) -> bool:
        return bool(self._run("success", signature.text, f"{gain:.17g}"))

    def _fail(self, signature: Signature, loss: float) -> bool:
        return bool(self._run("failure", signature.text, f"{loss:.17g}"))

    def _advance(self) -> int:
        return int(self._run("epoch"))

    def _clear(self) -> None:
        self._run("clear")

    def _counts(self) -> tuple[int, int, int, int, int]:
        hits, misses, epoch, count, size = map(int, self._run("counts")[:5])
        return hits, misses, epoch, count, size

    def get_stats(self) -> dict[str, Any]:
        hits, misses, epoch, count, size, registrations, pruned = map(int, self._run("counts"))
        return {
            "total_entries": count,
            "current_epoch": epoch,
            "hits": hits,
            "misses": misses,
            "hit_rate": hits / (hits + misses) if hits + misses else 0.0,
            "capacity": self.capacity,
            "memory_bytes": size,
            "registrations": registrations,
            "pruned": pruned,
        }

    def _adopt(self, entries: Sequence[FixEntry]) -> int:
        def items(entry: FixEntry) -> tuple[Any, ...]:
            epochs = ("" if epoch is None else epoch for epoch in (entry.last_success_epoch, entry.last_access_epoch))
            head = (entry.signature, _encoded(entry.fix), f"{entry.strength:.17g}", entry.creation_epoch)
            return (*head, *epochs, entry.success_count, entry.failure_count)

        if self.capacity is not None and len(self) + len(entries) > self.capacity:
            raise ValueError(f"the registry is full: {self.capacity} entries")
        new = 0
        for start in range(0, len(entries), _CHUNK):
            new += self._run("restore", *(item for entry in entries[start : start + _CHUNK] for item in items(entry)))
        return new

    def _start_at(self, epoch: int, hits: int, misses: int) -> None:
        self._run("resume", epoch, hits, misses)

    def close(self) -> None:
        """Let go of the server."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _decoded(self, text: str, fix: str | None) -> Fix | None:
        if fix is None:
            return None
        try:
            return Fix.from_json(fix)
        except ValueError as error:
            raise ValueError(f"{self.location}: the entry of {text!r} holds no fix: {error}") from error


def _encoded(fix: Any) -> str:
    text = fix.to_json()
    Fix.from_json(text)  # what nobody could read must not get there
    return text


def _epoch(value: str | None) -> int | None:
    return int(value) if value else None


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _source() -> str:
    return files("fastmem.registry").joinpath("redis_registry.lua").read_text()


def _parsed(location: str) -> tuple[str, str, str | None]:
    """(the address for redis-py, the address without user and password, the prefix)."""
    parts = urlsplit(location)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:  # its message may quote a password that holds a slash or a colon
        raise ValueError(f"location: {_EXPECTED}") from None
    if parts.scheme == "unix":
        address = f"unix://{parts.path}"
    else:
        if not re.fullmatch(r"/?\d*", parts.path) or not host:
            raise ValueError(f"location: {_EXPECTED}")
        host = f"[{host}]" if ":" in host else host
        address = f"{parts.scheme}://{host}:{port or 6379}/{parts.path.strip('/') or 0}"
    query = parse_qsl(parts.query)
    prefix = dict(query).get("prefix")
    options = urlencode([pair for pair in query if pair[0] != "prefix"])
    return f"{location.partition('?')[0]}?{options}", address, prefix
