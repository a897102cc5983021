"""`loss.png`: the losses of a run in one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from albireo.files import FileOperations
from albireo.training.metrics import EvalRow, TrainRow, read_metrics
from albireo.training.run_folder import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["build_figure", "draw_loss", "highest_loss_shown", "smooth", "thin_out"]

_WIDTH_INCHES, _HEIGHT_INCHES, _DOTS_PER_INCH = 9.0, 5.0, 150
# From the palette of Okabe and Ito, whose colours stay apart for the colour-blind.
_TRAINING, _EVALUATION, _TEXT, _GRID = "#0072B2", "#D55E00", "#333333", "#DDDDDD"
_MOST_POINTS_DRAWN = 4000
_MOST_EPOCHS_MARKED = 20

_Array = NDArray[np.float64]


def draw_loss(metrics_path: Path, output_path: Path, title: str, files: FileOperations | None = None) -> None:
    """Draw a run's losses as a PNG of 1350 x 750 pixels.

    Args:
        metrics_path: the run's `metrics.jsonl`.
        output_path: the picture, replaced whole or not at all.
        title: what stands above it.
        files: what touches the disk.

    Raises:
        RunFolderError: the metrics cannot be read, or the picture cannot be written.
    """
    train_rows, eval_rows = read_metrics(metrics_path)
    picture = io.BytesIO()
    build_figure(train_rows, eval_rows, title).savefig(picture, format="png", dpi=_DOTS_PER_INCH)
    replace_file(output_path, picture.getvalue(), files)


def build_figure(train_rows: Sequence[TrainRow], eval_rows: Sequence[EvalRow], title: str) -> Figure:
    """Build the picture: training loss raw and smoothed, evaluations, and each epoch's mean if there are several.

    Args:
        train_rows: by step; losses that are not finite leave a gap and are marked at the lower edge.
        eval_rows: by step.
        title: drawn as it is, never read as mathematics.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(
        figsize=(_WIDTH_INCHES, _HEIGHT_INCHES),
        dpi=_DOTS_PER_INCH,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
    )
    FigureCanvasAgg(figure)  # the figure's own canvas: no window system, and no figure that pyplot would keep alive
    axes = figure.add_subplot()
    steps = np.array([row.step for row in train_rows], dtype=np.float64)
    losses = np.array([row.loss for row in train_rows], dtype=np.float64)
    eval_steps = np.array([row.step for row in eval_rows], dtype=np.float64)
    eval_losses = np.array([row.eval_loss for row in eval_rows], dtype=np.float64)

    _style(axes, of_pictures=any(row.accuracy is not None for row in eval_rows))
    highest = highest_loss_shown(losses, eval_losses)
    _draw_training(axes, steps, losses, highest)
    _draw_evaluation(axes, eval_steps, eval_losses)
    _draw_epochs(axes, train_rows)
    all_steps, all_losses = np.concatenate([steps, eval_steps]), np.concatenate([losses, eval_losses])
    _set_limits(axes, all_steps, all_losses, highest)
    _mark_what_is_not_shown(axes, all_steps, all_losses, highest)
    _write_last_evaluation(axes, eval_rows)
    _add_heading(axes, title, has_epochs=len({row.epoch for row in train_rows}) > 1)
    return figure


def highest_loss_shown(losses: _Array, eval_losses: _Array) -> float:
    """Choose the largest loss the picture makes room for, so that a few spikes do not flatten the rest.

    Where the run begins is always shown, unless it is above 13 nats, which is more than blind guessing costs over any
    vocabulary in use; beyond that, 3 times the spread of the lower 95% of the training losses.

    Args:
        losses: [steps], training losses.
        eval_losses: [evaluations].

    Returns:
        The limit in nats; infinite where no loss is finite.
    """
    finite = losses[np.isfinite(losses)]
    finite_eval = eval_losses[np.isfinite(eval_losses)]
    both = np.concatenate([finite, finite_eval])
    if both.size == 0:
        return math.inf
    most = finite if finite.size else finite_eval
    low = float(both.min())
    limit = low + 3 * (float(np.quantile(most, 0.95)) - low)
    starts = [float(values[0]) for values in (finite, finite_eval) if values.size and values[0] <= 13]
    limit = max([limit, *starts])
    return float(both[both <= limit].max())


