"""A run's state goes to the disk and comes back to the bit; what belongs to another run is refused by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import small_opt

from albireo.booster import Booster
from albireo.checkpoint import OneRank, Snapshot, open_checkpoint, save_checkpoint, tensor_names, whole
from albireo.device import capture_random_state, restore_random_state, seed_everything
from albireo.distributed import World
from albireo.errors import CheckpointError
from albireo.files import FileOperations
from albireo.models import OPT
from albireo.optim import adamw, decay_groups, scheduler_for
from albireo.plugins import TorchDDPPlugin
from albireo.training.causal_lm import CausalLanguageModel
from albireo.training.saving import Position, RunState

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
VOCABULARY, LENGTH = 41, 9

Run = Callable[..., list[Any]]


def make(
    world: World = ALONE, precision: str = "fp32", *, seed: int = 4, layers: int = 1, width: int = 16, tied: bool = True
) -> RunState:
    model = small_opt(
        seed=seed,
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        max_position_embeddings=LENGTH,
        dropout=0.3,
        init_std=0.2,
        tie_word_embeddings=tied,
    )
    inner = adamw(decay_groups(model.named_parameters(), 0.1), 1e-2)
    scheduler = scheduler_for(inner, steps=8, warmup_steps=2, schedule="cosine")
    booster = Booster(plugin=TorchDDPPlugin(precision=precision), world=World(world.rank, world.world_size, 0, CPU))
    boosted, optimizer, *_ = booster.boost(CausalLanguageModel(model, OPT), inner)
    assert optimizer is not None
    names, aliases = tensor_names(model)
    return RunState(booster, boosted, optimizer, scheduler, names, aliases, {"data": "stories", "recipe": "opt"})


def train(state: RunState, first: int, last: int) -> list[list[float]]:
    """Make steps; dropout draws from the process's own generator, wherever that stands."""
    rows = []
    for step in range(first, last):
        batches = []
        for micro_batch in range(2):
            seed = 100 * step + 10 * state.booster.world.rank + micro_batch
            ids = torch.randint(2, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
            batches.append({"input_ids": ids, "labels": ids})
        output = state.booster.train_step(
            state.model, state.optimizer, batches, [2 * (LENGTH - 1)] * 2, lr_scheduler=state.scheduler, max_norm=1.0
        )
        rows.append([output.loss_sum.item(), output.grad_norm.item(), state.scheduler.get_last_lr()[0]])
    return rows


def bits_of(state: RunState) -> str:
    tensors = [tensor.detach() for tensor in state.names]
    for part in state.optimizer.unwrap().state.values():
        tensors += [part[key] for key in sorted(part)]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def continuing_case(world: World, *, folder: str, precision: str) -> dict[str, Any]:
    before = capture_random_state(CPU)
    try:
        seed_everything(7, world.rank)
        straight = make(world, precision)
        if precision == "fp16":  # a scale that overflows at the start, and has counted good steps at the end
            straight.optimizer.load_scaler_state({**straight.optimizer.scaler_state(), "scale": 2.0**20})
        train(straight, 0, 4)
        straight.save(Path(folder), Position(4, 64), keep=1, files=FileOperations())
        expected = train(straight, 4, 8)

        seed_everything(99)
        resumed = make(world, precision, seed=5)
        if world.world_size == 1:
            train(resumed, 0, 1)  # an optimizer that has states of its own
        position = resumed.load(open_checkpoint(Path(folder) / "step-00000004"))
        found = train(resumed, 4, 8)
        return {
            "position": [position.step, position.samples],
            "expected": expected,
            "found": found,
            "bits": [bits_of(straight), bits_of(resumed)],
            "scaler": [straight.optimizer.scaler_state(), resumed.optimizer.scaler_state()],
        }
    finally:
        restore_random_state(before, CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(
    run_case: Run, tmp_path: Path, world_size: int, precision: str
) -> None:
    results = run_case(continuing_case, world_size, folder=str(tmp_path), precision=precision)
    for result in results:
        assert result["position"] == [4, 64]
        assert result["found"] == result["expected"]
        assert result["bits"][0] == result["bits"][1] == results[0]["bits"][0]
        assert result["scaler"][0] == result["scaler"][1] == results[0]["scaler"][0]
    if precision == "fp16":
        assert results[0]["scaler"][0]["scale"] < 2.0**20
        assert results[0]["scaler"][0]["_growth_tracker"] > 0
    if world_size > 1:  # each rank drew masks of its own, and its own texts
        assert results[0]["found"][0][0] != results[1]["found"][0][0]


def saving_case(world: World, *, folder: str) -> None:
    state = make(world)
    train(state, 0, 2)
    state.save(Path(folder), Position(2, 16), keep=1, files=FileOperations())


def loading_case(world: World, *, folder: str) -> list[Any]:
    before = capture_random_state(CPU)
    state = make(world, seed=9)
    position = state.load(open_checkpoint(Path(folder) / "step-00000002"))
    after = capture_random_state(CPU)
    drawn = [name for name in before if not torch.equal(before[name], after[name])]
    restore_random_state(before, CPU)
    return [position.step, bits_of(state), drawn]


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 2), (2, 1), (2, 4)])
def test_another_number_of_ranks_goes_on_with_the_same_weights(
    run_case: Run, tmp_path: Path, saved_by: int, loaded_by: int
) -> None:
    run_case(saving_case, saved_by, folder=str(tmp_path))
    results = run_case(loading_case, saved_by, folder=str(tmp_path))
    others = run_case(loading_case, loaded_by, folder=str(tmp_path))
    assert len({(step, bits) for step, bits, _ in [*results, *others]}) == 1
    # The random states of so many ranks fit no other number of them: nobody takes another rank's.
    assert all(drawn == [] for _, _, drawn in others)


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of one rank; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    state = make()
    random_state = capture_random_state(CPU)
    train(state, 0, 2)
    restore_random_state(random_state, CPU)
    state.save(folder, Position(2, 16), keep=1, files=FileOperations())
    return folder / "step-00000002"


