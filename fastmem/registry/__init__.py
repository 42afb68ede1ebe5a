"""Learn a fix from one failure, find it again in O(1), forget what is not used. Needs neither torch nor numpy."""

from fastmem.registry.apply_fix import apply_fix
from fastmem.registry.approximate import Match
from fastmem.registry.background import BackgroundProcessor, ProcessorConfig, ProcessorState
from fastmem.registry.decay import DecayConfig
from fastmem.registry.diagnosis import diagnose
from fastmem.registry.dreaming import DreamGenerator, SyntheticExample
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
    "BackgroundProcessor",
    "DecayConfig",
    "DreamGenerator",
    "ErrorSeverity",
    "ErrorSignature",
    "ErrorType",
    "Fix",
    "FixEntry",
    "FixRegistry",
    "FixType",
    "Match",
    "ProcessorConfig",
    "ProcessorState",
    "SyntheticExample",
    "apply_fix",
    "classify_severity",
    "create_signature",
    "diagnose",
]
