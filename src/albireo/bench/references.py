"""Loops as a careful user writes them by hand, in plain PyTorch, DDP, FSDP2 and accelerate: what Albireo is measured against.

They use nothing of Albireo but the weights and the batches, which are the same for every system. A process group is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedModel

from albireo.bench.case import Case
from albireo.bench.ours import LEARNING_RATE
from albireo.bench.reference_inputs import Inputs
from albireo.models import family_of

__all__ = ["REFERENCES"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_Step = Callable[[int], torch.Tensor]


def _decay_groups(model: nn.Module) -> list[dict[str, object]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _plain_step(case: Case, model: nn.Module, inputs: Inputs, device: torch.device) -> _Step:
    optimizer = torch.optim.AdamW(_decay_groups(model), lr=LEARNING_RATE, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
    autocast = nullcontext() if case.precision == "fp32" else torch.autocast(device.type, dtype=_DTYPES[case.precision])

    def step(number: int) -> torch.Tensor:
        with autocast:
            loss = model(**inputs(number)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        result: torch.Tensor = loss.detach()
        return result

    return step


@contextmanager
def _plain(case: Case, model: PreTrainedModel, inputs: Inputs) -> Iterator[_Step]:
    """Autocast over fp32 weights, fused AdamW, the loss scaled in fp16, clipping: as `torch_ddp` on one GPU."""
    yield _plain_step(case, model, inputs, model.device)


@contextmanager
def _ddp(case: Case, model: PreTrainedModel, inputs: Inputs) -> Iterator[_Step]:
    """The same under torch's DistributedDataParallel, with its settings that cost least."""
    from torch.nn.parallel import DistributedDataParallel

    device = model.device
    wrapped = DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    yield _plain_step(case, wrapped, inputs, device)


@contextmanager
def _accelerate(case: Case, model: PreTrainedModel, inputs: Inputs) -> Iterator[_Step]:
    """Hugging Face's accelerate, as its examples have it."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="no" if case.precision == "fp32" else case.precision)
    wrapped, optimizer = accelerator.prepare(
        model, torch.optim.AdamW(_decay_groups(model), lr=LEARNING_RATE, fused=True)
    )

    def step(number: int) -> torch.Tensor:
        loss = wrapped(**inputs(number)).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        result: torch.Tensor = loss.detach()
        return result

    yield step


@contextmanager
def _fsdp2(case: Case, model: PreTrainedModel, inputs: Inputs) -> Iterator[_Step]:
    """FSDP2: 16-bit compute copies of fp32 weights, gradients reduced in fp32, as its users run it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=_DTYPES[case.precision], reduce_dtype=torch.float32)
    for _, block in family_of(model.config.model_type).blocks(model):
        if case.compiled:
            block.compile()
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(_decay_groups(model), lr=LEARNING_RATE, fused=True)

    def step(number: int) -> torch.Tensor:
        loss = model(**inputs(number)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        result: torch.Tensor = loss.detach()
        return result

    yield step


_Reference = Callable[[Case, PreTrainedModel, Inputs], AbstractContextManager[_Step]]
REFERENCES: Mapping[str, _Reference] = MappingProxyType(
    {"plain": _plain, "ddp": _ddp, "accelerate": _accelerate, "fsdp2": _fsdp2, "fsdp2_compiled": _fsdp2}
)
