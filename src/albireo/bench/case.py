"""One case: a system, a model, a batch, a precision; and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from albireo.errors import ConfigError
from albireo.training.metrics import finite_or_none

__all__ = ["OURS", "PEERS", "SYSTEMS", "Case", "CaseResult", "default_precision", "name_of"]

# Ours by name, and what each adds to the options of `albireo train`.
OURS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "albireo": {"plugin": "torch_ddp"},
        "torch_ddp": {"plugin": "torch_ddp"},
        "torch_ddp_fp16": {"plugin": "torch_ddp_fp16"},
        "low_level_zero": {"plugin": "low_level_zero"},
        "low_level_zero_offload": {"plugin": "low_level_zero", "cpu_offload": True},
        "gemini": {"plugin": "gemini"},
        "gemini_offload": {"plugin": "gemini", "offload_optim_frac": 1.0},
        "gemini_offload_all": {"plugin": "gemini", "offload_optim_frac": 1.0, "offload_param_frac": 1.0},
        "torch_fsdp": {"plugin": "torch_fsdp"},
        "torch_fsdp_offload": {"plugin": "torch_fsdp", "cpu_offload": True},
    }
)
_REFERENCES = ("plain", "ddp", "fsdp2", "accelerate")
_COMPILED = "_compiled"
# Those whose weights are fp32 and compute in fp32 where nothing is said; the others are made for 16 bits.
_IN_FP32 = frozenset({"albireo", "torch_ddp", "plain", "ddp", "accelerate"})
SYSTEMS = tuple(
    name + compiled
    for name in (*OURS, *_REFERENCES)
    for compiled in ("", _COMPILED)
    if not compiled or name in OURS or name == "fsdp2"
)
# Other people's ways, as their users run them.
PEERS = tuple(system for system in SYSTEMS if system.removesuffix(_COMPILED) in _REFERENCES)


def default_precision(system: str) -> str:
    """Return what a system computes in where nobody says: fp32 for plain data parallelism, else 16 bits.

    Args:
        system: one of `SYSTEMS`.
    """
    name = system.removesuffix(_COMPILED)
    if name == "torch_ddp_fp16":
        return "fp16"
    return "fp32" if name in _IN_FP32 else "bf16"


def name_of(case: Mapping[str, Any]) -> str:
    """Return what a person calls a case.

    Args:
        case: as `Case.mapping` has it, or a row; older ones lack recipe and adapter.
    """
    adapter = "" if case.get("adapter", "none") == "none" else f" {case['adapter']}"
    recipe, size, gpus = case.get("recipe", "opt"), case["batch_size"], case.get("gpus", 1)
    ranks = "" if gpus == 1 else f" on {gpus} ranks"
    return f"{case['system']} {recipe} {case['model']}{adapter} batch {size} {case['precision']}{ranks}"


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        system: one of our plugins by name ("albireo" is its plain one); or a reference: "plain" (a hand-written PyTorch
            loop with autocast), "ddp" (the same under DistributedDataParallel), "fsdp2" or "accelerate"; with "_compiled"
            behind it where blocks are compiled.
        model: a size of the recipe's family.
        batch_size: samples per rank and step.
        precision: "fp32", "fp16" or "bf16".
        sequence_length: tokens in a sample; nothing to the recipe vit.
        steps: steps that are timed.
        warmup: steps before them that are not.
        checkpointing: activation checkpointing.
        tf32: fp32 products in TF32, for every system alike.
        seed: decides the weights, and the tokens or the pictures.
        recipe: what is trained.
        adapter: "none", or another of the recipe's with its defaults.
        mem_cap: the most GB (2**30 bytes) of the device that the process may take, by the driver's count; 0: no bound.
        gpus: ranks, each with a GPU of its own where there are any.
    """

    system: str
    model: str
    batch_size: int
    precision: str
    sequence_length: int = 1024
    steps: int = 10
    warmup: int = 3
    checkpointing: bool = True
    tf32: bool = True
    seed: int = 42
    recipe: str = "opt"
    adapter: str = "none"
    mem_cap: float = 0.0
    gpus: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.system not in SYSTEMS:
            raise ConfigError(f"a system is one of {', '.join(SYSTEMS)}, not {self.system!r}")
        for name in ("batch_size", "sequence_length", "steps", "warmup", "gpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.system == "plain" and self.gpus > 1:
            raise ConfigError("plain is a loop of one process: measure ddp, which is the same over ranks")
        if self.ours is None and self.adapter not in ("none", "lora"):
            raise ConfigError(
                f"{self.system} knows the adapters none and lora, not {self.adapter!r}: measure ours with it"
            )
        if self.system.startswith("fsdp2") and self.precision == "fp16":
            raise ConfigError(f"{self.system} has no loss scale, and fp16 needs one: take bf16 or fp32")

    @property
    def compiled(self) -> bool:
        """The blocks are compiled."""
        return self.system.endswith(_COMPILED)

    @property
    def ours(self) -> Mapping[str, Any] | None:
        """The options that make it one of ours; None for a reference."""
        return OURS.get(self.system.removesuffix(_COMPILED))

    @property
    def plugin(self) -> str:
        """Albireo's plugin; the references have none."""
        return "" if self.ours is None else str(self.ours["plugin"])

    def samples_per_second(self, step_seconds: float) -> float:
        """Return how many samples a second steps of such a length come to, of all ranks."""
        return self.batch_size * self.gpus / step_seconds

    def tokens_per_second(self, step_seconds: float) -> float | None:
        """Return how many tokens a second steps of such a length come to, of all ranks; None for what has none."""
        return None if self.recipe == "vit" else self.samples_per_second(step_seconds) * self.sequence_length

    def mapping(self) -> dict[str, Any]:
        """Return the case as JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_mapping(values: Mapping[str, Any]) -> Case:
        """Return the case that `mapping` was made of."""
        return Case(**values)


@dataclass(frozen=True)
class CaseResult:
    """What a case came to.

    Attributes:
        case: what was measured.
        status: "ok", "out_of_memory" or "failed".
        error: what went wrong, in a line.
        step_seconds: the median step.
        step_seconds_min: the fastest step.
        step_seconds_max: the slowest step.
        samples_per_second: of all ranks, from the median step.
        tokens_per_second: of all ranks, from the median step; None for pictures.
        device_peak_bytes: most that was allocated on a device from the first step on; 0 on a CPU.
        device_reserved_peak_bytes: most that torch's allocator held.
        host_peak_bytes: the largest resident memory of a rank.
        moved_bytes: what crosses the bus between a device and the host in a step, as it was planned; None where nobody plans.
        memory_over_step: of a step of gemini's, moments: seconds since it began, bytes on the device, bytes on the host.
        first_loss: the loss of the first step.
        last_loss: the loss of the last step.
        model_tflops: 10**12 operations a second and device that the model's own products take: 6 a parameter and token,
            those of embeddings that are looked up included, recomputation not.
        rounds: how many rounds this is the median of.
        versions: of python, torch and transformers, and the device's name.
    """

    case: Case
    status: Literal["ok", "out_of_memory", "failed"]
    error: str = ""
    step_seconds: float | None = None
    step_seconds_min: float | None = None
    step_seconds_max: float | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    device_peak_bytes: int | None = None
    device_reserved_peak_bytes: int | None = None
    host_peak_bytes: int | None = None
    moved_bytes: int | None = None
    memory_over_step: list[list[float]] = dataclasses.field(default_factory=list)
    first_loss: float | None = None
    last_loss: float | None = None
    model_tflops: float | None = None
    rounds: int = 1
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return one flat row, as `bench.json` holds it."""
        values = dataclasses.asdict(self)
        case = values.pop("case")
        # Strict JSON has no word for a loss that is not finite.
        finite = {name: finite_or_none(value) if isinstance(value, float) else value for name, value in values.items()}
        return {**case, "plugin": self.case.plugin, **finite}
