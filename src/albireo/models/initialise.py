"""Random weights that depend on the seed and on each module's name, and on nothing else.

torch's own initialisation draws from one stream, so that a weight depends on all that were drawn before it. Here each
module has a stream of its own: the numbers are the same in any order, in any subset, on any number of threads and
ranks, and however the model is built.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from albireo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["initial_values", "initialise", "initialise_module"]

_MAX_THREADS = 8


def initial_values(module: nn.Module, name: str, seed: int, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and first values of a module's own parameters, those of its children left out.

    As transformers' `_init_weights` for the family: weights of linear layers and embeddings are normal with
    `config.init_std`, an embedding's padding row and all biases are 0, norms are 1.

    Args:
        module: the module; only its type and its parameters' shapes are read, so it may be on the meta device.
        name: its qualified name in the family's model.
        seed: the run's.
        config: the model's.

    Returns:
        Each parameter's name within the module, and its values in fp32 on the CPU.

    Raises:
        ModelError: nobody knows how to begin this type of module.
    """
    generator = torch.Generator().manual_seed(_module_seed(seed, name))
    for parameter_name, parameter in module.named_parameters(recurse=False):
        value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
        if isinstance(module, (nn.Linear, nn.Embedding)) and parameter_name == "weight":
            value.normal_(0.0, config.init_std, generator=generator)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                value[module.padding_idx] = 0.0
        elif isinstance(module, nn.LayerNorm) and parameter_name == "weight":
            value.fill_(1.0)
        elif isinstance(module, (nn.Linear, nn.LayerNorm)) and parameter_name == "bias":
            value.zero_()
        else:
            raise ModelError(
                f"the parameter {name}.{parameter_name} cannot be initialised: nothing is known about a "
                f"{type(module).__name__}; load trained weights instead, with --init pretrained"
            )
        yield parameter_name, value


@torch.no_grad()
def initialise_module(module: nn.Module, name: str, seed: int, config: PreTrainedConfig) -> None:
    """Write first values to a module's own parameters, whatever their device and dtype; see `initial_values`.

    Args:
        module: the module; its parameters have memory.
        name: its qualified name in the family's model.
        seed: the run's.
        config: the model's.

    Raises:
        ModelError: nobody knows how to begin this type of module.
    """
    for parameter_name, value in initial_values(module, name, seed, config):
        module.get_parameter(parameter_name).copy_(value)


def initialise(model: PreTrainedModel, seed: int) -> None:
    """Write first values to all of a model's parameters. torch's global random state is neither used nor changed.

    A parameter that several modules share is the first one's, in the order of `named_modules`: a tied head follows
    its embedding.

    Args:
        model: the model; its parameters have memory.
        seed: the run's.

    Raises:
        ModelError: nobody knows how to begin one of its modules.
    """
    owned: list[tuple[str, nn.Module]] = []
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        shared = [parameter for parameter in parameters if parameter in seen]
        if shared and len(shared) < len(parameters):
            raise ModelError(f"the module {name} shares some of its parameters only: expected all of them, or none")
        if parameters and not shared:
            owned.append((name, module))
            seen.update(parameters)
    # Largest first, so that no thread is left with one at the end. Drawing lets go of Python's lock.
    owned.sort(key=lambda item: -sum(parameter.numel() for parameter in item[1].parameters(recurse=False)))
    config = model.config
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="initialise") as pool:
        for result in [pool.submit(initialise_module, module, name, seed, config) for name, module in owned]:
            result.result()


def _module_seed(seed: int, name: str) -> int:
    """Return 63 bits that differ for every seed and name, and are the same on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
