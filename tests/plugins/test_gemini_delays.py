"""Copies and host steps that take random times, on threads of their own: what runs beside the computing changes no bit.

Elsewhere lanes run as late as they may, on the thread that waits, which finds a wait that is missing. Here they run at any
moment, as on a GPU, which finds what must not run beside something else.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gemini_runs import boosted, gemini, left, train

from albireo.device.lanes import Arrival
from albireo.device.simulated_lane import SimulatedLane
from albireo.memory import streamed_steps
from albireo.optim import host_stepper
from albireo.optim.host_kernel import TorchKernel
from albireo.optim.host_step import HostStep

WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "stepped as gradients arrive": ({"offload_optim_frac": 1.0, "offload_param_frac": 1.0}, 0.0),
    "stepped beside the next forward": ({"offload_optim_frac": 1.0, "offload_param_frac": 0.5}, 0.5),
    "host and stream": ({"offload_optim_frac": 1.0, "offload_param_frac": 0.5, "stream_optim_frac": 0.5}, 0.5),
    "all three places": ({"offload_optim_frac": 0.7, "offload_param_frac": 1.0, "stream_optim_frac": 0.4}, 0.5),
}


class Restless:
    """Runs what is on any lane, when it likes.

    Args:
        seed: of what it likes.

    Attributes:
        errors: what has been raised by what it ran.
        ran: how often it ran something.
    """

    def __init__(self, seed: int) -> None:
        self.errors: list[BaseException] = []
        self.ran = 0
        self._lanes: weakref.WeakSet[SimulatedLane] = weakref.WeakSet()
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(seed + n,), daemon=True) for n in range(2)]
        for thread in self._threads:
            thread.start()

    def add(self, lane: SimulatedLane) -> None:
        self._lanes.add(lane)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _work(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stopped.is_set():
            time.sleep(chance.random() ** 3 * 1e-3)
            for lane in chance.sample(list(self._lanes), len(self._lanes)):
                with lane._changed:
                    pending = list(lane._queue)
                if pending and chance.random() < 0.5:
                    try:
                        lane._run_until(chance.choice(pending))
                        self.ran += 1
                    except BaseException as error:  # noqa: BLE001  raised by the test
                        self.errors.append(error)


class SlowKernel(TorchKernel):
    """Takes its time before each step."""

    def __init__(self, threads: int, chance: random.Random) -> None:
        super().__init__(threads)
        self._chance = chance

    def submit(self, step: HostStep) -> None:
        time.sleep(self._chance.random() ** 3 * 1e-3)
        super().submit(step)


@contextmanager
def random_times(seed: int) -> Iterator[Restless]:
    """Have lanes and host steps take random times; what was raised beside the test is raised in the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    restless = Restless(seed)
    plain = SimulatedLane.__init__

    def made(lane: SimulatedLane) -> None:
        plain(lane)
        restless.add(lane)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SimulatedLane, "__init__", made)
            patch.setattr(host_stepper, "choose_kernel", lambda threads, **_: SlowKernel(threads, random.Random(seed)))
            yield restless
    finally:
        restless.stop()
        torch.set_num_threads(threads)
    assert restless.errors == []


def outcome(options: dict[str, Any], clip: float, steps: int) -> dict[str, Any]:
    run = boosted(gemini(precision="bf16", **options), "opt")
    return {"numbers": train(run, "opt", range(steps), clip=clip), "left": left(run)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("steps", [15, pytest.param(1000, marks=pytest.mark.full)])
def test_random_times_change_no_bit(way: str, steps: int) -> None:
    options, clip = WAYS[way]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted = outcome(options, clip, steps)
    torch.set_num_threads(threads)
    for seed in range(2 if steps > 100 else 1):
        with random_times(seed) as restless:
            got = outcome(options, clip, steps)
            # Some of it ran before anybody waited.
            assert restless.ran > steps
        assert got == wanted, seed


def test_a_wait_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    options, clip = WAYS["host and stream"]
    wanted = outcome(options, clip, 10)
    plain = streamed_steps._copy_all

    def copy_all(lane: Any, after: Any, pairs: Any, kind: str, chunk: Any) -> Arrival:
        # States leave without having been stepped, now and then.
        return plain(lane, [] if kind == "states out" else after, pairs, kind, chunk)

    monkeypatch.setattr(streamed_steps, "_copy_all", copy_all)
    with random_times(0):
        got = outcome(options, clip, 10)
    assert got != wanted
