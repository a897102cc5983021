"""The judgement of a step that may be some units in the last place away, on constructed tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from albireo.optim import HybridAdam
from albireo.verify.gather import ParameterTensors
from albireo.verify.judge import Judge, StepFacts
from albireo.verify.record import Phase
from albireo.verify.reference import PlainGradients
from albireo.verify.replay import Replay, Stepped
from albireo.verify.thresholds import Thresholds

CPU = torch.device("cpu")
SETTINGS = {
    "lr": 0.01,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "decoupled_weight_decay": True,
    "maximize": False,
}
DECAY = 1.0 - 0.01 * 0.1
ALLOWED = 2
# Elements of which nearly nothing is left by the step.
CANCELLED = slice(0, 32)


class Case:
    """A step of a parameter as torch makes it; some of its weights are nearly what is taken from them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.gradient = torch.randn(256, generator=generator)
        moments = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.randn(256, generator=generator) * 0.3,
            "exp_avg_sq": torch.rand(256, generator=generator) * 0.1 + 0.5,
        }
        update = -self.replay(Stepped(torch.zeros(256), moments)).weight
        weight = torch.randn(256, generator=generator) * 0.1
        weight[CANCELLED] = update[CANCELLED] / DECAY * (1 + 2.0**-15)
        self.before = Stepped(weight, moments)
        self.after = self.replay(self.before)
        # In fp32, of the larger of what is subtracted and what is left.
        larger = torch.maximum(weight.abs() * DECAY, self.after.weight.abs())
        self.unit = torch.exp2(torch.log2(larger).floor() - 23)
        assert bool((self.after.weight[CANCELLED].abs() < weight[CANCELLED].abs() * 2.0**-12).all())

    def replay(self, before: Stepped, **changes: object) -> Stepped:
        return Replay(HybridAdam, {**SETTINGS, **changes}, CPU).step(before, self.gradient)

    def judged(self, after: Stepped, *, allowed: int = ALLOWED) -> list[str]:
        """What is said of a step that ended so."""
        facts = StepFacts(
            plain=PlainGradients(0.0, {"weight": self.gradient}),
            true_norm=1.0,
            max_norm=0.0,
            skipped=False,
            groups={"weight": 0},
            settings=[SETTINGS],
            optimizer_class=HybridAdam,
            frozen=frozenset(),
            fingerprints=[],
            pieces=[],
            device=CPU,
        )
        phases: dict[Phase, Stepped] = {"before": self.before, "after": after}
        tensors: dict[tuple[Phase, str], torch.Tensor] = {
            ("reduced", "gradient"): self.gradient,
            ("clipped", "gradient"): self.gradient,
        }
        for phase, stepped in phases.items():
            tensors[phase, "model"] = stepped.weight
            tensors.update({(phase, name): value for name, value in stepped.states.items()})
        judge = Judge(facts, replace(Thresholds.of("bf16"), step_ulps=allowed))
        judge.parameter(ParameterTensors("weight", tensors))
        assert {failure.check for failure in judge.failures} <= {"step"}
        return [failure.detail for failure in judge.failures]

    def moved(self, units: float, elements: slice) -> Stepped:
        """The right step, but for weights that are off by units of what was subtracted."""
        weight = self.after.weight.clone()
        weight[elements] += units * self.unit[elements]
        return self.after._replace(weight=weight)


def test_the_right_step_passes() -> None:
    case = Case()
    assert case.judged(case.after) == []
    assert case.judged(case.after, allowed=0) == []


@pytest.mark.parametrize("units", [-2, -1, 0.5, 1, 2])
def test_a_rounding_is_forgiven_where_weight_and_update_cancel(units: float) -> None:
    case = Case()
    assert case.judged(case.moved(units, CANCELLED)) == []
    assert len(case.judged(case.moved(units, CANCELLED), allowed=0)) == 1


@pytest.mark.parametrize("at", [0, 31, 32, 255])
@pytest.mark.parametrize("units", [-3, 3, 1000])
def test_more_units_than_are_allowed_are_found_in_one_element(units: float, at: int) -> None:
    case = Case()
    off = case.moved(units, slice(at, at + 1))
    assert len(case.judged(off)) == 1


def missing_decay(case: Case) -> Stepped:
    return case.replay(case.before, weight_decay=0.0)


def slightly_other_decay(case: Case) -> Stepped:
    return case.replay(case.before, weight_decay=0.1001)


def decay_in_the_gradient(case: Case) -> Stepped:
    return case.replay(case.before, decoupled_weight_decay=False)


def slightly_other_rate(case: Case) -> Stepped:
    return case.replay(case.before, lr=0.01 * (1 + 2.0**-20))


def eps_within_the_root(case: Case) -> Stepped:
    return case.replay(case.before, eps=1e-4)


def one_correction_late(case: Case) -> Stepped:
    """Corrected as one step earlier, and counted rightly."""
    states = {**case.before.states, "step": case.before.states["step"] - 1}
    return case.after._replace(weight=case.replay(Stepped(case.before.weight, states)).weight)


def no_correction(case: Case) -> Stepped:
    states = {**case.before.states, "step": torch.tensor(1e6)}
    return case.after._replace(weight=case.replay(Stepped(case.before.weight, states)).weight)


def moment_off_by_three(case: Case) -> Stepped:
    exp_avg = (case.after.states["exp_avg"].view(torch.int32) + 3).view(torch.float32)
    return case.after._replace(states={**case.after.states, "exp_avg": exp_avg})


def weights_of_before(case: Case) -> Stepped:
    return case.after._replace(weight=case.before.weight)


FAULTS = [
    missing_decay,
    slightly_other_decay,
    decay_in_the_gradient,
    slightly_other_rate,
    eps_within_the_root,
    one_correction_late,
    no_correction,
    moment_off_by_three,
    weights_of_before,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_step_is_found(fault: Callable[[Case], Stepped]) -> None:
    case = Case()
    assert len(case.judged(fault(case))) == 1
