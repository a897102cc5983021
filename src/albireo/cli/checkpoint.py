"""`albireo checkpoint export`: a folder that others load, from a run's checkpoint."""

from __future__ import annotations

import click

from albireo.cli.options import NamedGroup, SectionedCommand
from albireo.config import user_path

__all__ = ["checkpoint"]

_EPILOG = """
Examples:
  albireo checkpoint export runs/mine --output mine-model             the newest whole checkpoint
  albireo checkpoint export runs/mine --output early --step 200       another one
  albireo checkpoint export runs/lora --output whole --merge          an adapter and its base as one model
"""


@click.group(cls=NamedGroup, help="Work on a run's checkpoints: `albireo checkpoint export --help`.")
def checkpoint() -> None:
    """Hold the verbs together."""


@checkpoint.command("export", cls=SectionedCommand, epilog=_EPILOG)
@click.argument("run", metavar="RUN")
@click.option("--output", metavar="DIR", required=True, help="The folder to make.")
@click.option("--merge", is_flag=True, help="Add the adapter to the weights that it stands beside: a whole model.")
@click.option(
    "--step", type=click.IntRange(min=0), metavar="N", help="Which checkpoint. Default: the newest whole one."
)
def export(run: str, output: str, merge: bool, step: int | None) -> None:
    """Write RUN's model as a Hugging Face folder, or its adapter as peft loads it."""
    source, target = user_path("RUN", run), user_path("--output", output)
    from albireo.training.exporting import export_checkpoint

    what = export_checkpoint(source, target, merge=merge, step=step)
    click.echo(f"wrote {what} to {target}")
