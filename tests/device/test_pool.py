"""Buffers that go and come back in place, counted; on a CPU, what is wrongly read shows."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import nn

from albireo.device.pool import CudaPool, DevicePool, SimulatedPool, device_pool
from albireo.errors import OutOfMemoryError

CPU = torch.device("cpu")


@pytest.fixture
def pool() -> SimulatedPool:
    return SimulatedPool(CPU)


def test_a_device_has_its_kind_of_pool() -> None:
    pool = device_pool(CPU, budget_bytes=100)
    assert isinstance(pool, SimulatedPool)
    assert (pool.device, pool.is_simulated, pool.budget_bytes) == (CPU, True, 100)
    assert not CudaPool.is_simulated
    with pytest.raises(ValueError, match="meta"):
        device_pool(torch.device("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_what_nobody_has_written_is_nan(pool: DevicePool, dtype: torch.dtype) -> None:
    flat = pool.empty(5, dtype)
    assert (flat.shape, flat.dtype, flat.device) == ((5,), dtype, CPU)
    assert flat.float().isnan().all()
    assert pool.host(5, dtype).float().isnan().all()
    assert pool.nan(dtype).float().isnan().all()


@pytest.mark.parametrize(("dtype", "shown"), [(torch.int32, -1), (torch.uint8, 255), (torch.bool, True)])
def test_integers_that_nobody_has_written_have_all_bits_set(pool: DevicePool, dtype: torch.dtype, shown: int) -> None:
    assert pool.empty(2, dtype).tolist() == [shown, shown]
    assert pool.nan(dtype).item() == shown


def test_a_buffer_goes_and_comes_back_under_its_views(pool: DevicePool) -> None:
    flat = pool.empty(6, torch.float32)
    view = flat[2:].view(2, 2)
    flat.fill_(1.0)
    version = flat._version
    pool.let_go(flat)
    pool.let_go(view)
    assert not pool.holds(flat)
    assert not pool.holds(view)
    assert flat.isnan().all()
    flat.fill_(3.0)  # a stray write
    pool.take_back(view)
    pool.take_back(flat)
    assert pool.holds(flat)
    assert view.isnan().all()
    view.fill_(2.0)
    assert flat[2:].tolist() == [2.0] * 4
    assert flat._version == version + 2, "the pool's own fills are no changes"


def test_the_memory_that_buffers_take_is_counted(pool: DevicePool) -> None:
    first, second = pool.empty(10, torch.float32), pool.empty(10, torch.bfloat16)
    assert (pool.owned_bytes, pool.peak_bytes) == (60, 60)
    pool.let_go(first)
    pool.let_go(first)
    assert (pool.owned_bytes, pool.peak_bytes) == (20, 60)
    pool.take_back(first)
    pool.take_back(first)
    assert (pool.owned_bytes, pool.peak_bytes) == (60, 60)
    pool.let_go(second)
    del second
    gc.collect()
    assert pool.owned_bytes == 40
    view = first[:2]
    del first
    gc.collect()
    assert pool.owned_bytes == 40
    del view
    gc.collect()
    assert pool.owned_bytes == 0
    assert pool.peak_bytes == 60


def test_an_empty_buffer_is_one_too(pool: DevicePool) -> None:
    flat = pool.empty(0, torch.float32)
    pool.let_go(flat)
    assert not pool.holds(flat)
    pool.take_back(flat)
    assert pool.holds(flat)
    assert pool.owned_bytes == 0
    assert pool.host(0, torch.float32).shape == (0,)


def test_more_than_the_budget_is_refused_with_the_numbers() -> None:
    pool = SimulatedPool(CPU, budget_bytes=1000)
    first = pool.empty(200, torch.float32)
    with pytest.raises(OutOfMemoryError, match=r"404 bytes .* hold 800 of a budget of 1,000 bytes"):
        pool.empty(101, torch.float32)
    assert pool.owned_bytes == 800
    pool.let_go(first)
    second = pool.empty(250, torch.float32)
    with pytest.raises(OutOfMemoryError, match="800 bytes"):
        pool.take_back(first)
    assert not pool.holds(first)
    del second
    gc.collect()
    pool.take_back(first)
    assert pool.peak_bytes == 1000


def test_another_tensor_is_no_buffer_of_the_pool(pool: DevicePool) -> None:
    stranger = torch.zeros(3)
    assert not pool.holds(stranger)
    assert not SimulatedPool(CPU).holds(pool.empty(3, torch.float32))
    with pytest.raises(ValueError, match=r"\(3,\) on cpu is no buffer"):
        pool.let_go(stranger)
    with pytest.raises(ValueError, match="is no buffer"):
        pool.take_back(stranger)


def test_a_new_buffer_is_not_taken_for_one_that_was_collected(pool: DevicePool) -> None:
    """Its storage may get the same address, and the same identity."""
    for _ in range(200):
        flat = pool.empty(3, torch.float32)
        pool.let_go(flat)
        del flat
        flat = pool.empty(2, torch.float32)
        assert pool.holds(flat)
        assert pool.owned_bytes == 8
        del flat
    assert pool.owned_bytes == 0


def test_memory_that_a_copy_still_uses_cannot_be_let_go_of(pool: DevicePool) -> None:
    flat, host = pool.empty(4, torch.float32), pool.host(4, torch.float32).fill_(1.0)
    for arrival in (pool.to_device.copy(flat, host), pool.to_host.copy(host[:2], flat[:2])):
        with pytest.raises(RuntimeError, match="still uses"):
            pool.let_go(flat)
        assert pool.holds(flat)
        arrival.wait()
    pool.let_go(flat)


def test_a_fetch_that_nobody_waits_for_gives_nan(pool: DevicePool) -> None:
    home = pool.host(4, torch.float32).fill_(1.0)
    flat = pool.empty(4, torch.float32).fill_(1.0)
    pool.let_go(flat)
    pool.take_back(flat)
    pool.to_device.follow()
    arrival = pool.to_device.copy(flat, home)
    assert flat.sum().isnan()
    arrival.wait()
    assert flat.sum() == 4


def test_a_gradient_that_nobody_waits_for_gives_nan_and_not_the_last_steps(pool: DevicePool) -> None:
    host = pool.host(4, torch.float32)
    gradient = pool.empty(4, torch.float32)
    for step in (1.0, 2.0):
        gradient.fill_(step)
        pool.to_host.follow()
        arrival = pool.to_host.copy(host, gradient)
        assert host.isnan().all()
        arrival.synchronize()
        assert host.tolist() == [step] * 4


def test_a_parameter_that_is_away_shows_and_autograd_reads_it_after_a_refill(pool: DevicePool) -> None:
    flat = pool.empty(6, torch.float32)
    flat.copy_(torch.arange(6.0))
    # A parameter made of a view would share its counter of versions; assigning data does not.
    weight = nn.Parameter(torch.empty(2, 3))
    weight.data = flat.view(2, 3)

    def fill() -> None:
        pool.take_back(flat)
        pool.to_device.copy(flat, torch.arange(6.0)).wait()
        weight.data = flat.view(2, 3)

    def leave() -> None:
        weight.data = pool.nan(torch.float32).expand(2, 3)
        pool.let_go(flat)

    inputs = torch.ones(4, 2, requires_grad=True)
    output = (inputs @ weight).sum()
    leave()
    assert weight.isnan().all()
    fill()
    output.backward()
    assert inputs.grad is not None
    assert inputs.grad.tolist() == [[3.0, 12.0]] * 4


def test_there_is_one_scalar_a_dtype(pool: DevicePool) -> None:
    assert pool.nan(torch.float32) is pool.nan(torch.float32)
    assert pool.nan(torch.bfloat16).dtype == torch.bfloat16
    assert pool.nan(torch.float32).shape == ()
    assert pool.owned_bytes == 0


def test_a_buffer_made_in_an_evaluation_can_be_trained_on(pool: DevicePool) -> None:
    with torch.inference_mode():
        flat, host = pool.empty(4, torch.float32), pool.host(4, torch.float32)
        scalar = pool.nan(torch.float32)
        pool.let_go(flat)
        pool.take_back(flat)
    assert not any(tensor.is_inference() for tensor in (flat, host, scalar))
    flat.fill_(1.0)
    weight = nn.Parameter(flat.view(2, 2))
    (weight * 2).sum().backward()
    assert weight.grad is not None


def test_closing_runs_what_is_left_on_every_lane() -> None:
    targets = [torch.zeros(1) for _ in range(3)]
    pool = SimulatedPool(CPU)
    for lane, target in zip((pool.to_device, pool.to_host, pool.gather), targets, strict=True):
        lane.copy(target, torch.ones(1))
    pool.to_device.run(lambda: 1 // 0)
    assert all(target.isnan() for target in targets)
    with pytest.raises(ZeroDivisionError), pool:
        pass
    assert all(target == 1 for target in targets)


def test_threads_make_and_lose_buffers_at_once(pool: DevicePool) -> None:
    def use() -> None:
        kept = pool.empty(16, torch.float32)
        for number in range(300):
            flat = pool.empty(number % 5, torch.float32)
            pool.let_go(kept)
            pool.take_back(kept)
            if number % 2:
                pool.let_go(flat)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    gc.collect()
    assert pool.owned_bytes == 0
