"""LoRA (Hu et al., 2021): beside a frozen matrix W, the product of two thin ones, B A, is trained. The layers are peft's."""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from albireo.adapters.layers import adaptable
from albireo.errors import ConfigError
from albireo.ops.quantise import Code

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = [
    "LoraPlan",
    "attach_lora",
    "check_targets",
    "count_lora",
    "has_lora",
    "lora_config_in",
    "lora_config_of",
    "require_peft",
]

_SHOWN = 12


@dataclass(frozen=True)
class LoraPlan:
    """Which adapter a model gets.

    Attributes:
        rank: columns of B and rows of A.
        alpha: what B A is multiplied by, times the rank.
        dropout: the probability with which an adapter's inputs are dropped.
        targets: names, or last parts of names, of the modules that get one.
        base: how the frozen layers are quantised; None: they are not.
        head: a layer that is trained as it is, beside the adapter, such as one for new classes; "": none.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    base: Code | None = None
    head: str = ""

    def describe(self) -> str:
        """Return it in words that differ wherever the adapter does."""
        base = "" if self.base is None else f", over {self.base}"
        return f"LoRA of rank {self.rank}, alpha {self.alpha:g}, on {', '.join(self.targets)}{base}"


def attach_lora(model: nn.Module, plan: LoraPlan, *, seed: int) -> LoraConfig:
    """Put an adapter on a model, in place: its own weights are frozen, and only the adapter is trained.

    At first the model computes what it did before. An adapter's first weights depend on the seed and their names alone:
    A is uniform as in peft, B is 0.

    Args:
        model: a transformers model, on its device; on the meta device, its adapter is in host memory.
        plan: the adapter.
        seed: the run's.

    Returns:
        peft's own description of it.

    Raises:
        ConfigError: peft is not installed, or a target is no module that can have an adapter.
    """
    peft = require_peft()
    config = lora_config_of(model, plan)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft draws first weights too, which are not kept.
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, model)
    if plan.head:
        model.get_submodule(plan.head).requires_grad_(requires_grad=True)
        # As peft's files have it: it is saved with the adapter, and loaded with it.
        config.modules_to_save = [plan.head]
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta and (".lora_A." in name or ".lora_B." in name):
                # peft puts an adapter where its matrix is.
                real = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu"))
                torch.utils.swap_tensors(parameter, real)  # type: ignore[no-untyped-call]
            if ".lora_A." in name:
                _fill(parameter, f"{seed}\0{name}")
            elif ".lora_B." in name:
                parameter.zero_()
    return config


def lora_config_of(model: nn.Module, plan: LoraPlan) -> LoraConfig:
    """Return peft's description of an adapter for a model.

    Args:
        model: the model without adapters; it may be on the meta device.
        plan: the adapter.

    Raises:
        ConfigError: peft is not installed, or a target is no module that can have an adapter.
    """
    if plan.head in plan.targets:
        raise ConfigError(f"--lora-targets: {plan.head} is trained as it is, and needs no adapter: leave it out")
    targets = check_targets(model, plan.targets)
    # transformers' Conv1D keeps its weight as [in, out].
    transposed = {type(module).__name__ == "Conv1D" for _, module in targets}
    if len(transposed) > 1:
        raise ConfigError("--lora-targets names layers of two kinds, nn.Linear and Conv1D: give those of one kind")
    config: LoraConfig = require_peft().LoraConfig(
        task_type=None if plan.head else "CAUSAL_LM",
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=plan.dropout,
        target_modules=list(plan.targets),
        fan_in_fan_out=transposed.pop(),
        bias="none",
    )
    return config


def check_targets(model: nn.Module, targets: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """Return the modules that targets name, with their names.

    Args:
        model: the model without adapters.
        targets: names, or last parts of names.

    Raises:
        ConfigError: a target names no module, or one that can have no adapter.
    """
    found: list[tuple[str, nn.Module]] = []
    for target in targets:
        named = [(name, m) for name, m in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not named:
            known = sorted({name.rsplit(".", 1)[-1] for name, _ in adaptable(model)})
            raise ConfigError(
                f"--lora-targets: the model has no module {target!r}; those that can have an adapter are "
                f"{', '.join(known[:_SHOWN])}"
            )
        usable = dict(adaptable(model))
        for name, module in named:
            if name not in usable:
                raise ConfigError(
                    f"--lora-targets: {name} is a {type(module).__name__}, which can have no adapter here; those that can "
                    f"are {', '.join(sorted({name.rsplit('.', 1)[-1] for name in usable})[:_SHOWN])}"
                )
        found += named
    return found


def count_lora(model: nn.Module, plan: LoraPlan) -> int:
    """Return how many numbers an adapter has.

    Args:
        model: the model without adapters; it may be on the meta device.
        plan: the adapter.

    Raises:
        ConfigError: a target is no module that can have an adapter.
    """
    modules = dict(check_targets(model, plan.targets))
    head = sum(p.numel() for p in model.get_submodule(plan.head).parameters()) if plan.head else 0
    return head + sum(plan.rank * sum(module.get_parameter("weight").shape) for module in modules.values())


def has_lora(model: nn.Module) -> bool:
    """Return True if a model has adapters."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


def lora_config_in(model: nn.Module) -> LoraConfig:
    """Return peft's description of the adapter that is on a model.

    Args:
        model: one that `attach_lora`, or peft, has put it on.

    Raises:
        ConfigError: there is none.
    """
    known: Any = getattr(model, "peft_config", None)
    if not known or "default" not in known:
        raise ConfigError("the model has no adapter: call enable_lora first")
    config: LoraConfig = known["default"]
    return config


def require_peft() -> Any:
    """Return the package peft.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("adapters need the package peft: pip install 'albireo[adapters]'") from error
    return peft


def _fill(parameter: nn.Parameter, what: str) -> None:
    """Draw A as peft does (Kaiming's uniform with a = sqrt 5, which is 1 over the root of the inputs)."""
    digest = hashlib.blake2b(what.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    bound = 1 / math.sqrt(parameter.shape[1])
    drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    parameter.copy_(drawn)
