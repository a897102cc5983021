"""What a run on pictures leaves to look at: its accuracy, what it takes pictures for, and which classes it mixes up."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from albireo.files import FileOperations
from albireo.training.metrics import EvalRow
from albireo.training.run_folder import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["confusion_png", "draw_accuracy", "predictions_png"]

_DOTS_PER_INCH = 150
# From the palette of Okabe and Ito, whose colours stay apart for the colour-blind.
_RIGHT, _WRONG, _TEXT, _GRID = "#0072B2", "#D55E00", "#333333", "#DDDDDD"
_COLUMNS = 6
_MOST_WRITTEN = 20


def draw_accuracy(rows: Sequence[EvalRow], path: Path, title: str, files: FileOperations | None = None) -> None:
    """Draw the accuracy of a run's evaluations, and their loss beside it.

    Args:
        rows: by step.
        path: the picture, replaced whole or not at all.
        title: what stands above it.
        files: what touches the disk.

    Raises:
        RunFolderError: the picture cannot be written.
    """
    known = [(row.step, row.accuracy, row.eval_loss) for row in rows if row.accuracy is not None]
    steps, accuracies, losses = (list(column) for column in zip(*known, strict=True))
    figure = _figure(9.0, 4.5)
    axes = figure.add_subplot()
    axes.plot(steps, [100 * value for value in accuracies], color=_RIGHT, marker="o", linewidth=2, label="accuracy")
    axes.set_ylabel("accuracy (%)", color=_RIGHT, fontsize=11)
    axes.set_ylim(0, 102)
    axes.set_xlabel("step", fontsize=11, color=_TEXT)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.annotate(
        f"{100 * accuracies[-1]:.1f}%", (steps[-1], 100 * accuracies[-1]), xytext=(6, 6), textcoords="offset points",
        color=_RIGHT, fontsize=11,
    )  # fmt: skip
    beside = axes.twinx()
    beside.plot(steps, losses, color=_WRONG, marker="s", markersize=4, linewidth=1.2, linestyle="--", label="loss")
    beside.set_ylabel("loss (nats)", color=_WRONG, fontsize=11)
    beside.set_ylim(bottom=0)
    for spines in (axes.spines, beside.spines):
        spines["top"].set_visible(False)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_TEXT, parse_math=False)
    replace_file(path, _png(figure), files)


def confusion_png(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> bytes:
    """Return a picture of how often each class was taken for each, as a PNG.

    Args:
        confusion: of each class, a row of counts.
        classes: their names.
    """
    counts = np.array(confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(14.0, 3.2 + 0.55 * len(classes))
    figure = _figure(size + 0.8, size)
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="share of the class", shrink=0.8)
    axes.set_xlabel("taken for", color=_TEXT)
    axes.set_ylabel("is", color=_TEXT)
    font = 10 if len(classes) <= _MOST_WRITTEN else 6
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", fontsize=font, parse_math=False)
    axes.set_yticks(range(len(classes)), classes, fontsize=font, parse_math=False)
    for row, column in np.ndindex(*counts.shape) if len(classes) <= _MOST_WRITTEN else ():
        colour = "white" if shares[row, column] > 0.6 else _TEXT
        axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=font)
    right = counts.trace() / max(counts.sum(), 1)
    axes.set_title(f"{100 * right:.1f}% of {counts.sum():,.0f} right", loc="left", fontsize=12, color=_TEXT)
    return _png(figure)


def predictions_png(
    pictures: Sequence[NDArray[np.uint8]], labels: Sequence[int], predicted: Sequence[int], classes: Sequence[str]
) -> bytes:
    """Return a grid of pictures with what they are taken for, as a PNG.

    Args:
        pictures: `[height, width, 3]` each.
        labels: what they are.
        predicted: what they are taken for.
        classes: the names.
    """
    rows = -(-len(pictures) // _COLUMNS)
    figure = _figure(1.6 * _COLUMNS, 1.95 * rows)
    for place, (picture, label, found) in enumerate(zip(pictures, labels, predicted, strict=True)):
        axes = figure.add_subplot(rows, _COLUMNS, place + 1)
        axes.imshow(picture)
        axes.set_xticks([])
        axes.set_yticks([])
        is_right = label == found
        for spine in axes.spines.values():
            spine.set_color(_RIGHT if is_right else _WRONG)
            spine.set_linewidth(2.5)
        text = classes[found] if is_right else f"{classes[found]}\n(is {classes[label]})"
        axes.set_title(text, fontsize=8, color=_RIGHT if is_right else _WRONG, parse_math=False)
    return _png(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)  # the figure's own canvas: no window system, and no figure that pyplot would keep alive
    return figure


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DOTS_PER_INCH)
    return content.getvalue()
