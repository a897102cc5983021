"""What is done to a model before it is sharded."""

from __future__ import annotations

import torch
from torch import nn

from albireo.distributed import World
from albireo.distributed.collectives import broadcast
from albireo.errors import ConfigError
from albireo.sharding.weight_source import WeightSource

__all__ = ["check_parameters", "copy_from_main", "give_memory"]


def check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse what sharding would lose or part, before anything is changed.

    Args:
        model: any module.
        optimizer: what is to step it.

    Raises:
        ConfigError: with what to do instead.
    """
    known = dict(model.named_parameters())
    stepped = [p for group in optimizer.param_groups for p in group["params"]] if optimizer is not None else []
    if not set(known.values()).issuperset(stepped):
        raise ConfigError(
            "the optimizer has a parameter that is not the model's: give boost one module that has all that is trained"
        )
    places: dict[int, str] = {}
    for name, parameter in known.items():
        if parameter.dtype == torch.float64 or parameter.is_complex():
            raise ConfigError(
                f"{name} is {parameter.dtype}, which cannot be sharded: call model.float() first, or take TorchDDPPlugin"
            )
        if parameter.numel() == 0 or parameter.is_meta:
            continue
        other = places.setdefault(parameter.data_ptr(), name)
        if other != name:
            raise ConfigError(
                f"{other} and {name} share their memory, and sharding would part them: make them one Parameter"
            )


def copy_from_main(model: nn.Module, world: World) -> None:
    """Give all ranks the main rank's parameters and buffers, as torch's DistributedDataParallel does.

    Args:
        model: of the same parameters on every rank.
        world: the ranks.
    """
    if world.world_size == 1:
        return
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            flat = tensor.detach().contiguous()
            broadcast(flat).wait()
            if flat.data_ptr() != tensor.data_ptr():
                tensor.copy_(flat)


def give_memory(model: nn.Module, device: torch.device, weights: WeightSource | None) -> None:
    """Make parameters that are on the meta device real; each stays the same object.

    Args:
        model: any module.
        device: where to.
        weights: what fills them.

    Raises:
        ConfigError: nobody knows how they begin.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            continue
        if weights is None:
            raise ConfigError(
                f"{name} is on the meta device, and nothing says how it begins: build the model within "
                "albireo.LazyInitContext, or give it memory first"
            )
        real = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        weights.fill(parameter, 0, real.view(-1))
        torch.utils.swap_tensors(parameter, nn.Parameter(real, requires_grad=parameter.requires_grad))  # type: ignore[no-untyped-call]
