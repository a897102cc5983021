"""Models, optimizers and schedules in files: what comes back, what is refused, and what all ranks learn of a failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from tiny_models import small_opt
from torch import nn
from transformers import AutoModelForCausalLM, OPTForCausalLM

from albireo.booster import Booster
from albireo.distributed import World
from albireo.errors import CheckpointError, ConfigError
from albireo.optim import HybridAdam, OptimizerWrapper
from albireo.plugins import ModelWrapper, TorchDDPPlugin

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


class Tied(nn.Module):
    """Tied weights, a buffer, one that is not saved, and whole numbers."""

    def __init__(self, seed: int = 1, width: int = 6) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.table = nn.Embedding(5, width)
            self.layers = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
            self.head = nn.Linear(width, 5)
        self.head.weight = self.table.weight
        self.register_buffer("offset", torch.full((), float(seed)))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.table(ids))) + self.offset


def make(
    seed: int = 1, *, precision: str = "fp32", width: int = 6, rate: float = 1e-2, world: World = ALONE
) -> tuple[Booster, ModelWrapper, OptimizerWrapper, torch.optim.lr_scheduler.LRScheduler]:
    model = Tied(seed, width)
    biases = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    inner = HybridAdam(groups, lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(inner, T_max=20)
    booster = Booster(plugin=TorchDDPPlugin(precision=precision), world=world)
    boosted, optimizer, *_ = booster.boost(model, inner)
    return booster, boosted, optimizer, scheduler


def train(made: Any, steps: range) -> None:
    booster, model, optimizer, scheduler = made
    for step in steps:
        ids = torch.randint(0, 5, (4,), generator=torch.Generator().manual_seed(step))
        booster.backward(model(ids).float().square().sum(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def everything(made: Any) -> dict[str, torch.Tensor]:
    """Copies of all that a step depends on."""
    _, model, optimizer, _ = made
    inner = model.unwrap()
    found = {name: tensor.detach().clone() for name, tensor in inner.state_dict().items()}
    for name, parameter in inner.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{key}/{name}"] = value.clone()
    return found


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def save(made: Any, folder: Path, *, shard: bool) -> None:
    booster, model, optimizer, scheduler = made
    end = "" if shard else "model.safetensors"
    booster.save_model(model, folder / end, shard=shard, size_per_shard=1)
    booster.save_optimizer(optimizer, str(folder / (end and "optimizer.safetensors")), shard=shard)
    booster.save_lr_scheduler(scheduler, folder / "schedule")


def load(made: Any, folder: Path, *, shard: bool) -> None:
    booster, model, optimizer, scheduler = made
    assert booster.load_model(model, str(folder / ("" if shard else "model.safetensors"))) == ([], [])
    booster.load_optimizer(optimizer, folder / ("" if shard else "optimizer.safetensors"))
    booster.load_lr_scheduler(scheduler, folder / "schedule")


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loop_goes_on_to_the_bit(tmp_path: Path, shard: bool, precision: str) -> None:
    made = make(precision=precision)
    train(made, range(3))
    save(made, tmp_path, shard=shard)
    other = make(2, precision=precision, rate=0.5)
    load(other, tmp_path, shard=shard)
    assert_same(everything(other), everything(made))
    assert other[2].scaler_state() == made[2].scaler_state()
    assert other[2].param_groups[0]["lr"] == made[2].param_groups[0]["lr"] != 0.5
    assert other[1].unwrap().head.weight is other[1].unwrap().table.weight
    for one in (made, other):
        train(one, range(3, 6))
    assert_same(everything(other), everything(made))
    assert other[3].get_last_lr() == made[3].get_last_lr()
    # A second save into the same place is the one that is read.
    save(made, tmp_path, shard=shard)
    again = make(3, precision=precision)
    load(again, tmp_path, shard=shard)
    assert_same(everything(again), everything(made))


def test_tied_weights_are_one_in_the_file(tmp_path: Path) -> None:
    made = make()
    made[0].save_model(made[1], tmp_path / "m.safetensors", prefix="net.")
    names = set(load_file(tmp_path / "m.safetensors"))
    assert names == {f"net.{name}" for name in Tied().state_dict() if name != "head.weight"}


def rewritten(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    made = make(5)
    made[0].save_model(made[1], tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def test_either_name_of_tied_weights_will_do(tmp_path: Path) -> None:
    def move(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.weight"] = tensors.pop("table.weight")

    booster, model, *_ = make()
    assert booster.load_model(model, rewritten(tmp_path, move)) == ([], [])
    assert torch.equal(model.unwrap().table.weight, Tied(5).table.weight)

    def both(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.weight"] = tensors["table.weight"].clone()

    assert booster.load_model(model, rewritten(tmp_path, both)) == ([], [])

    def different(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.weight"] = tensors["table.weight"] + 1

    with pytest.raises(CheckpointError, match=r"other values for head\.weight than for table\.weight"):
        booster.load_model(model, rewritten(tmp_path, different))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("layers.0.bias"), "lacks layers.0.bias, which the model has"),
        (lambda tensors: tensors.pop("offset"), "lacks offset"),
        (lambda tensors: tensors.update({"more": torch.zeros(1), "much": torch.zeros(1)}), "holds more and 1 more"),
        (lambda tensors: tensors.update({"head.bias": torch.zeros(4)}), r"head.bias of shape \(4,\)"),
        (lambda tensors: tensors.update({"head.bias": torch.zeros(5, dtype=torch.int64)}), "torch.int64"),
    ],
)
def test_another_models_file_is_named_and_fills_nothing(tmp_path: Path, change: Any, said: str) -> None:
    path = rewritten(tmp_path, change)
    made = make()
    before = everything(made)
    with pytest.raises(CheckpointError, match=said):
        made[0].load_model(made[1], path)
    assert_same(everything(made), before)


def test_what_is_not_strict_says_what_it_left(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["more"] = tensors.pop("layers.0.bias")

    booster, model, *_ = make()
    left = booster.load_model(model, rewritten(tmp_path, change), strict=False)
    assert (left.missing_keys, left.unexpected_keys) == (["layers.0.bias"], ["more"])
    inner = model.unwrap()
    assert torch.equal(inner.layers[0].weight, Tied(5).layers[0].weight)
    assert torch.equal(inner.layers[0].bias, Tied(1).layers[0].bias)

    def shape(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.bias"] = torch.zeros(4)

    with pytest.raises(CheckpointError, match=r"head.bias of shape \(4,\)"):
        booster.load_model(model, rewritten(tmp_path, shape), strict=False)


def test_weights_of_another_precision_are_cast(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items() if tensor.is_floating_point()})

    booster, model, *_ = make()
    booster.load_model(model, rewritten(tmp_path, change))
    assert torch.equal(model.unwrap().table.weight, Tied(5).table.weight.bfloat16().float())


def test_a_folder_of_a_transformers_model_is_one_of_hugging_face(tmp_path: Path) -> None:
    booster = Booster(world=ALONE)
    model, *_ = booster.boost(small_opt(seed=1))
    booster.save_model(model, tmp_path, shard=True)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(read) is OPTForCausalLM
    assert_same(dict(read.state_dict()), dict(model.unwrap().state_dict()))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["OPTForCausalLM"]
    # And the other way round: what transformers saved, in one file or in several.
    for size in ("1GB", "2KB"):
        folder = tmp_path / size
        small_opt(seed=2).save_pretrained(folder, max_shard_size=size)
        other, *_ = booster.boost(small_opt(seed=3))
        assert booster.load_model(other, folder) == ([], [])
        assert_same(dict(other.unwrap().state_dict()), dict(small_opt(seed=2).state_dict()))


def test_a_parameter_that_the_model_has_not_goes_by_its_place(tmp_path: Path) -> None:
    model, extra = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    booster = Booster(world=ALONE)
    boosted, optimizer, *_ = booster.boost(model, torch.optim.SGD([*model.parameters(), extra], lr=1, momentum=0.5))
    booster.backward(boosted(torch.ones(1, 2)).sum() + extra.sum(), optimizer)
    optimizer.step()
    booster.save_optimizer(optimizer, tmp_path / "o")
    assert set(load_file(tmp_path / "o")) == {
        "momentum_buffer/weight",
        "momentum_buffer/bias",
        "momentum_buffer/param_groups.0.params.2",
    }
    momentum = optimizer.state[extra]["momentum_buffer"].clone()
    optimizer.state[extra]["momentum_buffer"].zero_()
    booster.load_optimizer(optimizer, tmp_path / "o")
    assert torch.equal(optimizer.state[extra]["momentum_buffer"], momentum)


def test_the_count_of_steps_lies_where_the_optimizer_counts(tmp_path: Path) -> None:
    for fused in (True, False):
        model = nn.Linear(2, 2)
        booster = Booster(world=ALONE)
        boosted, optimizer, *_ = booster.boost(model, torch.optim.AdamW(model.parameters(), fused=fused))
        booster.backward(boosted(torch.ones(1, 2)).sum(), optimizer)
        optimizer.step()
        booster.save_optimizer(optimizer, tmp_path / "o")
        booster.load_optimizer(optimizer, tmp_path / "o")
        optimizer.step()
        assert optimizer.state[model.weight]["step"] == 2


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: make(width=7), r"exp_avg/.* has shape|of shape"),
        (lambda: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1), "2 groups of parameters, and this one 1"),
    ],
)
def test_another_optimizers_file_is_named(tmp_path: Path, other: Any, said: str) -> None:
    made = make()
    train(made, range(1))
    made[0].save_optimizer(made[2], tmp_path / "o")
    second = other()
    optimizer = second[2] if isinstance(second, tuple) else OptimizerWrapper(second)
    with pytest.raises(CheckpointError, match=said):
        made[0].load_optimizer(optimizer, tmp_path / "o")
    made[0].save_model(made[1], tmp_path / "m")
    with pytest.raises(CheckpointError, match="was not written by save_optimizer"):
        made[0].load_optimizer(made[2], tmp_path / "m")


SCHEDULERS: list[Callable[[torch.optim.Optimizer], Any]] = [
    lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 4]),
    lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=20),
    lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, 3, cycle_momentum=False),
    lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        ],
        [3],
    ),
]


@pytest.mark.parametrize("build", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's SequentialLR calls its parts so
def test_schedules_of_torch_go_on(tmp_path: Path, build: Callable[[torch.optim.Optimizer], Any]) -> None:
    booster = Booster(world=ALONE)
    rates = []
    for steps_before in (5, 0):
        model = nn.Linear(2, 2)
        inner = torch.optim.SGD(model.parameters(), lr=0.5)
        scheduler = build(inner)
        _, optimizer, *_ = booster.boost(model, inner)
        for _ in range(steps_before):
            optimizer.step()
            scheduler.step()
        if steps_before:
            booster.save_lr_scheduler(scheduler, tmp_path / "s")
            booster.save_optimizer(optimizer, tmp_path / "o")
        else:
            booster.load_lr_scheduler(scheduler, tmp_path / "s")
            booster.load_optimizer(optimizer, tmp_path / "o")
        seen = []
        for _ in range(6):
            optimizer.step()
            scheduler.step()
            seen.append(inner.param_groups[0]["lr"])
        rates.append(seen)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1 or "MultiStep" in type(scheduler).__name__


def test_a_schedule_that_waits_for_a_plateau_begins_at_infinity(tmp_path: Path) -> None:
    booster = Booster(world=ALONE)
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(inner)
    booster.save_lr_scheduler(scheduler, tmp_path / "s")
    scheduler.step(3.0)
    booster.load_lr_scheduler(scheduler, tmp_path / "s")
    assert scheduler.best == float("inf")


class Odd:
    def state_dict(self) -> dict[str, Any]:
        return {"tensor": torch.zeros(1)}


def test_schedules_that_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    booster, _, _, scheduler = make()
    with pytest.raises(CheckpointError, match=r"the state of Odd\.tensor is a Tensor, which JSON cannot hold"):
        booster.save_lr_scheduler(Odd(), tmp_path / "s.json")
    booster.save_lr_scheduler(scheduler, tmp_path / "s.json")
    with pytest.raises(CheckpointError, match="is of a CosineAnnealingLR, and a Odd is to go on"):
        booster.load_lr_scheduler(Odd(), tmp_path / "s.json")
    (tmp_path / "s.json").write_bytes((tmp_path / "s.json").read_bytes().replace(b'"T_max": 20', b'"T_max": 21'))
    with pytest.raises(CheckpointError, match="was altered"):
        booster.load_lr_scheduler(scheduler, tmp_path / "s.json")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        booster.load_lr_scheduler(scheduler, tmp_path / "none.json")


def test_names_of_pickles_are_refused_everywhere(tmp_path: Path) -> None:
    booster, model, optimizer, scheduler = make()
    for save_or_load, thing, instead in (
        (booster.save_model, model, "x.safetensors"),
        (booster.load_model, model, "x.safetensors"),
        (booster.save_optimizer, optimizer, "x.safetensors"),
        (booster.load_optimizer, optimizer, "x.safetensors"),
        (booster.save_lr_scheduler, scheduler, "x.json"),
        (booster.load_lr_scheduler, scheduler, "x.json"),
    ):
        with pytest.raises(CheckpointError, match=f"name it {instead}"):
            save_or_load(thing, tmp_path / "x.pt")  # type: ignore[operator]
    assert not list(tmp_path.iterdir())


def test_options_that_are_not_there_are_refused(tmp_path: Path) -> None:
    booster, model, optimizer, _ = make()
    path = tmp_path / "x"
    for call, said in (
        (lambda: booster.save_model(model, path, gather_dtensor=False), "leave gather_dtensor=True"),
        (lambda: booster.save_model(model, path, use_async=True), "use_async is not there"),
        (lambda: booster.save_optimizer(optimizer, path, use_async=True), "use_async is not there"),
        (lambda: booster.save_optimizer(optimizer, path, prefix="x"), "leave prefix out"),
        (lambda: booster.save_model(model.unwrap(), path), "that boost returned, not a Tied"),  # type: ignore[arg-type]
        (lambda: booster.load_optimizer(optimizer.unwrap(), path), "that boost returned, not a HybridAdam"),  # type: ignore[arg-type]
        (lambda: booster.save_model(model, tmp_path), "is a folder, and one file is to be written"),
    ):
        expected = CheckpointError if "is a folder" in said else ConfigError
        with pytest.raises(expected, match=said):
            call()
    assert not list(tmp_path.iterdir())


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_what_is_no_tensor_is_named(tmp_path: Path) -> None:
    booster = Booster(world=ALONE)
    model, optimizer, *_ = booster.boost(Extra(2, 2), None)
    with pytest.raises(CheckpointError, match="_extra_state is neither parameter nor buffer"):
        booster.save_model(model, tmp_path / "m")
    weight = nn.Parameter(torch.zeros(2))
    lbfgs = torch.optim.LBFGS([weight])
    _, optimizer, *_ = booster.boost(nn.Linear(1, 1), lbfgs)
    optimizer.step(weight.sum)
    with pytest.raises(CheckpointError, match="only tensors can be saved"):
        booster.save_optimizer(optimizer, tmp_path / "o")


def ranks_case(world: World, *, folder: str) -> dict[str, Any]:
    made = make(world.rank, world=World(world.rank, world.world_size, world.local_rank, CPU))
    booster, model, optimizer, _ = made
    train(made, range(2))
    path = Path(folder)
    save(made, path, shard=True)
    saved = everything(made)
    # All are through as soon as one is: what is read is whole.
    other = make(7, world=booster.world)
    load(other, path, shard=True)
    differing = [name for name, tensor in everything(other).items() if not torch.equal(tensor, saved[name])]
    said = []
    (path / "file").touch()
    for call in (
        lambda: booster.save_model(model, path / "file", shard=True),  # only the main rank writes
        lambda: booster.load_model(model, path if world.is_main else path / "nothing"),
        lambda: booster.load_optimizer(optimizer, path if world.is_main else path / "nothing"),
    ):
        try:
            call()
            said.append("nothing raised")
        except CheckpointError as error:
            said.append(str(error))
    world.barrier()
    return {"differing": differing, "said": said}


def test_ranks_save_and_load_as_one_and_fail_as_one(two_ranks: RankPool, tmp_path: Path) -> None:
    first, second = two_ranks.run(ranks_case, folder=str(tmp_path))
    assert first["differing"] == second["differing"] == []
    assert "several files are to be written" in first["said"][0]
    assert second["said"][0].startswith("the main rank could not save: ")
    for number in (1, 2):
        assert first["said"][number] == "rank 1 failed; its own message says why"
        assert "there is no file and no folder" in second["said"][number]
    shutil.rmtree(tmp_path)
