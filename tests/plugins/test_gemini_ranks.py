"""Gemini over ranks: what is sharded, gathered and stepped where changes no bit, and all ranks have the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gemini_runs import ALONE, boosted, gemini, joined, late_and_alone, least_bytes, left, slices, train
from gemini_zoo import KINDS
from torch import nn

from albireo.booster import Booster
from albireo.distributed import World
from albireo.memory import Gemini
from albireo.optim import HybridAdam
from albireo.plugins import GeminiPlugin, ModelWrapper, TorchDDPPlugin

Run = Callable[..., list[Any]]

AWAY = {"offload_optim_frac": 1.0, "offload_param_frac": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "here": {"placement_policy": "static", "shard_param_frac": 0.0},
    "sharded": {"placement_policy": "static", "shard_param_frac": 1.0},
    "half sharded": {"shard_param_frac": 0.5},
    "half of all": {"offload_optim_frac": 0.5, "offload_param_frac": 0.5, "shard_param_frac": 0.5},
    "states away": {"offload_optim_frac": 1.0, "shard_param_frac": 0.0},
    "states away, sharded": {"offload_optim_frac": 1.0},
    "weights away": {"offload_param_frac": 1.0},
    "all away": AWAY,
    "all away, no prefetch": {**AWAY, "max_prefetch": 0},
    "auto": {},
    # Of the least that does.
    "auto, no room": {"cap": 1.0},
    "auto, little": {"cap": 1.5, "max_prefetch": 0},
}


def plugin_of(way: str, kind: str, world: World, *, accumulate: int = 1, **options: Any) -> GeminiPlugin:
    how = dict(WAYS[way])
    if "cap" in how:
        least = least_bytes(kind, world=world, accumulate=accumulate, **options)
        how["mem_cap_bytes"] = int(least * how.pop("cap"))
    return gemini(**how, **options)


def cells_case(world: World, kind: str, precision: str, accumulate: int, ways: list[str]) -> dict[str, Any]:
    """Train many ways, and return what came of each: this rank's loss, the norm, and what this rank saves."""
    found = {}
    for way in ways:
        with late_and_alone():
            options: dict[str, Any] = {"precision": precision}
            if any("half" in other for other in ways):
                # Halves end chunks elsewhere, and norms (over more ranks sums too) are added up in an order that depends on it.
                options["min_chunk_size_m"] = 1e-9
            run = boosted(plugin_of(way, kind, world, accumulate=accumulate, **options), kind, world)
            found[way] = {"numbers": train(run, kind, range(3), accumulate, 0.5), "slices": slices(run)}
    return found


