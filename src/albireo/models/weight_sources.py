"""The first weights of a family's model a range at a time, drawn or out of a folder: those that `build_model` gives.

A model on the meta device is filled part by part by whoever owns the parts, and no tensor is ever held whole.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from albireo.device.cores import usable_cores
from albireo.errors import ConfigError
from albireo.models.family import Family
from albireo.models.flat_file import FlatFile
from albireo.models.initialise import BLOCK, owned_values
from albireo.models.pretrained import places_of_weights, tied_weights_differ, weight_files
from albireo.sharding.weight_source import WeightSource, check_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FolderWeights", "RandomWeights"]

# Elements that are compared at a time where a folder holds a tied weight twice.
_COMPARED = 2**20


class RandomWeights:
    """Random weights, to the bit those of `initialise`, whatever the range. A `WeightSource`.

    Args:
        model: the model; it may be on the meta device.
        seed: the run's.

    Raises:
        ModelError: nobody knows how to begin one of its modules.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self._values = owned_values(model, seed)
        # It starts no thread before there is work for one.
        self._workers = usable_cores()
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="first-weights")

    def fill(self, parameter: nn.Parameter, start: int, out: Tensor) -> None:
        """Draw a range of a parameter, several blocks at once; see `WeightSource.fill`.

        Raises:
            ConfigError: the parameter is not the model's, or has no such elements.
        """
        values = self._values.get(parameter)
        if values is None:
            raise _unknown_parameter(parameter)
        check_range(values.size, start, out)
        first_block, last_block = start // BLOCK, (start + out.numel() - 1) // BLOCK
        if values.std == 0.0 or first_block >= last_block:
            values.fill(out, start)
            return
        # Drawing lets go of Python's lock. A thread draws into host memory alone: a copy to a device belongs on the
        # caller's stream.
        blocks = range(first_block, last_block + 1)
        on_host = out.device.type == "cpu"
        for group in range(0, len(blocks), 2 * self._workers):
            drawing = []
            for block in blocks[group : group + 2 * self._workers]:
                first, last = max(start, block * BLOCK), min(start + out.numel(), (block + 1) * BLOCK)
                part = out[first - start : last - start]
                drawn = part if on_host else torch.empty(part.shape, dtype=part.dtype, device="cpu")
                drawing.append((part, drawn, self._pool.submit(values.fill, drawn, first)))
            for part, drawn, done in drawing:
                done.result()
                if drawn is not part:
                    part.copy_(drawn)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


class _Place(NamedTuple):
    """A tensor in a folder.

    Attributes:
        file: where it is.
        key: its name there.
        name: its name in the model.
    """

    file: Path
    key: str
    name: str


class FolderWeights:
    """Trained weights out of a Hugging Face folder, as `load_weights` reads and checks them. A `WeightSource`.

    Names, shapes and types are compared when it is made. Numbers are read when they are asked for, each from one
    place of one file; where a folder holds a tied weight twice, both are read and must be equal.

    Args:
        model: the model; its parameters may be on the meta device. Buffers that the folder holds are filled at once.
        folder: a Hugging Face folder.
        family: the model's.
        head: where the head's values come from instead; it is closed with this source.

    Raises:
        ModelError: see `load_weights`.
    """

    def __init__(
        self, model: PreTrainedModel, folder: Path, family: Family, *, head: WeightSource | None = None
    ) -> None:
        self._head = head
        self._of_head = (
            frozenset(model.get_submodule(family.head_name).parameters()) if head is not None else frozenset()
        )
        self._files: dict[Path, FlatFile] = {}
        self._places: dict[Tensor, list[_Place]] = {}
        targets = model.state_dict(keep_vars=True)
        for key, (file, name) in places_of_weights(
            weight_files(folder), targets, family, but_head=head is not None
        ).items():
            self._places.setdefault(targets[name], []).append(_Place(file, key, name))
        self._numels = {target: target.numel() for target in self._places}
        try:
            for target in [target for target in self._places if not isinstance(target, nn.Parameter)]:
                self._fill(target, 0, target.detach().view(-1))
        except BaseException:
            self.close()
            raise

    def fill(self, parameter: nn.Parameter, start: int, out: Tensor) -> None:
        """Read a range of a parameter; see `WeightSource.fill`.

        Raises:
            ConfigError: the parameter is not the model's, or has no such elements.
            ModelError: a file is damaged, or tied weights differ.
        """
        if self._head is not None and parameter in self._of_head:
            self._head.fill(parameter, start, out)
        else:
            self._fill(parameter, start, out)

    def close(self) -> None:
        """Close the files."""
        if self._head is not None:
            self._head.close()
        while self._files:
            self._files.popitem()[1].close()

    def _fill(self, target: Tensor, start: int, out: Tensor) -> None:
        if target not in self._places:
            raise _unknown_parameter(target)
        check_range(self._numels[target], start, out)
        first, *others = self._places[target]
        with torch.no_grad():
            if not others:
                self._opened(first.file).read_into(first.key, start, out)
            else:
                self._fill_and_compare(first, others, start, out)

    def _fill_and_compare(self, first: _Place, others: list[_Place], start: int, out: Tensor) -> None:
        """Fill a range, and refuse another value for it. They are compared as `load_weights` does it: in fp32."""
        one, two = torch.empty(2, min(_COMPARED, out.numel()), dtype=torch.float32, device="cpu")
        for offset in range(0, out.numel(), _COMPARED):
            part = out[offset : offset + _COMPARED]
            length = part.numel()
            self._opened(first.file).read_into(first.key, start + offset, one[:length])
            part.copy_(one[:length])
            for other in others:
                self._opened(other.file).read_into(other.key, start + offset, two[:length])
                if not torch.equal(one[:length], two[:length]):
                    raise tied_weights_differ(other.file, other.name, first.name)

    def _opened(self, file: Path) -> FlatFile:
        if file not in self._files:
            self._files[file] = FlatFile(file)
        return self._files[file]


def _unknown_parameter(tensor: Tensor) -> ConfigError:
    return ConfigError(f"a parameter of shape {tuple(tensor.shape)} is none of the model's that its weights are for")
