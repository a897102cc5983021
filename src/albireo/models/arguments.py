"""What an operation of torch's is called with: things of one kind, wherever among the arguments they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["instances", "replaced", "schema_of", "written_by"]

T = TypeVar("T")


def replaced(value: Any, kind: type[T], change: Callable[[T], Any]) -> Any:
    """Return arguments with something else in place of each thing of a kind.

    Args:
        value: arguments, or one of them.
        kind: what is replaced.
        change: returns what it is replaced by.
    """
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {name: replaced(one, kind, change) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([replaced(one, kind, change) for one in value])
    return value


def instances(value: Any, kind: type[T]) -> Iterator[T]:
    """Yield the things of a kind in arguments or results, in their order.

    Args:
        value: arguments, or one of them.
        kind: what is looked for.
    """
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        yield from instances(list(value.values()), kind)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from instances(one, kind)


def schema_of(operation: Any) -> Any:
    """Return what torch says about an operation: its arguments, its results, and which of them it writes to."""
    return operation._schema  # noqa: SLF001  it is nowhere else


def written_by(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a call writes to.

    Args:
        operation: what is called.
        args: of the call.
        kwargs: the same.
    """
    written: list[Tensor] = []
    for number, argument in enumerate(schema_of(operation).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += instances(args[number] if number < len(args) else kwargs.get(argument.name), Tensor)
    return written
