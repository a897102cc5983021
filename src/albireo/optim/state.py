"""An optimizer's state as named tensors, so that it can be saved and found again by the parameters' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from albireo.errors import CheckpointError

__all__ = ["named_state", "restore_named_state"]


def named_state(optimizer: torch.optim.Optimizer, names: Mapping[torch.nn.Parameter, str]) -> dict[str, torch.Tensor]:
    """Return every tensor that the optimizer keeps.

    Args:
        optimizer: any torch optimizer whose state is tensors, one set a parameter.
        names: the parameters' names.

    Returns:
        `STATE/PARAMETER` to the tensor itself, such as `exp_avg/model.decoder.layers.0.fc1.weight`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, torch.Tensor):
                    raise CheckpointError(
                        f"the optimizer keeps {key} of {names[parameter]} as {type(value).__name__}, and only tensors "
                        "can be saved"
                    )
                tensors[f"{key}/{names[parameter]}"] = value
    return tensors


def restore_named_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[torch.nn.Parameter, str],
    saved: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str, torch.Tensor], None],
) -> None:
    """Fill the optimizer's state from saved tensors.

    Args:
        optimizer: an optimizer over the same parameters.
        names: the parameters' names.
        saved: what there is: `STATE/PARAMETER` to shape and dtype.
        read: fills a tensor with what is saved under a name.

    Raises:
        CheckpointError: there are states of other parameters, or some of a parameter's are missing or do not fit it.
    """
    by_parameter: dict[str, list[str]] = {}
    for name in saved:
        key, _, parameter_name = name.partition("/")
        by_parameter.setdefault(parameter_name, []).append(key)
    known = {names[parameter] for group in optimizer.param_groups for parameter in group["params"]}
    unknown = sorted(set(by_parameter) - known)
    if unknown:
        raise CheckpointError(
            f"the checkpoint has optimizer states of {unknown[0]}, which this optimizer does not train"
        )
    for group in optimizer.param_groups:
        # A parameter that never had a gradient has no state at all; one that has some has all that its group has.
        found = {parameter: by_parameter.get(names[parameter], []) for parameter in group["params"]}
        wanted = sorted({key for keys in found.values() for key in keys})
        for parameter, keys in found.items():
            optimizer.state.pop(parameter, None)
            for key in wanted if keys else []:
                name = f"{key}/{names[parameter]}"
                if name not in saved:
                    raise CheckpointError(
                        f"the checkpoint has no optimizer state {name}, though it has {key} of others"
                    )
                shape, dtype = saved[name]
                _check_shape(name, shape, tuple(parameter.shape))
                # A step count lies beside its parameter where a kernel counts; where the host does, it would be waited for.
                beside = key != "step" or group.get("fused") or group.get("capturable")
                state = torch.empty(shape, dtype=dtype, device=parameter.device if beside else "cpu")
                read(name, state)
                optimizer.state[parameter][key] = state


def _check_shape(name: str, shape: tuple[int, ...], parameter_shape: tuple[int, ...]) -> None:
    """Refuse a state that is no scalar, no moment and no factor of one (a row or a column of it)."""
    sizes = zip(reversed(shape), reversed(parameter_shape), strict=False)
    if len(shape) > len(parameter_shape) or any(size not in (1, whole) for size, whole in sizes):
        raise CheckpointError(
            f"the optimizer's state {name} has shape {shape} in the checkpoint, and the parameter {parameter_shape}: it "
            "belongs to another model"
        )