def test_saving_changes_nothing(tmp_path: Path) -> None:
    state = make()
    bits, before = bits_of(state), capture_random_state(CPU)
    state.save(tmp_path, Position(0, 0), keep=1, files=FileOperations())
    after = capture_random_state(CPU)
    assert bits_of(state) == bits
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tied_weight_is_saved_once_and_read_by_either_name(one_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(one_checkpoint)
    assert checkpoint.aliases == {"model/lm_head.weight": "model/model.decoder.embed_tokens.weight"}
    first, second = (checkpoint.read(name) for name in ("model/lm_head.weight", *checkpoint.aliases.values()))
    assert torch.equal(first, second)
    moments = checkpoint.names("optimizer/exp_avg/")
    assert "optimizer/exp_avg/model.decoder.embed_tokens.weight" in moments
    assert not any("lm_head" in name for name in moments)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: make(layers=2), "has no model/model.decoder.layers.1."),
        (lambda: make(width=32), "has shape"),
        (lambda: make(tied=False), "has no model/lm_head.weight"),
    ],
    ids=["more layers", "wider", "untied"],
)
def test_another_model_is_refused(one_checkpoint: Path, other: Callable[[], RunState], said: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        other().load(open_checkpoint(one_checkpoint))
    assert said in str(raised.value)
    assert "another" in str(raised.value)


def test_fewer_layers_are_refused_too(tmp_path: Path) -> None:
    make(layers=2).save(tmp_path, Position(1, 8), keep=1, files=FileOperations())
    with pytest.raises(CheckpointError, match=r"has model/model\.decoder\.layers\.1\..*, which this model has not"):
        make().load(open_checkpoint(tmp_path / "step-00000001"))


@pytest.mark.parametrize(("key", "then"), [("data", "stories"), ("recipe", "opt")])
def test_other_data_are_refused(one_checkpoint: Path, key: str, then: str) -> None:
    state = make()
    state.identity = {**state.identity, key: "other"}
    before = bits_of(state)
    with pytest.raises(CheckpointError, match=f"made with another {key}: {then} then, other now; give what it was"):
        state.load(open_checkpoint(one_checkpoint))
    assert bits_of(state) == before


def altered(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The same tensors under another shared state, with all checksums right."""
    checkpoint = open_checkpoint(source)
    shared: dict[str, Any] = dict(checkpoint.shared_state)
    change(shared)
    names = sorted(set(checkpoint.names()) - set(checkpoint.aliases))
    slices = [whole(name, checkpoint.read(name).view(checkpoint.info(name).shape)) for name in names]
    aliases: Mapping[str, str] = checkpoint.aliases
    snapshot = Snapshot(step=2, slices=slices, shared_state=shared, aliases=aliases)
    return save_checkpoint(folder, snapshot, ranks=OneRank(), keep=1)


@pytest.mark.parametrize("key", ["step", "samples", "scheduler", "scaler"])
@pytest.mark.parametrize("value", [None, "gone", []], ids=["missing", "a word", "a list"])
def test_a_checkpoint_that_does_not_say_where_it_stands_is_refused(
    one_checkpoint: Path, tmp_path: Path, key: str, value: object
) -> None:
    path = altered(
        one_checkpoint, tmp_path, lambda shared: shared.pop(key) if value is None else shared.update({key: value})
    )
    with pytest.raises(CheckpointError, match=f"{key}"):
        make().load(open_checkpoint(path))


def test_one_of_another_program_is_refused(one_checkpoint: Path, tmp_path: Path) -> None:
    path = altered(one_checkpoint, tmp_path, lambda shared: shared.clear())
    with pytest.raises(CheckpointError, match="another data: None then"):
        make().load(open_checkpoint(path))


@pytest.mark.parametrize(("saved_in", "loaded_in"), [("fp32", "fp16"), ("fp16", "fp32"), ("fp16", "bf16")])
def test_another_precision_can_go_on(tmp_path: Path, saved_in: str, loaded_in: str) -> None:
    random_state = capture_random_state(CPU)
    state = make(precision=saved_in)
    train(state, 0, 2)
    state.save(tmp_path, Position(2, 16), keep=1, files=FileOperations())
    other = make(precision=loaded_in, seed=8)
    assert other.load(open_checkpoint(tmp_path / "step-00000002")) == Position(2, 16)
    assert bits_of(other) == bits_of(state)
    assert (other.optimizer.scaler_state() == {}) == (loaded_in != "fp16")
    train(other, 2, 3)
    restore_random_state(random_state, CPU)
