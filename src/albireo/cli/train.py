"""`albireo train RECIPE`: fine-tune a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import click

from albireo.cli.options import NamedGroup, SectionedCommand, config_options, given_options
from albireo.config import RECIPE_SECTIONS, config_to_mapping, user_path

__all__ = ["train"]


@dataclass(frozen=True)
class _Words:
    """What a recipe's help says.

    Attributes:
        purpose: what the command does.
        examples: lines that run.
    """

    purpose: str
    examples: str


_WORDS: Mapping[str, _Words] = MappingProxyType(
    {
        "opt": _Words(
            "Fine-tune an OPT language model on text.",
            """
Examples:
  albireo train opt                                     a small model on a text that is made up, on any machine
  albireo train opt --steps 100 --output runs/first     the same, shorter, in a folder of your choice
  albireo train opt --model 350m --data my-texts/       fine-tune OPT-350M on a folder of texts
  albireo train opt --resume runs/first --steps 200     go on with a run
  albireo train opt --print-config > mine.json          a configuration to edit, for --config mine.json
""",
        ),
        "gpt2": _Words(
            "Fine-tune a GPT-2 language model on instructions, so that it answers.",
            """
Examples:
  albireo train gpt2 --model tiny                       a small model on instructions that are made up
  albireo train gpt2 --data alpaca_data.json            fine-tune GPT-2 124M on records of a file
  albireo train gpt2 --model medium --data tatsu-lab/alpaca --checkpointing --gpus 2
  albireo generate --run runs/mine --instruction "Name three colours."
""",
        ),
        "vit": _Words(
            "Fine-tune a Vision Transformer on pictures, so that it tells their classes apart.",
            """
Examples:
  albireo train vit --model tiny                        a small model on pictures that are made up
  albireo train vit --data pictures/                    ViT-B/16 on pictures/CLASS/*.jpg, or pictures/{train,test}/CLASS/*.jpg
  albireo train vit --data AI-Lab-Makerere/beans --adapter lora
  albireo classify --run runs/mine a.jpg b.png          what a run takes pictures for
""",
        ),
    }
)


@click.group(cls=NamedGroup, help="Fine-tune a model: `albireo train opt --help`.")
def train() -> None:
    """Hold the recipes together."""


def _command(recipe: str) -> click.Command:
    """Return the command of a recipe, with the flags of its own configuration."""
    words = _WORDS[recipe]

    @click.command(recipe, cls=SectionedCommand, help=words.purpose, epilog=words.examples)
    @config_options(recipe)
    @click.option("--output", metavar="DIR", help="The run folder. Default: runs/NAME-TIME.")
    @click.option("--resume", metavar="RUN", help="Go on with the run in this folder; flags given override its own.")
    @click.option(
        "--config", "config_file", metavar="FILE", help="Take options from a JSON file, as --print-config makes it."
    )
    @click.option("--print-config", is_flag=True, help="Print the whole configuration as JSON, and end.")
    def command(
        output: str | None, resume: str | None, config_file: str | None, print_config: bool, **values: Any
    ) -> None:
        from albireo.training.plan import plan_run

        plan = plan_run(
            recipe=recipe,
            options=given_options(recipe, values),
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

    return command


for _recipe in RECIPE_SECTIONS:
    train.add_command(_command(_recipe))
