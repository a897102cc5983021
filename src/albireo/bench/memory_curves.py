"""Both memories over a step of gemini's, row by row."""

from __future__ import annotations

from collections.abc import Sequence

from albireo.bench.case import CaseResult, name_of
from albireo.bench.pictures import Picture, picture_of

__all__ = ["draw_memory"]

_GB = 2**30
_DEVICE, _HOST, _TEXT = "#0072B2", "#D55E00", "#333333"


def draw_memory(results: Sequence[CaseResult]) -> Picture | None:
    """Return what both memories had over a step, a panel a row; None if nothing was looked at.

    Args:
        results: what was measured.
    """
    seen = [result for result in results if result.memory_over_step]
    if not seen:
        return None
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "albireo"}):
        figure = Figure(figsize=(9.0, 2.4 * len(seen) + 0.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, result in zip(figure.subplots(len(seen), 1, squeeze=False)[:, 0], seen, strict=True):
            times = [1e3 * moment[0] for moment in result.memory_over_step]
            for place, label, colour in ((1, "device", _DEVICE), (2, "host", _HOST)):
                values = [moment[place] / _GB for moment in result.memory_over_step]
                axes.step(times, values, where="post", color=colour, label=label)
            axes.set_ylim(bottom=0)
            axes.set_title(name_of(result.case.mapping()), loc="left", fontsize=10, color=_TEXT, parse_math=False)
            axes.set_ylabel("GB", color=_TEXT)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.set_xlabel("ms since the step began", color=_TEXT)
        return picture_of(figure, "memory", "Both memories over a step")
