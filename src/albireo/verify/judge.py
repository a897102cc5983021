"""The judgement of one step, a parameter at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from albireo.verify.gather import ParameterTensors
from albireo.verify.record import fingerprint
from albireo.verify.reference import PlainGradients
from albireo.verify.replay import Replay, Stepped, compare_bits, subtraction_scale
from albireo.verify.report import Check, Failure, ParameterReport
from albireo.verify.thresholds import Thresholds

__all__ = ["Judge", "StepFacts", "clip_coefficient"]

# Below this, an element of a gradient is compared absolutely: fp32 has no full precision near 1e-38.
_TINY = 1e-30


@dataclass(frozen=True)
class StepFacts:
    """What is known of a step as a whole.

    Attributes:
        plain: the reference's gradients.
        true_norm: of the system's own reduced gradients.
        max_norm: what they are clipped to; 0: they are not.
        skipped: the step is left out, for an overflow.
        groups: each trained parameter's name to the number of its group.
        settings: the groups' settings in that step.
        optimizer_class: the user's.
        frozen: names of the parameters that are not trained.
        fingerprints: by rank, dtype and digest of each parameter that computes.
        pieces: by rank, what it steps of each parameter that has states; see `RankRecord.pieces`.
        device: the ranks' device.
    """

    plain: PlainGradients
    true_norm: float
    max_norm: float
    skipped: bool
    groups: Mapping[str, int]
    settings: Sequence[Mapping[str, Any]]
    optimizer_class: type[torch.optim.Optimizer]
    frozen: frozenset[str]
    fingerprints: Sequence[Mapping[str, Sequence[str]]]
    pieces: Sequence[Mapping[str, Sequence[Sequence[Any]]]]
    device: torch.device


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Return what clipping multiplies gradients by.

    Args:
        norm: their global norm.
        max_norm: the bound; 0 does not clip.
    """
    # The small addend is torch.nn.utils.clip_grad_norm_'s.
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


