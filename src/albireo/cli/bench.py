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
  albireo bench {recipe} --models tiny --batch-sizes 1,2 --steps 3
  albireo bench {recipe} --models {model} --batch-sizes 8,32 --precisions bf16,fp16,fp32 --output runs/bench
  albireo bench {recipe} --models {model} --plugins torch_ddp,low_level_zero,gemini --peers fsdp2,accelerate --rounds 3
  albireo bench compare runs/before runs/after --fail-under 0.95
"""
# A published size of each recipe, for the example.
_MODELS = {"opt": "125m", "gpt2": "124m", "vit": "base"}


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
    @click.option("--plugins", help="Our plugins: torch_ddp, torch_ddp_fp16, torch_fsdp, low_level_zero, gemini.")
    @click.option("--peers", help="What to measure beside them: ddp, fsdp2, fsdp2_compiled, accelerate, plain.")
    @click.option(
        "--systems", help="Both, by name, with more of ours. Default without any of the three: albireo,plain,fsdp2."
    )
    @click.option("--models", default="tiny", show_default=True, help="Sizes, with random weights.")
    @click.option("--adapters", default="none", show_default=True, help="none, lora, qlora8, qlora4: what is trained.")
    @click.option("--batch-sizes", default="8", show_default=True, help="Samples per step and GPU.")
    @click.option("--gpus", default="1", show_default=True, help="Ranks, each with a GPU; 1,2 measures with both.")
    @click.option(
        "--precisions",
        help="fp32, fp16, bf16. Default: fp32 for plain data parallelism, fp16 for torch_ddp_fp16, else bf16.",
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
    @click.option(
        "--mem-cap",
        type=click.FloatRange(min=0),
        default=0.0,
        help="GB of the GPU that a case may take; 0: all there are.",
    )
    @click.option("--reference", help="The system whose speed is 1. Default: the first.")
    @click.option(
        "--output",
        metavar="DIR",
        help="Where results go; rounds that are there already are kept. Default: runs/bench-TIME.",
    )
    def command(rounds: int, reference: str | None, output: str | None, **wanted: Any) -> None:
        from albireo.bench.report import run_cases

        # All is looked at before the first case runs: a wrong word should not be found after an hour.
        cases = _cases(recipe, **wanted)
        measured = list(dict.fromkeys(case.system for case in cases))
        if reference is not None and reference not in measured:
            raise ConfigError(
                f"--reference is one of those that are measured, {', '.join(measured)}, not {reference!r}"
            )
        folder = None if output is None else user_path("--output", output)
        results = run_cases(cases, rounds=rounds, output=folder, reference=reference or measured[0])
        if all(result.status != "ok" for result in results):
            raise click.exceptions.Exit(1)

    if recipe != "vit":
        command = click.option(
            "--sequence-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens in a sample."
        )(command)
    return command


@bench.command(
    "compare", epilog="\b\nExample:\n  albireo bench compare runs/before runs/after/bench.json --fail-under 0.95\n"
)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--fail-under",
    type=click.FloatRange(min=0),
    metavar="RATIO",
    help="Exit with 1 if a row of B has less than this share of its speed in A, or does not run.",
)
def compare_benches(first: str, second: str, fail_under: float | None) -> None:
    """Show two benches beside each other: bench.json files, or the folders that have one."""
    from albireo.bench.compare import compare, read_rows
    from albireo.bench.comparison_table import print_comparison

    pairs = compare(read_rows(user_path("A", first)), read_rows(user_path("B", second)))
    print_comparison(pairs)
    below = [pair.name for pair in pairs if fail_under is not None and pair.falls_below(fail_under)]
    if below:
        click.echo(f"below {fail_under:g} of before: {'; '.join(below)}")
        raise click.exceptions.Exit(1)


for _recipe in _MODELS:
    bench.add_command(_command(_recipe))


def _cases(
    recipe: str, *, models: str, adapters: str, batch_sizes: str, gpus: str, precisions: str | None, **common: Any
) -> list[Case]:
    from albireo.bench.case import Case, default_precision

    choices = {info.name: info.choices for info in RunConfig.options(recipe)}
    systems = _systems(common.pop("plugins"), common.pop("peers"), common.pop("systems"), known=choices["plugin"])
    # None: as the system has it by default, which is seen when its turn comes.
    wanted = [None] if precisions is None else _words("--precisions", precisions, choices["precision"])
    return [
        Case(
            recipe=recipe,
            system=system,
            model=model,
            adapter=adapter,
            batch_size=size,
            precision=precision or default_precision(system),
            gpus=ranks,
            **common,
        )
        for model in _words("--models", models)
        for adapter in _words("--adapters", adapters, choices["adapter"])
        for precision in wanted
        for ranks in _gpus(gpus)
        for size in _whole_numbers("--batch-sizes", batch_sizes)
        for system in systems
    ]


def _gpus(text: str) -> list[int]:
    from albireo.device import detect_device_type, device_count

    wanted = _whole_numbers("--gpus", text)
    if detect_device_type() == "cuda" and max(wanted) > device_count():
        raise ConfigError(f"--gpus {max(wanted)} asks for more than this machine has: {device_count()}")
    return wanted


def _systems(plugins: str | None, peers: str | None, systems: str | None, known: Sequence[str]) -> list[str]:
    from albireo.bench.case import PEERS, SYSTEMS

    if plugins is None and peers is None and systems is None:
        systems = "albireo,plain,fsdp2"
    found = [] if plugins is None else _words("--plugins", plugins, known)
    found += [] if systems is None else _words("--systems", systems, SYSTEMS)
    found += [] if peers is None else _words("--peers", peers, PEERS)
    return list(dict.fromkeys(found))


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
