"""What a run needs of memory before it starts, and what took it when it ran out."""

from __future__ import annotations

from dataclasses import dataclass

from albireo.config import RunConfig
from albireo.errors import OutOfMemoryError

__all__ = [
    "MemoryUse",
    "advice",
    "check_states_fit",
    "explain_out_of_memory",
    "explain_out_of_memory_at_start",
    "is_out_of_memory",
]

# torch_ddp: an fp32 weight, an fp32 gradient and Adam's two fp32 moments.
_BYTES_PER_PARAMETER = 16

_WORDS_OF_FAILED_ALLOCATIONS = ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class MemoryUse:
    """Who holds a device's memory, in bytes.

    Attributes:
        weights: parameters and buffers.
        gradients: their gradients.
        states: the optimizer's.
        logits: the piece of logits and its gradient that the loss holds at a time.
        peak: the most that was allocated.
    """

    weights: int
    gradients: int
    states: int
    logits: int
    peak: int

    @property
    def activations(self) -> int:
        """What is left of the peak: activations, and what is in between."""
        return max(0, self.peak - self.weights - self.gradients - self.states - self.logits)


def check_states_fit(parameters: int, *, available_bytes: int | None, where: str, config: RunConfig) -> None:
    """Refuse a run whose weights, gradients and optimizer states alone cannot fit.

    Args:
        parameters: how many the model has.
        available_bytes: the memory that there is, or None if nobody knows.
        where: whose memory it is, for the message.
        config: the run.

    Raises:
        OutOfMemoryError: they cannot.
    """
    needed = parameters * _BYTES_PER_PARAMETER
    if available_bytes is None or needed <= available_bytes:
        return
    raise OutOfMemoryError(
        f"--model {config.model.model} with --plugin {config.plugin.plugin} needs {_gb(needed)} for weights, gradients "
        f"and optimizer states ({_BYTES_PER_PARAMETER} bytes for each of {parameters:,} parameters), and {where} "
        f"{_gb(available_bytes)}: {_smaller(config)}"
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


def explain_out_of_memory_at_start(parameters: int, config: RunConfig, *, where: str) -> OutOfMemoryError:
    """Return the error for memory that ran out before there was a model to measure.

    Args:
        parameters: how many the model has.
        config: the run.
        where: what ran out, for the message.
    """
    return OutOfMemoryError(
        f"out of memory on {where} before the first step: --model {config.model.model} takes "
        f"{_gb(parameters * _BYTES_PER_PARAMETER)} for weights, gradients and optimizer states in all; end what else "
        f"runs there, or {_smaller(config)}"
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
    if use.activations > 0 and not recomputed:
        return "--checkpointing and a smaller --batch-size take less" if batch > 1 else "--checkpointing takes less"
    if use.activations > 0 and batch > 1 and config.plugin.mem_cap == 0:
        return "a smaller --batch-size, or a smaller --model, takes less"
    return _smaller(config)


def _smaller(config: RunConfig) -> str:
    """Return what helps where weights, gradients and states are too much."""
    return "raise --mem-cap, or take a smaller --model" if config.plugin.mem_cap > 0 else "take a smaller --model"


def _gb(size: int) -> str:
    return f"{size / 2**30:.1f} GB"
