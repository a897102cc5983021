"""What a user sees while a run goes on: a bar on a terminal, plain lines anywhere else, nothing on other ranks."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from albireo.training.metrics import EvalRow, TrainRow

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import TaskID

__all__ = ["Progress", "ProgressTask", "format_bytes", "format_duration", "format_perplexity", "format_quality"]

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BEFORE_A_TASK_IS_LONG = 2.0
_SECONDS_BETWEEN_DRAWINGS = 0.1


def format_bytes(size_bytes: int) -> str:
    """Write a size in units of 2**30 or 2**20 bytes: "1.50 GB", "320 MB"."""
    if size_bytes >= 2**30:
        return f"{size_bytes / 2**30:.2f} GB"
    return f"{size_bytes / 2**20:.0f} MB"


def format_duration(seconds: float) -> str:
    """Write a duration as "1:05" or "2:03:04"."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_quality(row: EvalRow) -> str:
    """Write what an evaluation says beside its loss: "accuracy 93.75%", or "perplexity 673.2"."""
    if row.accuracy is not None:
        return f"accuracy {100 * row.accuracy:.2f}%"
    return f"perplexity {format_perplexity(row.perplexity)}"


def format_perplexity(perplexity: float) -> str:
    """Write a perplexity with a digit after the point while that says something: "673.2", "1.2e+09"."""
    return f"{perplexity:.1f}" if perplexity < 1e6 else f"{perplexity:.1e}"


