"""The registry: failure -> fix, with strengths that fall while nothing happens."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmem._registry import Signature, Table
from fastmem.registry.approximate import ApproximateIndex, Match
from fastmem.registry.decay import FAILURE_LOSS, SUCCESS_GAIN, DecayConfig
from fastmem.registry.fix import Fix
from fastmem.registry.taxonomy import ErrorSignature, stored_signature

if TYPE_CHECKING:
    import numpy as np

    from fastmem._registry import Row

_REDIS = ("redis://", "rediss://", "unix://")
_NEVER = 2**32 - 1  # an epoch that never was, as the table writes it


@dataclass(slots=True)
class FixEntry:
    """What the registry holds for one signature, at the time of asking.

    Attributes:
        signature: the canonical text, "severity:type:context:[categories]".
        error_signature_hash: its key as 16 hex digits.
        fix: the fix itself, not a copy.
        strength: 1 when registered; decays, grows with success, falls with failure.
        success_count, failure_count: reports of each.
        creation_epoch: when the signature was first registered.
        last_success_epoch, last_access_epoch: None: never.
    """

    signature: str
    error_signature_hash: str
    fix: Fix
    strength: float
    success_count: int
    failure_count: int
    creation_epoch: int
    last_success_epoch: int | None
    last_access_epoch: int | None


class FixRegistry(Table):
    """O(1) lookups from an `ErrorSignature` to its `Fix`; unused fixes fade and go.

    `FixRegistry()` lives in memory, `FixRegistry("fixes.db")` in a SQLite file, `FixRegistry("redis://host/0")` in a
    Redis server that many processes share. All are safe to use from many threads.

    Per epoch a strength s becomes max(0, rate s - linear); an entry below `min_strength` is pruned. A success adds
    0.05 (at most 1), a failure takes 0.1. The table works strengths out when they are asked for, so an epoch costs
    what it prunes; the results are those of the loop over all entries.

    Args:
        location: None, a file, or a redis:// address.
        decay_config: the rule of forgetting; None: that of the file, or the default.
        capacity: the most entries to hold; None: no bound. A full registry drops the entry that would die first.
        approximate: keep what `match` needs to find similar signatures.
        durability: for a file. "full": what a call acknowledged survives a crash and a power cut; "normal": the last
            calls before a power cut may be lost, a crash of the process loses nothing, and the file is always sound.

    Raises:
        ValueError: a bad argument, or a file that is damaged, foreign or of a newer version.
        OSError: a file that cannot be opened or is in use.
    """

    def __new__(cls, location: str | os.PathLike[str] | None = None, *args: Any, **kwargs: Any) -> FixRegistry:
        if cls is not FixRegistry or location is None:
            return Table.__new__(cls)
        if str(location).startswith(_REDIS):
            from fastmem.registry.redis_registry import RedisFixRegistry

            return Table.__new__(RedisFixRegistry)
        if re.match(r"[a-zA-Z][\w+.-]+://|:memory:", str(location)):
            raise ValueError(f"location: expected a file or an address {', '.join(_REDIS)}, got {str(location)!r}")
        from fastmem.registry.sqlite_registry import SqliteFixRegistry

        return Table.__new__(SqliteFixRegistry)

    def __init__(
        self,
        location: str | os.PathLike[str] | None = None,
        decay_config: DecayConfig | None = None,
        *,
        capacity: int | None = None,
        approximate: bool = False,
        durability: str = "full",
    ) -> None:
        if hasattr(self, "location"):
            raise RuntimeError(f"{self!r} is made already")
        if decay_config is not None and not isinstance(decay_config, DecayConfig):
            raise TypeError(f"decay_config: expected a DecayConfig, got {decay_config!r}")
        if capacity is not None and (type(capacity) is not int or not 0 < capacity < 2**32):
            raise ValueError(f"capacity: expected a positive integer or None, got {capacity!r}")
        if durability not in ("full", "normal"):
            raise ValueError(f'durability: expected "full" or "normal", got {durability!r}')
        self.location = None if location is None else os.fsdecode(location)
        self.capacity = capacity
        self._similar = ApproximateIndex() if approximate else None
        self._open(decay_config, durability)

    def _open(self, config: DecayConfig | None, durability: str) -> None:
        """Begin where the location stands; here, with nothing."""
        self._begin(config or DecayConfig())

    def _begin(self, config: DecayConfig) -> None:
        self.decay_config = config
        self._start(config.exponential_rate, config.linear_rate, config.min_strength, self.capacity or 0)

    def _written(self) -> None:
        """Called after each change; a registry that lives elsewhere too writes it there before the call returns."""

    def register(self, signature: ErrorSignature, fix: Fix) -> None:
        """Learn that this fix mends this error. A known error gets the new fix and strength 1; its history stays."""
        self._learn(signature, fix)
        self._written()

    def _learn(self, signature: ErrorSignature, fix: Fix, encoded: str | None = None) -> None:
        """`register`, to be written with what comes next; `encoded` is the fix's JSON where the caller has made it."""
        self._insert(_checked_signature(signature), _checked_fix(fix))
        if self._similar is not None:
            self._similar.add(signature)

    def register_many(self, signatures: Sequence[ErrorSignature], fixes: Sequence[Fix]) -> None:
        """`register` of each pair, in order, as one change: faster, and in a file one transaction."""
        signatures, fixes = list(signatures), list(fixes)
        for fix in fixes:
            _checked_fix(fix)
        if self._similar is not None:
            for signature in signatures:
                _checked_signature(signature)
        self._insert_many(signatures, fixes)
        if self._similar is not None:
            for signature in signatures:
                self._similar.add(signature)
        self._written()

    if TYPE_CHECKING:

        def lookup(self, signature: Signature) -> Fix | None: ...

    def lookup_many(self, signatures: Any) -> Any:
        """Look many up at once.

        Args:
            signatures: a list of ErrorSignatures, or an array of their keys (n,), uint64 (`signature.key`).

        Returns:
            For a list: a list of fixes, None where there is none. For keys: handles (n,), int64, -1 where there is
            none; `fix(handle)` gives the fix. Keys are compared by themselves, without the text behind them.
        """
        if isinstance(signatures, (list, tuple)):
            return self._lookup_signatures(list(signatures))
        import numpy as np

        keys: np.ndarray = np.asarray(signatures)
        if keys.dtype != np.uint64 or keys.ndim != 1:
            got = f"{keys.dtype} {keys.shape}" if keys.ndim else type(signatures).__name__
            raise TypeError(f"signatures: expected a list of ErrorSignatures or a (n,) uint64 array, got {got}")
        handles = np.empty(len(keys), np.int64)
        self._lookup_keys(np.ascontiguousarray(keys), handles)
        return handles

    def fix(self, handle: int) -> Fix | None:
        """The fix of a handle of `lookup_many`; None for -1 and for an entry that is gone by now."""
        return self._fix_of(int(handle))

    def match(self, signature: ErrorSignature) -> Match | None:
        """The fix of this error, or of the most similar one that is known.

        Levels: "exact"; "context": the same in any context; "categories": of the same severity and type, with some of
        the categories; "type": of the same type. Within a level, the strongest of the most recent.

        Raises:
            ValueError: the registry was not made with `approximate=True`.
        """
        if self._similar is None:
            raise ValueError("match: this registry keeps no similar signatures; make it with approximate=True")
        fix = self.lookup(_checked_signature(signature))
        if fix is not None:
            return Match(fix, "exact", signature.text)
        return self._similar.find(signature, self._row)

    def report_success(self, signature: ErrorSignature) -> bool:
        """The fix helped: its strength grows by 0.05, to 1 at most. False: this error is not known."""
        known = self._succeed(_checked_signature(signature), SUCCESS_GAIN)
        self._written()
        return known

    def report_failure(self, signature: ErrorSignature) -> bool:
        """The fix did not help: its strength falls by 0.1, and below the minimum the entry goes. False: not known."""
        known = self._fail(_checked_signature(signature), FAILURE_LOSS)
        self._written()
        return known

    def advance_epoch(self) -> int:
        """Let one epoch pass. Returns how many entries were pruned."""
        pruned = self._advance()
        self._written()
        return pruned

    def clear(self) -> None:
        """Forget every fix. The epoch stays."""
        self._clear()
        self._written()

    @property
    def current_epoch(self) -> int:
        """How many epochs have passed."""
        return self._counts()[2]

    def get_stats(self) -> dict[str, Any]:
        """total_entries, current_epoch, hits, misses, hit_rate (of lookups so far), capacity and memory_bytes (of the
        table, without the fixes)."""
        hits, misses, epoch, _, size = self._counts()
        return {
            "total_entries": len(self),
            "current_epoch": epoch,
            "hits": hits,
            "misses": misses,
            "hit_rate": hits / (hits + misses) if hits + misses else 0.0,
            "capacity": self.capacity,
            "memory_bytes": size,
        }

    def entry(self, signature: ErrorSignature) -> FixEntry | None:
        """What is held for this error, as it is now; not counted as a lookup."""
        row = self._row(_checked_signature(signature))
        return None if row is None else _entry(row)

    _lookup_entry = entry  # the name of the original

    @property
    def entries(self) -> dict[str, FixEntry]:
        """All entries as they are now, by canonical text. A copy; `iter_entries` goes through them one by one."""
        return {entry.signature: entry for entry in self.iter_entries()}

    def iter_entries(self) -> Iterator[FixEntry]:
        """The entries, in no order. What changes meanwhile may or may not be seen."""
        for row in self._iter_rows():
            yield _entry(row)

    def _iter_rows(self) -> Iterator[Row]:
        block = 4096
        for start in range(0, self._counts()[3], block):
            for row in self._rows(range(start, min(start + block, self._counts()[3]))):
                if row is not None:
                    yield row

    def _adopt(self, entries: Sequence[FixEntry]) -> int:
        """Take over entries as they are, their epochs being this registry's, to be written with what comes next. Those
        that are known stay. Returns how many are new."""
        new = 0
        for entry in entries:
            signature = stored_signature(entry.signature)
            epochs = (entry.last_success_epoch, entry.last_access_epoch)
            success, access = (_NEVER if epoch is None else epoch for epoch in epochs)
            history = (entry.strength, self.current_epoch, entry.creation_epoch, success, access)
            while signature not in self:
                if self.capacity is not None and len(self) >= self.capacity:
                    raise ValueError(f"the registry is full: {self.capacity} entries")
                place = self._counts()[3]
                if self._restore(place, signature, entry.fix, *history, entry.success_count, entry.failure_count):
                    self._restored(place, entry.fix)
                    if self._similar is not None:
                        self._similar.add(signature)
                    new += 1
        return new

    def _restored(self, place: int, fix: Fix) -> None:
        """An entry was put at this place: a change, for a registry that keeps note of them."""
        self._give_back([place])

    def _start_at(self, epoch: int, hits: int, misses: int) -> None:
        """Set the clock and the counts of a registry that holds nothing, to be written with what comes next."""
        self._resume(epoch, hits, misses)

    def close(self) -> None:
        """Write what is still to write, and let go of the file or server. In memory: nothing to do."""

    def __enter__(self) -> FixRegistry:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "in memory" if self.location is None else repr(self.location)
        return f"<{type(self).__name__} {where}, {len(self)} entries, epoch {self.current_epoch}>"


def _entry(row: Row) -> FixEntry:
    _, key, text, fix, strength, _, _, created, last_success, last_access, successes, failures = row
    return FixEntry(text, f"{key:016x}", fix, strength, successes, failures, created, last_success, last_access)


def _checked_signature(signature: object) -> Any:
    if not isinstance(signature, Signature):
        raise TypeError(f"signature: expected an ErrorSignature, got {signature!r}")
    return signature


def _checked_fix(fix: object) -> Fix:
    if not isinstance(fix, Fix):
        raise TypeError(f"fix: expected a Fix, got {fix!r}")
    return fix
