"""Right code passes, and each planted fault is found and named. The faults are planted in plugins and optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from albireo.booster import Booster, StepOutput
from albireo.distributed import World, process_group
from albireo.optim import OptimizerWrapper, adamw, clip_by_norm, decay_groups, global_norm
from albireo.plugins import LowLevelZeroPlugin, ModelWrapper, Plugin, TorchDDPPlugin, TorchFSDPPlugin
from albireo.verify import Verifier

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
VOCABULARY, WIDTH = 37, 24

Run = Callable[..., list[Any]]


class Language(nn.Module):
    """A language model with tied weights, a frozen layer, a branch that is not used and rows that are padded."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.wide = nn.Linear(WIDTH, 50)
        self.norm = nn.LayerNorm(50)
        self.narrow = nn.Linear(50, WIDTH)
        self.unused = nn.Linear(3, 5)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean over what is counted."""
        hidden = self.frozen(self.embedding(input_ids))
        hidden = hidden + self.narrow(F.gelu(self.norm(self.wide(hidden))))
        logits = self.head(hidden)[:, :-1].float()
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Language()
    return model, adamw(decay_groups(model.named_parameters(), 0.1), 0.01)


def batches(step: int, world_size: int, accumulate: int) -> list[list[dict[str, torch.Tensor]]]:
    """Micro-batches by rank, whose rows are padded to other lengths."""
    generator = torch.Generator().manual_seed(step)

    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(0, VOCABULARY, (4, 11), generator=generator)
        labels = ids.clone()
        for row in labels:
            row[int(torch.randint(3, 11, (1,), generator=generator)) :] = -100
        return {"input_ids": ids, "labels": labels}

    return [[batch() for _ in range(accumulate)] for _ in range(world_size)]


def plugin_of(name: str, precision: str) -> Plugin:
    if name == "torch_ddp":
        return TorchDDPPlugin(precision=precision, find_unused_parameters=True)
    if name == "fsdp":
        return TorchFSDPPlugin(precision=precision)
    # Small buckets, so that there are several and their cuts go through parameters.
    return LowLevelZeroPlugin(
        stage=1 if name == "zero1" else 2,
        precision=precision,
        reduce_bucket_size_in_m=0.002,
        hysteresis=1,
        cpu_offload=name == "offload",
    )


Plant = Callable[[Plugin, ModelWrapper, OptimizerWrapper, World], None]


def dropped_micro_batch(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    backward, calls = optimizer.backward, []

    def but_the_first(loss: torch.Tensor) -> None:
        calls.append(None)
        backward(loss * 0.0 if len(calls) == 1 else loss)

    optimizer.backward = but_the_first  # type: ignore[method-assign]


def norm_over_one_rank(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    def clip(max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        gradients = optimizer.gradients()
        norm = global_norm(gradients[world.rank :: max(world.world_size, 2)])
        clip_by_norm(gradients, norm, max_norm)
        return norm

    optimizer.clip_grad_by_norm = clip  # type: ignore[method-assign]


def stale_weight(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    step, weight = optimizer.step, model.unwrap().narrow.weight

    def but_one(closure: Any = None) -> None:
        before = weight.detach().clone()
        step()
        if world.rank == world.world_size - 1:
            with torch.no_grad():
                weight.copy_(before)

    optimizer.step = but_one  # type: ignore[method-assign]


def wrong_loss_scale(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    backward = optimizer.backward
    optimizer.backward = lambda loss: backward(loss * 2.0)  # type: ignore[method-assign]


def swapped_moments(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    step = optimizer.step

    def and_swap(closure: Any = None) -> None:
        step()
        for state in optimizer.unwrap().state.values():
            state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]

    optimizer.step = and_swap  # type: ignore[method-assign]


def tied_gradient_twice(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    model.unwrap().embedding.weight.register_hook(lambda gradient: gradient * 2.0)


def frozen_stepped(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    step = optimizer.step

    def and_decay(closure: Any = None) -> None:
        step()
        with torch.no_grad():
            model.unwrap().frozen.weight.mul_(0.999)

    optimizer.step = and_decay  # type: ignore[method-assign]


def step_counted_in_a_skip(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    step = optimizer.step

    def and_count(closure: Any = None) -> None:
        scale = optimizer.scaler_state()["scale"]
        step()
        if optimizer.scaler_state()["scale"] < scale:
            for state in optimizer.unwrap().state.values():
                state["step"] += 1

    optimizer.step = and_count  # type: ignore[method-assign]


def sum_for_mean(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    backward = optimizer.backward
    # Over ranks, or over two micro-batches.
    optimizer.backward = lambda loss: backward(loss * max(world.world_size, 2))  # type: ignore[method-assign]


def no_clip(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    clip = optimizer.clip_grad_by_norm
    optimizer.clip_grad_by_norm = lambda *_: clip(0.0)  # type: ignore[method-assign]


def unused_stepped(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    step = optimizer.step

    def and_decay(closure: Any = None) -> None:
        step()
        with torch.no_grad():
            model.unwrap().unused.weight.mul_(0.999)

    optimizer.step = and_decay  # type: ignore[method-assign]


def sums_in_16_bits(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    backward, dtype = optimizer.backward, torch.float16 if plugin.precision == "fp16" else torch.bfloat16

    def and_round(loss: torch.Tensor) -> None:
        backward(loss)
        for gradient in optimizer.gradients():
            gradient.copy_(gradient.to(dtype))

    optimizer.backward = and_round  # type: ignore[method-assign]


def scale_not_halved(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    step = optimizer.step

    def and_reset(closure: Any = None) -> None:
        before = optimizer.scaler_state()
        step()
        optimizer.load_scaler_state(before)

    optimizer.step = and_reset  # type: ignore[method-assign]


def wrong_rate(plugin: Plugin, model: ModelWrapper, optimizer: OptimizerWrapper, world: World) -> None:
    step = optimizer.step

    def half(closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] /= 2
        step()
        for group in optimizer.param_groups:
            group["lr"] *= 2

    optimizer.step = half  # type: ignore[method-assign]


PLANTS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        dropped_micro_batch,
        norm_over_one_rank,
        stale_weight,
        wrong_loss_scale,
        swapped_moments,
        tied_gradient_twice,
        frozen_stepped,
        step_counted_in_a_skip,
        sum_for_mean,
        no_clip,
        unused_stepped,
        sums_in_16_bits,
        scale_not_halved,
        wrong_rate,
    )
}


class MeanOfMeans(Booster):
    """Weighs all micro-batches alike, whatever they count."""

    def train_step(self, model: Any, optimizer: Any, micro_batches: Any, tokens: Any = None, **how: Any) -> StepOutput:
        return super().train_step(model, optimizer, micro_batches, [1] * len(micro_batches), **how)


def case(
    world: World,
    *,
    fault: str | None = None,
    plugin: str = "torch_ddp",
    precision: str = "fp32",
    accumulate: int = 2,
    max_norm: float = 0.5,
    overflow: bool = False,
    steps: int = 1,
) -> list[dict[str, Any]]:
    """Verify steps of a system with a fault, and return what was found in each."""
    with process_group(world):
        return verified(world, fault, plugin, precision, accumulate, max_norm, overflow, steps)


def verified(
    world: World,
    fault: str | None,
    plugin: str,
    precision: str,
    accumulate: int,
    max_norm: float,
    overflow: bool,
    steps: int,
) -> list[dict[str, Any]]:
    model, torch_optimizer = build()
    made = plugin_of(plugin, precision)
    world = World(world.rank, world.world_size, 0, CPU)
    booster = (MeanOfMeans if fault == "mean_of_means" else Booster)(plugin=made, world=world)
    boosted, optimizer, *_ = booster.boost(model, torch_optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch_optimizer, lambda step: 1.0 / (step + 1))
    if fault in PLANTS:
        PLANTS[fault](made, boosted, optimizer, world)
    verifier = Verifier(booster, boosted, optimizer, build)
    found = []
    for step in range(steps):
        if precision == "fp16":
            # One that does not overflow here, and one that does.
            scale = 2.0**60 if overflow and step == steps - 1 else 256.0
            optimizer.load_scaler_state({**optimizer.scaler_state(), "scale": scale})
        report = verifier.step(batches(step, world.world_size, accumulate), lr_scheduler=scheduler, max_norm=max_norm)
        assert report.passed == (not report.failures)
        found.append(
            {
                "checks": sorted({failure.check for failure in report.failures}),
                "parameters": sorted({failure.parameter for failure in report.failures if failure.parameter}),
                "said": [str(failure) for failure in report.failures],
                "skipped": report.skipped,
                "error": report.max_relative_error,
                "compared": sum(parameter.relative_error is not None for parameter in report.parameters),
                "parts": len(report.parameters),
            }
        )
    return found


PLUGINS = ["torch_ddp", "zero1", "zero2", "offload", "fsdp"]
# What always runs of the whole matrix, beside all of torch_ddp.
SAMPLE = {
    ("zero1", "fp16", 2),
    ("zero2", "bf16", 2),
    ("zero2", "fp32", 1),
    ("offload", "fp16", 2),
    ("fsdp", "fp32", 2),
    ("fsdp", "bf16", 1),
}


def matrix() -> list[Any]:
    cells = [(p, precision, n) for p in PLUGINS for precision in ("fp32", "bf16", "fp16") for n in (1, 2)]
    return [
        pytest.param(*cell, marks=[] if cell[0] == "torch_ddp" or cell in SAMPLE else [pytest.mark.full])
        for cell in cells
    ]


@pytest.mark.parametrize(("plugin", "precision", "world_size"), matrix())
def test_right_code_passes_by_far(run_case: Run, world_size: int, precision: str, plugin: str) -> None:
    for accumulate, max_norm in ((1, 0.0), (4, 0.5)):
        results = run_case(
            case,
            world_size,
            plugin=plugin,
            precision=precision,
            accumulate=accumulate,
            max_norm=max_norm,
            overflow=True,
            steps=3,
        )
        for found in results[0]:
            assert found["said"] == []
            assert found["error"] < 1e-6
        assert [found["skipped"] for found in results[0]] == [False, False, precision == "fp16"]
        # Five tensors of four layers that are used, and a weight and a bias that are not.
        assert [(found["compared"], found["parts"]) for found in results[0][:2]] == [(7, 9)] * 2
        assert all(result == results[0] for result in results)


# The fault, what it takes to show, and the checks that must find it.
FAULTS = [
    ("dropped_micro_batch", {}, {"gradient"}),
    ("norm_over_one_rank", {}, {"norm", "clip"}),
    ("wrong_loss_scale", {"precision": "fp16"}, {"gradient"}),
    ("mean_of_means", {}, {"gradient", "loss"}),
    ("swapped_moments", {}, {"step"}),
    ("tied_gradient_twice", {}, {"gradient"}),
    ("frozen_stepped", {}, {"step"}),
    ("step_counted_in_a_skip", {"precision": "fp16", "overflow": True, "steps": 2}, {"step"}),
    ("sum_for_mean", {}, {"gradient"}),
    ("no_clip", {}, {"clip"}),
    ("unused_stepped", {}, {"step"}),
    ("sums_in_16_bits", {}, {"gradient"}),
    ("sums_in_16_bits", {"precision": "bf16"}, {"gradient"}),
    ("sums_in_16_bits", {"precision": "fp16"}, {"gradient"}),
    ("scale_not_halved", {"precision": "fp16", "overflow": True, "steps": 2}, {"scale"}),
    ("wrong_rate", {}, {"step"}),
]
WHOSE = {
    "tied_gradient_twice": ["embedding.weight"],
    "frozen_stepped": ["frozen.weight"],
    "unused_stepped": ["unused.weight"],
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("fault", "options", "checks"), FAULTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_planted_fault_is_found(
    run_case: Run, fault: str, options: dict[str, Any], checks: set[str], world_size: int
) -> None:
    found = run_case(case, world_size, fault=fault, **options)[0]
    assert all(step["said"] == [] for step in found[:-1])
    # Ranks that clip otherwise have other weights too.
    more = {"weights"} if fault == "norm_over_one_rank" and world_size > 1 else set()
    assert set(found[-1]["checks"]) == checks | more, found[-1]["said"]
    if fault in WHOSE:
        assert found[-1]["parameters"] == WHOSE[fault]


@pytest.mark.parametrize(
    ("plugin", "world_size"), [("torch_ddp", 1), ("torch_ddp", 2), ("zero1", 1), ("zero2", 2), ("offload", 2)]
)
def test_a_stale_weight_is_found(run_case: Run, world_size: int, plugin: str) -> None:
    precision = "fp32" if plugin == "torch_ddp" else "bf16"
    (found,) = run_case(case, world_size, fault="stale_weight", plugin=plugin, precision=precision)[0]
    assert found["parameters"] == ["narrow.weight"]
    # With one copy of the weights alone, a stale one is a weight that was not stepped; so is half of what is in halves.
    in_part = ["step"] if world_size == 1 else ["step", "weights"]
    wanted = {"torch_ddp": ["step"] if world_size == 1 else ["weights"], "offload": ["weights"]}.get(plugin, in_part)
    assert sorted(found["checks"]) == wanted
    if found["checks"] == ["weights"]:
        assert f"what computes on rank {world_size - 1}" in found["said"][0]


@pytest.mark.parametrize(
    "plugin", ["zero2", *(pytest.param(plugin, marks=pytest.mark.full) for plugin in ("zero1", "offload", "fsdp"))]
)
@pytest.mark.parametrize(
    ("fault", "precision", "check"),
    [
        ("dropped_micro_batch", "bf16", "gradient"),
        ("mean_of_means", "bf16", "gradient"),
        ("tied_gradient_twice", "bf16", "gradient"),
        ("sum_for_mean", "bf16", "gradient"),
        ("wrong_loss_scale", "fp16", "gradient"),
        ("swapped_moments", "bf16", "step"),
        ("no_clip", "bf16", "clip"),
        ("wrong_rate", "bf16", "step"),
    ],
)
def test_faults_are_found_in_sharded_systems(
    run_case: Run, plugin: str, fault: str, precision: str, check: str
) -> None:
    if plugin == "fsdp" and fault == "tied_gradient_twice":
        pytest.skip("torch's FSDP does not call a hook on the parameter that it keeps")
    (found,) = run_case(case, 2, fault=fault, plugin=plugin, precision=precision)[0]
    assert check in found["checks"], found["said"]
