"""How far a replacement model can be trusted: one call measures it, one page shows it."""

from replacement.validation.compute import compute_equivalent, read_curve
from replacement.validation.validate import ValidationConfig, validate

__all__ = ["ValidationConfig", "compute_equivalent", "read_curve", "validate"]
