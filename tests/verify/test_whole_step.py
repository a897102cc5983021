"""Losses, norms and loss scales of whole steps. Pure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from albireo.verify import Thresholds
from albireo.verify.judge import StepFacts
from albireo.verify.reference import PlainGradients
from albireo.verify.whole_step import RankNumbers, global_loss, judge_whole_step

GOOD = RankNumbers(loss_sum=6.0, tokens=3.0, grad_norm=2.0, square_sum=2.0, loss_scale=8.0)
SCALER = {"scale": 8.0, "_growth_tracker": 0.0, "growth_interval": 1000.0}
AFTER = {**SCALER, "_growth_tracker": 1.0}


def facts(*, loss: float = 2.0, gradient: float = 1.0, **changes: Any) -> StepFacts:
    values: dict[str, Any] = {
        "plain": PlainGradients(loss, {"weight": torch.tensor([gradient])}),
        "true_norm": 2.0,
        "max_norm": 0.0,
        "skipped": False,
        "groups": {"weight": 0},
        "settings": [{}],
        "optimizer_class": torch.optim.AdamW,
        "frozen": frozenset(),
        "fingerprints": [],
        "pieces": [],
        "device": torch.device("cpu"),
    }
    return StepFacts(**{**values, **changes})


def said(of: StepFacts, *numbers: RankNumbers, after: dict[str, float] | None = None) -> list[str]:
    counts = [[1, 2]] * len(numbers)
    failures = judge_whole_step(of, numbers, counts, (SCALER, after or AFTER), Thresholds.of("fp16"))
    return [str(failure) for failure in failures]


def test_a_right_step() -> None:
    assert said(facts(), GOOD, GOOD) == []
    assert global_loss([GOOD, GOOD._replace(loss_sum=0.0)]) == 1.0
    skipped = facts(gradient=math.inf, true_norm=math.nan, skipped=True)
    bad = GOOD._replace(grad_norm=math.nan)
    assert said(skipped, bad, bad, after={"scale": 4.0, "_growth_tracker": 0.0}) == []


@pytest.mark.parametrize(
    ("of", "second", "words"),
    [
        (facts(loss=2.1), GOOD, "loss: it is 2, and plain PyTorch's 2.1"),
        (facts(loss=math.nan), GOOD, "plain PyTorch's nan"),
        (facts(), GOOD._replace(tokens=2.0), "loss: rank 1 counted 2 terms, not 3"),
        (facts(), GOOD._replace(grad_norm=2.5), "norm: ranks have other ones: 2, 2.5"),
        (facts(true_norm=2.001), GOOD, "norm: it was reported as 2, and is 2.001"),
        (facts(), GOOD._replace(loss_scale=4.0), "scale: ranks have other ones: 8, 4"),
        (facts(gradient=math.inf), GOOD, "only plain PyTorch has gradients that are not finite"),
        (facts(true_norm=math.nan), GOOD, "only the system has gradients that are not finite"),
        (facts(gradient=math.nan, true_norm=math.nan), GOOD, "not finite on either side"),
        (facts(gradient=math.nan, true_norm=math.nan, skipped=True), GOOD, "reported as 2 though the gradients"),
    ],
)
def test_what_is_wrong_is_said(of: StepFacts, second: RankNumbers, words: str) -> None:
    assert any(words in line for line in said(of, GOOD, second)), said(of, GOOD, second)
