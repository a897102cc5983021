"""Results as a bench has them."""

from __future__ import annotations

from typing import Any

from albireo.bench.case import Case, CaseResult

MACHINE = {"python": "3.12.0", "torch": "2.11.0", "transformers": "5.17.0", "device": "a <GPU> & more"}


def case_of(system: str, batch_size: int = 8, precision: str = "bf16", **more: Any) -> Case:
    """Return a case of OPT-125M."""
    return Case(system, "125m", batch_size, precision, sequence_length=16, **more)


def done(case: Case, speed: float, gigabytes: float = 2.0, **more: Any) -> CaseResult:
    """Return what a case came to that made so many samples a second."""
    seconds = case.batch_size / speed
    values: dict[str, Any] = {
        "step_seconds": seconds,
        "step_seconds_min": 0.9 * seconds,
        "step_seconds_max": 1.2 * seconds,
        "samples_per_second": speed,
        "tokens_per_second": speed * case.sequence_length,
        "device_peak_bytes": int(gigabytes * 2**30),
        "device_reserved_peak_bytes": int(1.5 * gigabytes * 2**30),
        "host_peak_bytes": 2**30,
        "first_loss": 8.0,
        "last_loss": 7.0,
        "versions": dict(MACHINE),
    }
    return CaseResult(case, "ok", **{**values, **more})
