"""ZeRO against one process in plain PyTorch: the same weights after some steps, whatever is cut, unused, frozen or tied."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ragged_steps import batches_of, groups, optimizer_of, tokens_of, train
from torch import nn

from albireo.booster import Booster
from albireo.checkpoint import OneRank, Snapshot, open_checkpoint, save_checkpoint, tensor_names
from albireo.distributed import World
from albireo.errors import AlbireoError, CheckpointError, ConfigError
from albireo.optim import HybridAdam, OptimizerWrapper
from albireo.optim.adam_values import adam_state
from albireo.optim.split_adam import SplitStep
from albireo.optim.split_weights import join, split
from albireo.plugins import LowLevelZeroPlugin, ModelWrapper, Plugin, TorchDDPPlugin

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
STEPS = 4

Run = Callable[..., list[Any]]


class Awkward(nn.Module):
    """Odd sizes, a frozen layer, a branch that only some batches take, one that none takes, and a tied head."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 19)
        self.first = nn.Linear(19, 67)
        self.frozen = nn.Linear(67, 67).requires_grad_(requires_grad=False)
        self.branch = nn.Linear(67, 67, bias=False)
        self.never = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(67)
        self.last = nn.Linear(67, 19)
        self.head = nn.Linear(19, 37, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("shift", torch.full((19,), 0.25))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, *, branch: bool) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.frozen(torch.relu(self.first(self.embedding(ids))))
        if branch:
            hidden = hidden + self.branch(hidden)
        # `first` is used twice where the branch is taken.
        if branch:
            hidden = hidden + self.first(self.embedding(ids).flip(1))
        logits = self.head(self.last(self.norm(hidden)) * self.scale + self.shift.to(hidden.dtype))
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        return loss, (labels >= 0).sum()


def awkward(*, tied: bool = True) -> Awkward:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Awkward(tied=tied)


def boosted(
    world: World, plugin: Plugin, *, tied: bool = True, kind: str = "HybridAdam"
) -> tuple[Booster, ModelWrapper, OptimizerWrapper]:
    model = awkward(tied=tied)
    booster = Booster(plugin=plugin, world=World(world.rank, world.world_size, 0, CPU))
    wrapped, optimizer, *_ = booster.boost(model, optimizer_of(model, kind))
    return booster, wrapped, optimizer


def case(
    world: World,
    stage: int = 2,
    accumulate: int = 1,
    clip: float = 0.0,
    tied: bool = True,
    kind: str = "HybridAdam",
    bucket: float = 12.0,
    overlap: bool = True,
    precision: str = "fp32",
    offload: bool = False,
) -> dict[str, Any]:
    plugin = LowLevelZeroPlugin(
        cpu_offload=offload,
        stage=stage,
        precision=precision,
        reduce_bucket_size_in_m=bucket,
        overlap_communication=overlap,
        overlap_allgather=overlap,
    )
    booster, model, optimizer = boosted(world, plugin, tied=tied, kind=kind)
    numbers = train(booster, model, optimizer, range(STEPS), accumulate, clip)
    weights = {name: p.detach().float().tolist() for name, p in model.unwrap().named_parameters()}
    return {"numbers": numbers, "weights": weights}


def by_hand(
    ranks: int, accumulate: int = 1, clip: float = 0.0, tied: bool = True, kind: str = "HybridAdam"
) -> dict[str, Any]:
    """One process that runs the micro-batches of all ranks one after another."""
    model = awkward(tied=tied)
    optimizer = optimizer_of(model, kind)
    numbers = []
    for step in range(STEPS):
        batches = [batch for rank in range(ranks) for batch in batches_of(step, rank, accumulate)]
        total = sum(tokens_of(batches))
        loss_sum = 0.0
        for batch in batches:
            loss, _ = model(**batch)
            (loss / total).backward()
            loss_sum += loss.item()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack([g.double().norm() for g in gradients])))
        if clip > 0:
            for gradient in gradients:
                gradient.mul_(min(1.0, clip / (norm + 1e-6)))
        optimizer.step()
        optimizer.zero_grad()
        numbers.append([loss_sum / total, norm])
    return {"numbers": numbers, "weights": {name: p.tolist() for name, p in model.named_parameters()}}


