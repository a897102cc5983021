"""What a cap on the device leaves to torch's allocator."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from albireo.device.cap import apply_device_cap, device_room_bytes
from albireo.errors import OutOfMemoryError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GB = 2**30


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 80 GB of which this process's allocator holds 5, and others 20."""
    card = SimpleNamespace(total=80 * GB, free=55 * GB, reserved=5 * GB, fraction=1.0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=card.total))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (card.free, card.total))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: card.reserved)
    monkeypatch.setattr(
        "torch.cuda.set_per_process_memory_fraction", lambda fraction, _: setattr(card, "fraction", fraction)
    )
    return card


def test_the_room_under_a_cap_is_what_the_allocator_is_bound_to(card: SimpleNamespace) -> None:
    assert device_room_bytes(GPU, 17 * GB) == apply_device_cap(GPU, 17 * GB) == pytest.approx(16.1 * GB, abs=1)
    assert card.fraction * card.total == pytest.approx(16.1 * GB)


def test_the_room_without_a_cap_is_what_others_leave(card: SimpleNamespace) -> None:
    assert device_room_bytes(GPU, 0) == pytest.approx((60 - 0.4) * GB, abs=2)
    assert device_room_bytes(GPU, 70 * GB) == device_room_bytes(GPU, 0)
    card.free = card.reserved = 0
    assert device_room_bytes(GPU, 0) == 0


@pytest.mark.parametrize(("cap", "said"), [(GB // 2, "the least that can is 1.0"), (81 * GB, "more than the GPU has")])
def test_a_cap_that_cannot_be_is_refused(card: SimpleNamespace, cap: int, said: str) -> None:
    for function in (apply_device_cap, device_room_bytes):
        with pytest.raises(OutOfMemoryError, match=said):
            function(GPU, cap)
    assert card.fraction == 1.0


def test_a_cpu_has_the_cap_or_what_the_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_room_bytes(CPU, 1000) == 1000
    assert device_room_bytes(CPU, 0) > 2**28
    monkeypatch.setattr("albireo.device.cap.host_room_bytes", lambda *_: None)
    assert device_room_bytes(CPU, 0) == sys.maxsize
