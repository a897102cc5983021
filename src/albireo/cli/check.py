"""`albireo check`: what this machine has, how fast it is, and what of Albireo will work on it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from albireo import __version__
from albireo.cli.check_hub import hub_problem
from albireo.cli.check_table import (
    as_gb,
    print_all_reduce,
    print_copies,
    print_features,
    print_gpus,
    print_machine,
    print_matmul,
    print_memory,
    print_row,
    print_section,
    print_touched,
)
from albireo.cli.features import Findings, list_features
from albireo.config import user_path
from albireo.errors import ConfigError

if TYPE_CHECKING:
    from albireo.device.probe import GpuFacts, MachineFacts
    from albireo.device.probe_memory import HostMemoryReading
    from albireo.device.probe_rates import MatmulRate
    from albireo.device.probe_touch import TouchReport
    from albireo.distributed.probe import AllReduceCheck

__all__ = ["check"]

_EPILOG = """
\b
Examples:
  albireo check --quick
  albireo check --json check.json --hub
  albireo check --touch 64    is there really that much memory?
"""

_Result = TypeVar("_Result")


@click.command("check", context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.option("--quick", is_flag=True, help="Measure for a moment only.")
@click.option("--json", "json_file", metavar="FILE", help="Write all of it to a file as well.")
@click.option(
    "--touch",
    "touch_gb",
    type=click.FloatRange(min=0, max=2**20, min_open=True),
    metavar="GB",
    help="Really touch so much of the host's memory; stops before that would harm anybody.",
)
@click.option("--hub", is_flag=True, help="Ask whether the hub can be reached.")
def check(quick: bool, json_file: str | None, touch_gb: float | None, hub: bool) -> int:
    """Show what this machine has, how fast it is, and what of Albireo works on it.

    The exit code is 1 if something that should work here does not.
    """
    if touch_gb is not None and not touch_gb > 0:  # which no comparison with a NaN is
        raise ConfigError(f"--touch takes a number of GB above 0, not {touch_gb}")
    target = None if json_file is None else _writable(user_path("--json", json_file))
    start = time.monotonic()
    report = _Check(seconds=0.1 if quick else 0.6).run(touch_gb=touch_gb, hub=hub)
    report = {"albireo": __version__, "quick": quick, "seconds": time.monotonic() - start, **report}
    if target is not None:
        try:
            target.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {target} cannot be written: {error.strerror}") from error
    return 0 if report["passed"] else 1


class _Check:
    """One check: measures, prints as it goes, and keeps what it found.

    Args:
        seconds: about how long each rate is measured.
    """

    def __init__(self, *, seconds: float) -> None:
        self._seconds = seconds
        self._problems: list[str] = []

    def run(self, *, touch_gb: float | None, hub: bool) -> dict[str, Any]:
        """Return all that was found, as JSON values."""
        from albireo.device.probe import probe_gpus, probe_machine, reason_for_no_gpu

        machine = probe_machine()
        print_machine(machine)
        memory, touched = self._host_memory(touch_gb)
        gpus = self._attempt("the GPUs", probe_gpus) or []
        no_gpu_reason = "" if gpus else reason_for_no_gpu(machine)
        print_gpus(gpus, no_gpu_reason)
        all_reduces = self._all_reduces(machine, gpus)
        rates = self._rates(memory, gpus)
        matmuls: list[dict[str, Any]] = rates["matmul"]
        found = Findings(
            machine=machine,
            gpus=gpus,
            no_gpu_reason=no_gpu_reason,
            steps=_try_steps(gpus),
            all_reduces=all_reduces,
            rates={(rate["device"].partition(":")[0], rate["kind"]): rate["flops_per_second"] for rate in matmuls},
            hub_problem=hub_problem() if hub else None,
            problems=self._problems,
        )
        features = list_features(found)
        print_features(features)
        return {
            "passed": not any(feature.status == "failed" for feature in features),
            "machine": asdict(machine),
            "host_memory": {**asdict(memory), "touched": None if touched is None else asdict(touched)},
            "gpus": [asdict(gpu) for gpu in gpus],
            "communication": [asdict(one) for one in all_reduces],
            "rates": rates,
            "features": [asdict(feature) for feature in features],
        }

    def _attempt(self, what: str, measure: Callable[[], _Result]) -> _Result | None:
        """Measure; what cannot be measured is said, and the rest goes on."""
        try:
            return measure()
        except (RuntimeError, OSError, MemoryError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._problems.append(f"{what}: {reason}")
            print_row(what, f"could not be measured: {reason}")
            return None

    def _host_memory(self, touch_gb: float | None) -> tuple[HostMemoryReading, TouchReport | None]:
        from albireo.device.probe_memory import probe_host_memory
        from albireo.device.probe_touch import touch_pages

        memory = probe_host_memory()
        print_memory(memory)
        if touch_gb is None:
            return memory, None
        touched = self._attempt("touched", lambda: touch_pages(int(touch_gb * 2**30)))
        if touched is not None:
            print_touched(touched)
        return memory, touched

    def _all_reduces(self, machine: MachineFacts, gpus: list[GpuFacts]) -> list[AllReduceCheck]:
        from albireo.distributed.probe import check_all_reduce

        wanted = [("gloo", 2)] if machine.has_gloo else []
        if gpus and machine.nccl is not None:
            wanted.append(("nccl", len(gpus)))
        print_section("Sums over ranks")
        checks = []
        for backend, ranks in wanted:
            checks.append(check_all_reduce(backend, ranks))
            print_all_reduce(checks[-1])
        return checks

    def _rates(self, memory: HostMemoryReading, gpus: list[GpuFacts]) -> dict[str, Any]:
        import torch

        from albireo.device.probe_copies import measure_device_copies, measure_host_copy
        from albireo.optim import measure_host_adam

        print_section("Rates")
        seconds, available = self._seconds, _available_bytes(memory)
        copy = self._attempt("host copy", lambda: measure_host_copy(seconds=seconds, available_bytes=available))
        if copy is not None:
            print_row("host copy", f"{as_gb(copy.bytes_per_second)}/s, {copy.threads} threads")
        adam = self._attempt(
            "host Adam",
            lambda: measure_host_adam(
                seconds=seconds, parameters=(8 if seconds < 0.5 else 32) * 2**20, available_bytes=available
            ),
        )
        if adam is not None:
            print_row(
                "host Adam, bf16",
                f"{adam.parameters_per_second / 1e9:.2f} G parameters/s, {adam.threads} threads, {adam.kernel} kernel",
            )
        copies = None
        if gpus:
            copies = self._attempt(
                "GPU copies", lambda: measure_device_copies(torch.device("cuda", 0), seconds=seconds)
            )
            if copies is not None:
                print_copies(copies)
        return {
            "host_copy": None if copy is None else asdict(copy),
            "host_adam": None if adam is None else asdict(adam),
            "device_copies": None if copies is None else asdict(copies),
            "matmul": [asdict(rate) for rate in self._matmuls(gpus)],
        }

    def _matmuls(self, gpus: list[GpuFacts]) -> Iterable[MatmulRate]:
        import torch

        from albireo.device.probe_rates import measure_matmul

        cases = [(torch.device("cpu"), kind) for kind in ("fp32", "bf16", "fp16")]
        if gpus:
            cases = [(torch.device("cuda", 0), kind) for kind in ("fp32", "tf32", "bf16", "fp16")]
        for device, kind in cases:
            name = f"{kind} matrix product"
            rate = self._attempt(name, partial(measure_matmul, device, kind, seconds=self._seconds / 2))
            if rate is not None:
                print_matmul(rate)
                yield rate


def _try_steps(gpus: list[GpuFacts]) -> dict[tuple[str, str], str | None]:
    import torch

    from albireo.device.probe_rates import try_training_step

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    devices = [torch.device("cpu"), *([torch.device("cuda", 0)] if gpus else [])]
    return {
        (device.type, kind): try_training_step(device, dtype) for device in devices for kind, dtype in kinds.items()
    }


def _available_bytes(memory: HostMemoryReading) -> int | None:
    """Return what measuring may use."""
    known = [] if memory.available_bytes is None else [memory.available_bytes]
    if memory.cgroup_limit_bytes is not None and memory.cgroup_used_bytes is not None:
        known.append(max(0, memory.cgroup_limit_bytes - memory.cgroup_used_bytes))
    return min(known, default=None)


def _writable(path: Path) -> Path:
    """Find out now what would otherwise be found out after everything was measured.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"--json {path} is a folder; give a file's name")
    if not path.parent.is_dir():
        raise ConfigError(f"--json {path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--json {path} must not be written by this user; give another place")
    return path
