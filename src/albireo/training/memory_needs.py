"""What a run needs of memory before it starts, and what took it when it ran out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from albireo.config import RunConfig
from albireo.errors import OutOfMemoryError
from albireo.training.memory_use import MemoryUse
from albireo.training.state_bytes import Memory, needs_of

__all__ = [
    "MemoryUse",
    "advice",
    "check_states_fit",
    "explain_out_of_memory",
    "explain_out_of_memory_at_start",
    "is_out_of_memory",
]

_WORDS_OF_FAILED_ALLOCATIONS = ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED")


def check_states_fit(
    parameters: int,
    *,
    available_bytes: int | None,
    where: str,
    config: RunConfig,
    memory: Memory = "one",
    trained: int | None = None,
) -> None:
    """Refuse a run whose weights, gradients and optimizer states alone cannot fit.

    Args:
        parameters: how many the model has.
        available_bytes: the memory that there is for one rank, or None if nobody knows.
        where: whose memory it is, for the message.
        config: the run.
        memory: which one it is: a device's, the host's beside it, or one that is both.
        trained: how many of the parameters are trained; all if None.

    Raises:
        OutOfMemoryError: they cannot.
    """
    share = 1.0 if trained is None else trained / parameters
    each = needs_of(config).bytes_per_parameter(memory, share)
    needed = math.ceil(parameters * each)
    if available_bytes is None or needed <= available_bytes:
        return
    raise OutOfMemoryError(
        f"--model {config.model.model} with {_flags_of(config)} needs {_gb(needed)} for weights, gradients "
        f"and optimizer states ({round(each, 2):g} bytes for each of {parameters:,} parameters), and {where} "
        f"{_gb(available_bytes)}: {_what_fits(parameters, available_bytes, config, memory, share)}"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that an allocation failed, on the device or on the host."""
    import torch

    # The driver, cuBLAS and NCCL allocate for themselves, and have no type of error for it.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS_OF_FAILED_ALLOCATIONS)
    )


def explain_out_of_memory(use: MemoryUse, config: RunConfig, *, where: str) -> OutOfMemoryError:
    """Return the error that names what took the memory, and the flag that helps.

    Args:
        use: who holds it.
        config: the run.
        where: what ran out, for the message.
    """
    parts = {
        "weights": use.weights,
        "gradients": use.gradients,
        "optimizer states": use.states,
        "activations": use.activations,
        "logits": use.logits,
    }
    listed = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items())
    return OutOfMemoryError(f"out of memory on {where}: {listed}; {advice(use, config)}")


def explain_out_of_memory_at_start(
    parameters: int, config: RunConfig, *, where: str, memory: Memory = "one", trained: int | None = None
) -> OutOfMemoryError:
    """Return the error for memory that ran out before there was a model to measure.

    Args:
        parameters: how many the model has.
        config: the run.
        where: what ran out, for the message.
        memory: which one it is.
        trained: how many of the parameters are trained; all if None.
    """
    share = 1.0 if trained is None else trained / parameters
    needed = math.ceil(parameters * needs_of(config).bytes_per_parameter(memory, share))
    return OutOfMemoryError(
        f"out of memory on {where} before the first step: --model {config.model.model} with {_flags_of(config)} takes "
        f"{_gb(needed)} for weights, gradients and optimizer states in all; end what else runs there, or "
        f"{_smaller(config)}"
    )


def advice(use: MemoryUse, config: RunConfig) -> str:
    """Return the change that frees most.

    Args:
        use: who holds the memory.
        config: the run.
    """
    batch = config.optimizer.batch_size or 1
    recomputed = config.model.checkpointing
    if use.activations > use.weights + use.gradients + use.states:
        if not recomputed:
            return "--checkpointing keeps one block's activations instead of all"
        if batch > 1:
            # A divisor, so that a step takes as many samples as before.
            part = max(size for size in range(1, batch) if batch % size == 0)
            return (
                f"--batch-size {part} --accumulate {config.optimizer.accumulate * batch // part} takes less at a time"
            )
        return "a smaller --sequence-length takes less"
    elsewhere = next(_with_less(config, "one" if use.is_host else "device"), None)
    if elsewhere is not None:
        does = "keeps" if elsewhere.plugin.cpu_offload else "shares"
        place = "in host memory" if elsewhere.plugin.cpu_offload else "out over ranks"
        more = "" if recomputed else ", and --checkpointing takes less"
        return f"{_flags_of(elsewhere)} {does} optimizer states {place}{more}"
    if use.activations > 0 and not recomputed:
        return "--checkpointing and a smaller --batch-size take less" if batch > 1 else "--checkpointing takes less"
    if use.activations > 0 and batch > 1 and config.plugin.mem_cap == 0:
        return "a smaller --batch-size, or a smaller --model, takes less"
    return _smaller(config)


def _what_fits(parameters: int, available_bytes: int, config: RunConfig, memory: Memory, trained: float) -> str:
    """Return the flags with which the same model fits, else what is left to do."""
    for other in _with_less(config, memory, trained):
        needed = math.ceil(parameters * needs_of(other).bytes_per_parameter(memory, trained))
        if needed <= available_bytes:
            return f"{_flags_of(other)} takes {_gb(needed)} there"
    return _smaller(config)


def _with_less(config: RunConfig, memory: Memory, trained: float = 1.0) -> Iterator[RunConfig]:
    """Yield the same run under other plugins that take less of a memory, those that change least first."""
    taken = needs_of(config).bytes_per_parameter(memory, trained)
    # What was offloaded is not to go back to the device, and on a CPU there is nowhere to offload to.
    for offload in {"device": (False, True), "host": (True,), "one": (False,)}[memory]:
        for plugin in ("low_level_zero", "torch_fsdp"):
            stage = 2 if plugin == "low_level_zero" else None
            chosen = dataclasses.replace(config.plugin, plugin=plugin, zero_stage=stage, cpu_offload=offload)
            other = dataclasses.replace(config, plugin=chosen)
            if needs_of(other).bytes_per_parameter(memory, trained) < taken:
                yield other


def _flags_of(config: RunConfig) -> str:
    """Return the flags that choose how a run trains."""
    return f"--plugin {config.plugin.plugin}" + (" --cpu-offload" if config.plugin.cpu_offload else "")


def _smaller(config: RunConfig) -> str:
    """Return what helps where weights, gradients and states are too much."""
    return "raise --mem-cap, or take a smaller --model" if config.plugin.mem_cap > 0 else "take a smaller --model"


def _gb(size: int) -> str:
    return f"{size / 2**30:.1f} GB"
