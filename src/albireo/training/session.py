"""A run made ready: data, model, plugin, state and what records them, around the loop."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from albireo.booster import Booster, StepOutput
from albireo.config import RunConfig
from albireo.data import AnyBatch, BatchLayout
from albireo.device import PeakReading, describe_device, seed_everything
from albireo.distributed import World
from albireo.errors import Interrupted
from albireo.files import FileOperations
from albireo.optim import OptimizerWrapper
from albireo.plugins import ModelWrapper
from albireo.training.exporting import export_trained
from albireo.training.memory_needs import explain_out_of_memory, is_out_of_memory
from albireo.training.memory_use import MemoryUse, measure_memory_use
from albireo.training.metrics import read_metrics
from albireo.training.picture_plots import draw_accuracy
from albireo.training.plot import draw_loss
from albireo.training.progress import Progress
from albireo.training.recipe import Evaluation, Recipe, RunData, TaskModel
from albireo.training.recorder import Recorder
from albireo.training.run_folder import RunFolder, replace_file
from albireo.training.saving import Position, RunState
from albireo.training.stop import StopRequest
from albireo.training.summary import RunFacts, print_summary, summarise

__all__ = ["Session"]


@dataclass
class Session:
    """What the loop works on.

    Attributes:
        config: the whole configuration, with nothing left open.
        recipe: what is trained.
        folder: where the run is kept.
        world: the ranks.
        data: what is trained on.
        state: model, optimizer and schedule.
        recorder: keeps the rows.
        progress: what the user sees.
        stop: the user's wish to stop.
        layout: how a step's samples are dealt to ranks and micro-batches.
        steps: the run's last step.
        position: where the run stands.
        files: writes to the disk.
        parameters: how many numbers the model has, tied ones once, an adapter's too.
        trained_parameters: how many of them are trained.
        memory_before: memory before the first step, with model and optimizer in place.
        logits_bytes: what the loss holds of logits at a time.
    """

    config: RunConfig
    recipe: Recipe
    folder: RunFolder
    world: World
    data: RunData
    state: RunState
    recorder: Recorder
    progress: Progress
    stop: StopRequest
    layout: BatchLayout
    steps: int
    position: Position
    files: FileOperations
    parameters: int
    trained_parameters: int
    memory_before: PeakReading
    logits_bytes: int
    _rate: float = 0.0
    _found: Evaluation | None = None
    _saved_step: int = -1
    _evaluated_step: int = -1
    _began_seconds: float = field(default_factory=time.perf_counter)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.position.step

    @property
    def booster(self) -> Booster:
        """The facade."""
        return self.state.booster

    @property
    def model(self) -> ModelWrapper:
        """The boosted model."""
        return self.state.model

    @property
    def optimizer(self) -> OptimizerWrapper:
        """The boosted optimizer."""
        return self.state.optimizer

    @property
    def scheduler(self) -> torch.optim.lr_scheduler.LambdaLR:
        """The learning rate's schedule."""
        return self.state.scheduler

    def batches(self) -> Iterator[list[AnyBatch]]:
        """Yield the micro-batches of each step that is left, and keep the position."""
        self.progress.start_training(self.step + 1, self.steps)
        loader = self.data.steps(
            self.layout,
            seed=self.config.schedule.seed,
            start_sample=self.position.samples,
            steps=self.steps - self.step,
            pin=self.world.device.type == "cuda",
        )
        self.recorder.start_clock()
        yield from loader

    def begin_step(self) -> None:
        """Seed what the step draws: masks depend on seed, step and rank, so a step is the same after a resume."""
        self._rate = float(self.scheduler.optimizer.param_groups[0]["lr"])
        if self.config.drops_out:
            seed_everything(self.config.schedule.seed, self.step, self.world.rank)

    def record(self, output: StepOutput) -> bool:
        """Count a step as done and send its numbers on their way.

        Args:
            output: what the step left.

        Returns:
            True once all ranks know that one of them was asked to stop.
        """
        first_sample = self.position.samples
        self.position = Position(self.step + 1, first_sample + self.layout.samples_per_step)
        self.recorder.add(
            self.step,
            output,
            first_sample=first_sample,
            learning_rate=self._rate,
            stop_requested=self.stop.requested,
        )
        return self.recorder.stop_agreed

    def due(self, every: int | None) -> bool:
        """Return True at every so many steps, and at the last; never for 0."""
        return bool(every) and (self.step % (every or 1) == 0 or self.step == self.steps)

    def evaluate(self) -> None:
        """Evaluate on what is held out, unless the user wants no evaluation or this step has one."""
        if not self.config.schedule.eval_every or self._evaluated_step == self.step:
            return
        self.recorder.drain()
        batches = self.data.evaluation(self.layout.batch_size, self.world, pin=self.world.device.type == "cuda")
        self.recorder.start_clock()
        self._found = found = self.recipe.evaluate(self.model, batches, self.world)
        self.recorder.evaluation(self.step, found.loss, found.accuracy)
        self._evaluated_step = self.step
        self.recorder.start_clock()

    def save(self) -> None:
        """Save a checkpoint of this step; the rows so far come first, so that none is missing from a resumed run."""
        self.recorder.drain()
        self.recorder.sync()
        if self._saved_step != self.step:
            keep = self.config.schedule.keep
            self.state.save(self.folder.checkpoints_path, self.position, keep=keep, files=self.files)
            self._saved_step = self.step
        self.recorder.start_clock()

    def finish(self, status: Literal["finished", "interrupted"], *, export_model: bool = True) -> None:
        """Write what a run leaves: the plot, the summary and, when it is done, the model.

        Args:
            status: how it ended.
            export_model: write the model as a Hugging Face folder.

        Raises:
            Interrupted: the run was stopped; it says how to go on.
        """
        self.recorder.drain()
        self.recorder.sync()
        if status == "finished" and export_model:
            self._export()
            left = self.recipe.leave(self.model, self.data, self._found, self.world)
            for name, content in left.items() if self.world.is_main else ():
                replace_file(self.folder.path / name, content, self.files)
        if self.world.is_main:
            self._report(status)
        if status == "interrupted":
            # The launcher takes the first rank that ends with an error's exit code for a reason to end the others.
            self.world.barrier()
            raise Interrupted(
                f"stopped and saved at step {self.step} of {self.steps}; go on with: albireo train "
                f"{self.config.recipe} --resume {self.folder.path}"
            )

    @contextmanager
    def out_of_memory_explained(self) -> Iterator[None]:
        """Turn a failed allocation into one line that names what took the memory, and the flag that helps."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise explain_out_of_memory(
                self._memory_use(), self.config, where=describe_device(self.world.device)
            ) from error

    def _memory_use(self) -> MemoryUse:
        reading = self.booster.plugin.peaks(self.world.device).read()
        return measure_memory_use(
            self.model.weight_tensors(),
            self.optimizer.unwrap(),
            self.config,
            parameters=self.trained_parameters,
            device=self.world.device,
            logits_bytes=self.logits_bytes,
            peak_bytes=reading.device_peak_bytes or reading.host_peak_bytes,
        )

    def _export(self) -> None:
        module = self.model.unwrap()
        if not isinstance(module, TaskModel):
            raise TypeError(f"expected the model wrapper, not {type(module).__name__}")
        base = self.recipe.base_name(self.config)
        export_trained(self.state, module.pretrained, self.data, self.folder, base, self.files)

    def _report(self, status: Literal["finished", "interrupted"]) -> None:
        train_rows, eval_rows = read_metrics(self.folder.metrics_path)
        facts = RunFacts(
            status=status,
            model=self.config.model.model,
            parameters=self.parameters,
            trained_parameters=self.trained_parameters,
            memory_before=self.memory_before,
            memory_after=self.booster.plugin.peaks(self.world.device).read(),
            plugin=self.booster.plugin.name,
            precision=self.booster.plugin.precision,
            device=describe_device(self.world.device),
            world_size=self.world.world_size,
            total_seconds=time.perf_counter() - self._began_seconds,
            compile_seconds=self.recorder.compile_seconds,
            plan=self.booster.plugin.plan(self.model),
        )
        summary = summarise(train_rows, eval_rows, facts, self.folder)
        self.folder.write_summary(summary)
        if train_rows or eval_rows:
            draw_loss(self.folder.metrics_path, self.folder.loss_plot_path, self._title(), self.files)
        if any(row.accuracy is not None for row in eval_rows):
            draw_accuracy(eval_rows, self.folder.accuracy_plot_path, self._title(), self.files)
        self.progress.close()
        print_summary(summary, self.folder, sys.stdout)

    def _title(self) -> str:
        name = self.config.model.model.rstrip("/").rsplit("/", 1)[-1]
        data = self.config.data.data.rstrip("/").rsplit("/", 1)[-1]
        return f"{self.recipe.title} {name} on {data}"
