"""One declaration of an option: its default, its help, its choices and its limits."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from albireo.errors import ConfigError

__all__ = ["OptionInfo", "option", "options_of"]


def option(
    default: Any,
    help_text: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    exclusive_minimum: bool = False,
    metavar: str | None = None,
) -> Any:
    """Declare a field of a configuration section.

    Args:
        default: the default; None stands for "decided from the model, the machine or the data".
        help_text: what `--help` says.
        minimum: the least value of a number.
        maximum: the greatest value of a number.
        exclusive_minimum: True if the minimum itself is not allowed.
        metavar: the name of the value in `--help`.

    Returns:
        A dataclass field that carries all this as metadata.
    """
    metadata = {
        "help": help_text,
        "minimum": minimum,
        "maximum": maximum,
        "exclusive_minimum": exclusive_minimum,
        "metavar": metavar,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class OptionInfo:
    """An option as flags and files see it.

    Attributes:
        section: the section of the configuration that holds it.
        name: its name in that section, and with dashes its flag.
        kind: bool, int, float or str.
        choices: the allowed words, or none.
        optional: None is allowed, and means that the default is decided later.
        default: the declared default.
        help: what it is.
        minimum: the least value, if it is a number.
        maximum: the greatest value, if it is a number.
        exclusive_minimum: the minimum itself is not allowed.
        metavar: the name of its value in help.
    """

    section: str
    name: str
    kind: type
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str
    minimum: float | None
    maximum: float | None
    exclusive_minimum: bool
    metavar: str | None

    @property
    def flag(self) -> str:
        """The flag on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any) -> Any:
        """Return the value in the option's own type.

        Args:
            value: what a file or a program gave.

        Returns:
            The value, an int turned into a float where a float is wanted.

        Raises:
            ConfigError: the value has a wrong type, is no allowed word or lies outside the limits.
        """
        if value is None and self.optional:
            return None
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                value = float(value)
            except OverflowError as error:  # a whole number of more than 308 digits
                raise ConfigError(f"{self.flag} takes a finite number, not one of {len(str(value))} digits") from error
        if not isinstance(value, self.kind) or (self.kind is not bool and isinstance(value, bool)):
            raise ConfigError(f"{self.flag} takes {_article(self.kind)}, not {value!r}")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{self.flag} is one of {', '.join(self.choices)}, not {value!r}")
        if self.kind in (int, float):
            self._check_number(value)
        if self.kind is str:
            self._check_text(value)
        return value

    def _check_text(self, value: Any) -> None:
        if not value.strip():
            raise ConfigError(f"{self.flag} is empty: give a name, or leave {self.flag} out")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # as Python holds bytes of an argument that are not UTF-8
            raise ConfigError(f"{self.flag} {value!a} is not valid UTF-8: give it another name") from error

    def _check_number(self, value: Any) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{self.flag} takes a finite number, not {value!r}")
        if self.minimum is not None:
            if self.exclusive_minimum and value <= self.minimum:
                raise ConfigError(f"{self.flag} must be more than {self.minimum:,.15g}, not {value!r}")
            if value < self.minimum:
                raise ConfigError(f"{self.flag} must be at least {self.minimum:,.15g}, not {value!r}")
        if self.maximum is not None and value > self.maximum:
            raise ConfigError(f"{self.flag} must be at most {self.maximum:,.15g}, not {value!r}")


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def _unpack(annotation: Any) -> tuple[type, tuple[str, ...], bool]:
    """Return the plain type, the choices and whether None is allowed."""
    optional = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(annotation) if part is not type(None)]
        optional = len(inner) < len(typing.get_args(annotation))
        annotation = inner[0]
    if typing.get_origin(annotation) is Literal:
        return str, tuple(typing.get_args(annotation)), optional
    return annotation, (), optional


def options_of(section_name: str, section: type) -> Iterator[OptionInfo]:
    """Yield the options that a section's dataclass declares.

    Args:
        section_name: the name of the section in the whole configuration.
        section: its dataclass.
    """
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        kind, choices, optional = _unpack(hints[field.name])
        yield OptionInfo(
            section=section_name,
            name=field.name,
            kind=kind,
            choices=choices,
            optional=optional,
            default=field.default,
            help=field.metadata["help"],
            minimum=field.metadata["minimum"],
            maximum=field.metadata["maximum"],
            exclusive_minimum=field.metadata["exclusive_minimum"],
            metavar=field.metadata["metavar"],
        )
