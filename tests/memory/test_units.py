"""Which modules are units, and what each has."""

from __future__ import annotations

import torch
from gemini_zoo import KINDS, built
from torch import nn

from albireo.memory.units import find_units


def names(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of each unit's parameters."""
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {unit.name: [known[p] for p in unit.parameters] for unit in find_units(model)}


def test_entries_of_lists_are_units_and_the_root_has_the_rest() -> None:
    model = built("plain")
    units = find_units(model)
    assert [unit.name for unit in units] == [*(f"blocks.{number}" for number in range(4)), ""]
    assert units[-1].module is model
    assert units[1].module is model.blocks[1]
    assert names(model)["blocks.1"] == [f"blocks.1.{n}" for n, _ in model.blocks[1].named_parameters()]
    assert names(model)[""] == ["embedding.weight", "head.weight", "head.bias"]


def test_every_parameter_is_in_one_unit() -> None:
    for kind in KINDS:
        model = built(kind)
        found = [p for unit in find_units(model) for p in unit.parameters]
        assert len(found) == len(set(found))
        assert set(found) == set(model.parameters()), kind


def test_lists_within_lists_are_looked_through_and_what_is_within_a_unit_belongs_to_it() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2)])
    block = nn.Module()
    block.parts = inner
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(3, 3)])), "b": block})
    assert list(names(model)) == ["a.0", "a.1.0", "b", ""]
    assert names(model)["b"] == ["b.parts.0.weight", "b.parts.0.bias"]
    assert names(model)[""] == []


def test_entries_without_parameters_are_none() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert list(names(model)) == ["0", "2", ""]


def test_what_units_share_is_the_roots() -> None:
    shared = names(built("tied blocks"))
    assert "blocks.0.up.weight" in shared[""]
    assert "blocks.0.up.weight" not in shared["blocks.0"]
    assert "embedding.weight" in shared[""]
    assert "blocks.2.up.bias" in shared["blocks.2"]


def test_what_a_unit_shares_with_the_root_is_the_roots() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.head = nn.Linear(4, 4)
            self.head.weight = self.blocks[1].weight
            self.scale = nn.Parameter(torch.ones(()))

    assert names(Model()) == {
        "blocks.0": ["blocks.0.weight", "blocks.0.bias"],
        "blocks.1": ["blocks.1.bias"],
        "": ["scale", "blocks.1.weight", "head.bias"],
    }


def test_a_module_that_is_in_two_lists_is_one_unit() -> None:
    block = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.ModuleList([block, nn.Linear(2, 2)]), "b": nn.ModuleList([block])})
    assert list(names(model)) == ["a.0", "a.1", ""]


def test_a_model_without_lists_is_its_root() -> None:
    model = nn.Linear(3, 3)
    assert names(model) == {"": ["weight", "bias"]}