@pytest.mark.parametrize(
    ("world_size", "kind", "precision", "accumulate", "ways"),
    [
        (4, "plain", "fp32", 1, ["half sharded", "half of all"]),
        (2, "opt", "fp32", 1, ["here", "sharded", "states away, sharded", "all away", "auto, no room"]),
        (2, "side", "bf16", 2, list(WAYS)),
        (2, "side", "fp16", 1, ["here", "half of all", "all away", "auto, little"]),
        (2, "twice", "fp32", 1, ["here", "half of all", "auto, little"]),
        (2, "frozen", "bf16", 1, ["here", "sharded", "all away", "auto, little"]),
        (2, "lora", "fp32", 2, ["here", "half of all", "all away"]),
        (2, "conv", "bf16", 1, ["here", "sharded", "all away"]),
        (2, "recomputed reentrant", "fp32", 2, ["here", "all away", "auto, little"]),
        (2, "tied blocks", "fp32", 1, ["here", "all away", "auto"]),
        (4, "side", "bf16", 1, ["here", "sharded", "all away", "auto, no room"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_where_parts_are_changes_no_bit(
    run_case: Run, world_size: int, kind: str, precision: str, accumulate: int, ways: list[str]
) -> None:
    results = run_case(cells_case, world_size, kind=kind, precision=precision, accumulate=accumulate, ways=ways)
    saved = {way: joined([result[way]["slices"] for result in results]) for way in ways}
    for way in ways:
        assert saved[way] == saved[ways[0]], way
        assert [result[way]["numbers"] for result in results] == [result[ways[0]]["numbers"] for result in results], way
    # All ranks have one norm, and each its own loss.
    losses, norms = zip(*(zip(*result[ways[0]]["numbers"], strict=True) for result in results), strict=True)
    assert len(set(norms)) == 1
    assert len(set(losses)) == world_size


def plain_case(world: World, kind: str, ways: list[str]) -> list[Any]:
    """Train, and return the numbers and all weights as every rank computes with them."""
    found = []
    for way in ways:
        plugin = (
            TorchDDPPlugin(find_unused_parameters=True) if way == "plain" else plugin_of(way, kind, world, accumulate=2)
        )
        with late_and_alone():
            run = boosted(plugin, kind, world)
            numbers = train(run, kind, accumulate=2, clip=0.5)
            weights = [p.detach().float().flatten().tolist() for p in plugin.readable_weights(run[1])]
        order = {p: n for n, p in enumerate(run[1].unwrap().parameters())}
        found.append([numbers, [w for _, w in sorted(zip(_order(plugin, run[1], order), weights, strict=True))]])
    return found


def _order(plugin: Any, model: ModelWrapper, order: dict[nn.Parameter, int]) -> list[int]:
    return [order[p] for p in plugin.readable_weights(model)]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["side"])
def test_it_is_torchs_own_plugin(run_case: Run, world_size: int, kind: str) -> None:
    results = run_case(plain_case, world_size, kind=kind, ways=["plain", "sharded", "all away", "auto"])
    for result in results:
        plain, *others = result
        for numbers, weights in others:
            assert torch.allclose(torch.tensor(numbers), torch.tensor(plain[0]), rtol=2e-5, atol=0)
            for mine, theirs in zip(weights, plain[1], strict=True):
                torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=0, atol=2e-5)
        # Every rank computes with the same weights, to the bit.
        assert [weights for _, weights in others] == [weights for _, weights in results[0][1:]]


def share_case(world: World) -> list[list[float]]:
    found = []
    for share in (0.0, 0.5, 1.0):
        _, model, _ = boosted(gemini(shard_param_frac=share), "plain", world)
        chunks = gemini_of(model).chunks
        whole = sum(chunk.weight_bytes for chunk in chunks)
        largest = max(chunk.weight_bytes for chunk in chunks)
        alone = sum(chunk.weight_bytes for chunk in chunks if chunk.home_place != "storage")
        found.append([alone / whole, largest / whole])
    return found


def test_so_much_is_sharded_as_was_asked_for(run_case: Run) -> None:
    for result in run_case(share_case, 2):
        for (found, largest), asked in zip(result, (0.0, 0.5, 1.0), strict=True):
            assert abs(found - asked) <= largest
        assert (result[0][0], result[2][0]) == (0.0, 1.0)


def failing_case(world: World, when: str) -> dict[str, Any]:
    """A step that fails on all ranks in forward or backward, and good ones after it."""
    found = {}
    for way in ("sharded", "all away", "auto, little"):
        with late_and_alone():
            wanted = boosted(plugin_of(way, "plain", world, accumulate=2), "plain", world)
            numbers = train(wanted, "plain", range(1, 4), 2, 0.5)
            run = boosted(plugin_of(way, "plain", world, accumulate=2), "plain", world)
            block = run[1].unwrap().blocks[2]
            if when == "forward":
                handle = block.register_forward_pre_hook(_fail)
            else:
                handle = block.register_forward_hook(lambda *call: _Fails.apply(call[-1]))
            said = ""
            try:
                train(run, "plain", range(1), 2, 0.5)
            except ValueError as error:
                said = str(error)
            handle.remove()
            again = train(run, "plain", range(1, 4), 2, 0.5)
            found[way] = {"said": said, "same": again == numbers and left(run) == left(wanted)}
    return found


def _fail(*_: Any) -> None:
    raise ValueError("planted")


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004  torch's signature
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004  torch's signature
        raise ValueError("planted")


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_step_that_fails_leaves_nothing(run_case: Run, when: str) -> None:
    """On all ranks: where one fails alone, the others wait for its weights, and the watchdog ends them."""
    for result in run_case(failing_case, 2, when=when):
        assert result == {way: {"said": "planted", "same": True} for way in ("sharded", "all away", "auto, little")}


def unequal_case(world: World) -> list[float]:
    torch.manual_seed(100 + world.rank)
    model = KINDS["plain"].build()
    booster = Booster(plugin=gemini(), world=World(world.rank, world.world_size, 0, torch.device("cpu")))
    wrapped, *_ = booster.boost(model, HybridAdam(model.parameters()))
    return [float(p.detach().double().sum()) for p in booster.plugin.readable_weights(wrapped)]


def test_ranks_that_begin_with_different_weights_take_the_main_ranks(run_case: Run) -> None:
    first, second = run_case(unequal_case, 2)
    assert first == second
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(100)
        model = KINDS["plain"].build()
        wrapped, *_ = (booster := Booster(plugin=gemini(), world=ALONE)).boost(model, HybridAdam(model.parameters()))
        assert first == [float(p.detach().double().sum()) for p in booster.plugin.readable_weights(wrapped)]


def gemini_of(model: ModelWrapper) -> Gemini:
    return model.gemini  # type: ignore[attr-defined, no-any-return]
