"""FSDP2 against one process in plain PyTorch: the same weights after some steps, whatever is unused, frozen or tied."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ragged_steps import batches_of, optimizer_of, tokens_of, train
from torch import nn
from torch.distributed.fsdp import FSDPModule

from albireo.booster import Booster
from albireo.checkpoint import Snapshot, open_checkpoint, save_checkpoint, tensor_names
from albireo.distributed import World
from albireo.distributed.local_group import process_group
from albireo.errors import CheckpointError, ConfigError
from albireo.optim import HybridAdam, OptimizerWrapper
from albireo.plugins import ModelWrapper, Plugin, TorchDDPPlugin, TorchFSDPPlugin
from albireo.plugins.fully_sharded import choose_blocks, first_element

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
POOLS = {2: "two_ranks", 4: "four_ranks"}
STEPS = 4

Run = Callable[..., list[Any]]


@pytest.fixture
def run_case(request: pytest.FixtureRequest) -> Run:
    """Run a case on so many ranks: on one in this process, on more in a pool."""

    def run(case: Callable[..., Any], world_size: int, **arguments: Any) -> list[Any]:
        if world_size == 1:
            with process_group(ALONE):
                return [case(ALONE, **arguments)]
        return request.getfixturevalue(POOLS[world_size]).run(case, **arguments)

    return run


class Block(nn.Module):
    """A frozen layer and a trained one in a group; odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(19)
        self.up = nn.Linear(19, 37)
        self.frozen = nn.Linear(37, 37).requires_grad_(requires_grad=False)
        self.down = nn.Linear(37, 19)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(self.frozen(torch.relu(self.up(self.norm(hidden)))))


class Awkward(nn.Module):
    """Blocks, a branch that only some batches take, one that none takes, a tied head, fewer rows than ranks."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 19)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.branch = nn.Linear(19, 19, bias=False)
        self.never = nn.Linear(3, 5)
        self.head = nn.Linear(19, 37, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("shift", torch.full((19,), 0.25))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, *, branch: bool) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        if branch:
            hidden = hidden + self.branch(hidden)
        logits = self.head(hidden * self.scale + self.shift.to(hidden.dtype))
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


def exported(booster: Booster, model: ModelWrapper) -> dict[str, list[Any]]:
    """This rank's weights: where they begin, and their elements."""
    names, _ = tensor_names(model.unwrap())
    parts = booster.plugin.export_model(model, names, booster.world)
    return {part.name.removeprefix("model/"): [part.start, part.data.tolist()] for part in parts}


def together(parts: list[dict[str, list[Any]]]) -> dict[str, list[float]]:
    """Put all ranks' parts of each weight together: no gap, nothing twice."""
    whole: dict[str, list[float]] = {}
    for part in parts:
        for name, (start, values) in part.items():
            assert start == len(whole.setdefault(name, [])), name
            whole[name] += values
    return whole


def case(
    world: World,
    accumulate: int = 1,
    clip: float = 0.0,
    tied: bool = True,
    kind: str = "HybridAdam",
    precision: str = "fp32",
    options: dict[str, bool] | None = None,
    evaluate: bool = False,
) -> dict[str, Any]:
    options = dict(options or {})
    classes: Any = (Block,) if options.pop("by_class", False) else None
    classes = () if options.pop("no_blocks", False) else classes
    plugin = TorchFSDPPlugin(precision=precision, block_classes=classes, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody should be warned of what he has not asked for
        booster, model, optimizer = boosted(world, plugin, tied=tied, kind=kind)
        numbers = []
        for step in range(STEPS):
            numbers += train(booster, model, optimizer, range(step, step + 1), accumulate, clip)
            if evaluate:
                with torch.no_grad():
                    model.evaluation_module(**batches_of(step, world.rank, 1)[0])
    return {"numbers": numbers, "weights": exported(booster, model)}


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
    names, _ = tensor_names(model)
    return {"numbers": numbers, "weights": {name: tensor.reshape(-1).tolist() for tensor, name in names.items()}}


def assert_same_weights(got: Mapping[str, list[float]], wanted: Mapping[str, list[float]], tolerance: float) -> None:
    assert got.keys() == {name for name, values in wanted.items() if values} | (got.keys() & {"nothing"})
    for name, values in wanted.items():
        torch.testing.assert_close(torch.tensor(got.get(name, [])), torch.tensor(values), rtol=0, atol=tolerance)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    "how",
    [
        {"accumulate": 1, "clip": 0.0},
        {"accumulate": 3, "clip": 0.5},
        {"accumulate": 2, "clip": 0.5, "tied": False, "options": {"cpu_offload": True}},
        {"accumulate": 1, "clip": 0.5, "kind": "SGD", "options": {"no_blocks": True}},
        {"accumulate": 2, "clip": 0.0, "kind": "AdamW", "options": {"by_class": True, "reshard_after_forward": False}},
        {"accumulate": 1, "clip": 0.5, "evaluate": True},
    ],
    ids=lambda how: "-".join(f"{key}={value}" for key, value in how.items()),
)
def test_it_is_one_process_in_plain_pytorch(run_case: Run, world_size: int, how: dict[str, Any]) -> None:
    results = run_case(case, world_size, **how)
    wanted = by_hand(world_size, **{key: how[key] for key in ("accumulate", "clip", "tied", "kind") if key in how})
    for result in results:
        assert torch.allclose(torch.tensor(result["numbers"]), torch.tensor(wanted["numbers"]), rtol=2e-5, atol=0)
        # Every rank has the same norm, to the bit.
        assert [norm for _, norm in result["numbers"]] == [norm for _, norm in results[0]["numbers"]]
    # Adam turns rounding noise in an element with next to no gradient into a part of a whole step, which is 1e-2.
    assert_same_weights(together([result["weights"] for result in results]), wanted["weights"], 2e-4)


