"""`albireo bench RECIPE`: measure cases, each in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from albireo.cli.options import NamedGroup
from albireo.config import RunConfig, user_path
from albireo.errors import ConfigError

if TYPE_CHECKING:
    from albireo.bench.case import Case

__all__ = ["bench"]

_EXAMPLES = """
\b
Examples:
  albireo bench {recipe} --models tiny --batch-sizes 1,2 --steps 3 --sequence-length 128
  albireo bench {recipe} --models {model} --batch-sizes 8,32 --precisions bf16,fp16,fp32 --output runs/bench
"""
# A published size of each recipe, for the example.
_MODELS = {"opt": "125m", "gpt2": "124m"}


@click.group(cls=NamedGroup, help="Measure speed and memory: `albireo bench opt --help`.")
def bench() -> None:
    """Hold the recipes together."""


def _command(recipe: str) -> click.Command:
    """Return the command of a recipe."""

    @click.command(
        recipe,
        help=f"Measure training of the recipe {recipe}: samples per second and peak memory, one process a case, cases in turn.",
        epilog=_EXAMPLES.format(recipe=recipe, model=_MODELS[recipe]),
    )
    @click.option(
        "--systems", default="albireo,plain,fsdp2", show_default=True, help="What to measure: ours and references."
    )
    @click.option("--models", default="tiny", show_default=True, help="Sizes, with random weights.")
    @click.option("--adapters", default="none", show_default=True, help="none, lora: what is trained.")
    @click.option("--batch-sizes", default="8", show_default=True, help="Samples per step.")
    @click.option("--precisions", default="fp32", show_default=True, help="fp32, fp16, bf16.")
    @click.option(
        "--sequence-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens in a sample."
    )
    @click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Steps that are timed.")
    @click.option(
        "--warmup", type=click.IntRange(min=1), default=3, show_default=True, help="Steps before them that are not."
    )
    @click.option(
        "--rounds",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Measure everything so many times, in turn; the median counts.",
    )
    @click.option(
        "--checkpointing/--no-checkpointing", default=True, show_default=True, help="Activation checkpointing."
    )
    @click.option("--tf32/--no-tf32", default=True, show_default=True, help="Fp32 products in TF32 on a GPU.")
    @click.option("--output", metavar="DIR", help="Where bench.json goes. Default: runs/bench-TIME.")
    def command(rounds: int, output: str | None, **wanted: Any) -> None:
        from albireo.bench.report import run_cases

        # All is looked at before the first case runs: a wrong word should not be found after an hour.
        cases = _cases(recipe, **wanted)
        results = run_cases(cases, rounds=rounds, output=None if output is None else user_path("--output", output))
        if all(result.status != "ok" for result in results):
            raise click.exceptions.Exit(1)

    return command


# What is measured is read off token ids.
for _recipe in _MODELS:
    bench.add_command(_command(_recipe))


def _cases(
    recipe: str, *, systems: str, models: str, adapters: str, batch_sizes: str, precisions: str, **common: Any
) -> list[Case]:
    from albireo.bench.case import SYSTEMS, Case

    choices = {info.name: info.choices for info in RunConfig.options(recipe)}
    return [
        Case(
            recipe=recipe,
            system=system,
            model=model,
            adapter=adapter,
            batch_size=size,
            precision=precision,
            **common,
        )
        for model in _words("--models", models)
        for adapter in _words("--adapters", adapters, choices["adapter"])
        for precision in _words("--precisions", precisions, choices["precision"])
        for size in _whole_numbers("--batch-sizes", batch_sizes)
        for system in _words("--systems", systems, SYSTEMS)
    ]


def _words(flag: str, text: str, known: Sequence[str] = ()) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"{flag} needs at least one word, with commas between more, not {text!r}")
    for word in words:
        if known and word not in known:
            raise ConfigError(f"{flag} knows {', '.join(known)}, not {word!r}")
    return words


def _whole_numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(word) for word in _words(flag, text)]
    except ValueError as error:
        raise ConfigError(f"{flag} takes whole numbers with commas between, not {text!r}") from error
    if min(numbers) < 1:
        raise ConfigError(f"{flag} must be at least 1, not {min(numbers)}")
    return numbers
