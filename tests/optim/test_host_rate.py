from __future__ import annotations

import threading

import pytest

from albireo.optim import HybridAdam, host_rate, measure_host_adam, stepper_threads
from albireo.optim.host_stepper import HostStepper, usable_cores


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_rate, "HostStepper", lambda of: HostStepper(of, compiled=False))


def test_the_rate_is_one_that_memory_can_have() -> None:
    before = set(threading.enumerate())
    rate = measure_host_adam(seconds=0.05, parameters=2**20)
    assert rate.parameters == 2**20
    assert (rate.threads, rate.kernel) == (stepper_threads(usable_cores()), "torch")
    assert rate.parameters_per_second == pytest.approx(rate.parameters / rate.step_seconds)
    # 28 bytes move for each parameter, or none where all of it stays in a cache.
    assert 1e6 < rate.parameters_per_second < 1e12
    assert set(threading.enumerate()) == before


def test_little_memory_means_fewer_parameters() -> None:
    assert measure_host_adam(seconds=0.01, available_bytes=100 * 2**20).parameters == 2 * 2**20


def test_what_is_timed_is_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[HybridAdam] = []

    def keep(*arguments: object) -> HybridAdam:
        made.append(HybridAdam(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(host_rate, "HybridAdam", keep)
    measure_host_adam(seconds=0.0, parameters=2**20)
    (state,) = made[0].state.values()
    # One that does not count, and three.
    assert state["step"] == 4.0
    assert state["exp_avg"].count_nonzero() == 2**20
