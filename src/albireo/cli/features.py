"""What of Albireo works on a machine, from what was found out about it. Nothing is tried here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from albireo.device.probe import GpuFacts, MachineFacts
    from albireo.distributed.probe import AllReduceCheck

__all__ = ["Feature", "Findings", "list_features"]


@dataclass(frozen=True)
class Feature:
    """One thing that Albireo can do.

    Attributes:
        name: what.
        status: "ok"; "missing": not on this machine, and that is no fault; "failed": it should work and does not;
            "skipped": nobody asked.
        why: the reason, or what it rests on.
    """

    name: str
    status: Literal["ok", "missing", "failed", "skipped"]
    why: str


@dataclass(frozen=True)
class Findings:
    """What was found out.

    Attributes:
        machine: the system and the libraries.
        gpus: those that torch can use.
        no_gpu_reason: why there is none; empty if there is.
        steps: what went wrong with a step of training, by device type and precision; None: nothing.
        all_reduces: sums over ranks that were tried.
        rates: FLOP per second of matrix products, by device type and kind.
        hub_problem: why the hub cannot be reached; empty if it can; None if nobody asked.
        problems: what could not be measured, and why.
    """

    machine: MachineFacts
    gpus: Sequence[GpuFacts] = ()
    no_gpu_reason: str = ""
    steps: Mapping[tuple[str, str], str | None] = field(default_factory=dict)
    all_reduces: Sequence[AllReduceCheck] = ()
    rates: Mapping[tuple[str, str], float] = field(default_factory=dict)
    hub_problem: str | None = None
    problems: Sequence[str] = ()


def list_features(found: Findings) -> list[Feature]:
    """Return what works, what does not, and why.

    Args:
        found: what was found out.
    """
    return [
        _training(found, "cpu", "train on the CPU"),
        _training(found, "cuda", "train on a GPU"),
        _bf16(found),
        _fp16(found),
        _ranks(found),
        _several_gpus(found),
        _compile(found),
        _transformers(found),
        _adapters(found),
        _datasets(found),
        _hub(found),
        *(Feature("measuring", "failed", problem) for problem in found.problems),
    ]


def _training(found: Findings, device: str, name: str) -> Feature:
    if (device, "fp32") not in found.steps:
        return Feature(name, "missing", found.no_gpu_reason)
    problem = found.steps[device, "fp32"]
    if problem is not None:
        return Feature(name, "failed", problem)
    what = f"{found.machine.threads} threads" if device == "cpu" else ", ".join(gpu.name for gpu in found.gpus)
    return Feature(name, "ok", what)


def _bf16(found: Findings) -> Feature:
    if not found.gpus:
        return _on_cpu(found, "bf16")
    gpu = found.gpus[0]
    if not gpu.has_native_bf16:
        why = f"{gpu.name} (compute capability {gpu.compute_capability}) has no bf16 in hardware: --precision fp16"
        return Feature("bf16", "missing", why)
    return _on_gpu(found, "bf16")


def _fp16(found: Findings) -> Feature:
    return _on_gpu(found, "fp16") if found.gpus else _on_cpu(found, "fp16")


def _on_gpu(found: Findings, kind: str) -> Feature:
    problem = found.steps.get(("cuda", kind))
    return Feature(kind, "ok", "on the GPU") if problem is None else Feature(kind, "failed", problem)


def _on_cpu(found: Findings, kind: str) -> Feature:
    problem = found.steps.get(("cpu", kind))
    if problem is not None:
        return Feature(kind, "failed", problem)
    mine, plain = (found.rates.get(("cpu", name)) for name in (kind, "fp32"))
    if mine is None or plain is None:
        return Feature(kind, "ok", "on the CPU")
    ratio = f"{mine / plain:.1f} times as fast as" if mine >= plain else f"{plain / mine:.1f} times slower than"
    return Feature(kind, "ok", f"on the CPU, where its products are {ratio} those of fp32")


def _ranks(found: Findings) -> Feature:
    name = "several ranks"
    for check in found.all_reduces:
        if check.backend == "gloo":
            return Feature(name, "ok", f"gloo, {check.ranks} ranks") if check.ok else Feature(name, "failed", check.why)
    if not found.machine.has_gloo:
        return Feature(name, "failed", f"this torch {found.machine.torch} is built without gloo")
    return Feature(name, "skipped", "not tried")


def _several_gpus(found: Findings) -> Feature:
    name = "several GPUs"
    tried = next((check for check in found.all_reduces if check.backend == "nccl"), None)
    if tried is not None and not tried.ok:
        return Feature(name, "failed", tried.why)
    if len(found.gpus) < 2:
        single = f"there is one; NCCL {found.machine.nccl} works with it" if tried is not None else "there is one"
        return Feature(name, "missing", single if found.gpus else found.no_gpu_reason)
    if tried is None:
        return Feature(name, "failed", f"this torch {found.machine.torch} is built without NCCL")
    return Feature(name, "ok", f"NCCL {found.machine.nccl}, {tried.ranks} ranks")


def _compile(found: Findings) -> Feature:
    if found.gpus:
        if found.machine.triton is None:
            return Feature("--compile", "missing", "triton is not installed: pip install triton")
        return Feature("--compile", "ok", f"triton {found.machine.triton}")
    if found.machine.compiler is None:
        return Feature(
            "--compile", "missing", "on a CPU torch.compile needs a C++ compiler, such as g++: there is none"
        )
    return Feature("--compile", "ok", found.machine.compiler)


def _transformers(found: Findings) -> Feature:
    version = found.machine.transformers
    if version is None:
        return Feature("models", "failed", "transformers is not installed: pip install 'transformers>=5.17,<6'")
    return Feature("models", "ok", f"transformers {version}")


def _adapters(found: Findings) -> Feature:
    version = found.machine.peft
    if version is None:
        return Feature("adapters", "missing", "peft is not installed: pip install 'albireo[adapters]'")
    return Feature("adapters", "ok", f"peft {version}")


def _datasets(found: Findings) -> Feature:
    version = found.machine.datasets
    if version is None:
        return Feature("data sets of the hub", "missing", "datasets is not installed: pip install 'albireo[hub]'")
    return Feature("data sets of the hub", "ok", f"datasets {version}")


def _hub(found: Findings) -> Feature:
    if found.hub_problem is None:
        return Feature("hub reachable", "skipped", "not asked; --hub asks")
    return Feature("hub reachable", "missing" if found.hub_problem else "ok", found.hub_problem)
