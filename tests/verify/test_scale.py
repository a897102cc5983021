"""How a loss scale may move."""

from __future__ import annotations

import pytest

from albireo.verify.scale import scale_problem

TORCH = {"scale": 8.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 4, "_growth_tracker": 1}
COUNTING = {"scale": 8.0, "_growth_tracker": 1.0, "_overflow_tracker": 0.0}


@pytest.mark.parametrize(
    ("before", "after", "skipped"),
    [
        ({}, {}, False),
        (TORCH, {"scale": 8.0, "_growth_tracker": 2}, False),
        ({**TORCH, "_growth_tracker": 3}, {"scale": 16.0, "_growth_tracker": 0}, False),
        (TORCH, {"scale": 4.0, "_growth_tracker": 0}, True),
        (COUNTING, {"scale": 8.0, "_growth_tracker": 2.0}, False),
        (COUNTING, {"scale": 16.0, "_growth_tracker": 0.0}, False),
        (COUNTING, {"scale": 8.0, "_growth_tracker": 0.0}, True),
        (COUNTING, {"scale": 4.0, "_growth_tracker": 0.0}, True),
    ],
)
def test_right_moves(before: dict[str, float], after: dict[str, float], skipped: bool) -> None:
    assert scale_problem(before, after, skipped=skipped) is None


@pytest.mark.parametrize(
    ("before", "after", "skipped", "said"),
    [
        (TORCH, {"scale": 8.0, "_growth_tracker": 0}, True, "became 8, not 4"),
        (TORCH, {"scale": 4.0, "_growth_tracker": 1}, True, "1 steps count as good"),
        (TORCH, {"scale": 4.0, "_growth_tracker": 2}, False, "became 4, not 8"),
        (TORCH, {"scale": 16.0, "_growth_tracker": 0}, False, "became 16, not 8"),
        ({**TORCH, "_growth_tracker": 3}, {"scale": 8.0, "_growth_tracker": 4}, False, "became 8, not 16"),
        (TORCH, {"scale": 8.0, "_growth_tracker": 1}, False, "1 steps count as good, not 2"),
        (TORCH, {}, False, "became 0"),
        (COUNTING, {"scale": 2.0, "_growth_tracker": 0.0}, True, "became 2"),
    ],
)
def test_wrong_moves(before: dict[str, float], after: dict[str, float], skipped: bool, said: str) -> None:
    assert said in (scale_problem(before, after, skipped=skipped) or "")
