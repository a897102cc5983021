"""From a step's numbers on the device to a row in the metrics file and on the screen."""

from __future__ import annotations

import math
from typing import Literal

import torch

from albireo.booster import StepOutput
from albireo.data import epoch_of
from albireo.device import Moment, PeakMemory, Readback
from albireo.distributed import World
from albireo.training.metrics import EvalRow, MetricsWriter, TrainRow
from albireo.training.progress import Progress

__all__ = ["Recorder"]

# The host may run this many steps ahead of the device before it waits for a step's numbers.
_LAG_STEPS = 2


class Recorder:
    """Keeps the rows of a run. The numbers of a step come back some steps later; `drain` waits for all of them.

    Args:
        world: the ranks; all of them record, so that all agree.
        progress: what the user sees.
        writer: the metrics file, on the main rank; None elsewhere.
        samples_per_step: of the global batch.
        dataset_size: samples in an epoch.
        peaks: the run's reader of peak memory.
        compiled: the first step compiles the model, and takes longer than all others.
        loss_scaled: a loss scale leaves out a step whose gradient is not finite, as in fp16.

    Attributes:
        stop_agreed: all ranks know that one of them was asked to stop.
        compile_seconds: how much longer the first step took than the second, where `compiled`; None until both are done.
    """

    def __init__(
        self,
        world: World,
        progress: Progress,
        writer: MetricsWriter | None,
        *,
        samples_per_step: int,
        dataset_size: int,
        peaks: PeakMemory,
        compiled: bool = False,
        loss_scaled: bool = False,
    ) -> None:
        self._world = world
        self._progress = progress
        self._writer = writer
        self._samples_per_step = samples_per_step
        self._dataset_size = dataset_size
        self._peaks = peaks
        self._readback = Readback(world.device, _LAG_STEPS if world.device.type == "cuda" else 0)
        self._on_their_way: dict[int, tuple[int, float]] = {}
        self._mark = Moment(world.device)
        self._last_eval: EvalRow | None = None
        self._health = _Health(loss_scaled=loss_scaled)
        self._compiled = compiled
        self._first_eval_seconds: float | None = None
        self._first_step_seconds: float | None = None
        self.stop_agreed = False
        self.compile_seconds: float | None = None

    def start_clock(self) -> None:
        """Count the next step's seconds from now: what came before was no step."""
        self._mark = Moment(self._world.device)

    def add(
        self, step: int, output: StepOutput, *, first_sample: int, learning_rate: float, stop_requested: bool
    ) -> None:
        """Send a step's numbers on their way, and take in those that have arrived.

        Args:
            step: the step's number from 1.
            output: what it left on the device.
            first_sample: the global index of its first sample; a run may have gone on with another batch size.
            learning_rate: the rate it used.
            stop_requested: this rank was asked to stop; the request reaches every rank with the step's numbers.
        """
        own = torch.tensor([float(output.tokens), float(stop_requested)], dtype=torch.float64)
        sums = torch.cat([output.loss_sum.detach().double().reshape(1), own.to(self._world.device, non_blocking=True)])
        self._world.sum_in_place(sums)
        self._on_their_way[step] = (first_sample, learning_rate)
        self._readback.push(step, torch.cat([sums, output.grad_norm.detach().double().reshape(1)]))
        self._take_in(everything=False)

    def drain(self) -> None:
        """Wait for the numbers of every step so far."""
        self._take_in(everything=True)

    def evaluation(self, step: int, loss: float, accuracy: float | None = None) -> EvalRow:
        """Keep the result of an evaluation, which began when the clock was started.

        Args:
            step: the steps done before it.
            loss: the mean loss on held-out data.
            accuracy: the share of it that was right, where there is right and wrong.
        """
        if self._compiled and self._first_step_seconds is None and self._first_eval_seconds is None:
            now = Moment(self._world.device)
            now.wait()  # whoever has the loss has waited for all that came before
            self._first_eval_seconds = now.seconds_since(self._mark)
        row = EvalRow(step=step, eval_loss=loss, accuracy=accuracy)
        if self._writer is not None:
            self._writer.write(row)
        self._progress.evaluation(row, self._last_eval)
        if not math.isfinite(loss):
            self._progress.message(f"warning: at step {step} the evaluation loss is {loss}: the weights are of no use")
        self._last_eval = row
        return row

    def sync(self) -> None:
        """Wait until the rows so far are on the disk."""
        if self._writer is not None:
            self._writer.sync()

    def _take_in(self, *, everything: bool) -> None:
        for step, (loss_sum, tokens, stops, norm), moment in self._readback.pop(everything=everything):
            seconds = max(moment.seconds_since(self._mark), 1e-9)
            self._mark = moment
            self._keep(step, loss_sum / max(tokens, 1.0), tokens, norm, seconds)
            self.stop_agreed = self.stop_agreed or stops > 0

    def _keep(self, step: int, loss: float, tokens: float, norm: float, seconds: float) -> None:
        peaks = self._peaks.read()
        first_sample, learning_rate = self._on_their_way.pop(step)
        row = TrainRow(
            step=step,
            epoch=epoch_of(first_sample, self._dataset_size) + 1,
            loss=loss,
            lr=learning_rate,
            grad_norm=norm,
            samples_per_second=self._samples_per_step / seconds,
            tokens_per_second=tokens / seconds,
            step_seconds=seconds,
            device_peak_bytes=peaks.device_peak_bytes,
            host_peak_bytes=peaks.host_peak_bytes,
        )
        if self._writer is not None:
            self._writer.write(row)
        self._progress.update(row)
        for line in self._health.lines(step, loss, norm):
            self._progress.message(line)
        if self._compiled and self.compile_seconds is None:
            self._tell_cost_of_compiling(seconds)

    def _tell_cost_of_compiling(self, seconds: float) -> None:
        """Compare the first step with the second, which is compiled already."""
        if self._first_step_seconds is None:
            self._first_step_seconds = seconds
            return
        first = self._first_step_seconds
        self.compile_seconds = max(0.0, first - seconds)
        line = f"compiled   the first step took {first:.3g} s, the second {seconds:.2g} s"
        if self._first_eval_seconds is not None:
            line += f"; the evaluation before them {self._first_eval_seconds:.3g} s, some of it for this"
        self._progress.message(line)


