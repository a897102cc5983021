"""Whole tensors on the main rank, whichever ranks hold their parts, without holding more than one piece of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from albireo.checkpoint import DTYPE_CODES, Piece, TensorInfo, TensorSlice, check_coverage
from albireo.distributed import World
from albireo.distributed.host_gather import gather_json
from albireo.distributed.remote_reading import Fetch, let_main_read

__all__ = ["WholeTensors", "with_whole_tensors"]

_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class WholeTensors:
    """All ranks' slices put together, for the main rank. Made by `with_whole_tensors`, and good as long as it runs.

    Attributes:
        slices: whole tensors. One that this rank has whole has its elements; any other is on the meta device.
    """

    def __init__(self, own: Sequence[TensorSlice], listings: Sequence[list[Any]], fetch: Fetch) -> None:
        infos: dict[str, TensorInfo] = {}
        self._places: dict[str, list[tuple[int, int, int, int]]] = {}
        for rank, listing in enumerate(listings):
            for number, (name, shape, code, start, stop) in enumerate(listing):
                infos.setdefault(name, TensorInfo(tuple(shape), _DTYPES[code]))
                self._places.setdefault(name, []).append((start, stop, rank, number))
        pieces = (Piece(name, start, stop) for name, places in self._places.items() for start, stop, *_ in places)
        check_coverage(infos, pieces)
        whole = {part.name: part for part in own if part.data.numel() == part.info.elements}
        self.slices = [
            whole.get(name)
            or TensorSlice(name, info.shape, 0, torch.empty(info.elements, dtype=info.dtype, device="meta"))
            for name, info in infos.items()
        ]
        self._fetch = fetch

    def read(self, slice_: TensorSlice, start: int, out: torch.Tensor) -> None:
        """Fill a host tensor with elements of one of `slices`, from an index on.

        Args:
            slice_: one of `slices`.
            start: the first element, in the flattened tensor.
            out: 1-D, contiguous, in host memory, of the tensor's dtype; its length says how many elements.
        """
        stop = start + out.numel()
        for first, last, rank, number in self._places[slice_.name]:
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                self._fetch(rank, number, begin - first, out[begin - start : end - start])

    def tensor(self, slice_: TensorSlice) -> torch.Tensor:
        """Return one of `slices` as a tensor: its own elements if it has them, else in new host memory."""
        flat = slice_.data
        if flat.is_meta:
            flat = torch.empty(flat.numel(), dtype=flat.dtype)
            self.read(slice_, 0, flat)
        return flat.view(slice_.shape)


def with_whole_tensors(slices: Iterable[TensorSlice], world: World, action: Callable[[WholeTensors], None]) -> None:
    """Do something with whole tensors on the main rank; all ranks call this, and all raise if it fails.

    Args:
        slices: this rank's; all ranks' together make up whole tensors.
        world: the ranks.
        action: what the main rank does.

    Raises:
        CheckpointError: the slices do not make up whole tensors.
        AlbireoError: on the other ranks, if the action failed, with its message.
    """
    own = list(slices)
    listing = [[part.name, list(part.shape), DTYPE_CODES[part.dtype], part.start, part.stop] for part in own]
    listings = gather_json(listing, world)

    def act(fetch: Fetch) -> None:
        if listings is not None:  # which it is on the main rank alone
            action(WholeTensors(own, listings, fetch))

    let_main_read(world, [part.data for part in own], act)
