"""`albireo train RECIPE`: fine-tune a model."""

from __future__ import annotations

import json
from typing import Any

import click

from albireo.cli.options import NamedGroup, SectionedCommand, config_options, given_options
from albireo.config import config_to_mapping, user_path

__all__ = ["train"]

_EPILOG = """
Examples:
  albireo train opt                                     a small model on a text that is made up, on any machine
  albireo train opt --steps 100 --output runs/first     the same, shorter, in a folder of your choice
  albireo train opt --model 350m --data my-texts/       fine-tune OPT-350M on a folder of texts
  albireo train opt --resume runs/first --steps 200     go on with a run
  albireo train opt --print-config > mine.json          a configuration to edit, for --config mine.json
"""


@click.group(cls=NamedGroup, help="Fine-tune a model: `albireo train opt --help`.")
def train() -> None:
    """Hold the recipes together."""


@train.command("opt", cls=SectionedCommand, epilog=_EPILOG)
@config_options
@click.option("--output", metavar="DIR", help="The run folder. Default: runs/NAME-TIME.")
@click.option("--resume", metavar="RUN", help="Go on with the run in this folder; flags given override its own.")
@click.option(
    "--config", "config_file", metavar="FILE", help="Take options from a JSON file, as --print-config makes it."
)
@click.option("--print-config", is_flag=True, help="Print the whole configuration as JSON, and end.")
def opt(output: str | None, resume: str | None, config_file: str | None, print_config: bool, **values: Any) -> None:
    """Fine-tune an OPT language model on text."""
    from albireo.training.plan import plan_run

    plan = plan_run(
        recipe="opt",
        options=given_options(values),
        config_file=None if config_file is None else user_path("--config", config_file),
        resume=None if resume is None else user_path("--resume", resume),
        output=None if output is None else user_path("--output", output),
    )
    if print_config:
        from albireo.training.start import resolved_config

        click.echo(json.dumps(config_to_mapping(resolved_config(plan)), indent=2))
        return
    # The folder comes before the heavy imports: a run that is killed meanwhile can already be resumed.
    folder = plan.make_folder()
    from albireo.training.start import start_run

    start_run(plan, folder)
