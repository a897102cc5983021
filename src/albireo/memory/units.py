"""Units: the modules whose weights are fetched together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

__all__ = ["Unit", "find_units"]

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True, eq=False)
class Unit:
    """A module, and the parameters that are there while it is in use.

    Attributes:
        name: the module's name in the model; empty for the root.
        module: whose calls begin and end its use.
        parameters: in the order of registration, each once.
    """

    name: str
    module: nn.Module
    parameters: tuple[nn.Parameter, ...]


def find_units(model: nn.Module) -> list[Unit]:
    """Return a model's units, in the order of registration; the last is the root.

    Each entry of a list of modules (`ModuleList`, `ModuleDict`, `Sequential`) is one, if it is called by itself: lists
    within lists are looked through, and what is within a unit belongs to it. The root has all other parameters, and
    those that several units share: it is in use from the beginning of forward to the end of backward, so that they can
    be read by whoever has them, with a call of their module or without.

    Args:
        model: any module.
    """
    found = list(_entries(model, ""))
    owners = Counter(parameter for _, module in found for parameter in set(module.parameters()))
    within = {id(part) for _, module in found for part in module.modules()}
    outside = {p for module in model.modules() if id(module) not in within for p in module.parameters(recurse=False)}
    own = {parameter for parameter, count in owners.items() if count == 1 and parameter not in outside}
    units = []
    for name, module in found:
        parameters = tuple(parameter for parameter in module.parameters() if parameter in own)
        if parameters:
            units.append(Unit(name, module, parameters))
    units.append(Unit("", model, tuple(p for p in model.parameters() if p not in own)))
    return units


def _entries(module: nn.Module, prefix: str, seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield outermost entries of lists, each module once."""
    seen = set() if seen is None else seen
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(module, _LISTS) and not isinstance(child, _LISTS):
            if id(child) not in seen:
                seen.add(id(child))
                yield full, child
        else:
            yield from _entries(child, full, seen)
