"""The proof that a plugin computes what plain PyTorch computes, on a model, data and settings of the user's.

Read in this order: `verifier` (one step, watched), `record` and `gather` (what the ranks export, and how it comes to
the main rank), `reference` and `replay` (plain PyTorch), `judge`, `report`; then `run` (a recipe's own run) and `table`.
"""

from __future__ import annotations

from albireo.verify.report import Failure, ParameterReport, StepReport, VerifyReport
from albireo.verify.thresholds import Thresholds
from albireo.verify.verifier import Verifier, verify_step

__all__ = ["Failure", "ParameterReport", "StepReport", "Thresholds", "Verifier", "VerifyReport", "verify_step"]
