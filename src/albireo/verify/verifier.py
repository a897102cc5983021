"""One training step, watched: the real `booster.train_step`, and plain PyTorch beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from albireo.booster import Booster, StepOutput
from albireo.checkpoint import tensor_names
from albireo.distributed import World
from albireo.distributed.host_gather import gather_json
from albireo.errors import AlbireoError, CheckpointError, ConfigError
from albireo.ops import count_terms
from albireo.optim import OptimizerWrapper
from albireo.plugins import ModelWrapper
from albireo.verify.comparable import comparable
from albireo.verify.gather import StepTensors, with_step_tensors
from albireo.verify.judge import Judge, StepFacts
from albireo.verify.record import RankRecord, square_sum
from albireo.verify.reference import Form, PlainGradients, PlainReference, ReferenceFactory
from albireo.verify.report import Failure, StepReport
from albireo.verify.thresholds import Thresholds
from albireo.verify.whole_step import RankNumbers, global_loss, judge_whole_step

__all__ = ["Verifier", "verify_step"]

MicroBatch = Mapping[str, Any]
NamesOf = Callable[[nn.Module], Mapping[torch.Tensor, str]]


def names_in(module: nn.Module) -> Mapping[torch.Tensor, str]:
    """Return a model's tensors with their names in its state dict; tied ones have one name."""
    return tensor_names(module)[0]


