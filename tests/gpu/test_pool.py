"""The pool on a GPU: memory that really goes and comes back, and copies that run beside and still are waited for."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from albireo.device import PeakMemory
from albireo.device.pool import CudaPool, DevicePool, device_pool
from albireo.errors import OutOfMemoryError

pytestmark = pytest.mark.gpu

MB = 2**20
# Long enough for a copy that is not waited for to be late: about 100 ms.
CYCLES = 2 * 10**8


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def pool(device: torch.device) -> Iterator[DevicePool]:
    # Kernels are loaded at their first call, which takes longer than the lateness that is made here.
    ones = torch.ones(MB, device=device)
    assert float(ones.clone().zero_().sum(dtype=torch.float64)) == 0.0
    torch.cuda._sleep(1)
    del ones
    gc.collect()
    torch.cuda.synchronize()
    with device_pool(device) as pool:
        yield pool


def test_a_gpu_has_its_pool(pool: DevicePool) -> None:
    assert isinstance(pool, CudaPool)
    assert not pool.is_simulated


def test_memory_that_is_let_go_of_is_really_free(pool: DevicePool, device: torch.device) -> None:
    before = torch.cuda.memory_allocated(device)
    flat = pool.empty(64 * MB, torch.float32)
    view = flat[MB:].view(-1, 16)
    assert torch.cuda.memory_allocated(device) - before == 256 * MB == pool.owned_bytes
    pool.let_go(flat)
    pool.let_go(flat)
    assert torch.cuda.memory_allocated(device) == before
    assert (pool.owned_bytes, pool.holds(flat)) == (0, False)
    # Its memory serves another, and comes back as another block.
    other = torch.zeros(64 * MB, device=device)
    pool.take_back(flat)
    flat.fill_(2.0)
    assert torch.cuda.memory_allocated(device) - before == 512 * MB
    assert view.data_ptr() == flat.data_ptr() + 4 * MB
    assert float(view.sum(dtype=torch.float64)) == 2.0 * view.numel()
    assert not other.any()
    del flat, view, other
    gc.collect()
    assert pool.owned_bytes == 0
    assert torch.cuda.memory_allocated(device) == before
    assert pool.peak_bytes == 256 * MB


def test_autograd_reads_what_a_refill_brings(pool: DevicePool, device: torch.device) -> None:
    flat = pool.empty(6, torch.float32)
    home = pool.host(6, torch.float32).copy_(torch.arange(6.0))
    weight = nn.Parameter(torch.empty(2, 3, device=device))

    def fill() -> None:
        pool.take_back(flat)
        pool.to_device.follow()
        pool.to_device.copy(flat, home).wait()
        weight.data = flat.view(2, 3)

    pool.let_go(flat)
    fill()
    inputs = torch.ones(4, 2, device=device, requires_grad=True)
    output = (inputs @ weight).sum()
    weight.data = pool.nan(torch.float32).expand(2, 3)
    pool.let_go(flat)
    assert weight.isnan().all()
    fill()
    output.backward()
    assert inputs.grad is not None
    assert inputs.grad.tolist() == [[3.0, 12.0]] * 4


def test_a_fetch_is_there_after_its_wait_and_the_host_has_not_waited(pool: DevicePool, device: torch.device) -> None:
    """The copy is held up on its lane; only the current stream may be held up by it."""
    home = pool.host(MB, torch.float32).fill_(3.0)
    flat = pool.empty(MB, torch.float32)
    flat.zero_()
    pool.to_device.follow()
    pool.to_device.run(lambda: torch.cuda._sleep(CYCLES))
    arrival = pool.to_device.copy(flat, home)
    early = flat.sum(dtype=torch.float64)
    arrival.wait()
    reached = torch.cuda.Event()
    late = flat.sum(dtype=torch.float64)
    reached.record()
    assert not reached.query(), "the host has waited for the device"
    assert float(late) == 3.0 * MB
    assert float(early) == 0.0, "the computing has waited for a copy that it had not to wait for"


def test_a_lane_that_follows_writes_after_the_kernels_that_were_there(pool: DevicePool) -> None:
    home = pool.host(MB, torch.float32).fill_(3.0)
    flat = pool.empty(MB, torch.float32)
    flat.fill_(1.0)
    torch.cuda._sleep(CYCLES)
    read = flat.clone()
    pool.let_go(flat)
    pool.take_back(flat)  # the same block: the kernel above has yet to read it
    pool.to_device.follow()
    pool.to_device.copy(flat, home).wait()
    assert float(read.sum(dtype=torch.float64)) == 1.0 * MB
    assert float(flat.sum(dtype=torch.float64)) == 3.0 * MB


def test_a_gradient_outlives_its_copy_while_the_arrival_is_kept(pool: DevicePool, device: torch.device) -> None:
    host = pool.host(4 * MB, torch.float32).zero_()
    gradient = torch.full((4 * MB,), 5.0, device=device)
    held = torch.cuda.memory_allocated(device)
    pool.to_host.follow()
    pool.to_host.run(lambda: torch.cuda._sleep(CYCLES))
    arrival = pool.to_host.copy(host, gradient)
    del gradient
    gc.collect()
    assert torch.cuda.memory_allocated(device) == held, "the memory may be given to another while the copy runs"
    arrival.wait()
    # From here on the current stream is behind the copy, and has the memory again, at once.
    assert torch.cuda.memory_allocated(device) == held - 16 * MB
    torch.full((4 * MB,), 9.0, device=device)
    arrival.synchronize()
    assert float(host.sum(dtype=torch.float64)) == 5.0 * 4 * MB


def test_a_thread_of_the_host_waits_for_a_copy_and_sends_one_back(pool: DevicePool, device: torch.device) -> None:
    host, back = pool.host(MB, torch.float32).zero_(), pool.host(MB, torch.bfloat16)
    gradient = torch.full((MB,), 2.0, device=device)
    flat = pool.empty(MB, torch.float32)
    pool.to_host.follow()
    pool.to_device.follow()
    pool.to_host.run(lambda: torch.cuda._sleep(CYCLES))
    arrived = pool.to_host.copy(host, gradient)
    sent = []

    def step() -> None:
        arrived.synchronize()
        back.copy_(host * 2)
        sent.append(pool.to_device.copy(flat, back))

    thread = threading.Thread(target=step)
    thread.start()
    thread.join(60)
    sent[0].wait()
    assert float(flat.sum(dtype=torch.float64)) == 4.0 * MB


def test_a_lane_waits_for_another_without_the_host(pool: DevicePool, device: torch.device) -> None:
    host, flat, copied = pool.host(MB, torch.float32).fill_(1.0), *(pool.empty(MB, torch.float32) for _ in range(2))
    pool.to_device.follow()
    pool.gather.follow()
    pool.to_device.run(lambda: torch.cuda._sleep(CYCLES))
    came = pool.to_device.copy(flat, host)

    def then() -> None:
        came.wait()
        copied.copy_(flat)

    pool.gather.run(then).wait()
    assert float(copied.sum(dtype=torch.float64)) == 1.0 * MB


def test_code_runs_on_a_lane(pool: DevicePool, device: torch.device) -> None:
    outside = torch.cuda.current_stream(device)
    with pool.gather.running():
        assert torch.cuda.current_stream(device) != outside
    assert torch.cuda.current_stream(device) == outside


def test_a_budget_is_kept_and_a_full_device_is_torchs_error(device: torch.device) -> None:
    with device_pool(device, budget_bytes=MB) as pool:
        flat = pool.empty(MB, torch.uint8)
        with pytest.raises(OutOfMemoryError, match="budget"):
            pool.empty(1, torch.uint8)
        assert pool.holds(flat)
    with device_pool(device) as pool:
        with pytest.raises(torch.OutOfMemoryError):
            pool.empty(2**42, torch.float32)
        assert pool.owned_bytes == 0


def test_a_storage_that_gets_no_memory_stays_away(device: torch.device, pool: DevicePool) -> None:
    flat = pool.empty(4 * 2**30, torch.uint8)
    pool.let_go(flat)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**30 / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            pool.take_back(flat)
        assert not pool.holds(flat)
        assert pool.owned_bytes == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    pool.take_back(flat)
    assert pool.holds(flat)


def test_peaks_of_intervals_and_of_the_whole(device: torch.device, pool: DevicePool) -> None:
    peaks = PeakMemory(device)
    peaks.reset()
    peaks.interval_peak_bytes()
    base = peaks.read().device_bytes
    big = pool.empty(64 * MB, torch.uint8)
    pool.let_go(big)
    assert peaks.interval_peak_bytes() - base == 64 * MB
    small = pool.empty(16 * MB, torch.uint8)
    pool.let_go(small)
    assert peaks.interval_peak_bytes() - base == 16 * MB
    assert peaks.interval_peak_bytes() == base
    assert peaks.read().device_peak_bytes - base == 64 * MB
