"""The judgement of what is not of a single parameter: loss, norm and loss scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from albireo.verify.judge import StepFacts
from albireo.verify.report import SMALL_LOSS, Failure
from albireo.verify.scale import scale_problem
from albireo.verify.thresholds import Thresholds

__all__ = ["RankNumbers", "global_loss", "judge_whole_step"]


class RankNumbers(NamedTuple):
    """What a rank says of a step.

    Attributes:
        loss_sum: the loss over its own micro-batches.
        tokens: how many terms it counted.
        grad_norm: the norm that it was told.
        square_sum: of its own part of the reduced gradients.
        loss_scale: after the step; 0 without one.
    """

    loss_sum: float
    tokens: float
    grad_norm: float
    square_sum: float
    loss_scale: float


def global_loss(numbers: Sequence[RankNumbers]) -> float:
    """Return the mean over all that all ranks counted."""
    return sum(said.loss_sum for said in numbers) / max(sum(said.tokens for said in numbers), 1.0)


def judge_whole_step(
    facts: StepFacts,
    numbers: Sequence[RankNumbers],
    counts: Sequence[Sequence[int]],
    scaler: tuple[Mapping[str, float], Mapping[str, float]],
    allowed: Thresholds,
) -> Iterator[Failure]:
    """Yield what is not as it should be.

    Args:
        facts: of the step.
        numbers: what each rank said.
        counts: how many terms each rank's micro-batches were given with.
        scaler: the scaler's state before the step and after it.
        allowed: what passes.
    """
    yield from _finiteness(facts)
    for rank, (said, own) in enumerate(zip(numbers, counts, strict=True)):
        if said.tokens != sum(own):
            yield Failure("loss", None, f"rank {rank} counted {said.tokens:g} terms, not {sum(own)}")
    loss, plain = global_loss(numbers), facts.plain.loss
    if not abs(loss - plain) <= allowed.gradient * max(abs(plain), SMALL_LOSS):
        yield Failure("loss", None, f"it is {loss:.9g}, and plain PyTorch's {plain:.9g}")
    yield from _norm(facts, [said.grad_norm for said in numbers], allowed)
    problem = scale_problem(*scaler, skipped=facts.skipped)
    if problem is not None:
        yield Failure("scale", None, problem)
    scales = [said.loss_scale for said in numbers]
    if any(scale != scales[0] for scale in scales):
        yield Failure("scale", None, f"ranks have other ones: {', '.join(f'{scale:g}' for scale in scales)}")


def _finiteness(facts: StepFacts) -> Iterator[Failure]:
    finite = math.isfinite(facts.true_norm)
    if finite != facts.plain.finite:
        infinite = "plain PyTorch" if finite else "the system"
        yield Failure("gradient", None, f"only {infinite} has gradients that are not finite")
    elif not finite and not facts.skipped:
        yield Failure("gradient", None, "gradients are not finite on either side: there is nothing to compare")


def _norm(facts: StepFacts, norms: Sequence[float], allowed: Thresholds) -> Iterator[Failure]:
    norm, true = norms[0], facts.true_norm
    if facts.skipped:
        if math.isfinite(norm):
            yield Failure("norm", None, f"it was reported as {norm:.9g} though the gradients are not finite")
        return
    if any(other != norm for other in norms):
        yield Failure("norm", None, f"ranks have other ones: {', '.join(f'{other:.9g}' for other in norms)}")
    if math.isfinite(true) and not abs(norm - true) <= allowed.norm * true:
        yield Failure("norm", None, f"it was reported as {norm:.9g}, and is {true:.9g}")