def test_alone_in_fp32_it_is_torch_ddp_to_the_bit() -> None:
    plain = boosted(ALONE, TorchDDPPlugin())
    numbers = train(*plain, range(STEPS), 2, 0.5)
    with process_group(ALONE):
        sharded = boosted(ALONE, TorchFSDPPlugin())
        assert train(*sharded, range(STEPS), 2, 0.5) == numbers
        mine, theirs = exported(*sharded[:2]), exported(*plain[:2])
    assert mine == theirs


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sixteen_bits_compute_and_fp32_is_stepped(precision: str) -> None:
    """One step of two micro-batches by hand: 16-bit copies, gradients added up and clipped in fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    batches = batches_of(1, 0, 2)
    total = sum(tokens_of(batches))
    masters, copies = awkward(), awkward().to(dtype)
    copies.shift = masters.shift  # buffers stay as they are
    sums: dict[str, torch.Tensor] = {}
    scale = 2.0**16 if precision == "fp16" else 1.0
    for batch in batches:
        loss, _ = copies(**batch)
        (loss * (1.0 / total) * scale).backward()
        for name, parameter in copies.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0) + parameter.grad.float()
                parameter.grad = None
    norm = torch.linalg.vector_norm(torch.stack([g.double().norm() for g in sums.values()])) / scale
    for name, parameter in masters.named_parameters():
        if name in sums:
            parameter.grad = sums[name] / scale * min(1.0, 0.5 / (float(norm) + 1e-6))
    optimizer_of(masters).step()

    with process_group(ALONE):
        booster, model, optimizer = boosted(ALONE, TorchFSDPPlugin(precision=precision))
        output = booster.train_step(model, optimizer, batches, tokens_of(batches), max_norm=0.5)
        assert float(output.grad_norm) == pytest.approx(float(norm), rel=1e-6)
        got = together([exported(booster, model)])
    names, _ = tensor_names(masters)
    for tensor, name in names.items():
        torch.testing.assert_close(
            torch.tensor(got[name]), tensor.detach().reshape(-1), rtol=0, atol=1e-6, check_dtype=False
        )


class Normed(nn.Module):
    """A norm over batches, whose running means 16 bits could not add up."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))])

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.layers[0](inputs)
        return outputs.float().square().sum(), torch.tensor(len(inputs))


def test_a_norm_over_batches_keeps_fp32_weights() -> None:
    model = Normed()
    seen: list[torch.dtype] = []
    for layer in model.layers[0]:
        layer.register_forward_pre_hook(lambda module, inputs: seen.extend([inputs[0].dtype, module.weight.dtype]))
    with process_group(ALONE):
        booster = Booster(plugin=TorchFSDPPlugin(precision="bf16"), world=ALONE)
        wrapped, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters(), lr=0.1))
        booster.train_step(wrapped, optimizer, {"inputs": torch.randn(5, 3)}, 5)
    assert seen == [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]


