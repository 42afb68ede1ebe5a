"""Learn a fix from one failure, find it again in O(1), forget what is not used. Needs neither torch nor numpy."""

from fastmem.registry.approximate import Match
from fastmem.registry.decay import DecayConfig
from fastmem.registry.fix import Fix, FixType
from fastmem.registry.fix_registry import FixEntry, FixRegistry
from fastmem.registry.taxonomy import (
    ErrorSeverity,
    ErrorSignature,
    ErrorType,
    classify_severity,
    create_signature,
)

__all__ = [
    "DecayConfig",
    "ErrorSeverity",
    "ErrorSignature",
    "ErrorType",
    "Fix",
    "FixEntry",
    "FixRegistry",
    "FixType",
    "Match",
    "classify_severity",
    "create_signature",
]
