"""Results as rows of words: for the terminal, Markdown and the report; and as CSV. Pure."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence

from albireo.bench.case import Case, CaseResult

__all__ = ["HEADERS", "as_csv", "as_markdown", "number", "ratios", "rows_of_words", "scaling", "short_number"]

HEADERS = (
    "system", "model", "adapter", "GPUs", "batch", "precision", "samples/s", "tokens/s", "step ms", "spread", "TFLOP/s",
    "device GB", "reserved GB", "host GB", "moved GB", "ratio", "scaling", "status",
)  # fmt: skip
_GB = 2**30
_NO_NUMBERS = frozenset({"versions", "memory_over_step"})


def ratios(results: Sequence[CaseResult], reference: str) -> list[float | None]:
    """Return each result's speed as a multiple of a reference's on the same model, adapter and batch.

    Args:
        results: what was measured.
        reference: a system. Its row of the same precision counts if there is one, else its only one.

    Returns:
        None where either was not measured, or where it is open which row counts.
    """
    return [_ratio(result, results, reference) for result in results]


def _ratio(result: CaseResult, results: Sequence[CaseResult], reference: str) -> float | None:
    def job(case: Case) -> tuple[object, ...]:
        return case.recipe, case.model, case.adapter, case.batch_size, case.sequence_length, case.gpus

    beside = [other for other in results if other.case.system == reference and job(other.case) == job(result.case)]
    same = [other for other in beside if other.case.precision == result.case.precision] or beside
    if len(same) != 1 or not same[0].samples_per_second or result.samples_per_second is None:
        return None
    return result.samples_per_second / same[0].samples_per_second


def scaling(result: CaseResult, results: Sequence[CaseResult]) -> float | None:
    """Return a result's speed over that of as many times one rank of the same; None where that was not measured.

    Args:
        result: of several ranks.
        results: what was measured.
    """
    if result.case.gpus == 1 or result.samples_per_second is None:
        return None
    one = dataclasses.replace(result.case, gpus=1)
    alone = next((other.samples_per_second for other in results if other.case == one), None)
    return result.samples_per_second / (result.case.gpus * alone) if alone else None


def rows_of_words(results: Sequence[CaseResult], reference: str) -> list[tuple[str, ...]]:
    """Return a row of words a result, under `HEADERS`.

    Args:
        results: what was measured.
        reference: the system whose speed is 1.
    """
    rows: list[tuple[str, ...]] = []
    for result, ratio in zip(results, ratios(results, reference), strict=True):
        case = result.case
        rows.append(
            (
                case.system,
                case.model,
                case.adapter,
                str(case.gpus),
                str(case.batch_size),
                case.precision,
                number(result.samples_per_second, 1.0),
                number(result.tokens_per_second, 1.0, 0),
                number(result.step_seconds, 1e3),
                _spread(result),
                number(result.model_tflops, 1.0),
                # 0 is what a CPU takes of a device: nothing to say.
                number(result.device_peak_bytes or None, 1 / _GB),
                number(result.device_reserved_peak_bytes or None, 1 / _GB),
                number(result.host_peak_bytes, 1 / _GB),
                number(result.moved_bytes, 1 / _GB),
                number(ratio, 1.0),
                number(scaling(result, results), 1.0),
                result.status if result.status == "ok" else f"{result.status.replace('_', ' ')}: {result.error}",
            )
        )
    return rows


def as_markdown(results: Sequence[CaseResult], reference: str) -> str:
    """Return the table in Markdown."""
    lines = [HEADERS, tuple("---" for _ in HEADERS), *rows_of_words(results, reference)]
    return "".join("| " + " | ".join(word.replace("|", "\\|") for word in row) + " |\n" for row in lines)


def as_csv(results: Sequence[CaseResult], reference: str) -> str:
    """Return all values of all rows as CSV, unrounded: bytes, seconds."""
    rows = [
        {name: value for name, value in result.row().items() if name not in _NO_NUMBERS}
        | {"ratio": ratio, "scaling": scaling(result, results)}
        for result, ratio in zip(results, ratios(results, reference), strict=True)
    ]
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def short_number(value: float) -> str:
    """Return a number with three digits or more, as `1,234` and `0.0123`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def number(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
    """Return a number times a factor in words; nothing for None."""
    return "" if value is None else f"{value * factor:,.{digits}f}"


def _spread(result: CaseResult) -> str:
    """Return how far the slowest and the fastest step are apart, as a share of the median."""
    fastest, slowest, median = result.step_seconds_min, result.step_seconds_max, result.step_seconds
    if fastest is None or slowest is None or not median:
        return ""
    return f"{100 * (slowest - fastest) / median:.0f}%"
