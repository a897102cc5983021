import pytest
import torch

from albireo.device.probe_copies import measure_device_copies, measure_host_copy

MB = 2**20


def test_the_hosts_rate_is_one_that_memory_can_have() -> None:
    rate = measure_host_copy(seconds=0.05)
    assert rate.block_bytes == 256 * MB
    assert rate.threads == torch.get_num_threads()
    # From the slowest shared machine to the fastest server.
    assert 1e8 < rate.bytes_per_second < 2e12


def test_little_memory_means_small_blocks() -> None:
    assert measure_host_copy(seconds=0.01, available_bytes=600 * MB).block_bytes == 64 * MB
    assert measure_host_copy(seconds=0.01, available_bytes=0).block_bytes == 16 * MB


@pytest.mark.gpu
def test_a_gpus_rates_are_in_the_order_that_hardware_has() -> None:
    rates = measure_device_copies(torch.device("cuda", 0), seconds=0.3)
    pinned = rates.host_to_device_pinned_bytes_per_second
    assert 1e9 < rates.host_to_device_unpinned_bytes_per_second < 1.2 * pinned
    assert pinned < 1e12
    assert 1e9 < rates.device_to_host_pinned_bytes_per_second < 1e12
    # Both directions share less than all of what each has alone.
    assert rates.both_ways_pinned_bytes_per_second < 1.1 * (pinned + rates.device_to_host_pinned_bytes_per_second)
    assert rates.both_ways_pinned_bytes_per_second > 0.8 * pinned
    assert 2 * pinned < rates.within_device_bytes_per_second < 1e13
