"""Several rounds of a case come to one row."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.bench import Case, CaseResult
from albireo.bench.report import combine

CASE = Case(system="plain", model="tiny", batch_size=4, precision="fp32", sequence_length=8)
DONE = CaseResult(
    CASE,
    "ok",
    step_seconds=2.0,
    step_seconds_min=1.0,
    step_seconds_max=3.0,
    samples_per_second=2.0,
    tokens_per_second=16.0,
    device_peak_bytes=10,
    device_reserved_peak_bytes=20,
    host_peak_bytes=30,
    first_loss=8.0,
    last_loss=7.0,
)


def test_one_round_is_itself() -> None:
    assert combine([DONE]) == DONE


def test_speed_is_the_median_memory_the_most_and_the_spread_that_of_all() -> None:
    slow = dataclasses.replace(DONE, step_seconds=8.0, step_seconds_min=7.0, step_seconds_max=9.0, host_peak_bytes=99)
    middle = dataclasses.replace(DONE, step_seconds=4.0, step_seconds_min=0.5, device_peak_bytes=5)
    result = combine([slow, DONE, middle])
    assert (result.step_seconds, result.step_seconds_min, result.step_seconds_max) == (4.0, 0.5, 9.0)
    assert (result.samples_per_second, result.tokens_per_second) == (1.0, 8.0)
    assert (result.device_peak_bytes, result.device_reserved_peak_bytes, result.host_peak_bytes) == (10, 20, 99)
    assert (result.status, result.case) == ("ok", CASE)


@given(st.permutations([1.0, 2.0, 5.0, 6.0, 90.0]))
def test_the_order_of_rounds_does_not_count(seconds: list[float]) -> None:
    result = combine([dataclasses.replace(DONE, step_seconds=value) for value in seconds])
    assert result.step_seconds == 5.0


@pytest.mark.parametrize("status", ["failed", "out_of_memory"])
def test_a_round_that_failed_is_the_result(status: str) -> None:
    failed = CaseResult(CASE, status, error="no")  # type: ignore[arg-type]
    assert combine([DONE, failed, DONE]) == failed
