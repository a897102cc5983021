"""Weights, gradients and optimizer states of fragments as slices of the user's parameters, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from albireo.checkpoint import TensorSlice, TensorSource, whole
from albireo.errors import CheckpointError
from albireo.sharding.bucket import Fragment

__all__ = ["fragment_slice", "optimizer_slices", "restore_optimizer"]


def fragment_slice(name: str, fragment: Fragment, data: torch.Tensor) -> TensorSlice:
    """Return a slice of what belongs to a parameter.

    Args:
        name: of the whole tensor.
        fragment: which elements.
        data: these elements, 1-D.
    """
    return TensorSlice(name, tuple(fragment.parameter.shape), fragment.cut.start, data)


def optimizer_slices(
    optimizer: torch.optim.Optimizer, fragments: Iterable[Fragment], names: Mapping[nn.Parameter, str]
) -> Iterator[TensorSlice]:
    """Yield this rank's part of all states, as `optimizer/STATE/NAME`.

    Args:
        optimizer: it steps the fragments' masters.
        fragments: this rank's.
        names: the names of the user's parameters.

    Raises:
        CheckpointError: a state is neither one number nor one for each element.
    """
    for fragment in fragments:
        for key, value in optimizer.state.get(fragment.master, {}).items():
            name = f"optimizer/{key}/{names[fragment.parameter]}"
            if not isinstance(value, torch.Tensor):
                raise CheckpointError(
                    f"the optimizer keeps {key} of {names[fragment.parameter]} as {type(value).__name__}, and only "
                    "tensors can be saved"
                )
            if value.dim() == 0:
                # The same on every rank that has a part of the parameter.
                if fragment.is_first:
                    yield whole(name, value)
            elif value.shape == fragment.master.shape:
                yield fragment_slice(name, fragment, value)
            else:
                raise CheckpointError(
                    f"the optimizer keeps {name} with shape {tuple(value.shape)}, which is not one number for each element: "
                    "take an element-wise optimizer"
                )


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    fragments: Iterable[Fragment],
    names: Mapping[nn.Parameter, str],
    source: TensorSource,
) -> None:
    """Fill the states of this rank's fragments.

    Args:
        optimizer: it steps the fragments' masters.
        fragments: this rank's.
        names: the names of the user's parameters that it steps.
        source: where `optimizer/STATE/NAME` can be read.

    Raises:
        CheckpointError: there are states of other parameters, or some of a parameter's are missing or do not fit it.
    """
    by_parameter: dict[str, dict[str, str]] = {}
    for full in source.names("optimizer/"):
        key, _, saved_name = full.removeprefix("optimizer/").partition("/")
        by_parameter.setdefault(saved_name, {})[key] = full
    for unknown in sorted(by_parameter.keys() - set(names.values())):
        raise CheckpointError(f"the checkpoint has optimizer states of {unknown}, which this optimizer does not train")
    wanted = {key for keys in by_parameter.values() for key in keys}
    for fragment in fragments:
        optimizer.state.pop(fragment.master, None)
        name = names[fragment.parameter]
        # A parameter that never had a gradient has no state at all.
        found = by_parameter.get(name, {})
        for key in sorted(wanted) if found else []:
            if key not in found:
                raise CheckpointError(
                    f"the checkpoint has no optimizer state {key}/{name}, though it has {key} of others"
                )
            optimizer.state[fragment.master][key] = _read_state(optimizer, fragment, key, found[key], source)


def _read_state(
    optimizer: torch.optim.Optimizer, fragment: Fragment, key: str, name: str, source: TensorSource
) -> torch.Tensor:
    shape, dtype = source.info(name)
    if shape == () and (fragment.parameter.dim() > 0 or key == "step"):
        # A step count lies beside its parameter where a kernel counts; where the host does, it would be waited for.
        group = next(g for g in optimizer.param_groups if any(p is fragment.master for p in g["params"]))
        beside = key != "step" or group.get("fused") or group.get("capturable")
        number = torch.empty((), dtype=dtype, device=fragment.master.device if beside else "cpu")
        source.read_into(name, number)
        return number
    if shape != tuple(fragment.parameter.shape):
        raise CheckpointError(
            f"the optimizer's state {name} has shape {shape} in the checkpoint, and the parameter "
            f"{tuple(fragment.parameter.shape)}: it belongs to another model, or to an optimizer that is not element-wise"
        )
    state = torch.empty(fragment.cut.numel, dtype=dtype, device=fragment.master.device)
    source.read_slice_into(name, fragment.cut.start, state)
    return state
