"""Two benches beside each other, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from albireo.bench.compare import Pair
from albireo.bench.table import number

__all__ = ["print_comparison"]


def print_comparison(pairs: Sequence[Pair]) -> None:
    """Print a row a pair: samples a second, their ratio, and memory at the peak in GB."""
    table = Table("measured", "A samples/s", "B samples/s", "B / A", "A GB", "B GB")
    for pair in pairs:
        table.add_row(
            pair.name,
            number(pair.before),
            number(pair.after),
            number(pair.ratio, digits=3),
            number(pair.memory_before, 2**-30),
            number(pair.memory_after, 2**-30),
        )
    Console().print(table)
