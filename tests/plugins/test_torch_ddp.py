"""What the plugin wraps, saves and loads, and what an overflow in fp16 leaves on every rank."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from albireo.booster import Booster
from albireo.checkpoint import Checkpoint, OneRank, Snapshot, open_checkpoint, save_checkpoint, whole
from albireo.distributed import World
from albireo.errors import CheckpointError, ConfigError
from albireo.optim import OptimizerWrapper, ScaledOptimizer, adamw, decay_groups
from albireo.plugins import ModelWrapper, TorchDDPPlugin

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)

Run = Callable[..., list[Any]]


class Regression(nn.Module):
    """A model with a buffer, whose forward returns a sum and a count as the training step wants them."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 2))
        self.register_buffer("offset", torch.full((2,), 0.5))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.layers(inputs) + self.offset
        return outputs.float().square().sum(), torch.tensor(len(inputs))


def make(world: World, precision: str = "fp32", **options: Any) -> tuple[Booster, ModelWrapper, OptimizerWrapper]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Regression()
    booster = Booster(
        plugin=TorchDDPPlugin(precision=precision, **options), world=World(world.rank, world.world_size, 0, CPU)
    )
    boosted, optimizer, *_ = booster.boost(model, adamw(decay_groups(model.named_parameters(), 0.1), 0.01))
    assert optimizer is not None
    return booster, boosted, optimizer


def inputs_of(step: int, rank: int) -> dict[str, torch.Tensor]:
    return {"inputs": torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * step + rank))}


def names_of(model: ModelWrapper) -> dict[torch.Tensor, str]:
    inner = model.unwrap()
    return {tensor: name for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]}