class ProgressTask(Protocol):
    """Work other than training that is going on: tokenizing, downloading."""

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units as done."""


class _Face(Protocol):
    """One of the two ways to show the same things."""

    def line(self, text: str) -> None:
        """Show a line that stays."""

    def start(self, done: int, total: int) -> None:
        """Show that training begins, with `done` steps behind it."""

    def step(self, done: int, total: int, times: str, numbers: str) -> None:
        """Show where training stands, if it is time to."""

    def begin(self, description: str, total: int | None) -> ProgressTask:
        """Show that a task has begun."""

    def end(self, task: ProgressTask) -> None:
        """Show that a task is over."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Progress:
    """Shows how a run goes. A context manager; whatever it does to the terminal is undone at the end.

    Nothing here starts a thread, since tokenizing forks: what is shown changes only inside these calls.

    Args:
        enabled: False on every rank but the main one, where all calls do nothing.
        stream: where to show it; standard error if None.
        clock: seconds that only grow.
    """

    def __init__(
        self, *, enabled: bool = True, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._stream = stream if stream is not None else sys.stderr
        self._face: _Face | None = None
        if enabled:
            self._face = _Bar(self._stream, clock) if _is_terminal(self._stream) else _Lines(self._stream, clock)
        self._steps = 0
        self._start_seconds = clock()
        self._first_update: tuple[int, float] | None = None

    def start_training(self, first_step: int, steps: int) -> None:
        """Begin to count steps.

        Args:
            first_step: the step that comes first, counted from 1; later where a run goes on.
            steps: the last step's number.
        """
        self._steps = steps
        self._start_seconds = self._clock()
        self._first_update = None
        if self._face is not None:
            self._face.start(first_step - 1, steps)

    def update(self, row: TrainRow) -> None:
        """Show a step that is done, after `start_training`. Cheap enough to call for each."""
        if self._face is None:
            return
        now = self._clock()
        times = f"elapsed {format_duration(now - self._start_seconds)}"
        left_seconds = self._left_seconds(row.step, now)
        if left_seconds is not None:
            times += f"  left {format_duration(left_seconds)}"
        self._face.step(row.step, self._steps, times, _numbers(row))

    def evaluation(self, row: EvalRow, previous: EvalRow | None = None) -> None:
        """Show what an evaluation came to, as a line that stays.

        Args:
            row: the evaluation.
            previous: the one before it, to compare with.
        """
        where = f"step {row.step}/{self._steps}" if self._steps else f"step {row.step}"
        text = f"{where}  evaluation loss {row.eval_loss:.3f}, {format_quality(row)}"
        if previous is not None:
            text += f" (loss was {previous.eval_loss:.3f} at step {previous.step})"
        self.message(text)

    def message(self, text: str) -> None:
        """Show a line that stays, above the bar if there is one."""
        if self._face is not None:
            self._face.line(text)

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[ProgressTask]:
        """Show a task while the block runs.

        Args:
            description: what is being done, such as "tokenizing".
            total: how many units there are; None if that is not known.

        Yields:
            The task, whose `advance` counts units.
        """
        if self._face is None:
            yield _SilentTask()
            return
        task = self._face.begin(description, total)
        try:
            yield task
        finally:
            self._face.end(task)

    def close(self) -> None:
        """Leave the terminal as it was. May be called again."""
        if self._face is not None:
            self._face.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _left_seconds(self, step: int, now: float) -> float | None:
        # Counted from the end of the first step, which is slower than all others (kernels are chosen, caches are
        # filled), and by the clock, so that evaluations and checkpoints on the way count too.
        if step >= self._steps:
            return 0.0
        if self._first_update is None:
            self._first_update = (step, now)
        first_step, first_seconds = self._first_update
        if step <= first_step:
            return None
        return (now - first_seconds) / (step - first_step) * (self._steps - step)


class _SilentTask:
    def advance(self, amount: int = 1) -> None:
        pass


class _Lines:
    """Plain lines: the first and the last step, and between them one for 5% of the steps or for some seconds."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._last_line: tuple[int, float] | None = None

    def line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def start(self, done: int, total: int) -> None:  # noqa: ARG002  the bar needs them, lines do not
        self._last_line = None

    def step(self, done: int, total: int, times: str, numbers: str) -> None:
        now = self._clock()
        if self._last_line is not None and done < total:
            last_done, last_seconds = self._last_line
            if done - last_done < total / 20 and now - last_seconds < _SECONDS_BETWEEN_LINES:
                return
        self._last_line = (done, now)
        self.line(f"step {done}/{total}  {numbers}  {times}")

    def begin(self, description: str, total: int | None) -> _LineTask:
        return _LineTask(self, description, total, self._clock)

    def end(self, task: ProgressTask) -> None:
        if isinstance(task, _LineTask):
            task.end()

    def close(self) -> None:
        self._stream.flush()


class _LineTask:
    """Says nothing of what is soon over, so that short evaluations do not fill a log."""

    def __init__(self, lines: _Lines, description: str, total: int | None, clock: Callable[[], float]) -> None:
        self._lines, self._description, self._total, self._clock = lines, description, total, clock
        self._done = 0
        self._start_seconds = clock()
        self._next_seconds = self._start_seconds + _SECONDS_BEFORE_A_TASK_IS_LONG

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        now = self._clock()
        if now >= self._next_seconds:
            self._next_seconds = now + _SECONDS_BETWEEN_LINES
            self._lines.line(f"{self._description}  {_of(self._done, self._total)}")

    def end(self) -> None:
        took_seconds = self._clock() - self._start_seconds
        if took_seconds >= _SECONDS_BEFORE_A_TASK_IS_LONG:
            count = _of(self._done, self._total)
            self._lines.line(f"{self._description}  {count}  took {format_duration(took_seconds)}")


class _Bar:
    """A bar for each thing going on, and under the training's bar a line of its numbers."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._clock = clock
        self._drawn_seconds = -math.inf
        self._numbers = ""
        self._training: TaskID | None = None
        # Told that it is a terminal: that was decided once, in _is_terminal, and must not be decided again elsewhere.
        self._console = Console(file=stream, force_terminal=True, highlight=False)
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[times]}", markup=False),
            console=self._console,
            auto_refresh=False,
            expand=True,
            get_time=clock,
        )
        self._live = Live(get_renderable=self._render, console=self._console, auto_refresh=False)
        self._is_live = False

    def line(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def start(self, done: int, total: int) -> None:
        if self._training is not None:
            self._bars.remove_task(self._training)
        # Shown before the first step is done, which may take long.
        self._training = self._bars.add_task(
            "training", total=total, completed=done, count=f"{done}/{total}", times=f"elapsed {format_duration(0)}"
        )
        self._numbers = ""
        self._draw(now=True)

    def step(self, done: int, total: int, times: str, numbers: str) -> None:
        if self._training is None:
            self.start(done, total)
            return
        self._numbers = numbers
        self._bars.update(self._training, completed=done, count=f"{done}/{total}", times=times)
        self._draw(now=done >= total)

    def begin(self, description: str, total: int | None) -> _BarTask:
        task = self._bars.add_task(description, total=total, count=_of(0, total), times="")
        self._draw(now=True)
        return _BarTask(self, task, total, self._clock)

    def end(self, task: ProgressTask) -> None:
        if isinstance(task, _BarTask):
            self._bars.remove_task(task.task)
            self._draw(now=True)

    def advance(self, task: TaskID, done: int, total: int | None, seconds: float) -> None:
        times = f"elapsed {format_duration(seconds)}"
        self._bars.update(task, completed=done, count=_of(done, total), times=times)
        self._draw(now=False)

    def close(self) -> None:
        if self._is_live:
            self._is_live = False
            self._live.stop()

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        if not self._numbers:
            return self._bars
        return Group(self._bars, Text(self._numbers, style="dim", overflow="ellipsis", no_wrap=True))

    def _draw(self, *, now: bool) -> None:
        # Not until there is something to show: a terminal without a bar is left alone.
        if not self._is_live:
            self._is_live = True
            self._live.start()
        seconds = self._clock()
        if now or seconds - self._drawn_seconds >= _SECONDS_BETWEEN_DRAWINGS:
            self._drawn_seconds = seconds
            self._live.refresh()


class _BarTask:
    def __init__(self, bar: _Bar, task: TaskID, total: int | None, clock: Callable[[], float]) -> None:
        self.task = task
        self._bar, self._total, self._clock = bar, total, clock
        self._done = 0
        self._start_seconds = clock()

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        self._bar.advance(self.task, self._done, self._total, self._clock() - self._start_seconds)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in {"dumb", "unknown"}


def _speed(row: TrainRow) -> str:
    # Where a sample is one term of the loss, tokens are no word for it.
    if math.isclose(row.tokens_per_second, row.samples_per_second, rel_tol=1e-6):
        return f"{row.samples_per_second:,.1f} samples/s"
    return f"{row.tokens_per_second:,.0f} tokens/s"


def _numbers(row: TrainRow) -> str:
    parts = [f"loss {row.loss:.3f}", f"lr {row.lr:.2e}", _speed(row)]
    if row.device_peak_bytes:
        parts.append(f"device {format_bytes(row.device_peak_bytes)}")
    parts.append(f"host {format_bytes(row.host_peak_bytes)}")
    return "  ".join(parts)


def _of(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"