def skip_case(world: World, kind: str) -> dict[str, Any]:
    """A step whose gradient overflows on the last rank alone, between two good ones."""
    booster, model, optimizer = boosted(world, TorchFSDPPlugin(precision="fp16"), kind=kind)
    optimizer.load_scaler_state({"scale": 2.0**10})
    train(booster, model, optimizer, range(1), 1, 0.5)

    def everything() -> dict[str, list[float]]:
        names, _ = tensor_names(model.unwrap())
        parts = booster.plugin.export_state(model, optimizer, names, booster.world)
        return {f"{part.name}@{part.start}": part.data.float().tolist() for part in parts}

    before = everything()
    loss, _ = model(**batches_of(2, booster.world.rank, 1)[0])
    last = booster.world.rank == booster.world.world_size - 1
    booster.backward(loss * (1e30 if last else 1.0), optimizer)
    norm = float(optimizer.clip_grad_by_norm(0.5))
    optimizer.step()
    optimizer.zero_grad()
    unchanged = everything() == before
    scale = optimizer.scaler_state()["scale"]
    train(booster, model, optimizer, range(2, 3), 1, 0.5)
    return {
        "finite": norm == norm and abs(norm) != float("inf"),
        "unchanged": unchanged,
        "scale": scale,
        "moved": everything() != before,
        "counts": sorted({int(s["step"]) for s in optimizer.unwrap().state.values()}),
    }


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["HybridAdam", "AdamW"])
def test_an_overflow_on_one_rank_leaves_no_trace_on_any(run_case: Run, world_size: int, kind: str) -> None:
    for result in run_case(skip_case, world_size, kind=kind):
        assert result == {"finite": False, "unchanged": True, "scale": 2.0**9, "moved": True, "counts": [2]}


def no_sync_case(world: World) -> dict[str, Any]:
    """A loop of the user's own, which first gives up a step that it has begun."""
    booster, model, optimizer = boosted(world, TorchFSDPPlugin())
    with booster.no_sync(model, optimizer):
        booster.backward(model(**batches_of(9, world.rank, 1)[0])[0], optimizer)
    optimizer.zero_grad()
    for step in range(STEPS):
        batches = batches_of(step, world.rank, 2)
        total = booster.world.sum_in_place(torch.tensor(float(sum(tokens_of(batches)))))
        factor = booster.world.world_size / total
        with booster.no_sync(model, optimizer):
            booster.backward(model(**batches[0])[0] * factor, optimizer)
            nothing_sent = all(p.grad is None for p in model.unwrap().parameters())
        booster.backward(model(**batches[1])[0] * factor, optimizer)
        assert nothing_sent
        optimizer.step()
        optimizer.zero_grad()
    return exported(booster, model)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loop_of_the_users_own_accumulates_with_no_sync(run_case: Run, world_size: int) -> None:
    wanted = by_hand(world_size, accumulate=2)["weights"]
    assert_same_weights(together(run_case(no_sync_case, world_size)), wanted, 2e-5)


def abandoned_case(world: World, precision: str) -> list[float]:
    """What was added up in a step that was given up must not be in the next one."""
    norms = []
    for gives_up in (False, True):
        booster, model, optimizer = boosted(world, TorchFSDPPlugin(precision=precision))
        if gives_up:
            with booster.no_sync(model):
                for _ in range(2):
                    booster.backward(model(**batches_of(9, world.rank, 1)[0])[0], optimizer)
            optimizer.zero_grad()
        booster.backward(model(**batches_of(0, world.rank, 1)[0])[0], optimizer)
        norms.append(float(optimizer.clip_grad_by_norm(0.0)))
    return norms


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_was_given_up_leaves_no_gradients(run_case: Run, precision: str) -> None:
    for first, second in run_case(abandoned_case, 2, precision=precision):
        assert first == second


def failing_case(world: World) -> list[list[float]]:
    """A forward that fails on every rank, and then the same step again."""
    booster, model, optimizer = boosted(world, TorchFSDPPlugin())
    wrong = batches_of(0, world.rank, 1)[0] | {"ids": torch.full((2, 6), 99)}
    with pytest.raises(IndexError):
        booster.train_step(model, optimizer, wrong, 12)
    return train(booster, model, optimizer, range(2), 1, 0.5)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_failed_can_be_taken_again(run_case: Run, world_size: int) -> None:
    wanted = torch.tensor(by_hand(world_size, clip=0.5)["numbers"][:2])
    for numbers in run_case(failing_case, world_size):
        assert torch.allclose(torch.tensor(numbers), wanted, rtol=2e-5, atol=0)