def bits_of(model: ModelWrapper, optimizer: OptimizerWrapper) -> str:
    """A digest of weights, moments and step counts."""
    tensors = [parameter.detach() for parameter in model.unwrap().parameters()]
    for state in optimizer.unwrap().state.values():
        assert sorted(state) == ["exp_avg", "exp_avg_sq", "step"]
        tensors += [state[key] for key in sorted(state)]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def overflow_case(world: World, *, who: str, accumulate: int) -> dict[str, Any]:
    """A good step, steps that overflow until the scale has come down, and good steps again."""
    booster, model, optimizer = make(world, "fp16")
    scale = 2.0**31

    def step(number: int) -> float:
        micro_batches = []
        for micro_batch in range(accumulate):
            batch = inputs_of(number, world.rank + 100 * micro_batch)
            if who == "one rank" and world.rank != world.world_size - 1:
                batch["inputs"] = torch.zeros(0, 3)  # no loss, so a gradient of zero, which no scale makes infinite
            micro_batches.append(batch)
        tokens = [len(batch["inputs"]) for batch in micro_batches]
        return booster.train_step(model, optimizer, micro_batches, tokens, max_norm=1.0).grad_norm.item()

    norms = [step(0)]
    optimizer.load_scaler_state({**optimizer.scaler_state(), "scale": scale})
    skipped = 0
    before = bits_of(model, optimizer)
    while True:
        norms.append(step(1))
        after = bits_of(model, optimizer)
        if after != before:
            break
        skipped += 1
        assert not norms[-1] < float("inf")
        assert optimizer.scaler_state()["scale"] == scale / 2**skipped
        assert skipped < 40
    assert norms[-1] < float("inf")
    return {"skipped": skipped, "scaler": optimizer.scaler_state(), "bits": after, "good": [norms[0], norms[-1]]}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("who", ["all ranks", "one rank"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_overflow_changes_nothing_but_the_scale_on_any_rank(
    run_case: Run, world_size: int, who: str, accumulate: int
) -> None:
    results = run_case(overflow_case, world_size, who=who, accumulate=accumulate)
    assert results[0]["skipped"] > 2
    assert results[0]["scaler"]["scale"] == 2.0 ** (31 - results[0]["skipped"])
    assert all(result == results[0] for result in results)


def nan_case(world: World) -> list[float]:
    """What fp32 makes of a gradient that is not a number on one rank: nobody hides it, nobody differs."""
    booster, model, optimizer = make(world)
    batch = inputs_of(0, world.rank)
    if world.rank == 0:
        batch["inputs"][0, 0] = float("nan")
    output = booster.train_step(model, optimizer, [batch], [5], max_norm=1.0)
    finite = sum(int(torch.isfinite(parameter).sum()) for parameter in model.parameters())
    return [float(torch.isfinite(output.grad_norm)), float(finite)]


def test_a_gradient_that_is_no_number_is_hidden_on_no_rank(two_ranks: Any) -> None:
    assert two_ranks.run(nan_case) == [[0.0, 0.0]] * 2


def wrapping_case(world: World) -> list[bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody should be warned of what he has not asked for
        booster, model, _ = make(world, "bf16")
    seen: list[torch.dtype] = []
    model.unwrap().layers[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        model.evaluation_module(**inputs_of(0, world.rank))
        model(**inputs_of(0, world.rank))
    with booster.no_sync(model):
        unsynced = not getattr(model.module, "require_backward_grad_sync", False)
    return [
        isinstance(model.module, DistributedDataParallel),
        isinstance(model.evaluation_module, DistributedDataParallel),
        unsynced,
        seen == [torch.bfloat16] * 2,
        len(list(model.parameters())) == len(list(model.unwrap().parameters())) == 6,
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_only_several_ranks_are_wrapped_for_communication(run_case: Run, world_size: int) -> None:
    assert run_case(wrapping_case, world_size) == [[world_size > 1, False, True, True, True]] * world_size


def static_graph_case(world: World) -> str:
    booster, model, _ = make(world, static_graph=True)
    try:
        with booster.no_sync(model):
            return "not refused"
    except ConfigError as error:
        return str(error)


def test_a_static_graph_is_refused_with_accumulation(two_ranks: Any) -> None:
    for said in two_ranks.run(static_graph_case):
        assert "static_graph" in said
        assert "leave it out" in said


def test_a_loss_scale_is_for_fp16_alone() -> None:
    for precision in ("fp32", "bf16", "fp16"):
        _, _, optimizer = make(ALONE, precision)
        assert isinstance(optimizer, ScaledOptimizer) == (precision == "fp16")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="precision is one of fp32, fp16, bf16, not 'fp8'"):
        TorchDDPPlugin(precision="fp8")


def trained(world: World = ALONE) -> tuple[Booster, ModelWrapper, OptimizerWrapper]:
    booster, model, optimizer = make(world)
    for step in range(3):
        booster.train_step(model, optimizer, [inputs_of(step, world.rank)], [5])
    return booster, model, optimizer


def saved(folder: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Checkpoint:
    """A checkpoint of a trained model, altered."""
    booster, model, optimizer = trained()
    slices = booster.plugin.export_state(model, optimizer, names_of(model), ALONE)
    tensors = {piece.name: piece.data.view(piece.shape) for piece in slices}
    if change is not None:
        change(tensors)
    snapshot = Snapshot(step=3, slices=[whole(name, tensor) for name, tensor in tensors.items()])
    return open_checkpoint(save_checkpoint(folder, snapshot, ranks=OneRank(), keep=1))


def import_into(fresh: tuple[Booster, ModelWrapper, OptimizerWrapper], checkpoint: Checkpoint) -> None:
    booster, model, optimizer = fresh
    booster.plugin.import_state(model, optimizer, names_of(model), checkpoint)


def test_only_the_main_rank_exports() -> None:
    booster, model, optimizer = trained()
    names = names_of(model)
    assert list(booster.plugin.export_state(model, optimizer, names, World(1, 2, 1, CPU))) == []
    exported = [piece.name for piece in booster.plugin.export_state(model, optimizer, names, ALONE)]
    assert len(exported) == len(set(exported)) == 7 + 3 * 6
    assert "model/offset" in exported
    assert "optimizer/exp_avg_sq/layers.1.bias" in exported
    without = [piece.name for piece in booster.plugin.export_state(model, None, names, ALONE)]
    assert without == [name for name in exported if name.startswith("model/")]


def test_what_was_exported_is_imported_to_the_bit(tmp_path: Path) -> None:
    _, model, optimizer = trained()
    fresh = make(ALONE)
    checkpoint = saved(tmp_path)
    import_into(fresh, checkpoint)
    assert bits_of(*fresh[1:]) == bits_of(model, optimizer)
    # And it goes on as the other does.
    again, other = [trained(), fresh]
    for booster, wrapper, stepping in (again, other):
        booster.train_step(wrapper, stepping, [inputs_of(9, 0)], [5])
    assert bits_of(*again[1:]) == bits_of(*other[1:])


def test_weights_alone_can_be_imported(tmp_path: Path) -> None:
    booster, model, _ = make(ALONE)
    checkpoint = saved(tmp_path)
    booster.plugin.import_state(model, None, names_of(model), checkpoint)
    expected = dict(trained()[1].unwrap().named_parameters())
    for name, parameter in model.unwrap().named_parameters():
        assert torch.equal(parameter, expected[name])


def pop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, tensor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (pop("model/layers.0.weight"), "has no model/layers.0.weight"),
        (pop("model/offset"), "has no model/offset"),
        (put("model/layers.3.weight", torch.zeros(2)), "has model/layers.3.weight, which this model has not"),
        (put("model/layers.0.weight", torch.zeros(5, 3)), "model/layers.0.weight has shape (5, 3)"),
        (put("model/layers.0.bias", torch.zeros(4, dtype=torch.bfloat16)), "model/layers.0.bias is torch.bfloat16"),
        (pop("optimizer/exp_avg_sq/layers.0.weight"), "no optimizer state exp_avg_sq/layers.0.weight"),
        (pop("optimizer/step/layers.2.bias"), "no optimizer state step/layers.2.bias"),
        (put("optimizer/exp_avg/layers.9.bias", torch.zeros(2)), "states of layers.9.bias"),
        (put("optimizer/exp_avg/layers.0.bias", torch.zeros(7)), "exp_avg/layers.0.bias has shape (7,)"),
        (put("optimizer/momentum/layers.0.bias", torch.zeros(4)), "no optimizer state momentum/layers."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    checkpoint = saved(tmp_path, change)
    with pytest.raises(CheckpointError) as raised:
        import_into(make(ALONE), checkpoint)
    assert said in str(raised.value)


def test_a_run_that_made_no_step_has_no_states_and_can_be_loaded(tmp_path: Path) -> None:
    booster, model, optimizer = make(ALONE)
    slices = booster.plugin.export_state(model, optimizer, names_of(model), ALONE)
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, Snapshot(0, slices), ranks=OneRank(), keep=1))
    for other in (make(ALONE), trained()):  # what another run had learnt is forgotten
        import_into(other, checkpoint)
        assert other[2].unwrap().state == {}
        assert bits_of(*other[1:]) == bits_of(model, optimizer)
