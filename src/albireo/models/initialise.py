"""Random weights that depend on the seed and on each parameter's name, and on nothing else.

torch's own initialisation draws from one stream, so that a weight depends on all that were drawn before it. Here each
block of 2**20 values has a stream of its own: the numbers are the same in any order, for any part of a parameter
alone, on any number of threads and ranks, and however the model is built.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from albireo.errors import ModelError
from albireo.models.families import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["BLOCK", "InitialValues", "initial_values", "initialise", "initialise_module", "owned_values"]

# Values that are drawn from one stream. 4 MB in fp32: stays in a core's cache between drawing and copying.
BLOCK = 2**20


@dataclass(frozen=True)
class InitialValues:
    """How one parameter begins.

    Attributes:
        name: the parameter's qualified name in the family's model.
        seed: the run's.
        size: how many values it has.
        mean: of the normal distribution that they are drawn from.
        std: of the same; 0 makes every value the mean.
        zeros: a range of the flattened values that are 0 nevertheless; an embedding's padding row.
    """

    name: str
    seed: int
    size: int
    mean: float = 0.0
    std: float = 0.0
    zeros: range = range(0)

    def fill(self, out: Tensor, start: int = 0) -> None:
        """Write the values from an offset on, as far as there is room.

        Args:
            out: `[n]`, contiguous, of any dtype and on any device; the draw itself is fp32 on the CPU.
            start: offset of the first in the flattened parameter.
        """
        with torch.no_grad():
            if self.std == 0.0:
                out.fill_(self.mean)
            else:
                stop = start + out.numel()
                for block in range(start // BLOCK, -(-stop // BLOCK)):
                    first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
                    self._fill_from_block(out[first - start : last - start], block, first - block * BLOCK)
            padding = range(max(start, self.zeros.start), min(start + out.numel(), self.zeros.stop))
            if len(padding) > 0:
                out[padding.start - start : padding.stop - start] = 0.0

    def _fill_from_block(self, out: Tensor, block: int, skip: int) -> None:
        length = min(BLOCK, self.size - block * BLOCK)
        generator = torch.Generator().manual_seed(self._block_seed(block))
        if out.numel() == length and out.dtype == torch.float32 and out.device.type == "cpu":
            out.normal_(self.mean, self.std, generator=generator)
        else:
            drawn = torch.empty(length, dtype=torch.float32, device="cpu")
            out.copy_(drawn.normal_(self.mean, self.std, generator=generator)[skip : skip + out.numel()])

    def _block_seed(self, block: int) -> int:
        """Return 63 bits that differ for every seed, name and block, and are the same on every machine."""
        digest = hashlib.blake2b(f"{self.seed}\0{self.name}\0{block}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


def initial_values(module: nn.Module, name: str, seed: int, config: PreTrainedConfig) -> dict[str, InitialValues]:
    """Return how a module's own parameters begin, by their names in it; those of its children are left out.

    As transformers' `_init_weights` for the family: weights of linear layers and embeddings are normal with the
    family's standard deviation, an embedding's padding row and all biases are 0, norms are 1.

    Args:
        module: the module; only its type and its parameters' shapes are read, so it may be on the meta device.
        name: its qualified name in the family's model.
        seed: the run's.
        config: the model's.

    Raises:
        ModelError: nobody knows how to begin this type of module.
    """
    from transformers.pytorch_utils import Conv1D

    values = {}
    family = family_of(config.model_type)
    for parameter_name, parameter in module.named_parameters(recurse=False):
        qualified, size = f"{name}.{parameter_name}", parameter.numel()
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D)) and parameter_name == "weight":
            padding = range(0)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                width = module.embedding_dim
                padding = range(module.padding_idx * width, (module.padding_idx + 1) * width)
            value = InitialValues(qualified, seed, size, std=family.weight_std(qualified, config), zeros=padding)
        elif (isinstance(module, nn.Conv2d) and parameter_name == "weight") or parameter_name in family.drawn_names:
            value = InitialValues(qualified, seed, size, std=family.weight_std(qualified, config))
        elif isinstance(module, nn.LayerNorm) and parameter_name == "weight":
            value = InitialValues(qualified, seed, size, mean=1.0)
        elif isinstance(module, (nn.Linear, nn.LayerNorm, Conv1D, nn.Conv2d)) and parameter_name == "bias":
            value = InitialValues(qualified, seed, size)
        else:
            raise ModelError(
                f"the parameter {qualified} cannot be initialised: nothing is known about a "
                f"{type(module).__name__}; load trained weights instead, with --init pretrained"
            )
        values[parameter_name] = value
    return values


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
    for parameter_name, values in initial_values(module, name, seed, config).items():
        values.fill(module.get_parameter(parameter_name).detach().view(-1))


def owned_values(model: PreTrainedModel, seed: int) -> dict[nn.Parameter, InitialValues]:
    """Return how each of a model's parameters begins, without a draw.

    A parameter that several modules share is the first one's, in the order of `named_modules`: a tied head follows
    its embedding.

    Args:
        model: the model; it may be on the meta device.
        seed: the run's.

    Raises:
        ModelError: nobody knows how to begin one of its modules.
    """
    owned: dict[nn.Parameter, InitialValues] = {}
    for name, module in model.named_modules():
        if any(parameter not in owned for parameter in module.parameters(recurse=False)):
            for parameter_name, values in initial_values(module, name, seed, model.config).items():
                owned.setdefault(module.get_parameter(parameter_name), values)
    return owned


def initialise(model: PreTrainedModel, seed: int) -> None:
    """Write first values to all of a model's parameters. torch's global random state is neither used nor changed.

    Args:
        model: the model; its parameters have memory.
        seed: the run's.

    Raises:
        ModelError: nobody knows how to begin one of its modules; nothing is written then. See `owned_values`.
    """
    owned = owned_values(model, seed)
    # Drawing lets go of Python's lock, so threads draw at once, a block each.
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="initialise") as pool:
        results = [
            pool.submit(values.fill, parameter.detach().view(-1)[start : start + BLOCK], start)
            for parameter, values in owned.items()
            for start in range(0, values.size, BLOCK)
        ]
        for result in results:
            result.result()
