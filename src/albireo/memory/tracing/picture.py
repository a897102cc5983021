"""`trace.png`: where each chunk is over time, above the curves of both memories and of what was waited for."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from albireo.memory.tracing.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["build_timeline_figure", "draw_timeline"]

_WIDTH_INCHES, _HEIGHT_INCHES, _DOTS_PER_INCH = 12.0, 9.0, 120
_GB = 2**30
# From the palette of Okabe and Ito, whose colours stay apart for the colour-blind.
_AWAY, _HERE = "#EEEEEE", "#9CC9E8"
_COLOUR_OF = {
    "weights in": "#E69F00",
    "weights home": "#CC79A7",
    "gradient out": "#009E73",
    "host step": "#D55E00",
    "states in": "#F0E442",
    "streamed step": "#0072B2",
    "states out": "#56B4E9",
    "norm of gradients": "#555555",
}
_OTHER, _DEVICE, _HOST = "#555555", "#0072B2", "#CC79A7"
_PHASES = {"forward": "#F7F7F7", "backward": "#E3E3E3", "step": "#CFCFCF"}


def draw_timeline(timeline: Timeline) -> bytes:
    """Draw a step as a PNG of 1440 x 1080 pixels.

    Args:
        timeline: the step's.
    """
    picture = io.BytesIO()
    build_timeline_figure(timeline).savefig(picture, format="png", dpi=_DOTS_PER_INCH)
    return picture.getvalue()


def build_timeline_figure(timeline: Timeline) -> Figure:
    """Build the picture.

    Args:
        timeline: the step's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)  # the figure's own canvas: no window system, and no figure that pyplot would keep alive
    chunks, memory, waits = figure.subplots(3, 1, sharex=True, height_ratios=(5, 2, 2))
    _draw_chunks(chunks, timeline)
    _draw_memory(memory, timeline)
    _draw_waits(waits, timeline)
    for axes in (memory, waits):
        _shade_phases(axes, timeline)
    waits.set_xlim(0, timeline.seconds * 1e3)
    waits.set_xlabel("milliseconds since the step's first forward")
    where = f"{timeline.device}, simulated" if timeline.is_simulated else timeline.device
    title = f"step {timeline.step}, {timeline.seconds * 1e3:,.1f} ms, on {where}"
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
    return figure


def _draw_chunks(axes: Axes, timeline: Timeline) -> None:
    """A row a chunk: its memory on the device, and in thinner bars what moves or steps it."""
    from matplotlib.patches import Patch

    end = timeline.seconds
    for chunk in timeline.chunks:
        axes.broken_barh([(0, end * 1e3)], (chunk.number - 0.45, 0.9), facecolors=_AWAY)
        bars = [
            (stay.begin_seconds * 1e3, (stay.end_seconds - stay.begin_seconds) * 1e3)
            for stay in timeline.stays
            if stay.chunk == chunk.number
        ]
        axes.broken_barh(bars, (chunk.number - 0.45, 0.9), facecolors=_HERE)
    kinds = list(dict.fromkeys(work.kind for work in timeline.works))
    for place, kind in enumerate(kinds):
        bottom, height = -0.45 + 0.9 * place / len(kinds), 0.9 / len(kinds)
        for work in timeline.works:
            if work.kind != kind or work.chunk is None:
                continue
            begin = max(work.begin_seconds, 0.0)
            last = end if work.end_seconds is None else work.end_seconds
            axes.broken_barh(
                [(begin * 1e3, (last - begin) * 1e3)],
                (work.chunk + bottom, height),
                facecolors=_COLOUR_OF.get(kind, _OTHER),
            )
    axes.set_ylim(len(timeline.chunks) - 0.5, -0.5)
    axes.set_ylabel("chunk")
    legend = [Patch(color=_HERE, label="on the device"), Patch(color=_AWAY, label="away")]
    legend += [Patch(color=_COLOUR_OF.get(kind, _OTHER), label=kind) for kind in kinds]
    axes.legend(handles=legend, loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False, fontsize=9)


def _draw_memory(axes: Axes, timeline: Timeline) -> None:
    times = [reading.seconds * 1e3 for reading in timeline.memory]
    peaks = [reading.device_peak_bytes / _GB for reading in timeline.memory]
    device = [reading.device_bytes / _GB for reading in timeline.memory]
    host = [reading.host_bytes / _GB for reading in timeline.memory]
    if not timeline.is_simulated:
        # A peak belongs to what came before its reading.
        axes.step(times, peaks, where="pre", color=_DEVICE, linewidth=0.8, linestyle=":", label="device, peak")
    axes.step(times, device, where="post", color=_DEVICE, label="device")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("device, GB", color=_DEVICE)
    beside = axes.twinx()
    beside.step(times, host, where="post", color=_HOST, label="host")
    beside.set_ylim(bottom=0)
    beside.set_ylabel("host, GB", color=_HOST)


def _draw_waits(axes: Axes, timeline: Timeline) -> None:
    """What has been waited for so far, by cause."""
    kinds = list(dict.fromkeys(wait.kind for wait in timeline.waits if wait.seconds > 0))
    for kind in kinds:
        times, sums = [0.0], [0.0]
        for wait in timeline.waits:
            if wait.kind == kind:
                times += [wait.begin_seconds * 1e3, wait.end_seconds * 1e3]
                sums += [sums[-1], sums[-1] + wait.seconds * 1e3]
        times.append(timeline.seconds * 1e3)
        sums.append(sums[-1])
        axes.plot(times, sums, color=_COLOUR_OF.get(kind, _OTHER), label=f"{kind}: {sums[-1]:,.1f} ms")
    if kinds:
        # Above: within, no corner is left free by every curve.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=9, borderpad=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("waited so far, ms")


def _shade_phases(axes: Axes, timeline: Timeline) -> None:
    for span in timeline.spans:
        axes.axvspan(span.begin_seconds * 1e3, span.end_seconds * 1e3, color=_PHASES[span.phase], linewidth=0, zorder=0)
