"""`albireo bench RECIPE`: measure cases, each in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from albireo.errors import ConfigError

__all__ = ["bench"]

_EPILOG = """
\b
Examples:
  albireo bench opt --models tiny --batch-sizes 1,2 --steps 3 --sequence-length 128
  albireo bench opt --models 125m --batch-sizes 8,32 --precisions bf16,fp16,fp32 --output runs/bench
"""


@click.group(help="Measure speed and memory: `albireo bench opt --help`.")
def bench() -> None:
    """Hold the recipes together."""


@bench.command("opt", epilog=_EPILOG)
@click.option(
    "--systems", default="albireo,plain,fsdp2", show_default=True, help="What to measure: ours and references."
)
@click.option("--models", default="tiny", show_default=True, help="OPT sizes, with random weights.")
@click.option("--batch-sizes", default="8", show_default=True, help="Samples per step.")
@click.option("--precisions", default="fp32", show_default=True, help="fp32, fp16, bf16.")
@click.option("--sequence-length", default=1024, show_default=True, help="Tokens in a sample.")
@click.option("--steps", default=10, show_default=True, help="Steps that are timed.")
@click.option("--warmup", default=3, show_default=True, help="Steps before them that are not.")
@click.option(
    "--rounds", default=1, show_default=True, help="Measure everything so many times, in turn; the median counts."
)
@click.option("--checkpointing/--no-checkpointing", default=True, show_default=True, help="Activation checkpointing.")
@click.option("--tf32/--no-tf32", default=True, show_default=True, help="Fp32 products in TF32 on a GPU.")
@click.option("--output", metavar="DIR", help="Where bench.json goes. Default: runs/bench-TIME.")
def opt(
    systems: str,
    models: str,
    batch_sizes: str,
    precisions: str,
    rounds: int,
    output: str | None,
    **common: Any,
) -> None:
    """Measure training of OPT: samples per second and peak memory, one process a case, cases in turn."""
    from albireo.bench import Case
    from albireo.bench.report import run_cases

    sizes = _whole_numbers(batch_sizes)
    if rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, not {rounds}")
    cases = [
        Case(system=system, model=model, batch_size=size, precision=precision, **common)
        for model in _words(models)
        for precision in _words(precisions)
        for size in sizes
        for system in _words(systems)
    ]
    run_cases(cases, rounds=rounds, output=Path(output) if output else None)


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError("a list needs at least one word, with commas between")
    return words


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError as error:
        raise ConfigError(f"--batch-sizes takes whole numbers with commas between, not {text!r}") from error
