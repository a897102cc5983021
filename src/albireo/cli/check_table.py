"""How `albireo check` prints what it found: sections of rows, each as soon as it is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from albireo.cli.features import Feature

if TYPE_CHECKING:
    from albireo.device.probe import GpuFacts, MachineFacts
    from albireo.device.probe_copies import DeviceCopyRates
    from albireo.device.probe_memory import HostMemoryReading
    from albireo.device.probe_rates import MatmulRate
    from albireo.device.probe_touch import TouchReport
    from albireo.distributed.probe import AllReduceCheck

__all__ = [
    "as_gb",
    "print_all_reduce",
    "print_copies",
    "print_features",
    "print_gpus",
    "print_machine",
    "print_matmul",
    "print_memory",
    "print_row",
    "print_section",
    "print_touched",
]

_NAME_WIDTH = 26
_STATUSES = {
    "ok": ("ok", "green"),
    "missing": ("not here", "yellow"),
    "failed": ("FAILED", "red"),
    "skipped": ("-", ""),
}


def print_section(title: str) -> None:
    """Begin a section."""
    click.echo()
    click.secho(title, bold=True)


def print_row(name: str, value: str) -> None:
    """Print one row."""
    click.echo(f"  {name:<{_NAME_WIDTH}}{value}")


def as_gb(count: float | None) -> str:
    """Return bytes for people; 1 GB is 2**30 bytes."""
    return "unknown" if count is None else f"{count / 2**30:.1f} GB"


def print_matmul(rate: MatmulRate) -> None:
    """Print how fast matrices are multiplied."""
    place = "CPU" if rate.device == "cpu" else "GPU"
    unit, name = (1e12, "TFLOP/s") if rate.flops_per_second >= 1e12 else (1e9, "GFLOP/s")
    value = f"{rate.flops_per_second / unit:.3g} {name}, {rate.size} x {rate.size}"
    print_row(f"{rate.kind} matrix product, {place}", value)


def print_machine(machine: MachineFacts) -> None:
    """Print system and libraries."""
    click.secho("Machine", bold=True)
    print_row("system", machine.system)
    print_row("processor", machine.processor)
    cores = (
        f"{machine.usable_cores} usable of {machine.logical_cores} processors; torch takes {machine.threads} threads"
    )
    print_row("cores", cores)
    print_row("Python", machine.python)
    print_row("torch", machine.torch)
    print_row("transformers", machine.transformers or "not installed")
    print_row("CUDA", f"{machine.cuda or 'not in this torch'}; driver: {machine.driver or 'none'}")


def print_memory(memory: HostMemoryReading) -> None:
    """Print the host's memory."""
    print_section("Host memory")
    limit = f", the limit of the {memory.limited_by}" if memory.limited_by else ""
    print_row("usable", as_gb(memory.usable_bytes) + limit)
    print_row("MemTotal, MemAvailable", f"{as_gb(memory.total_bytes)}, {as_gb(memory.available_bytes)}")
    if memory.cgroup_limit_bytes is not None:
        print_row("cgroup", f"{as_gb(memory.cgroup_used_bytes)} used of {as_gb(memory.cgroup_limit_bytes)}")


def print_touched(touched: TouchReport) -> None:
    """Print what came of touching pages."""
    more = "" if touched.ended == "all" else f"; {touched.ended}: {touched.why}"
    value = f"{as_gb(touched.touched_bytes)} of {as_gb(touched.asked_bytes)} in {touched.seconds:.1f} s{more}"
    print_row("touched", value)
    if touched.total_after_bytes != touched.total_before_bytes:
        print_row(
            "MemTotal meanwhile", f"{as_gb(touched.total_before_bytes)} became {as_gb(touched.total_after_bytes)}"
        )


def print_gpus(gpus: Sequence[GpuFacts], no_gpu_reason: str) -> None:
    """Print the GPUs, or why there is none."""
    print_section("GPUs")
    for gpu in gpus:
        bf16 = "bf16 in hardware" if gpu.has_native_bf16 else "no bf16 in hardware"
        memory = f"{as_gb(gpu.free_bytes)} free of {as_gb(gpu.total_bytes)}"
        print_row(f"GPU {gpu.index}", f"{gpu.name}, {memory}, compute capability {gpu.compute_capability}, {bf16}")
    if not gpus:
        print_row("none", no_gpu_reason)


def print_all_reduce(check: AllReduceCheck) -> None:
    """Print how a sum over ranks went."""
    speed = "" if check.bytes_per_second is None else f", then {as_gb(check.bytes_per_second)}/s"
    value = f"right; the first after {check.start_seconds:.1f} s{speed}" if check.ok else f"FAILED: {check.why}"
    print_row(f"{check.backend}, {check.ranks} rank{'s' if check.ranks > 1 else ''}", value)


def print_copies(copies: DeviceCopyRates) -> None:
    """Print how fast bytes move to, from and within a GPU."""
    rows = {
        "host to GPU, pinned": copies.host_to_device_pinned_bytes_per_second,
        "host to GPU, unpinned": copies.host_to_device_unpinned_bytes_per_second,
        "GPU to host, pinned": copies.device_to_host_pinned_bytes_per_second,
        "both at once, pinned": copies.both_ways_pinned_bytes_per_second,
        "within the GPU": copies.within_device_bytes_per_second,
    }
    for name, rate in rows.items():
        print_row(name, f"{as_gb(rate)}/s")


def print_features(features: Sequence[Feature]) -> None:
    """Print what works."""
    print_section("What works here")
    for feature in features:
        word, color = _STATUSES[feature.status]
        status = click.style(f"{word:<10}", fg=color or None)
        click.echo(f"  {feature.name:<{_NAME_WIDTH}}{status}{feature.why}".rstrip())