def assert_same(got: Mapping[str, Any], wanted: Mapping[str, Any], tolerance: float = 2e-5) -> None:
    assert torch.allclose(torch.tensor(got["numbers"]), torch.tensor(wanted["numbers"]), rtol=tolerance, atol=0)
    assert got["weights"].keys() == wanted["weights"].keys()
    for name, values in wanted["weights"].items():
        torch.testing.assert_close(torch.tensor(got["weights"][name]), torch.tensor(values), rtol=0, atol=tolerance)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "how",
    [
        {"stage": 2, "accumulate": 1, "clip": 0.0},
        {"stage": 2, "accumulate": 3, "clip": 0.5},
        {"stage": 1, "accumulate": 3, "clip": 0.5, "tied": False},
        {"stage": 1, "accumulate": 1, "clip": 0.5, "bucket": 0.002},
        {"stage": 2, "accumulate": 2, "clip": 0.0, "bucket": 0.002, "tied": False},
        {"stage": 2, "accumulate": 1, "clip": 0.5, "bucket": 0.002, "overlap": False},
        {"stage": 2, "accumulate": 1, "clip": 0.5, "kind": "SGD", "bucket": 0.002},
        {"stage": 1, "accumulate": 2, "clip": 0.0, "kind": "AdamW"},
        {"stage": 2, "accumulate": 1, "clip": 0.5, "bucket": 0.002, "offload": True},
        {"stage": 2, "accumulate": 3, "clip": 0.5, "offload": True},
        {"stage": 1, "accumulate": 2, "clip": 0.0, "offload": True, "tied": False},
        {"stage": 2, "accumulate": 2, "clip": 0.5, "offload": True, "kind": "SGD"},
    ],
    ids=lambda how: "-".join(f"{key}={value}" for key, value in how.items()),
)
def test_it_is_one_process_in_plain_pytorch(run_case: Run, world_size: int, how: dict[str, Any]) -> None:
    results = run_case(case, world_size, **how)
    plain = {key: how[key] for key in ("accumulate", "clip", "tied", "kind") if key in how}
    wanted = by_hand(world_size, **plain)
    for result in results:
        assert_same(result, wanted)
        # Every rank computes with the same weights, to the bit.
        assert result["weights"] == results[0]["weights"]