def save_case(world: World, folder: str, precision: str) -> list[list[float]]:
    """Train two steps, save, and train two more."""
    booster, model, optimizer = boosted(world, TorchFSDPPlugin(precision=precision))
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


def load_case(world: World, folder: str, precision: str) -> list[list[float]]:
    booster, model, optimizer = boosted(world, TorchFSDPPlugin(precision=precision))
    train(booster, model, optimizer, range(1), 1, 0.5)  # what is there is to be forgotten
    model(**batches_of(0, 0, 1)[0])  # and the whole weights that a forward without a backward leaves too
    names, _ = tensor_names(model.unwrap())
    checkpoint = open_checkpoint(Path(folder) / "step-00000002")
    booster.plugin.import_state(model, optimizer, names, checkpoint)
    optimizer.load_scaler_state(checkpoint.shared_state["scaler"])
    return train(booster, model, optimizer, range(2, STEPS), 1, 0.5)


@pytest.mark.parametrize(("world_size", "precision"), [(1, "fp32"), (2, "fp32"), (2, "fp16"), (4, "bf16")])
def test_what_is_saved_goes_on_to_the_bit(run_case: Run, tmp_path: Path, world_size: int, precision: str) -> None:
    saved = run_case(save_case, world_size, folder=str(tmp_path), precision=precision)
    assert run_case(load_case, world_size, folder=str(tmp_path), precision=precision) == saved


def test_a_checkpoint_of_two_ranks_is_the_plain_plugins_too(run_case: Run, tmp_path: Path) -> None:
    saved = run_case(save_case, 2, folder=str(tmp_path), precision="fp32")
    booster, model, optimizer = boosted(ALONE, TorchDDPPlugin())
    names, _ = tensor_names(model.unwrap())
    booster.plugin.import_state(model, optimizer, names, open_checkpoint(tmp_path / "step-00000002"))
    for step, (loss, norm) in zip(range(2, STEPS), saved[0], strict=True):
        batches = [batch for rank in range(2) for batch in batches_of(step, rank, 1)]
        output = booster.train_step(model, optimizer, batches, tokens_of(batches), max_norm=0.5)
        assert float(output.loss) == pytest.approx(loss, rel=2e-5)
        assert float(output.grad_norm) == pytest.approx(norm, rel=2e-5)


def files_case(world: World, folder: str) -> dict[str, Any]:
    """Save with the facade, and load into fresh ones."""
    booster, model, optimizer = boosted(world, TorchFSDPPlugin())
    train(booster, model, optimizer, range(2), 1, 0.0)
    booster.save_model(model, Path(folder) / "sharded", shard=True, size_per_shard=1)
    booster.save_model(model, Path(folder) / "model.safetensors")
    booster.save_optimizer(optimizer, Path(folder) / "optimizer.safetensors")
    numbers = train(booster, model, optimizer, range(2, STEPS), 1, 0.0)
    same = []
    for name in ("sharded", "model.safetensors"):
        fresh = boosted(world, TorchFSDPPlugin())
        assert fresh[0].load_model(fresh[1], Path(folder) / name) == ([], [])
        fresh[0].load_optimizer(fresh[2], Path(folder) / "optimizer.safetensors")
        same.append(train(*fresh, range(2, STEPS), 1, 0.0) == numbers)
    return {"same": same, "rows": next(iter(model.unwrap().parameters())).shape}


