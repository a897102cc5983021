"""`albireo generate --run RUN`: let a trained language model answer, or go on with a text."""

from __future__ import annotations

from typing import Any

import click

from albireo.cli.options import SectionedCommand
from albireo.config import user_path

__all__ = ["generate"]

_EPILOG = """
Examples:
  albireo generate --run runs/mine --instruction "Name three colours."
  albireo generate --run runs/mine --instruction "Translate to French." --input "Good morning."
  albireo generate --run runs/opt --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1

The answer alone goes to standard output.
"""


@click.command("generate", cls=SectionedCommand, epilog=_EPILOG)
@click.option("--run", metavar="RUN", required=True, help="The folder of a run.")
@click.option("--instruction", metavar="TEXT", help="What is asked for, for a run trained on instructions.")
@click.option("--input", "input_text", metavar="TEXT", help="What the instruction is about.")
@click.option("--prompt", metavar="TEXT", help="A text to go on with as it is, instead of an instruction.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="The most tokens of the answer. Default: 256, or what the model has positions for.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0.0, max=100.0),
    default=0.0,
    metavar="X",
    help="0 takes the likeliest token each time; above it tokens are drawn, the more evenly the higher. Default: 0.",
)
@click.option("--top-k", type=click.IntRange(min=1), metavar="N", help="Draw among so many likeliest tokens only.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0.0, max=1.0, min_open=True),
    metavar="X",
    help="Draw among the likeliest tokens only that together have this probability.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), metavar="N", help="Which draws. Default: 0.")
def generate(run: str, instruction: str | None, input_text: str | None, prompt: str | None, **choosing: Any) -> None:
    """Let a trained language model answer an instruction, or go on with a text."""
    place = user_path("--run", run)
    from albireo.distributed import join_world
    from albireo.training.exporting import read_run
    from albireo.training.generation import GenerationOptions, prompt_for
    from albireo.training.generation import generate as go_on
    from albireo.training.trained import load_language_model

    options = GenerationOptions(**choosing)
    config, _, _ = read_run(place)
    text = prompt_for(config.recipe, prompt=prompt, instruction=instruction, input_text=input_text)
    trained = load_language_model(place, join_world(single=True).device)
    if trained.note:
        click.echo(f"note: {trained.note}", err=True)
    click.echo(go_on(trained, text, options))
