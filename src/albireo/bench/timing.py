"""Steps timed one by one on the device's clock, without a wait between them that training would not have."""

from __future__ import annotations

import itertools
import platform
import statistics
from collections.abc import Callable

import torch
import transformers

from albireo.bench.case import Case, CaseResult
from albireo.device import Moment, PeakMemory, PeakReading, describe_device
from albireo.distributed import World

__all__ = ["result_of", "time_steps", "versions"]


def time_steps(case: Case, world: World, step: Callable[[int], torch.Tensor]) -> CaseResult:
    """Run warm-up steps, then timed ones, and return what was measured.

    Args:
        case: how many of each.
        world: the ranks that run it.
        step: makes one step, given its number from 0, and returns its mean loss on the device.
    """
    device = world.device
    peaks = PeakMemory(device)
    peaks.reset()
    marks = [Moment(device)]
    losses: list[torch.Tensor] = []
    for number in range(case.warmup + case.steps):
        losses.append(step(number))
        marks.append(Moment(device))
    marks[-1].wait()
    seconds = [later.seconds_since(earlier) for earlier, later in itertools.pairwise(marks)]
    return result_of(case, world, seconds[case.warmup :], [float(loss) for loss in losses], peaks.read())


def result_of(case: Case, world: World, seconds: list[float], losses: list[float], peaks: PeakReading) -> CaseResult:
    """Return the result of timed steps; called by all ranks.

    Args:
        case: the case.
        world: the ranks that ran it.
        seconds: of each timed step, on this rank.
        losses: of every step.
        peaks: of memory, by whoever ran the steps: torch's own counters may have been started anew among them.
    """
    median = statistics.median(seconds)
    # The same on all ranks: the longest, and the most.
    told = world.gather_numbers(
        [
            median,
            *(
                float(number)
                for number in (peaks.device_peak_bytes, peaks.device_reserved_peak_bytes, peaks.host_peak_bytes)
            ),
        ]
    )
    median, *most = (max(column) for column in zip(*told, strict=True))
    device_peak, reserved_peak, host_peak = (int(number) for number in most)
    return CaseResult(
        case=case,
        status="ok",
        step_seconds=median,
        step_seconds_min=min(seconds),
        step_seconds_max=max(seconds),
        samples_per_second=case.samples_per_second(median),
        tokens_per_second=case.tokens_per_second(median),
        device_peak_bytes=device_peak,
        device_reserved_peak_bytes=reserved_peak,
        host_peak_bytes=host_peak,
        first_loss=losses[0],
        last_loss=losses[-1],
        versions=versions(world.device),
    )


def versions(device: torch.device) -> dict[str, str]:
    """Return what ran: the versions, and the device's name."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": describe_device(device),
    }