def test_files_hold_whole_tensors_and_load_again(run_case: Run, tmp_path: Path) -> None:
    for result in run_case(files_case, 2, folder=str(tmp_path)):
        assert result["same"] == [True, True]
    # Anybody else can read them.
    booster, model, optimizer = boosted(ALONE, TorchDDPPlugin())
    booster.load_model(model, tmp_path / "sharded")
    booster.load_optimizer(optimizer, tmp_path / "optimizer.safetensors")
    plain = awkward()
    steps = optimizer_of(plain)
    for step in range(2):
        batches = [batch for rank in range(2) for batch in batches_of(step, rank, 1)]
        for batch in batches:
            (plain(**batch)[0] / sum(tokens_of(batches))).backward()
        steps.step()
        steps.zero_grad()
    for mine, theirs in zip(model.unwrap().parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


def gradients_case(world: World) -> dict[str, list[Any]]:
    booster, model, optimizer = boosted(world, TorchFSDPPlugin(precision="fp16"))
    optimizer.load_scaler_state({"scale": 2.0**8})
    batches = batches_of(1, world.rank, 1)
    found: dict[str, list[Any]] = {}

    def look(stage: str) -> None:
        for part in booster.plugin.export_gradients(optimizer, optimizer.names, booster.world):
            found.setdefault(f"{stage} {part.name}", [part.start, part.data.tolist()])

    booster.train_step(model, optimizer, batches, tokens_of(batches), max_norm=0.25, observe=look)
    return found


def test_gradients_are_shown_without_the_scale_and_clipped_later(two_ranks: Any) -> None:
    whole = together(two_ranks.run(gradients_case))
    reduced = torch.cat([torch.tensor(v).double() for name, v in whole.items() if name.startswith("reduced ")])
    clipped = torch.cat([torch.tensor(v).double() for name, v in whole.items() if name.startswith("clipped ")])
    model = awkward()
    batches = [batch for rank in range(2) for batch in batches_of(1, rank, 1)]
    for batch in batches:
        (model(**batch)[0] / sum(tokens_of(batches))).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name.removeprefix("reduced gradient/") for name in whole if name.startswith("reduced ")} == set(wanted)
    for name, gradient in wanted.items():
        got = torch.tensor(whole[f"reduced gradient/{name}"])
        torch.testing.assert_close(got, gradient.reshape(-1), rtol=0.05, atol=5e-3)
    assert float(clipped.norm()) == pytest.approx(0.25, rel=1e-3)
    torch.testing.assert_close(clipped * float(reduced.norm()) / 0.25, reduced, rtol=1e-3, atol=1e-6)


def equal_case(world: World) -> dict[str, list[Any]]:
    model = Awkward()  # from each process's own random state
    torch.manual_seed(world.rank)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    booster = Booster(plugin=TorchFSDPPlugin(), world=World(world.rank, world.world_size, 0, CPU))
    return exported(booster, booster.boost(model)[0])


def test_all_ranks_begin_with_the_main_ranks_weights(two_ranks: Any) -> None:
    got = together(two_ranks.run(equal_case))
    with torch.random.fork_rng(devices=[]):
        model = Awkward()
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    assert got["blocks.1.down.weight"] == model.blocks[1].down.weight.reshape(-1).tolist()


def test_blocks_are_the_members_of_lists() -> None:
    model = awkward()
    assert choose_blocks(model) == list(model.blocks)
    assert choose_blocks(model, (nn.Linear,)) == [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "head"  # the head's weight is the embedding's too
    ]
    assert choose_blocks(model, ()) == []


def test_blocks_that_share_a_weight_with_others_are_the_roots() -> None:
    lists = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([nn.ReLU(), Block()])])
    lists[1][1].up.weight = lists[0][1].up.weight
    model = nn.Sequential(nn.Linear(2, 2), lists)
    assert choose_blocks(model) == [lists[0][0]]