def smooth(values: _Array, half_window: int) -> _Array:
    """Smooth by a straight line fitted around each point, weighted by nearness (Cleveland's LOWESS, one pass).

    Unlike a moving average it lags nowhere and does not bend at the two ends, where a loss curve is steepest and where
    it is read.

    Args:
        values: [n]; NaN is a point that is not there.
        half_window: points to either side that count.

    Returns:
        [n]; NaN where most of the window is missing, since a line drawn across a gap would be invented.
    """
    offsets = np.arange(-half_window, half_window + 1, dtype=np.float64)
    weights = (1 - np.abs(offsets / (half_window + 1)) ** 3) ** 3
    there = np.isfinite(values).astype(np.float64)
    filled = np.where(there > 0, values, 0.0)

    def windowed(kernel: _Array, signal: _Array) -> _Array:
        # Reversed, since convolution flips its kernel; "full" and cut, since "same" follows the longer of the two.
        full = np.convolve(signal, kernel[::-1])
        return full[half_window : half_window + signal.size]

    s0, s1, s2 = (windowed(weights * offsets**power, there) for power in range(3))
    t0, t1 = (windowed(weights * offsets**power, filled) for power in range(2))
    determinant = s0 * s2 - s1 * s1
    with np.errstate(divide="ignore", invalid="ignore"):
        # Without spread in the window there is no slope to fit, only a mean.
        smoothed = np.where(determinant > 1e-9 * s0 * s2, (s2 * t0 - s1 * t1) / determinant, t0 / s0)
    return np.where(s0 >= 0.35 * windowed(weights, np.ones_like(values)), smoothed, np.nan)