def test_alone_in_fp32_it_is_torch_ddp_to_the_bit() -> None:
    zero = boosted(ALONE, LowLevelZeroPlugin(precision="fp32"))
    plain = boosted(ALONE, TorchDDPPlugin())
    assert train(*zero, range(STEPS), 2, 0.5) == train(*plain, range(STEPS), 2, 0.5)
    for mine, theirs in zip(zero[1].unwrap().parameters(), plain[1].unwrap().parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_compute_and_fp32_is_stepped(precision: str, accumulate: int) -> None:
    """One step by hand: 16-bit copies, gradients added up and clipped in fp32, fp32 weights stepped, cast again."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    booster, model, optimizer = boosted(ALONE, LowLevelZeroPlugin(precision=precision, initial_scale=2.0**12))
    batches = batches_of(1, 0, accumulate)
    total = sum(tokens_of(batches))
    masters = awkward()
    copies = copy.deepcopy(masters)
    for parameter in copies.parameters():
        parameter.data = parameter.data.to(dtype)
    sums: dict[str, torch.Tensor] = {}
    scale = 2.0**12 if precision == "fp16" else 1.0
    for batch in batches:
        loss, _ = copies(**batch)
        (loss * (1.0 / total) * scale).backward()
        for name, parameter in copies.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums[name] + parameter.grad.float() if name in sums else parameter.grad.float()
                parameter.grad = None
    norm = torch.linalg.vector_norm(torch.stack([g.double().norm() for g in sums.values()])) / scale
    for name, parameter in masters.named_parameters():
        if name in sums:
            parameter.grad = sums[name] / scale * min(1.0, 0.5 / (float(norm) + 1e-6))
    optimizer_of(masters).step()

    output = booster.train_step(model, optimizer, batches, tokens_of(batches), max_norm=0.5)
    assert float(output.grad_norm) == pytest.approx(float(norm), rel=1e-6)
    names = {p: name for name, p in model.unwrap().named_parameters()}
    wanted = dict(masters.named_parameters())
    for fragment in model.fragments:  # type: ignore[attr-defined]
        torch.testing.assert_close(
            fragment.weights(), wanted[names[fragment.parameter]].detach().reshape(-1), rtol=0, atol=1e-6
        )
        assert torch.equal(fragment.compute, fragment.weights().to(dtype))
        assert fragment.parameter.dtype == dtype


def skip_case(world: World, stage: int, kind: str, offload: bool) -> dict[str, Any]:
    """A step whose gradient overflows on the last rank alone, between two good ones."""
    plugin = LowLevelZeroPlugin(stage=stage, precision="fp16", initial_scale=2.0**10, hysteresis=1, cpu_offload=offload)
    booster, model, optimizer = boosted(world, plugin, kind=kind)
    train(booster, model, optimizer, range(1), 1, 0.5)

    def everything() -> dict[str, list[float]]:
        names, _ = tensor_names(model.unwrap())
        parts = booster.plugin.export_state(model, optimizer, names, booster.world)
        return {f"{part.name}@{part.start}": part.data.float().tolist() for part in parts}

    before = everything()
    batches = batches_of(2, booster.world.rank, 1)
    factor = 1e30 if booster.world.rank == booster.world.world_size - 1 else 1.0
    loss, _ = model(**batches[0])
    booster.backward(loss * factor, optimizer)
    norm = float(optimizer.clip_grad_by_norm(0.5))
    optimizer.step()
    optimizer.zero_grad()
    unchanged = everything() == before
    scale = optimizer.scaler_state()["scale"]
    train(booster, model, optimizer, range(2, 3), 1, 0.5)
    counts = {int(s["step"]) for s in optimizer.unwrap().state.values() if "step" in s}
    return {
        "finite": norm == norm and abs(norm) != float("inf"),
        "unchanged": unchanged,
        "scale": scale,
        "moved": everything() != before,
        "counts": sorted(counts),
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["HybridAdam", "AdamW"])
@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, False), (2, True)])
def test_an_overflow_on_one_rank_leaves_no_trace_on_any(
    run_case: Run, world_size: int, kind: str, stage: int, offload: bool
) -> None:
    for result in run_case(skip_case, world_size, stage=stage, kind=kind, offload=offload):
        assert result == {"finite": False, "unchanged": True, "scale": 2.0**9, "moved": True, "counts": [2]}


def no_sync_case(world: World, stage: int) -> dict[str, Any]:
    booster, model, optimizer = boosted(world, LowLevelZeroPlugin(stage=stage, precision="fp32"))
    for step in range(STEPS):
        batches = batches_of(step, booster.world.rank, 2)
        mine = sum(tokens_of(batches))
        total = booster.world.sum_in_place(torch.tensor(float(mine)))
        factor = booster.world.world_size / total
        with booster.no_sync(model, optimizer):
            booster.backward(model(**batches[0])[0] * factor, optimizer)
        booster.backward(model(**batches[1])[0] * factor, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.tolist() for name, p in model.unwrap().named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_loop_of_the_users_own_accumulates_with_no_sync(run_case: Run, world_size: int, stage: int) -> None:
    wanted = by_hand(world_size, accumulate=2)["weights"]
    for weights in run_case(no_sync_case, world_size, stage=stage):
        for name, values in wanted.items():
            torch.testing.assert_close(torch.tensor(weights[name]), torch.tensor(values), rtol=0, atol=2e-5)


def save_case(world: World, folder: str, stage: int, precision: str, offload: bool = False) -> list[list[float]]:
    """Train two steps, save, and train two more."""
    booster, model, optimizer = boosted(
        world, LowLevelZeroPlugin(stage=stage, precision=precision, cpu_offload=offload)
    )
    train(booster, model, optimizer, range(2), 1, 0.5)
    names, aliases = tensor_names(model.unwrap())
    snapshot = Snapshot(
        step=2,
        slices=booster.plugin.export_state(model, optimizer, names, booster.world),
        shared_state={"scaler": optimizer.scaler_state()},
        aliases={f"model/{name}": f"model/{first}" for name, first in aliases.items()},
    )
    save_checkpoint(Path(folder), snapshot, ranks=booster.world, keep=2)
    return train(booster, model, optimizer, range(2, STEPS), 1, 0.5)


def load_case(world: World, folder: str, stage: int, precision: str, offload: bool = False) -> list[list[float]]:
    booster, model, optimizer = boosted(
        world, LowLevelZeroPlugin(stage=stage, precision=precision, cpu_offload=offload)
    )
    train(booster, model, optimizer, range(1), 1, 0.5)  # what is there is to be forgotten
    names, _ = tensor_names(model.unwrap())
    checkpoint = open_checkpoint(Path(folder) / "step-00000002")
    booster.plugin.import_state(model, optimizer, names, checkpoint)
    optimizer.load_scaler_state(checkpoint.shared_state["scaler"])
    return train(booster, model, optimizer, range(2, STEPS), 1, 0.5)


@pytest.mark.parametrize(
    ("precision", "then"),
    [("fp32", {"stage": 1}), ("fp16", {"stage": 2}), ("fp32", {"stage": 2, "offload": True})],
    ids=["another stage", "a loss scale", "to the host"],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_saved_goes_on_to_the_bit(
    run_case: Run, tmp_path: Path, world_size: int, precision: str, then: dict[str, Any]
) -> None:
    saved = run_case(save_case, world_size, folder=str(tmp_path), stage=2, precision=precision)
    assert run_case(load_case, world_size, folder=str(tmp_path), precision=precision, **then) == saved


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_where_adam_runs_on_the_same_side_offloading_changes_no_number(precision: str, accumulate: int) -> None:
    results = []
    for offload in (False, True):
        booster, model, optimizer = boosted(ALONE, LowLevelZeroPlugin(precision=precision, cpu_offload=offload))
        numbers = train(booster, model, optimizer, range(STEPS), accumulate, 0.5)
        names, _ = tensor_names(model.unwrap())
        parts = booster.plugin.export_state(model, optimizer, names, ALONE)
        results.append((numbers, {part.name: part.data for part in parts}))
    assert results[0][1].keys() == results[1][1].keys()
    if precision == "bf16":
        # Beside the device, weights are kept in halves: one in 2^17 is a unit in the last place nearer to zero.
        torch.testing.assert_close(torch.tensor(results[0][0]), torch.tensor(results[1][0]), rtol=1e-5, atol=0)
        for name, data in results[0][1].items():
            torch.testing.assert_close(data, results[1][1][name], rtol=1e-5, atol=1e-9, msg=name)
        return
    assert results[0][0] == results[1][0]
    for name, data in results[0][1].items():
        assert torch.equal(data, results[1][1][name]), name


class OnePass:
    """What stands for the kernel where there is no GPU: the same step in torch's own kernels."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.states = optimizer.state
        self.steps = 0

    @staticmethod
    def can_step(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:  # noqa: ARG004
        return isinstance(optimizer, HybridAdam)

    def step(self, group: Mapping[str, Any], steps: Sequence[SplitStep], factor: torch.Tensor | None) -> None:
        for step in steps:
            self.steps += 1
            wide = nn.Parameter(torch.empty(step.weight.numel()))
            join(step.weight, step.rest, wide.detach())
            wide.grad = step.gradient.float() if factor is None else step.gradient.float() * factor
            settings = {key: value for key, value in group.items() if key in ("lr", "betas", "eps", "weight_decay")}
            plain = torch.optim.AdamW([wide], **settings, fused=True)
            plain.state[wide] = adam_state(self.states, step.parameter)
            plain.step()
            split(wide.detach(), step.weight, step.rest)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_halves_that_are_stepped_in_one_pass_are_those_that_are_joined(
    monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    results = []
    for one_pass in (False, True):
        if one_pass:
            monkeypatch.setattr("albireo.sharding.optimizer.SplitAdam", OnePass)
        booster, model, optimizer = boosted(ALONE, LowLevelZeroPlugin(precision="bf16"))
        numbers = train(booster, model, optimizer, range(STEPS), accumulate, 0.5)
        names, _ = tensor_names(model.unwrap())
        parts = booster.plugin.export_state(model, optimizer, names, ALONE)
        results.append((numbers, {part.name: part.data for part in parts}))
    assert optimizer._split_adam.steps > 0  # type: ignore[attr-defined]
    assert results[0][0] == results[1][0]
    assert results[0][1].keys() == results[1][1].keys()
    for name, data in results[0][1].items():
        assert torch.equal(data, results[1][1][name]), name


def test_offloaded_gradients_add_up_over_backwards_that_nobody_announced() -> None:
    def trained(plugin: Plugin) -> list[torch.Tensor]:
        booster, model, optimizer = boosted(ALONE, plugin)
        for step in range(2):
            for batch in batches_of(step, 0, 3):
                booster.backward(model(**batch)[0] / 20, optimizer)
            optimizer.clip_grad_by_norm(0.5)
            optimizer.step()
            optimizer.zero_grad()
        return list(model.unwrap().parameters())

    offloaded = trained(LowLevelZeroPlugin(precision="fp32", cpu_offload=True))
    for mine, theirs in zip(offloaded, trained(LowLevelZeroPlugin(precision="fp32")), strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_of_two_ranks_is_the_plain_plugins_too(run_case: Run, tmp_path: Path) -> None:
    run_case(save_case, 2, folder=str(tmp_path), stage=2, precision="fp32")
    booster, model, optimizer = boosted(ALONE, TorchDDPPlugin())
    names, _ = tensor_names(model.unwrap())
    booster.plugin.import_state(model, optimizer, names, open_checkpoint(tmp_path / "step-00000002"))
    back = tmp_path / "back"
    snapshot = Snapshot(
        step=2, slices=booster.plugin.export_state(model, optimizer, names, ALONE), shared_state={}, aliases={}
    )
    save_checkpoint(back, snapshot, ranks=OneRank(), keep=2)
    first, second = open_checkpoint(tmp_path / "step-00000002"), open_checkpoint(back / "step-00000002")
    assert sorted(set(first.names()) - set(first.aliases)) == sorted(second.names())
    for name in second.names():
        assert torch.equal(first.read(name), second.read(name))


def test_another_models_checkpoint_is_refused_before_anything_changes(tmp_path: Path) -> None:
    save_case(ALONE, str(tmp_path), 2, "fp32")
    booster, model, optimizer = boosted(ALONE, LowLevelZeroPlugin(precision="fp32"), tied=False)
    before = [p.clone() for p in model.unwrap().parameters()]
    names, _ = tensor_names(model.unwrap())
    with pytest.raises(CheckpointError, match=r"has no model/head.weight|has shape|of shape"):
        booster.plugin.import_state(
            model,
            optimizer,
            {t: n for t, n in names.items() if n != "scale"},
            open_checkpoint(tmp_path / "step-00000002"),
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.unwrap().parameters(), strict=True))


def test_a_frozen_weight_is_kept_in_fp32_and_has_no_states() -> None:
    booster, model, optimizer = boosted(ALONE, LowLevelZeroPlugin(precision="bf16"))
    frozen = awkward().frozen.weight
    train(booster, model, optimizer, range(2), 1, 0.0)
    names, _ = tensor_names(model.unwrap())
    exported = {part.name: part for part in booster.plugin.export_model(model, names, ALONE)}
    # What is saved is not rounded to what computes.
    assert torch.equal(exported["model/frozen.weight"].data, frozen.reshape(-1))
    states = booster.plugin.export_optimizer(optimizer, names, ALONE)  # type: ignore[arg-type]
    assert not any("/frozen." in part.name or "/never." in part.name for part in states)


def test_gradients_do_not_stay_where_users_look() -> None:
    booster, model, optimizer = boosted(ALONE, LowLevelZeroPlugin(precision="bf16"))
    loss, _ = model(**batches_of(0, 0, 1)[0])
    booster.backward(loss, optimizer)
    assert all(p.grad is None for p in model.unwrap().parameters())
    assert optimizer.get_grad_norm() > 0  # type: ignore[operator]
    optimizer.zero_grad()
    assert optimizer.get_grad_norm() is None


def test_backward_after_the_clip_is_refused() -> None:
    booster, model, optimizer = boosted(ALONE, LowLevelZeroPlugin(precision="fp32"))
    booster.backward(model(**batches_of(0, 0, 1)[0])[0], optimizer)
    optimizer.clip_grad_by_norm(1.0)
    with pytest.raises(RuntimeError, match="clip once"):
        booster.backward(model(**batches_of(0, 0, 1)[0])[0], optimizer)


def test_fp16_without_the_boosters_backward_is_refused() -> None:
    _, model, optimizer = boosted(ALONE, LowLevelZeroPlugin(precision="fp16"))
    with pytest.raises(RuntimeError, match=r"booster\.backward"):
        model(**batches_of(0, 0, 1)[0])[0].backward()
    with pytest.raises(RuntimeError, match=r"booster\.backward"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stage": 3}, "TorchFSDPPlugin"),
        ({"precision": "int8"}, "precision is one of"),
        ({"communication_dtype": torch.float16}, "reduced in fp32"),
        ({"master_weights": False}, "master_weights=True"),
        ({"max_norm": -1.0}, "max_norm"),
        ({"reduce_bucket_size_in_m": 0}, "reduce_bucket_size_in_m"),
        ({"initial_scale": 2.0**40}, "initial_scale"),
        ({"growth_factor": 0.5}, "growth_factor"),
        ({"hysteresis": 0}, "hysteresis"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LowLevelZeroPlugin(**options)


def test_what_cannot_be_sharded_is_refused_before_the_model_changes() -> None:
    model = awkward()
    with pytest.raises(ConfigError, match="LBFGS"):
        Booster(plugin=LowLevelZeroPlugin(), world=ALONE).boost(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ConfigError, match=r"model\.float"):
        Booster(plugin=LowLevelZeroPlugin(), world=ALONE).boost(copy.deepcopy(model).double())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_plugins_own_bound_clips_where_the_loop_does_not() -> None:
    mine = boosted(ALONE, LowLevelZeroPlugin(precision="fp32", max_norm=0.5))
    theirs = boosted(ALONE, LowLevelZeroPlugin(precision="fp32"))
    for (booster, model, optimizer), clip in ((mine, 0.0), (theirs, 0.5)):
        booster.backward(model(**batches_of(0, 0, 1)[0])[0], optimizer)
        if clip:
            optimizer.clip_grad_by_norm(clip)
        optimizer.step()
    for a, b in zip(mine[1].unwrap().parameters(), theirs[1].unwrap().parameters(), strict=True):
        assert torch.equal(a, b)


def late_case(world: World, reentrant: bool) -> dict[str, Any]:
    """Steps whose branch no rank expects any more, or whose gradients come in two parts."""
    booster, model, optimizer = boosted(world, LowLevelZeroPlugin(precision="fp32", reduce_bucket_size_in_m=0.002))
    inner = model.unwrap()
    if reentrant:
        plain = inner.first.forward
        inner.first.forward = lambda x: torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=True)
    # Even steps leave the branch out, so that it is not waited for in the odd ones.
    numbers = train(booster, model, optimizer, range(STEPS), 2, 0.5)
    return {"numbers": numbers, "weights": {name: p.tolist() for name, p in inner.named_parameters()}}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_that_nobody_waits_for_still_count(run_case: Run, world_size: int, reentrant: bool) -> None:
    wanted = by_hand(world_size, accumulate=2, clip=0.5)
    for result in run_case(late_case, world_size, reentrant=reentrant):
        assert_same(result, wanted)


class Fails(torch.autograd.Function):
    """Passes a tensor through, and fails in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004  torch's signature
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004  torch's signature
        raise ValueError("planted")


def failing_case(world: World, where: str) -> dict[str, Any]:
    """A step that fails on the last rank, and good ones after it."""
    booster, model, optimizer = boosted(world, LowLevelZeroPlugin(precision="fp32", reduce_bucket_size_in_m=0.002))
    inner = model.unwrap()
    last = booster.world.rank == booster.world.world_size - 1
    layer = {"early": inner.last, "late": inner.embedding}[where]
    said = ""
    handle = layer.register_forward_hook(lambda *call: Fails.apply(call[-1])) if last else None
    try:
        train(booster, model, optimizer, range(1), 2, 0.5)
    except (ValueError, AlbireoError) as error:
        said = str(error)
    if handle is not None:
        handle.remove()
    numbers = train(booster, model, optimizer, range(STEPS), 2, 0.5)
    weights = {name: p.tolist() for name, p in inner.named_parameters()}
    return {"said": said, "numbers": numbers, "weights": weights}


@pytest.mark.parametrize("where", ["early", "late"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_backward_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(
    run_case: Run, world_size: int, where: str
) -> None:
    results = run_case(failing_case, world_size, where=where)
    wanted = by_hand(world_size, accumulate=2, clip=0.5)
    for rank, result in enumerate(results):
        assert ("planted" if rank == world_size - 1 else "another rank") in result["said"]
        assert_same(result, wanted)


def uneven_case(world: World) -> str:
    booster, model, optimizer = boosted(world, LowLevelZeroPlugin(precision="fp32"))
    try:
        train(booster, model, optimizer, range(1), 1 + booster.world.rank, 0.0)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_come_with_different_numbers_of_micro_batches_are_refused(run_case: Run) -> None:
    assert all("1 to 2 micro-batches" in said for said in run_case(uneven_case, 2))


def unequal_case(world: World) -> list[float]:
    torch.manual_seed(100 + world.rank)
    model = Awkward()
    booster = Booster(plugin=LowLevelZeroPlugin(precision="fp32"), world=World(world.rank, world.world_size, 0, CPU))
    booster.boost(model, optimizer_of(model))
    return [float(p.detach().double().sum()) for p in model.parameters()]


def test_ranks_that_begin_with_different_weights_take_the_main_ranks(run_case: Run) -> None:
    first, second = run_case(unequal_case, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100)
        wanted = [float(p.detach().double().sum()) for p in Awkward().parameters()]
    assert first == second == wanted


def kept_local_case(world: World) -> dict[str, Any]:
    """All of a step's backwards are kept local; the step itself sends them."""
    booster, model, optimizer = boosted(world, LowLevelZeroPlugin(precision="fp32"))
    for step in range(STEPS):
        batches = batches_of(step, booster.world.rank, 1)
        total = booster.world.sum_in_place(torch.tensor(float(sum(tokens_of(batches)))))
        with booster.no_sync(model, optimizer):
            booster.backward(model(**batches[0])[0] * (booster.world.world_size / total), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.tolist() for name, p in model.unwrap().named_parameters()}


def test_a_step_sends_what_was_only_kept_local(run_case: Run) -> None:
    wanted = by_hand(2)["weights"]
    for weights in run_case(kept_local_case, 2):
        for name, values in wanted.items():
            torch.testing.assert_close(torch.tensor(weights[name]), torch.tensor(values), rtol=0, atol=2e-5)


def test_a_weight_that_somebody_else_wrote_or_moved_is_refused() -> None:
    booster, model, optimizer = boosted(ALONE, LowLevelZeroPlugin(precision="bf16"))
    train(booster, model, optimizer, range(1), 1, 0.0)
    booster.backward(model(**batches_of(0, 0, 1)[0])[0], optimizer)
    with torch.no_grad():
        model.unwrap().last.weight.mul_(2)
    with pytest.raises(RuntimeError, match="written to"):
        optimizer.step()
    booster, model, optimizer = boosted(ALONE, LowLevelZeroPlugin(precision="bf16"))
    model.unwrap().float()
    with pytest.raises(RuntimeError, match="left its place"):
        train(booster, model, optimizer, range(1), 1, 0.0)


def test_a_backward_through_weights_that_have_been_stepped_is_an_error() -> None:
    booster, model, optimizer = boosted(ALONE, LowLevelZeroPlugin(precision="fp32"))
    stale, _ = model(**batches_of(0, 0, 1)[0])
    train(booster, model, optimizer, range(1), 1, 0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        booster.backward(stale, optimizer)


def test_the_users_own_optimizer_does_not_step_behind_the_plugin() -> None:
    model = awkward()
    raw = optimizer_of(model)
    booster = Booster(plugin=LowLevelZeroPlugin(precision="fp32"), world=ALONE)
    wrapped, optimizer, *_ = booster.boost(model, raw)
    booster.backward(wrapped(**batches_of(0, 0, 1)[0])[0], optimizer)
    with pytest.raises(RuntimeError, match="that boost returned"):
        raw.step()
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict({}), lambda: optimizer.add_param_group({})):
        with pytest.raises(ConfigError, match="boost"):
            call()


class Counting(torch.optim.Optimizer):
    """Keeps its count of steps in a group, as some optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "count": 0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"] / group["count"])


def test_an_optimizer_that_counts_in_its_groups_and_its_hooks_see_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albireo.sharding.optimizer._STEP_ELEMENTS", 100)
    model, plain = awkward(), awkward()
    raw, other = Counting(groups(model)), Counting(groups(plain))
    calls: list[int] = []
    raw.register_step_post_hook(lambda *_: calls.append(1))
    booster = Booster(plugin=LowLevelZeroPlugin(precision="fp32", reduce_bucket_size_in_m=0.0001), world=ALONE)
    wrapped, optimizer, *_ = booster.boost(model, raw)
    for step in range(3):
        batches = batches_of(step, 0, 1)
        booster.train_step(wrapped, optimizer, batches, tokens_of(batches))
        loss, _ = plain(**batches[0])
        (loss / tokens_of(batches)[0]).backward()
        other.step()
        other.zero_grad()
    assert len(calls) == 3
    assert [group["count"] for group in raw.param_groups] == [3, 3]
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_steps_in_parts_are_one_step_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = boosted(ALONE, LowLevelZeroPlugin(precision="bf16"))
    train(*whole, range(STEPS), 1, 0.5)
    monkeypatch.setattr("albireo.sharding.optimizer._STEP_ELEMENTS", 100)
    calls: list[int] = []
    step = HybridAdam.step
    monkeypatch.setattr(HybridAdam, "step", lambda *args: (calls.append(1), step(*args))[1])
    parts = boosted(ALONE, LowLevelZeroPlugin(precision="bf16", reduce_bucket_size_in_m=0.0001))
    train(*parts, range(STEPS), 1, 0.5)
    assert len(calls) > 2 * STEPS
    for mine, theirs in zip(parts[1].unwrap().parameters(), whole[1].unwrap().parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_states_from_before_come_along_and_adagrad_has_some() -> None:
    def trained(plugin: Plugin) -> list[torch.Tensor]:
        model = awkward()
        optimizer = torch.optim.Adagrad(
            [p for p in model.parameters() if p.requires_grad], lr=0.1, initial_accumulator_value=0.5
        )
        model(**batches_of(1, 0, 1)[0])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        booster = Booster(plugin=plugin, world=ALONE)
        wrapped, boosted_optimizer, *_ = booster.boost(model, optimizer)
        train(booster, wrapped, boosted_optimizer, range(2), 1, 0.5)
        return list(model.parameters())

    for mine, theirs in zip(trained(LowLevelZeroPlugin(precision="fp32")), trained(TorchDDPPlugin()), strict=True):
        assert torch.equal(mine, theirs)


def test_norms_over_batches_keep_their_means_in_fp32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    booster = Booster(plugin=LowLevelZeroPlugin(precision="bf16"), world=ALONE)
    wrapped, optimizer, criterion, *_ = booster.boost(
        model, HybridAdam(model.parameters(), lr=1e-2), nn.CrossEntropyLoss()
    )
    losses = []
    for _ in range(8):
        images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        loss = criterion(wrapped(images), torch.arange(8) % 2)
        assert loss.dtype == torch.float32
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert model[1].weight.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].running_mean.dtype == torch.float32


def test_what_would_be_untied_or_lost_is_refused() -> None:
    booster = Booster(plugin=LowLevelZeroPlugin(precision="fp32"), world=ALONE)
    model = awkward()
    model.last.bias.data = model.embedding.weight.data[0]
    with pytest.raises(ConfigError, match="share their memory"):
        booster.boost(model, optimizer_of(model))
    model = awkward()
    with pytest.raises(ConfigError, match="not the model's"):
        booster.boost(model, HybridAdam([*model.parameters(), nn.Parameter(torch.zeros(3))]))
    model.first.weight = nn.Parameter(torch.zeros(67, 19, dtype=torch.complex64))
    with pytest.raises(ConfigError, match="complex64"):
        booster.boost(model, HybridAdam(model.last.parameters()))
