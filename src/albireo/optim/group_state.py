"""The settings of an optimizer's groups, found again by the parameters' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from albireo.errors import CheckpointError

__all__ = ["complete_names", "named_groups", "restore_named_groups"]

Groups = Sequence[Sequence[torch.nn.Parameter]]

# What the optimizer is, and by which kernel it steps: said when it is made, and no state.
_OWN = frozenset(
    {"params", "capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused", "param_names"}
)


def complete_names(groups: Groups, names: Mapping[torch.nn.Parameter, str]) -> dict[torch.nn.Parameter, str]:
    """Return a name for each parameter of an optimizer.

    Args:
        groups: the parameters, by group.
        names: the names that there are; a parameter that has none goes by its place, `param_groups.0.params.3`.
    """
    return {
        parameter: names.get(parameter, f"param_groups.{number}.params.{index}")
        for number, group in enumerate(groups)
        for index, parameter in enumerate(group)
    }


def named_groups(
    optimizer: torch.optim.Optimizer, groups: Groups, names: Mapping[torch.nn.Parameter, str]
) -> list[dict[str, Any]]:
    """Return the groups with names in place of parameters, and numbers in place of tensors.

    Args:
        optimizer: any torch optimizer.
        groups: the model's parameters, by group, whatever the optimizer steps in their place.
        names: the parameters' names.
    """
    named = []
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        settings = {
            key: value.item() if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key not in _OWN
        }
        named.append({"params": [names[parameter] for parameter in parameters], **settings})
    return named


def restore_named_groups(
    optimizer: torch.optim.Optimizer,
    groups: Groups,
    names: Mapping[torch.nn.Parameter, str],
    saved: Sequence[Mapping[str, Any]],
) -> None:
    """Give the groups the settings that were saved: rates, decays and the like, but not the choice of kernels.

    Args:
        optimizer: an optimizer over the same parameters in the same groups.
        groups: the model's parameters, by group.
        names: the parameters' names.
        saved: what `named_groups` returned.

    Raises:
        CheckpointError: the groups are not the same; nothing is changed then.
    """
    if len(saved) != len(groups):
        raise CheckpointError(
            f"the saved optimizer has {len(saved)} groups of parameters, and this one {len(groups)}: build it as it was"
        )
    for number, (parameters, old) in enumerate(zip(groups, saved, strict=True)):
        mine, theirs = {names[parameter] for parameter in parameters}, set(old["params"])
        for name in sorted(mine ^ theirs):
            where = "the saved optimizer" if name in theirs else "this optimizer"
            raise CheckpointError(f"only {where} has {name} in group {number}: build the groups as they were")
    for group, old in zip(optimizer.param_groups, saved, strict=True):
        for key, value in old.items():
            if key in _OWN:
                continue
            if isinstance(group.get(key), torch.Tensor):
                group[key].fill_(value)
            else:
                group[key] = value