def thin_out(steps: _Array, values: _Array, most_points: int) -> tuple[_Array, _Array]:
    """Keep a line's look with fewer points: of each group of neighbours its lowest and its highest value.

    A picture has fewer columns than a long run has steps, and the renderer gives up on a line of too many points.

    Args:
        steps: [n].
        values: [n]; a group without a finite value becomes one NaN, a gap.
        most_points: the most points to return.

    Returns:
        Steps and values, each of the same length of at most `most_points`.
    """
    if steps.size <= most_points:
        return steps, values
    kept: list[int] = []
    for group in np.array_split(np.arange(steps.size), max(1, most_points // 2)):
        finite = group[np.isfinite(values[group])]
        if finite.size:
            kept.extend(sorted({int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}))
        else:
            kept.append(int(group[0]))
    return steps[kept], values[kept]


def _style(axes: Axes, *, of_pictures: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlabel("step", fontsize=11, color=_TEXT)
    axes.set_ylabel("loss (nats)" if of_pictures else "loss (nats per token)", fontsize=11, color=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_TEXT, labelsize=10, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


def _draw_training(axes: Axes, steps: _Array, losses: _Array, highest: float) -> None:
    if not np.isfinite(losses).any():
        return
    shown_steps, shown = thin_out(steps, losses, _MOST_POINTS_DRAWN)
    if steps.size < 10:
        axes.plot(shown_steps, shown, color=_TRAINING, linewidth=1.5, marker=".", markersize=9, label="training")
        return
    crowd = min(1.0, steps.size / 1000)
    axes.plot(
        shown_steps, shown, color=_TRAINING, alpha=0.4 - 0.1 * crowd, linewidth=1.0 - 0.4 * crowd, label="training"
    )
    # What is too high to be shown would drag its neighbours up as well.
    smoothed = smooth(np.where(losses <= highest, losses, np.nan), min(3 + steps.size // 30, 250))
    axes.plot(
        *thin_out(steps, smoothed, _MOST_POINTS_DRAWN), color=_TRAINING, linewidth=2.0, label="training, smoothed"
    )


def _draw_evaluation(axes: Axes, steps: _Array, losses: _Array) -> None:
    finite = np.isfinite(losses)
    if not finite.any():
        return
    is_crowded = int(finite.sum()) > 40
    axes.plot(
        steps[finite],
        losses[finite],
        color=_EVALUATION,
        linewidth=1.5,
        marker="o",
        markersize=3 if is_crowded else 6,
        markeredgecolor="white",
        markeredgewidth=0.0 if is_crowded else 0.8,
        label="evaluation",
        zorder=4,
    )


def _draw_epochs(axes: Axes, rows: Sequence[TrainRow]) -> None:
    epochs: dict[int, list[TrainRow]] = {}
    for row in rows:
        epochs.setdefault(row.epoch, []).append(row)
    if len(epochs) < 2:
        return
    is_crowded = len(epochs) > _MOST_EPOCHS_MARKED
    middles, means, spans = [], [], []
    for number, (epoch, members) in enumerate(epochs.items()):
        first, last = members[0].step - 0.5, members[-1].step + 0.5
        if number and not is_crowded:
            axes.axvline(first, color="#BBBBBB", linewidth=0.8, zorder=1)
        if not is_crowded:
            axes.annotate(
                f"epoch {epoch}" if len(epochs) <= 8 or not number else str(epoch),
                xy=((first + last) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color="#777777",
            )
        finite = [row.loss for row in members if math.isfinite(row.loss)]
        if finite:
            middles.append((first + last) / 2)
            means.append(sum(finite) / len(finite))
            spans.append((first, last))
    if not is_crowded and means:
        axes.hlines(means, *zip(*spans, strict=True), color="black", linewidth=1.0, linestyle=(0, (4, 3)), zorder=5)
    axes.plot(
        middles,
        means,
        linestyle="none",
        marker="D",
        markersize=5 if is_crowded else 7,
        color="black",
        markeredgecolor="white",
        markeredgewidth=1.0,
        label="mean of an epoch",
        zorder=6,
    )


def _set_limits(axes: Axes, steps: _Array, losses: _Array, highest: float) -> None:
    first, last = (float(steps.min()), float(steps.max())) if steps.size else (0.0, 1.0)
    margin = max(0.02 * (last - first), 0.5)
    axes.set_xlim(first - margin, last + margin)
    shown = losses[np.isfinite(losses) & (losses <= highest)]
    if not shown.size:
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no finite loss", transform=axes.transAxes, ha="center", color=_TEXT, fontsize=12)
        return
    low, high = float(shown.min()), float(shown.max())
    room = max(0.06 * (high - low), 0.02 * abs(high), 0.01)
    axes.set_ylim(low - room, high + room)


def _mark_what_is_not_shown(axes: Axes, steps: _Array, losses: _Array, highest: float) -> None:
    """Say at the upper and the lower edge what the axes have no place for."""
    above = np.isfinite(losses) & (losses > highest)
    missing = ~np.isfinite(losses)
    for where, height, marker, label in (
        (above, 0.985, "^", f"above the scale (up to {_short(float(losses[above].max(initial=0.0)))})"),
        (missing, 0.015, "x", f"not finite ({missing.sum():,} of {losses.size:,})"),
    ):
        if where.any():
            axes.plot(
                steps[where],
                np.full(int(where.sum()), height),
                linestyle="none",
                marker=marker,
                markersize=6,
                color=_TEXT,
                label=label,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
                zorder=7,
            )


def _write_last_evaluation(axes: Axes, rows: Sequence[EvalRow]) -> None:
    finite = [row for row in rows if math.isfinite(row.eval_loss)]
    if not finite:
        return
    low, high = axes.get_ylim()
    accuracy = finite[-1].accuracy
    quality = f"perplexity\n{_short(finite[-1].perplexity)}" if accuracy is None else f"accuracy\n{100 * accuracy:.1f}%"
    # In the margin, where no curve can run through it.
    axes.annotate(
        f"loss {finite[-1].eval_loss:.3f}\n{quality}",
        xy=(1.0, min(max(finite[-1].eval_loss, low), high)),
        xycoords=("axes fraction", "data"),
        xytext=(8, 0),
        textcoords="offset points",
        color=_EVALUATION,
        fontsize=10,
        va="center",
        annotation_clip=False,
    )


def _add_heading(axes: Axes, title: str, *, has_epochs: bool) -> None:
    """Put the title and the legend above the axes: inside, no corner is left free by every curve."""
    from matplotlib.transforms import ScaledTranslation

    labels = axes.get_legend_handles_labels()[1]
    columns = len(labels) if len(labels) <= 4 else 3
    rows = math.ceil(len(labels) / columns) if labels else 0
    above_points = 19 if has_epochs else 7
    if labels:
        figure = axes.figure
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            bbox_transform=axes.transAxes + ScaledTranslation(0, above_points / 72, figure.dpi_scale_trans),
            borderaxespad=0.0,
            ncols=columns,
            frameon=False,
            fontsize=10,
            labelcolor=_TEXT,
            columnspacing=1.6,
            handletextpad=0.6,
            borderpad=0.2,
        )
    pad = above_points + 16 * rows + 5
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_TEXT, pad=pad, parse_math=False)


def _short(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.2e}"
