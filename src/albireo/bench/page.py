"""A bench as one HTML page that needs nothing else: tables, pictures, machine, commands. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from albireo.bench.case import CaseResult
from albireo.bench.pictures import Picture
from albireo.bench.table import HEADERS, rows_of_words

__all__ = ["page_of"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, td.word, th.word { text-align: left; }
td.why { white-space: normal; min-width: 12rem; text-align: left; }
pre { overflow-x: auto; background: #8882; padding: .6rem; border-radius: .3rem; font-size: .85rem; }
figure { margin: 1rem 0; background: #fff; border-radius: .3rem; }
figure svg { width: 100%; height: auto; display: block; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 0; }
"""
_WORDS = frozenset({"system", "model", "adapter", "precision"})


def page_of(
    results: Sequence[CaseResult],
    pictures: Sequence[Picture],
    *,
    machine: Mapping[str, str],
    command: str,
    date: str,
    reference: str,
) -> str:
    """Return the page.

    Args:
        results: what was measured.
        pictures: of it.
        machine: versions and the device's name.
        command: what measured it.
        date: when.
        reference: the system whose speed is 1.
    """
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in machine.items())
    drawn = "".join(f"<h2>{escape(picture.title)}</h2><figure>{_inline(picture.svg)}</figure>" for picture in pictures)
    notes = (
        f"Ratio: samples a second over those of {escape(reference)} on the same model and batch. Step: the median; spread: "
        "slowest minus fastest step, over the median. TFLOP/s: 6 x parameters x tokens a second and GPU; recomputed activations "
        "do not count. Scaling: samples a second over as many times those of one GPU. Moved: what is "
        "planned to cross the bus in a step. GB are 2<sup>30</sup> bytes; device memory is what torch's allocator gave out at the peak, and held."
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Albireo bench, {escape(date)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Albireo bench, {escape(date)}</h1><pre>{escape(command)}</pre>"
        f'<h2>Figures</h2><div class="wide">{_table(results, reference)}</div><p>{notes}</p>'
        f"{drawn}<h2>Machine</h2><dl>{facts}</dl></body></html>\n"
    )


def _table(results: Sequence[CaseResult], reference: str) -> str:
    head = "".join(f"<th{_kind(name)}>{escape(name)}</th>" for name in HEADERS)
    body = ""
    for row in rows_of_words(results, reference):
        cells = "".join(f"<td{_kind(name)}>{escape(word)}</td>" for name, word in zip(HEADERS, row, strict=True))
        body += f"<tr>{cells}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _kind(name: str) -> str:
    if name == "status":
        return ' class="why"'
    return ' class="word"' if name in _WORDS else ""


def _inline(svg: str) -> str:
    """Return a picture without what stands before it in a file of its own."""
    return svg[svg.index("<svg") :]
