"""Measuring: one case in one process of its own, our system and plain references alike."""

from albireo.bench.case import Case, CaseResult
from albireo.bench.measure import measure

__all__ = ["Case", "CaseResult", "measure"]
