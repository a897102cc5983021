"""What this machine is: its system, its libraries, its GPUs. Nothing is measured here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from albireo.device.cores import usable_cores

__all__ = ["GpuFacts", "MachineFacts", "probe_gpus", "probe_machine", "reason_for_no_gpu"]


@dataclass(frozen=True)
class MachineFacts:
    """The system and the libraries. A version that is None is not there.

    Attributes:
        system: name and version of the operating system.
        python: version of Python.
        processor: name of the processor.
        logical_cores: processors that the system counts.
        usable_cores: cores that this process may really compute on.
        threads: threads that torch computes with in this process.
        torch: version.
        transformers: version.
        datasets: version.
        triton: version.
        cuda: version of CUDA that torch was built with.
        driver: version of NVIDIA's driver.
        nccl: version that torch brings along.
        has_gloo: torch can speak between processes on the host.
        compiler: path of a C++ compiler, which torch.compile needs for a CPU.
        peft: version.
    """

    system: str
    python: str
    processor: str
    logical_cores: int
    usable_cores: int
    threads: int
    torch: str
    transformers: str | None
    datasets: str | None
    triton: str | None
    cuda: str | None
    driver: str | None
    nccl: str | None
    has_gloo: bool
    compiler: str | None
    peft: str | None = None


@dataclass(frozen=True)
class GpuFacts:
    """One GPU.

    Attributes:
        index: torch's number of it.
        name: what its maker calls it.
        total_bytes: all of its memory.
        free_bytes: what no process has taken.
        compute_capability: such as "9.0".
        has_native_bf16: it multiplies bf16 matrices in hardware.
    """

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: str
    has_native_bf16: bool


def probe_machine(root: Path = Path("/")) -> MachineFacts:
    """Return what there is.

    Args:
        root: where `proc` and `sys` are; another one in tests.
    """
    distributed = torch.distributed.is_available()
    return MachineFacts(
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=platform.python_version(),
        processor=_processor(root),
        logical_cores=os.cpu_count() or 1,
        usable_cores=usable_cores(root),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        transformers=_version("transformers"),
        datasets=_version("datasets"),
        peft=_version("peft"),
        triton=_version("triton"),
        cuda=torch.version.cuda,
        driver=_driver(root),
        nccl=_nccl() if distributed and torch.distributed.is_nccl_available() else None,
        has_gloo=distributed and torch.distributed.is_gloo_available(),
        compiler=shutil.which("g++") or shutil.which("clang++") or shutil.which("c++"),
    )


def probe_gpus() -> list[GpuFacts]:
    """Return the GPUs that torch can use.

    Raises:
        RuntimeError: one that is there cannot be used, for instance since another process has it for itself.
    """
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        gpus.append(
            GpuFacts(
                index=index,
                name=properties.name,
                total_bytes=int(properties.total_memory),
                free_bytes=int(free),
                compute_capability=f"{properties.major}.{properties.minor}",
                has_native_bf16=properties.major >= 8,
            )
        )
    return gpus


def reason_for_no_gpu(machine: MachineFacts) -> str:
    """Say why torch can use no GPU, as far as it can be told.

    Args:
        machine: what `probe_machine` returned.
    """
    if machine.driver is None:
        return "there is no NVIDIA driver on this machine"
    if machine.cuda is None:
        return f"the driver {machine.driver} is there, but this torch {machine.torch} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    return "torch counts no GPU; CUDA_VISIBLE_DEVICES may hide them"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor(root: Path) -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", (root / "proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _driver(root: Path) -> str | None:
    # The kernel's module says it itself; asking nvidia-smi would start a process that may hang with a sick GPU.
    try:
        match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", (root / "proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return match.group(1) if match else None


def _nccl() -> str:
    version: object = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(str(part) for part in version) if isinstance(version, tuple) else str(version)
