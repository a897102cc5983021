"""Flags made from the configuration: declared there once, spelled here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from albireo.config import OptionInfo, RunConfig

__all__ = ["NamedGroup", "SectionedCommand", "config_options", "given_options"]

_SECTION_TITLES = {
    "model": "Model",
    "data": "Data",
    "adapter": "Adapter",
    "optimizer": "Optimizer",
    "schedule": "Length and schedule",
    "plugin": "Device and plugin",
    "run": "Run",
}

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _ConfigOption(click.Option):
    """A flag that knows its section."""

    def __init__(self, declarations: Sequence[str], *, info: OptionInfo) -> None:
        self.section = info.section
        super().__init__(declarations, default=None, help=_help(info), **_value(info))


def _declarations(info: OptionInfo) -> tuple[str, str]:
    flag = f"{info.flag}/--no-{info.flag[2:]}" if info.kind is bool else info.flag
    return flag, info.name


def _value(info: OptionInfo) -> dict[str, Any]:
    """Return what click needs to know of an option's value."""
    if info.kind is bool:
        return {}
    if info.choices:
        return {"type": click.Choice(info.choices)}
    kinds: dict[type, tuple[click.ParamType[Any], str]] = {
        int: (click.INT, "N"),
        float: (click.FLOAT, "X"),
        str: (click.STRING, "TEXT"),
    }
    kind, metavar = kinds[info.kind]
    return {"type": kind, "metavar": info.metavar or metavar}


def _help(info: OptionInfo) -> str:
    if info.default is None:
        return info.help
    if info.kind is bool:
        return f"{info.help} Default: {'on' if info.default else 'off'}."
    default = f"{info.default:g}" if isinstance(info.default, float) else info.default
    return f"{info.help} Default: {default}."


class NamedGroup(click.Group):
    """A group of commands that names them all to whoever asks for one that is not there."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command of the first argument.

        Raises:
            UsageError: there is none of that name.
        """
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            known = ", ".join(self.list_commands(ctx))
            raise click.UsageError(f"{ctx.command_path} knows no {args[0]!r}, only: {known}", ctx)
        return super().resolve_command(ctx, args)


class SectionedCommand(click.Command):
    """A command whose help lists flags by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags, a block a section, the command's own last."""
        blocks: dict[str, list[tuple[str, str]]] = {name: [] for name in _SECTION_TITLES}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                blocks[getattr(parameter, "section", "run")].append(record)
        for name, records in blocks.items():
            if records:
                with formatter.section(_SECTION_TITLES[name]):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  click's own
        """Write examples as they are, each on a line of its own."""
        if self.epilog:
            formatter.write_paragraph()
            for line in self.epilog.strip().splitlines():
                formatter.write(line + "\n")


def config_options(recipe: str) -> Callable[[_Function], _Function]:
    """Give a command every flag of a recipe's configuration.

    Args:
        recipe: its name.
    """

    def decorate(function: _Function) -> _Function:
        for info in reversed(list(RunConfig.options(recipe))):
            function = click.option(*_declarations(info), cls=_ConfigOption, info=info)(function)
        return function

    return decorate


def given_options(recipe: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration's options that the user gave.

    Args:
        recipe: whose command it is.
        values: all that click parsed.
    """
    names = {info.name for info in RunConfig.options(recipe)}
    return {name: value for name, value in values.items() if name in names and value is not None}
