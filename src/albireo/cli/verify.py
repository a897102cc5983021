"""`albireo verify RECIPE`: the proof that a plugin computes what plain PyTorch computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from albireo.cli.options import NamedGroup, SectionedCommand, config_options, given_options
from albireo.config import RECIPE_SECTIONS, user_path
from albireo.errors import RunFolderError

__all__ = ["verify"]

_HOW = """

Takes the flags of `albireo train {recipe}`: the same model, data, plugin and ranks. Every gradient is compared, every
parameter's step replayed; nothing is left on the disk.
"""


@dataclass(frozen=True)
class _Words:
    """What a recipe's help says.

    Attributes:
        purpose: what the command does.
        examples: lines that run.
    """

    purpose: str
    examples: str


_CODES = """
Exit code 0: the same as plain PyTorch; 1: not; 2: the input is wrong.
"""
_WORDS: Mapping[str, _Words] = MappingProxyType(
    {
        "opt": _Words(
            "Train an OPT model for a few steps, and judge each against plain PyTorch in one process.",
            """
Examples:
  albireo verify opt                                            three steps of `albireo train opt`
  albireo verify opt --gpus 2 --precision bf16 --accumulate 4   the same flags as train's
  albireo verify opt --model 125m --data my.txt --json out.json
"""
            + _CODES,
        ),
        "gpt2": _Words(
            "Train a GPT-2 model on instructions for a few steps, and judge each against plain PyTorch in one process.",
            """
Examples:
  albireo verify gpt2 --model tiny                               three steps of `albireo train gpt2 --model tiny`
  albireo verify gpt2 --data alpaca_data.json --gpus 2 --plugin low_level_zero
"""
            + _CODES,
        ),
        "vit": _Words(
            "Train a ViT model on pictures for a few steps, and judge each against plain PyTorch in one process.",
            """
Examples:
  albireo verify vit --model tiny                                three steps of `albireo train vit --model tiny`
  albireo verify vit --data pictures/ --gpus 2 --plugin gemini
"""
            + _CODES,
        ),
    }
)

# They say when a run looks at itself, and nothing of what it computes.
_NO_PART = ("eval_every", "save_every", "keep")


@click.group(cls=NamedGroup, help="Prove that a plugin equals plain PyTorch: `albireo verify opt --help`.")
def verify() -> None:
    """Hold the recipes together."""


def _command(recipe: str) -> click.Command:
    """Return the command of a recipe, with the flags of its own configuration."""
    words = _WORDS[recipe]

    @click.command(
        recipe, cls=SectionedCommand, help=f"{words.purpose}{_HOW.format(recipe=recipe)}", epilog=words.examples
    )
    @config_options(recipe)
    @click.option(
        "--config",
        "config_file",
        metavar="FILE",
        help="Take options from a JSON file, as `train --print-config` makes it.",
    )
    @click.option("--json", "json_file", metavar="FILE", help="Write the whole report to this file.")
    def command(config_file: str | None, json_file: str | None, **values: Any) -> None:
        options = given_options(recipe, values)
        target = None if json_file is None else _writable(user_path("--json", json_file))
        source = None if config_file is None else user_path("--config", config_file)
        for name in _NO_PART:
            if name in options:
                click.echo(f"note: --{name.replace('_', '-')} plays no part in verify", err=True)
        from albireo.verify.run import verify_recipe
        from albireo.verify.table import print_report, verdict

        report = verify_recipe(recipe, options, config_file=source)
        print_report(report)
        if target is not None:
            _write(target, report.to_json())
        if report.passed:
            click.echo(verdict(report))
            return
        click.echo(f"albireo: {verdict(report)}", err=True)
        raise click.exceptions.Exit(1)

    # The one flag that is not quite train's.
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name == "steps":
            parameter.help = "Optimizer steps to verify, of a run of so many. Default: the first 3 of the whole run."
    return command


for _recipe in RECIPE_SECTIONS:
    verify.add_command(_command(_recipe))


def _writable(path: Path) -> Path:
    """Refuse a file that cannot be written before an hour has gone into what would stand in it."""
    is_new = not path.exists()
    try:
        with path.open("a"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error
