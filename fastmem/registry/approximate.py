"""Similar signatures: what is known of an error that was never seen in just this form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastmem._registry import Signature
from fastmem.registry.fix import Fix
from fastmem.registry.taxonomy import ErrorSignature, parse_text

if TYPE_CHECKING:
    from fastmem._registry import Row

_CONSIDERED = 32  # of a level's candidates, the most recent


@dataclass(frozen=True)
class Match:
    """An answer of `FixRegistry.match`.

    Attributes:
        fix: the fix.
        level: "exact", "context", "categories" or "type": what of the signature had to be equal.
        signature: the canonical text of the entry that was found.
    """

    fix: Fix
    level: str
    signature: str


class ApproximateIndex:
    """Registered signatures by severity, type and categories. Entries that have died are dropped when they are met."""

    def __init__(self) -> None:
        # type -> severity -> categories -> canonical text -> signature; insertion order is order of registration
        self._groups: dict[str, dict[str, dict[frozenset[str], dict[str, Signature]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(dict))
        )
        # type -> canonical text -> its group, for the last level
        self._types: dict[str, dict[str, Signature]] = defaultdict(dict)

    def add(self, signature: Signature) -> None:
        severity, error_type, _, categories = parse_text(signature.text)
        for group in (self._groups[error_type][severity][frozenset(categories)], self._types[error_type]):
            group.pop(signature.text, None)
            group[signature.text] = signature

    def find(self, signature: ErrorSignature, row_of: Callable[[Signature], Row | None]) -> Match | None:
        error_type, severity = signature.error_type.value, signature.severity.value
        categories = frozenset(signature.affected_categories)
        groups = self._groups[error_type][severity]
        if match := _strongest([groups.get(categories, {})], row_of, "context"):
            return match
        subsets = sorted((known for known in list(groups) if known and known < categories), key=len, reverse=True)
        for size in sorted({len(known) for known in subsets}, reverse=True):
            if match := _strongest([groups[known] for known in subsets if len(known) == size], row_of, "categories"):
                return match
        return _strongest([self._types[error_type]], row_of, "type")


def _strongest(
    groups: Iterable[dict[str, Signature]], row_of: Callable[[Signature], Row | None], level: str
) -> Match | None:
    best: tuple[float, Any, str] | None = None
    for group in groups:
        considered = 0
        for text in reversed(list(group)):
            signature = group.get(text)
            row = None if signature is None else row_of(signature)
            if row is None:
                group.pop(text, None)
                continue
            if best is None or row[4] > best[0]:
                best = row[4], row[3], text
            considered += 1
            if considered == _CONSIDERED:
                break
    return None if best is None else Match(best[1], level, best[2])