@dataclass
class Judge:
    """Judges a step's parameters, and keeps what it found.

    Attributes:
        facts: of the step.
        thresholds: what passes.
        parameters: reports of the trained parameters that were judged.
        failures: what is not as it should be.
    """

    facts: StepFacts
    thresholds: Thresholds
    parameters: list[ParameterReport] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Take what every parameter needs."""
        self._rms = self.facts.plain.rms
        self._coefficient = clip_coefficient(self.facts.true_norm, self.facts.max_norm)

    def parameter(self, found: ParameterTensors) -> None:
        """Judge a parameter: its gradient, how it was clipped, the step, and the copies that compute.

        Args:
            found: all that was recorded of it; a buffer's is passed over.
        """
        trained = found.name in self.facts.groups
        if not trained and found.name not in self.facts.frozen:
            return
        mismatches, ulps = self._step(found)
        if trained:
            error = self._gradient(found)
            clip_error = self._clip(found)
            elements = found.tensors["before", "model"].numel()
            self.parameters.append(ParameterReport(found.name, elements, error, clip_error, mismatches, ulps))
        self._weights(found)

    def _gradient(self, found: ParameterTensors) -> float | None:
        if self.facts.skipped:
            return None
        reduced = found.tensors.get(("reduced", "gradient"))
        plain = self.facts.plain.gradients.get(found.name)
        if reduced is None and plain is None:
            return None
        if reduced is None or plain is None:
            who, other = ("the system", "plain PyTorch") if plain is None else ("plain PyTorch", "the system")
            self._fail("gradient", found.name, f"{who} has one, and {other} has none")
            return math.inf
        wide = plain.double()
        difference = float(torch.linalg.vector_norm(reduced.double() - wide))
        size = max(float(torch.linalg.vector_norm(wide)), self._rms * math.sqrt(plain.numel()))
        error = difference / size if size > 0 else (0.0 if difference == 0 else math.inf)
        if not error <= self.thresholds.gradient:
            allowed = self.thresholds.gradient
            self._fail("gradient", found.name, f"the relative error is {error:.2g}, and {allowed:g} is allowed")
        return error

    def _clip(self, found: ParameterTensors) -> float | None:
        reduced = found.tensors.get(("reduced", "gradient"))
        clipped = found.tensors.get(("clipped", "gradient"))
        if self.facts.skipped or (reduced is None and clipped is None):
            return None
        if reduced is None or clipped is None:
            self._fail("clip", found.name, "there is a gradient only before clipping, or only after it")
            return math.inf
        expected = reduced.double() * self._coefficient
        difference = (clipped.double() - expected).abs()
        relative = torch.where(difference <= _TINY, 0.0, difference / expected.abs())
        error = float(relative.max()) if relative.numel() else 0.0
        if not error <= self.thresholds.clip:
            self._fail(
                "clip",
                found.name,
                f"the clipped gradient is not the reduced one times {self._coefficient:.6g}: an element is off by "
                f"{error:.2g} of its value, and {self.thresholds.clip:g} is allowed",
            )
        return error

    def _step(self, found: ParameterTensors) -> tuple[int, int]:
        before, after = _stepped(found, "before"), _stepped(found, "after")
        gradient = found.tensors.get(("clipped", "gradient"))
        expected, scale, why = before, None, "is not trained"
        if found.name in self.facts.groups:
            if self.facts.skipped:
                why = "was in a step that is left out for an overflow"
            elif gradient is None:
                why = "has no gradient in this step"
            else:
                try:
                    expected, why = self._replay(found, before, gradient), ""
                    settings = self.facts.settings[self.facts.groups[found.name]]
                    scale = subtraction_scale(before.weight, expected.weight, settings)
                except KeyError as error:
                    self._fail("exports", found.name, f"it has states before the step, and {error} is not among them")
                    return 0, 0
        # What is not stepped is not rounded either.
        allowed = 0 if why else self.thresholds.step_ulps
        elements, ulps = 0, 0
        wrong = []
        pairs = [("weight", after.weight, expected.weight, scale)] + [
            (name, after.states.get(name), expected.states.get(name), None)
            for name in sorted({*after.states, *expected.states})
        ]
        for what, mine, plain, at in pairs:
            mismatch = compare_bits(mine, plain, at)
            elements, ulps = elements + mismatch.elements, max(ulps, mismatch.ulps)
            if mismatch.ulps > allowed:
                wrong.append(f"{mismatch.elements:,} of its {what} by up to {_ulps(mismatch.ulps)}")
        if wrong:
            rule = f"it {why} and must keep its bits" if why else "torch's own optimizer steps it otherwise"
            self._fail("step", found.name, f"{rule}; other elements: {', '.join(wrong)}")
        return elements, ulps

    def _replay(self, found: ParameterTensors, before: Stepped, gradient: torch.Tensor) -> Stepped:
        facts = self.facts
        pieces = [piece for of_rank in facts.pieces for piece in of_rank.get(found.name, ())]
        sides = {side for side, _, _ in pieces}
        device = facts.device if sides <= {facts.device.type} else torch.device(sides.pop())
        replay = Replay(facts.optimizer_class, facts.settings[facts.groups[found.name]], device)
        return replay.step(before, gradient, {(start, stop) for _, start, stop in pieces})

    def _weights(self, found: ParameterTensors) -> None:
        """Compare the copies that compute, on every rank, with the weights that were stepped."""
        master = found.tensors["after", "model"]
        expected: dict[str, str] = {}
        for rank, digests in enumerate(self.facts.fingerprints):
            if found.name not in digests:
                continue
            dtype, digest = digests[found.name]
            if dtype not in expected:
                expected[dtype] = fingerprint(master.to(getattr(torch, dtype)))
            if digest != expected[dtype]:
                self._fail(
                    "weights", found.name, f"what computes on rank {rank} is not the stepped weight, cast to {dtype}"
                )

    def _fail(self, check: Check, parameter: str, detail: str) -> None:
        self.failures.append(Failure(check, parameter, detail))


def _stepped(found: ParameterTensors, phase: str) -> Stepped:
    tensors = {kind: tensor for (when, kind), tensor in found.tensors.items() if when == phase}
    weight = tensors.pop("model")
    return Stepped(weight, tensors)


def _ulps(ulps: int) -> str:
    return f"{ulps:,} units in the last place" if ulps < 2**31 else "more than can be counted"