class _Health:
    """Says when losses or gradients begin to be no numbers, and when that is over; not again at each step between.

    Args:
        loss_scaled: a step whose gradient is not finite is left out.
    """

    def __init__(self, *, loss_scaled: bool) -> None:
        self._loss_scaled = loss_scaled
        self._trouble: Literal["loss", "gradient's norm"] | None = None
        self._since = 0

    def lines(self, step: int, loss: float, norm: float) -> list[str]:
        """Take in a step, and return what there is to say of it."""
        trouble: Literal["loss", "gradient's norm"] | None = None
        if not math.isfinite(loss):
            trouble = "loss"
        elif not math.isfinite(norm):
            trouble = "gradient's norm"
        if trouble == self._trouble:
            return []
        before, since = self._trouble, self._since
        self._trouble, self._since = trouble, step
        if trouble is None:
            return self._over(before, since, step)
        if trouble == "loss":
            return [f"warning: at step {step} the loss is {loss}; a smaller --learning-rate may help"]
        if self._loss_scaled:
            return [f"step {step} left out: its gradient overflowed in fp16; the loss scale is lowered until none does"]
        return [f"warning: at step {step} the gradient's norm is {norm}"]

    def _over(self, trouble: str | None, since: int, step: int) -> list[str]:
        if trouble == "loss" or not self._loss_scaled:
            steps = "1 step" if step - since == 1 else f"{step - since} steps"
            return [f"at step {step} the {trouble} is finite again, after {steps}"]
        # A single one is no more than a loss scale's way to find its height.
        return [f"steps {since} to {step - 1} were left out"] if step - since > 1 else []
