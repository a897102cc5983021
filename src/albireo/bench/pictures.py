"""A bench in pictures: speed and memory as bars, over batch sizes, and one against the other."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from albireo.bench.case import CaseResult
from albireo.bench.table import short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Picture", "draw", "picture_of"]

_GB = 2**30
# Okabe and Ito's palette, whose colours stay apart for the colour-blind; with more series hatches tell them apart too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#999999")
_HATCHES = ("", "//", "..", "xx")
_MARKERS = "osD^vPX*"
_TEXT, _GRID = "#333333", "#DDDDDD"


class Picture(NamedTuple):
    """A picture in two forms.

    Attributes:
        name: what its files are called, without their ends.
        title: what it shows.
        png: for looking at.
        svg: for the report; text stays text.
    """

    name: str
    title: str
    png: bytes
    svg: str


def draw(results: Sequence[CaseResult]) -> list[Picture]:
    """Return the pictures that there is something to show in; none if nothing was measured.

    Args:
        results: what was measured.
    """
    groups = _groups(results)
    done = {name: rows for name, rows in groups.items() if any(row.status == "ok" for row in rows)}
    if not done:
        return []
    found = [
        _picture(
            "bars", "Throughput and peak memory", done, [partial(_bars, shown=shown) for shown in (_SPEED, _MEMORY)]
        ),
        _picture("tradeoff", "Throughput against peak memory", done, (_tradeoff,)),
    ]
    if any(len({row.case.batch_size for row in rows if row.status == "ok"}) > 1 for rows in done.values()):
        found.insert(
            1,
            _picture(
                "batch-sizes", "Over batch sizes", done, [partial(_lines, shown=shown) for shown in (_SPEED, _MEMORY)]
            ),
        )
    return found


def _groups(results: Sequence[CaseResult]) -> dict[str, list[CaseResult]]:
    groups: dict[str, list[CaseResult]] = {}
    for result in results:
        case = result.case
        adapter = "" if case.adapter == "none" else f", {case.adapter}"
        ranks = "" if case.gpus == 1 else f" on {case.gpus} GPUs"
        groups.setdefault(f"{case.recipe} {case.model}{adapter}{ranks}", []).append(result)
    return groups


def _series(results: Sequence[CaseResult]) -> dict[str, list[CaseResult]]:
    """Return the rows of each system and precision."""
    series: dict[str, list[CaseResult]] = {}
    for result in results:
        series.setdefault(f"{result.case.system} {result.case.precision}", []).append(result)
    return series


def _memory(result: CaseResult) -> float | None:
    """Return peak memory in GB: the device's where there is one."""
    taken = result.device_peak_bytes or result.host_peak_bytes
    return None if taken is None else taken / _GB


def _speed(result: CaseResult) -> float | None:
    return result.samples_per_second


def _memory_label(results: Sequence[CaseResult]) -> str:
    on_device = any(result.device_peak_bytes for result in results)
    return "device memory at the peak (GB)" if on_device else "host memory at the peak (GB)"


class _Shown(NamedTuple):
    """What a panel shows: of a result, a number; and what is written beside it."""

    of: Callable[[CaseResult], float | None]
    label: Callable[[Sequence[CaseResult]], str]


_SPEED = _Shown(_speed, lambda _: "samples a second")
_MEMORY = _Shown(_memory, _memory_label)


def _picture(
    name: str,
    title: str,
    groups: dict[str, list[CaseResult]],
    panels: Sequence[Callable[[Axes, Sequence[CaseResult]], object]],
) -> Picture:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "albireo"}):
        figure = Figure(figsize=(5.6 * len(panels) + 1.2, 4.2 * len(groups) + 0.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # the figure's own canvas: no window system
        axes = figure.subplots(len(groups), len(panels), squeeze=False)
        for line, (group, rows) in zip(axes, groups.items(), strict=True):
            for place, panel in zip(line, panels, strict=True):
                panel(place, rows)
                _clean(place)
            line[0].set_title(group, loc="left", fontsize=12, fontweight="bold", color=_TEXT, parse_math=False)
            line[-1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return picture_of(figure, name, title)


def picture_of(figure: Figure, name: str, title: str) -> Picture:
    """Return a figure in its two forms.

    Args:
        figure: drawn.
        name: what its files are called, without their ends.
        title: what it shows.
    """
    return Picture(name, title, _as_png(figure), _as_svg(figure))


def _clean(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylim(bottom=0)


def _bars(axes: Axes, results: Sequence[CaseResult], shown: _Shown) -> None:
    series = _series(results)
    sizes = sorted({result.case.batch_size for result in results})
    width = 0.84 / len(series)
    for number, (name, rows) in enumerate(series.items()):
        by_size = {row.case.batch_size: row for row in rows}
        places = [at - 0.42 + width * (number + 0.5) for at in range(len(sizes))]
        values = [shown.of(by_size[size]) if size in by_size else None for size in sizes]
        axes.bar(
            places,
            [value or 0.0 for value in values],
            width * 0.94,
            color=_COLOURS[number % len(_COLOURS)],
            hatch=_HATCHES[number // len(_COLOURS) % len(_HATCHES)],
            label=name,
        )
        for place, value, size in zip(places, values, sizes, strict=True):
            if size not in by_size:
                continue
            word = by_size[size].status.replace("_", " ") if value is None else short_number(value)
            axes.annotate(
                word, (place, value or 0.0), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom",
                rotation=90, fontsize=7, color=_TEXT,
            )  # fmt: skip
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("batch size", color=_TEXT)
    axes.set_ylabel(shown.label(results), color=_TEXT)
    axes.margins(y=0.18)


def _lines(axes: Axes, results: Sequence[CaseResult], shown: _Shown) -> None:
    for number, (name, rows) in enumerate(_series(results).items()):
        points = sorted((row.case.batch_size, value) for row in rows if (value := shown.of(row)) is not None)
        axes.plot(
            [size for size, _ in points],
            [value for _, value in points],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            linewidth=1.8,
            clip_on=False,
            markersize=5,
            label=name,
        )
    sizes = sorted({result.case.batch_size for result in results})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("batch size", color=_TEXT)
    axes.set_ylabel(shown.label(results), color=_TEXT)


def _tradeoff(axes: Axes, results: Sequence[CaseResult]) -> None:
    for number, (name, rows) in enumerate(_series(results).items()):
        points = [
            (memory, speed, row.case.batch_size)
            for row in rows
            if (memory := _memory(row)) is not None and (speed := _speed(row)) is not None
        ]
        axes.scatter(
            [memory for memory, _, _ in points],
            [speed for _, speed, _ in points],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            s=46,
            clip_on=False,
            label=name,
        )
        for memory, speed, size in points:
            axes.annotate(
                str(size), (memory, speed), xytext=(5, 4), textcoords="offset points", fontsize=7, color=_TEXT
            )
    axes.set_xlabel(_memory_label(results), color=_TEXT)
    axes.set_ylabel("samples a second (numbers: batch size)", color=_TEXT)


def _as_png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def _as_svg(figure: Figure) -> str:
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
