"""`albireo trace RUN`: what a traced step waited for, in words."""

from __future__ import annotations

import click

from albireo.cli.options import SectionedCommand
from albireo.config import user_path

__all__ = ["trace"]

_EPILOG = """
Examples:
  albireo train opt --plugin gemini --mem-cap 1 --trace --steps 10 --output runs/traced
  albireo trace runs/traced
"""


@click.command("trace", cls=SectionedCommand, epilog=_EPILOG)
@click.argument("run", metavar="RUN")
def trace(run: str) -> None:
    """Say what the traced step of RUN, a run folder or its trace.json, waited for: sums by cause and by unit."""
    path = user_path("RUN", run)
    from albireo.memory.tracing import describe_trace, read_trace

    for line in describe_trace(read_trace(path)):
        click.echo(line)