@pytest.mark.parametrize("shape", [(7, 3), (1, 5), (4,), (3, 2, 2), (0, 2)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_rows_are_dealt_as_torch_deals_them(shape: tuple[int, ...], world_size: int) -> None:
    chunks = list(torch.zeros(shape).chunk(world_size))
    counts = [chunk.numel() for chunk in chunks] + [0] * (world_size - len(chunks))
    for rank in range(world_size):
        assert first_element(shape, rank, world_size) == sum(counts[:rank])


def test_what_cannot_be_sharded_is_refused_before_anything_changes() -> None:
    model = awkward()
    plugin = TorchFSDPPlugin()
    with pytest.raises(ConfigError, match=r"call albireo\.launch_from_torch"):
        plugin.configure(model, None, ALONE)
    assert not isinstance(model, FSDPModule)
    with process_group(ALONE):
        for change, said in (
            (lambda m: setattr(m, "scale", nn.Parameter(torch.tensor(1.0))), "give it the shape"),
            (lambda m: m.double(), r"call model.float\(\) first"),
            (lambda m: setattr(m.branch, "weight", nn.Parameter(m.head.weight.data[:19])), "share their memory"),
        ):
            changed = awkward()
            change(changed)
            with pytest.raises(ConfigError, match=said):
                plugin.configure(changed, None, ALONE)
            assert not any(isinstance(module, FSDPModule) for module in changed.modules())
        for optimizer, said in (
            (torch.optim.LBFGS(model.parameters()), "steps a parameter as a whole"),
            (HybridAdam([nn.Parameter(torch.zeros(2))]), "not the model's"),
            (torch.optim.Adagrad(model.parameters()), "has states already"),
        ):
            with pytest.raises(ConfigError, match=said):
                plugin.configure(model, optimizer, ALONE)
        assert not any(isinstance(module, FSDPModule) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_torch_that_cannot_shard_bytes_is_named_with_alternatives(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_torch_2_11_does(module: nn.Module, **_: Any) -> None:
        raise RuntimeError("only Tensors of floating point dtype can require gradients")

    monkeypatch.setattr("albireo.plugins.fully_sharded.fully_shard", as_torch_2_11_does)
    model = nn.Linear(4, 4)
    model.codes = nn.Parameter(torch.zeros(8, dtype=dtype), requires_grad=False)
    optimizer = torch.optim.AdamW([model.weight, model.bias])
    # What else torch refuses is not put down to a quantised base.
    expected, message = (ConfigError, "low_level_zero") if dtype == torch.uint8 else (RuntimeError, "only Tensors")
    with process_group(ALONE), pytest.raises(expected, match=message):
        TorchFSDPPlugin(precision="fp32").configure(model, optimizer, ALONE)


def test_the_optimizer_refuses_what_would_go_wrong_silently() -> None:
    with process_group(ALONE):
        booster, model, optimizer = boosted(ALONE, TorchFSDPPlugin())
        booster.backward(model(**batches_of(0, 0, 1)[0])[0], optimizer)
        assert optimizer.get_grad_norm() > 0  # type: ignore[operator]
        with pytest.raises(RuntimeError, match="the optimizer that boost returned"):
            optimizer.unwrap().step()
        with pytest.raises(ConfigError, match=r"booster\.save_optimizer"):
            optimizer.state_dict()
        with pytest.raises(ConfigError, match="all its groups before boost"):
            optimizer.add_param_group({"params": []})
        with pytest.raises(ConfigError, match="norm_type is 2"):
            optimizer.clip_grad_by_norm(1.0, 1.0)
        optimizer.clip_grad_by_value(1e-3)
        assert max(float(gradient.abs().max()) for gradient in optimizer.gradients()) == pytest.approx(1e-3)
        optimizer.zero_grad()
        assert optimizer.get_grad_norm() is None
        booster, model, optimizer = boosted(ALONE, TorchFSDPPlugin(precision="fp16"))
        model(**batches_of(0, 0, 1)[0])[0].backward()
        with pytest.raises(RuntimeError, match=r"call booster.backward"):
            optimizer.step()
    with pytest.raises(ConfigError, match="precision is one of fp32, fp16, bf16, not 'fp8'"):
        TorchFSDPPlugin(precision="fp8")
    with pytest.raises(ConfigError, match="mixed_precision='fp16' does not go together"):
        Booster(plugin=TorchFSDPPlugin(precision="bf16"), mixed_precision="fp16", world=ALONE)


def test_gradients_take_what_those_of_the_last_backward_did() -> None:
    with process_group(ALONE):
        plugin = TorchFSDPPlugin()
        booster, model, optimizer = boosted(ALONE, plugin)
        expected = plugin.gradient_bytes(model)
        booster.backward(model(**batches_of(0, 0, 1)[0])[0], optimizer)
        unused = sum(p.numel() for p in model.unwrap().parameters() if p.requires_grad and p.grad is None)
        assert expected == sum(g.numel() * g.element_size() for g in optimizer.gradients()) + 4 * unused
        assert TorchFSDPPlugin(cpu_offload=True).gradient_bytes(model) == 0


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    with process_group(ALONE):
        save_case(ALONE, str(tmp_path), "fp32")
        booster, model, optimizer = boosted(ALONE, TorchFSDPPlugin(), tied=False)
        before = exported(booster, model)
        names, _ = tensor_names(model.unwrap())
        with pytest.raises(CheckpointError, match=r"has no model/head.weight"):
            booster.plugin.import_state(model, optimizer, names, open_checkpoint(tmp_path / "step-00000002"))
        assert exported(booster, model) == before


def test_old_weights_do_not_stay_in_memory() -> None:
    model = awkward()
    kept = list(model.parameters())
    optimizer = optimizer_of(model)
    with process_group(ALONE):
        Booster(plugin=TorchFSDPPlugin(), world=ALONE).boost(model, optimizer)
        assert sum(parameter.numel() for parameter in kept) == 0
