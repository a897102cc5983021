"""The pool: all that a mechanism does to device memory, on a GPU by torch's allocator, on a CPU simulated."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from types import TracebackType
from typing import Self

import torch

from albireo.device.lanes import CopyLane, CudaLane
from albireo.device.pinned import host_buffer
from albireo.device.simulated_lane import SimulatedLane
from albireo.errors import OutOfMemoryError

__all__ = ["CudaPool", "DevicePool", "SimulatedPool", "device_pool"]

# Every format of floating point reads a number whose bits are all set as NaN.
_NAN_BYTE = 0xFF


class DevicePool(ABC):
    """Makes flat buffers on a device, lets their memory go and takes it back; and has the lanes that copy beside.

    A buffer is known by its storage, which it keeps for life: views stay views of it while its memory is away and after
    it has come back. Any thread may call.

    Args:
        device: where the buffers are.
        lanes: for weights in, for gradients out, and for gathers over ranks.
        budget_bytes: what all buffers together may take; None: what the device gives.

    Attributes:
        device: where the buffers are.
        is_simulated: the device is a CPU that plays one.
        to_device: the lane for weights in.
        to_host: the lane for gradients out.
        gather: the lane for gathers over ranks.
    """

    is_simulated: bool

    def __init__(
        self, device: torch.device, lanes: tuple[CopyLane, CopyLane, CopyLane], budget_bytes: int | None
    ) -> None:
        self.device = device
        self.to_device, self.to_host, self.gather = lanes
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        # By the identity of their storages, of which each buffer has one Python object for life.
        self._sizes: dict[int, int] = {}
        self._away: set[int] = set()
        # A storage may be collected at any line, with the lock held: it is only noted here, and counted at the next call.
        self._collected: deque[int] = deque()
        self._owned_bytes = 0
        self._peak_bytes = 0
        self._nans: dict[torch.dtype, torch.Tensor] = {}

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised buffer, which is counted until its memory is let go of or it is collected.

        On a GPU it comes from the current stream's part of the allocator: a lane follows that before it writes.

        Args:
            numel: elements; the buffer is 1-D.
            dtype: theirs.

        Raises:
            OutOfMemoryError: it is more than the budget leaves; on a GPU torch raises its own where the device is full.
        """
        size = numel * dtype.itemsize
        with self._lock:
            self._settle()
            self._check_budget(size)
            # Made in an evaluation, it may be trained on later.
            with torch.inference_mode(mode=False):
                flat = torch.empty(numel, dtype=dtype, device=self.device)
            # Again: the new storage may stand where one was that has been collected since.
            self._settle()
            storage = flat.untyped_storage()
            self._sizes[id(storage)] = size
            weakref.finalize(storage, self._collected.append, id(storage)).atexit = False
            self._count(size)
        self._spoil(flat)
        return flat

    def let_go(self, flat: torch.Tensor) -> None:
        """Free a buffer's memory; the tensor and all views of it stay, and must not be read. Nothing if it is away.

        On a GPU the current stream's kernels may use the memory to their end. The current stream must be behind every
        copy of a lane from or to it.

        Args:
            flat: a buffer of this pool, or a view of one.

        Raises:
            ValueError: it is none.
            RuntimeError: simulated: a copy that nobody has waited for still reads or writes it.
        """
        with self._lock:
            key = self._key(flat)
            if key in self._away:
                return
            self._free(flat)
            self._away.add(key)
            self._count(-self._sizes[key])

    def take_back(self, flat: torch.Tensor) -> None:
        """Give a buffer memory again, uninitialised. Nothing if it has it.

        On a GPU it comes from the current stream's part of the allocator: a lane follows that before it writes.

        Args:
            flat: a buffer of this pool, or a view of one.

        Raises:
            ValueError: it is none.
            OutOfMemoryError: as by `empty`; the buffer stays away.
        """
        with self._lock:
            key = self._key(flat)
            if key not in self._away:
                return
            size = self._sizes[key]
            self._check_budget(size)
            self._restore(flat)
            self._away.discard(key)
            self._count(size)

    def holds(self, flat: torch.Tensor) -> bool:
        """Return True for a buffer of this pool, or a view of one, that has its memory."""
        with self._lock:
            self._settle()
            key = id(flat.untyped_storage())
            return key in self._sizes and key not in self._away

    def host(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return uninitialised host memory that lanes copy to and from, page-locked, in exactly this size.

        Args:
            numel: elements; the buffer is 1-D.
            dtype: theirs.

        Raises:
            OutOfMemoryError: so much cannot be page-locked.
        """
        with torch.inference_mode(mode=False):
            buffer = host_buffer(numel, dtype, self.device)
        self._spoil(buffer)
        return buffer

    @abstractmethod
    def make_lane(self) -> CopyLane:
        """Return one more lane, of whoever asks."""

    @property
    def owned_bytes(self) -> int:
        """What the buffers take now."""
        with self._lock:
            self._settle()
            return self._owned_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that the buffers have taken."""
        return self._peak_bytes

    @property
    def budget_bytes(self) -> int | None:
        """What all buffers together may take; None: what the device gives."""
        return self._budget_bytes

    def nan(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the NaN scalar (integers: all bits set) that stands for what is away, to be expanded and only read.

        Args:
            dtype: of the scalar; there is one for each.
        """
        with self._lock:
            if dtype not in self._nans:
                with torch.inference_mode(mode=False):
                    scalar = torch.empty((), dtype=dtype, device=self.device)
                _fill_with_nan(scalar)
                self._nans[dtype] = scalar
            return self._nans[dtype]

    def close(self) -> None:
        """Let the lanes run out. Buffers stay with those who have them.

        Raises:
            Exception: what late work raised that nobody has waited for; the other lanes have run out all the same.
        """
        try:
            self.to_device.drain()
        finally:
            try:
                self.to_host.drain()
            finally:
                self.gather.drain()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _free(self, flat: torch.Tensor) -> None: ...

    @abstractmethod
    def _restore(self, flat: torch.Tensor) -> None: ...

    @abstractmethod
    def _spoil(self, buffer: torch.Tensor) -> None:
        """Make it show if memory is read that nobody has written, where that costs nothing that counts."""

    def _key(self, flat: torch.Tensor) -> int:
        self._settle()
        key = id(flat.untyped_storage())
        if key not in self._sizes:
            raise ValueError(f"a tensor of shape {tuple(flat.shape)} on {flat.device} is no buffer of this pool")
        return key

    def _settle(self) -> None:
        """Count out the buffers that were collected."""
        while self._collected:
            key = self._collected.popleft()
            size = self._sizes.pop(key)
            if key in self._away:
                self._away.discard(key)
            else:
                self._count(-size)

    def _count(self, size_bytes: int) -> None:
        self._owned_bytes += size_bytes
        self._peak_bytes = max(self._peak_bytes, self._owned_bytes)

    def _check_budget(self, asked_bytes: int) -> None:
        if self._budget_bytes is not None and self._owned_bytes + asked_bytes > self._budget_bytes:
            raise OutOfMemoryError(
                f"a buffer of {asked_bytes:,} bytes was asked for on {self.device}, where buffers hold "
                f"{self._owned_bytes:,} of a budget of {self._budget_bytes:,} bytes"
            )


class CudaPool(DevicePool):
    """Buffers by torch's allocator, which gives and takes in the order of the current stream.

    Args:
        device: the GPU.
        budget_bytes: what all buffers together may take; None: what the device, or a cap on it, gives.
    """

    is_simulated = False

    def __init__(self, device: torch.device, budget_bytes: int | None = None) -> None:
        # Somebody may be waiting for weights; gradients have time.
        lanes = CudaLane(device, priority=-1), CudaLane(device), CudaLane(device, priority=-1)
        super().__init__(device, lanes, budget_bytes)

    def make_lane(self) -> CopyLane:
        """Return one more stream."""
        return CudaLane(self.device)

    def _free(self, flat: torch.Tensor) -> None:
        flat.untyped_storage().resize_(0)

    def _restore(self, flat: torch.Tensor) -> None:
        flat.untyped_storage().resize_(self._sizes[self._key(flat)])

    def _spoil(self, buffer: torch.Tensor) -> None:
        pass


class SimulatedPool(DevicePool):
    """A CPU that plays a device: what is away, or was never written, is NaN, and lanes run when somebody waits.

    The memory of what is away stays, out of the count: a stray read gives NaN instead of a crash.

    Args:
        device: the CPU.
        budget_bytes: what all buffers together may take; None: anything.
    """

    is_simulated = True

    def __init__(self, device: torch.device, budget_bytes: int | None = None) -> None:
        lanes = SimulatedLane(), SimulatedLane(), SimulatedLane()
        self._lanes = list(lanes)
        super().__init__(device, lanes, budget_bytes)

    def make_lane(self) -> CopyLane:
        """Return one more lane, which is asked too before memory is let go of."""
        lane = SimulatedLane()
        self._lanes.append(lane)
        return lane

    def _free(self, flat: torch.Tensor) -> None:
        if any(lane.is_pending(flat) for lane in self._lanes):
            # On a GPU its memory would go to others, and the copy would write into theirs or read it.
            raise RuntimeError(
                "memory is let go of that a copy on a lane still uses: wait for the copy's arrival first"
            )
        self._spoil(flat)

    def _restore(self, flat: torch.Tensor) -> None:
        # Whoever wrote into it while it was away wrote into nothing.
        self._spoil(flat)

    def _spoil(self, buffer: torch.Tensor) -> None:
        _fill_with_nan(buffer)


def device_pool(device: torch.device, *, budget_bytes: int | None = None) -> DevicePool:
    """Return a pool: torch's allocator on a GPU, a simulated one on a CPU.

    Args:
        device: where the buffers are.
        budget_bytes: what all buffers together may take; None: what there is.

    Raises:
        ValueError: the device is neither.
    """
    if device.type == "cuda":
        return CudaPool(device, budget_bytes)
    if device.type == "cpu":
        return SimulatedPool(device, budget_bytes)
    raise ValueError(f"there is no pool for a device of type {device.type}: take cuda or cpu")


def _fill_with_nan(tensor: torch.Tensor) -> None:
    """Set all bits of a tensor's memory, by another tensor: autograd's counters of versions know of no change."""
    with torch.inference_mode(mode=False):
        torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).fill_(_NAN_BYTE)
