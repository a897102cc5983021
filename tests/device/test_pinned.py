"""Page-locked memory is of the size that was asked for, and let go of with its last view."""

from __future__ import annotations

import gc

import pytest
import torch

from albireo.device.pinned import host_buffer
from albireo.errors import OutOfMemoryError


class Runtime:
    """Stands in for CUDA's, and remembers what is locked."""

    def __init__(self, error: int = 0) -> None:
        self.locked: dict[int, int] = {}
        self.error = error

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 0
        if not self.error:
            self.locked[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_memory_stays_locked_as_long_as_a_view_of_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    buffer = host_buffer(1000, torch.bfloat16, torch.device("cuda"))
    assert runtime.locked == {buffer.data_ptr(): 2000}
    view = buffer[10:20]
    del buffer
    gc.collect()
    assert len(runtime.locked) == 1
    del view
    gc.collect()
    assert runtime.locked == {}


def test_memory_that_cannot_be_locked_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(error=2))
    with pytest.raises(OutOfMemoryError, match="CUDA error 2"):
        host_buffer(1000, torch.float32, torch.device("cuda"))


def test_without_a_gpu_nothing_is_locked() -> None:
    assert host_buffer(10, torch.float32, torch.device("cpu")).shape == (10,)