class Verifier:
    """Makes training steps of a boosted model, and judges each against plain PyTorch in one process.

    All ranks make one, with the same arguments, and call `step` together; all get the same report. Nothing is changed
    but what a training step changes. The main rank needs memory for a second model (on its device while the reference
    runs, in host memory otherwise), and each rank host memory for five fp32 copies of what its plugin exports.

    Dropout must be 0: two runs would draw different masks.

    Args:
        booster: the plugin and the ranks.
        model: the boosted model.
        optimizer: its boosted optimizer.
        reference_factory: builds anew what was given to `boost`: a model of the same parameters (its weights are filled
            in) and an optimizer with the same groups. It is called on the main rank alone, once, at the first step.
        names_of: names of a model's tensors, for the boosted model's `unwrap()` and the reference; those of the state
            dict if None.
        thresholds: what passes; those of the plugin and its precision if None.
    """

    def __init__(
        self,
        booster: Booster,
        model: ModelWrapper,
        optimizer: OptimizerWrapper,
        reference_factory: ReferenceFactory,
        *,
        names_of: NamesOf | None = None,
        thresholds: Thresholds | None = None,
    ) -> None:
        self._booster, self._model, self._optimizer = booster, model, optimizer
        self._factory = reference_factory
        self._names_of = names_of if names_of is not None else names_in
        precision = booster.plugin.precision
        self.thresholds = (
            thresholds if thresholds is not None else Thresholds.of(precision, step_ulps=booster.plugin.step_ulps)
        )
        self._form = Form(precision, booster.plugin.compute_form, booster.world.device)
        self._reference: PlainReference | None = None
        self._steps = 0

    def step(
        self,
        micro_batches: Sequence[Sequence[MicroBatch]],
        counts: Sequence[Sequence[int]] | None = None,
        *,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        max_norm: float = 0.0,
    ) -> StepReport:
        """Make one training step, and judge it.

        Args:
            micro_batches: those of all ranks, on every rank: by rank, then in order. This rank trains on its own.
            counts: how many terms the loss of each is a mean of; counted if None, as `train_step` does.
            lr_scheduler: stepped by the training step.
            max_norm: clip the gradient to this global norm; 0 does not.

        Returns:
            The same report on every rank.

        Raises:
            ConfigError: there are not micro-batches for each rank, or the reference is another model.
            AlbireoError: on other ranks, where the main rank could not judge.
        """
        world = self._booster.world
        if len(micro_batches) != world.world_size:
            raise ConfigError(
                f"verify needs the micro-batches of all {world.world_size} ranks, and got those of {len(micro_batches)}"
            )
        if counts is None:
            module, criterion = self._model.unwrap(), self._model.criterion
            counts = [[count_terms(batch, module, criterion) for batch in batches] for batches in micro_batches]
        with comparable(self._form):
            return self._watched(micro_batches, counts, lr_scheduler, max_norm)

    def _watched(
        self,
        micro_batches: Sequence[Sequence[MicroBatch]],
        counts: Sequence[Sequence[int]],
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        max_norm: float,
    ) -> StepReport:
        world, optimizer = self._booster.world, self._optimizer
        names = self._names_of(self._model.unwrap())
        record = RankRecord(self._booster, self._model, optimizer, names)
        record.take_state("before")
        # The rates of this step: a schedule moves them within the call.
        settings = [{key: _plain(value) for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        scaler = optimizer.scaler_state()
        output = self._booster.train_step(
            self._model,
            optimizer,
            micro_batches[world.rank],
            counts[world.rank],
            lr_scheduler=lr_scheduler,
            max_norm=max_norm,
            observe=record.take_gradients,
        )
        record.take_state("after")
        self._steps += 1
        said = gather_json({"fingerprints": record.fingerprints(), "pieces": record.pieces()}, world) or []
        numbers = self._numbers(output, record)
        reports: list[StepReport] = []

        def judge(tensors: StepTensors) -> None:
            plain = self._plain(tensors, micro_batches, counts, scaler)
            facts = self._facts(plain, numbers, names, settings, said, max_norm)
            judged = Judge(facts, self.thresholds)
            judged.failures.extend(
                judge_whole_step(facts, numbers, counts, (scaler, optimizer.scaler_state()), self.thresholds)
            )
            if facts.skipped or (math.isfinite(facts.true_norm) and plain.finite):
                for found in tensors.parameters():
                    judged.parameter(found)
            reports.append(self._report(judged, numbers, scaler))

        failure: Exception | None = None
        try:
            with_step_tensors(record.slices, world, judge)
        except CheckpointError as error:
            reports.append(self._unjudged(numbers, scaler, str(error)))
        except Exception as error:  # noqa: BLE001  raised again below, after all know whether there is a report
            failure = error
        return _from_main(world, reports, failure)

    def _built(self) -> PlainReference:
        if self._reference is None:
            self._reference = PlainReference(self._factory, self._names_of, self._form)
        return self._reference

    def _plain(
        self,
        tensors: StepTensors,
        micro_batches: Sequence[Sequence[MicroBatch]],
        counts: Sequence[Sequence[int]],
        scaler: Mapping[str, float],
    ) -> PlainGradients:
        return self._built().gradients(
            tensors.weights_before(),
            micro_batches,
            counts,
            training=self._model.training,
            loss_function=self._model.loss_function,
            criterion=self._model.criterion,
            loss_scale=scaler.get("scale"),
        )

    def _facts(
        self,
        plain: PlainGradients,
        numbers: Sequence[RankNumbers],
        names: Mapping[torch.Tensor, str],
        settings: Sequence[Mapping[str, Any]],
        said: Sequence[Mapping[str, Any]],
        max_norm: float,
    ) -> StepFacts:
        reference = self._built()
        squares = sum(of_rank.square_sum for of_rank in numbers)
        finite = math.isfinite(squares)
        parameters = {name for tensor, name in names.items() if isinstance(tensor, nn.Parameter)}
        return StepFacts(
            plain=plain,
            true_norm=math.sqrt(squares) if finite else math.nan,
            max_norm=max_norm,
            skipped=not finite and self._form.precision == "fp16",
            groups=reference.groups,
            settings=settings,
            optimizer_class=reference.optimizer_class,
            frozen=frozenset(parameters - set(reference.groups)),
            fingerprints=[of_rank["fingerprints"] for of_rank in said],
            pieces=[of_rank["pieces"] for of_rank in said],
            device=self._booster.world.device,
        )

    def _numbers(self, output: StepOutput, record: RankRecord) -> list[RankNumbers]:
        mine = RankNumbers(
            float(output.loss_sum),
            float(output.tokens),
            float(output.grad_norm),
            square_sum(record.slices.get("reduced", ())),
            self._optimizer.scaler_state().get("scale", 0.0),
        )
        return [RankNumbers(*numbers) for numbers in self._booster.world.gather_numbers(mine)]

    def _report(self, judged: Judge, numbers: Sequence[RankNumbers], scaler: Mapping[str, float]) -> StepReport:
        return StepReport(
            step=self._steps,
            loss=global_loss(numbers),
            reference_loss=judged.facts.plain.loss,
            grad_norm=numbers[0].grad_norm,
            true_norm=judged.facts.true_norm,
            loss_scale=scaler.get("scale"),
            skipped=judged.facts.skipped,
            parameters=tuple(judged.parameters),
            failures=tuple(judged.failures),
        )

    def _unjudged(self, numbers: Sequence[RankNumbers], scaler: Mapping[str, float], problem: str) -> StepReport:
        return StepReport(
            step=self._steps,
            loss=global_loss(numbers),
            reference_loss=math.nan,
            grad_norm=numbers[0].grad_norm,
            true_norm=math.nan,
            loss_scale=scaler.get("scale"),
            skipped=False,
            parameters=(),
            failures=(Failure("exports", None, problem),),
        )


def verify_step(
    booster: Booster,
    model: ModelWrapper,
    optimizer: OptimizerWrapper,
    micro_batches: Sequence[Sequence[MicroBatch]],
    counts: Sequence[Sequence[int]] | None,
    reference_factory: ReferenceFactory,
    *,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    max_norm: float = 0.0,
) -> StepReport:
    """Make one training step on all ranks, and judge it: see `Verifier`, which also takes more steps.

    Args:
        booster: the plugin and the ranks.
        model: the boosted model.
        optimizer: its boosted optimizer.
        micro_batches: those of all ranks, on every rank: by rank, then in order.
        counts: how many terms the loss of each is a mean of; counted if None.
        reference_factory: builds anew what was given to `boost`: the model and its optimizer.
        lr_scheduler: stepped by the training step.
        max_norm: clip the gradient to this global norm; 0 does not.

    Returns:
        The same report on every rank.

    Raises:
        ConfigError: see `Verifier.step`.
    """
    verifier = Verifier(booster, model, optimizer, reference_factory)
    return verifier.step(micro_batches, counts, lr_scheduler=lr_scheduler, max_norm=max_norm)


def _plain(value: Any) -> Any:
    """Return a group's setting as it is now: a rate may be a tensor that a schedule writes to."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _from_main(world: World, reports: Sequence[StepReport], failure: Exception | None) -> StepReport:
    """Return the main rank's report on all ranks; where it has none, all raise."""
    message = world.share_from_main(reports[0].to_message() if reports and world.is_main else None)
    if message is not None:
        return reports[0] if world.is_main else StepReport.from_message(message)
    if failure is None:
        raise AlbireoError("the main rank could not verify; its own message says why")
    raise failure
