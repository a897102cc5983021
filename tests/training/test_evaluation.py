"""Evaluation counts every sample once, on however many ranks, and touches nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import small_opt
from torch import nn
from transformers import OPTForCausalLM

from albireo.booster import Booster
from albireo.data import Batch, RandomTokens, evaluation_batches
from albireo.device import capture_random_state
from albireo.distributed import World
from albireo.errors import DataError
from albireo.models import OPT
from albireo.optim import adamw, decay_groups
from albireo.plugins import ModelWrapper, TorchDDPPlugin
from albireo.training.causal_lm import CausalLanguageModel
from albireo.training.evaluation import evaluate
from albireo.training.recipe import Evaluation
from albireo.training.session import Session

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
VOCABULARY, LENGTH = 41, 9

Run = Callable[..., list[Any]]


class Labelled:
    """Random tokens of which some do not count: here few, there all."""

    def __init__(self, size: int) -> None:
        self._tokens = RandomTokens(size, LENGTH, VOCABULARY, 3)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._tokens[index]["input_ids"]
        places = torch.rand(LENGTH, generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": torch.where(places < (index % 5) / 4, -100, ids)}


def make(world: World, precision: str = "fp32", dropout: float = 0.5) -> tuple[OPTForCausalLM, ModelWrapper]:
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "num_hidden_layers": 2}
    model = small_opt(seed=4, dropout=dropout, init_std=0.2, **sizes)
    optimizer = adamw(decay_groups(model.named_parameters(), 0.0), 1e-3)
    booster = Booster(plugin=TorchDDPPlugin(precision=precision), world=world)
    boosted, *_ = booster.boost(CausalLanguageModel(model, OPT), optimizer)
    return model, boosted


def plain_loss(model: OPTForCausalLM, data: Any) -> float:
    """The mean over all counted tokens, a sample at a time, in fp64."""
    twin = OPTForCausalLM(model.config).double().eval()
    twin.load_state_dict(model.state_dict())
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for index in range(len(data)):
            sample = data[index]
            labels = sample.get("labels", sample["input_ids"])[1:]
            logits = twin(input_ids=sample["input_ids"][None]).logits[0, :-1]
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            tokens += int((labels != -100).sum())
    return loss / tokens


def evaluation_case(world: World, *, size: int, labelled: bool, precision: str) -> dict[str, Any]:
    world = World(world.rank, world.world_size, world.local_rank, CPU)
    data: Any = Labelled(size) if labelled else RandomTokens(size, LENGTH, VOCABULARY, 3)
    model, boosted = make(world, precision)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    before = capture_random_state(CPU)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    loss = evaluate(boosted, evaluation_batches(data, 2, world.rank, world.world_size), world)
    after = capture_random_state(CPU)
    with torch.random.fork_rng(devices=[]):
        expected = plain_loss(model, data)
    return {
        "loss": loss,
        "expected": expected,
        "training": boosted.training and all(module.training for module in boosted.modules()),
        "random": all(torch.equal(before[name], after[name]) for name in before),
        "gradients": all(bool((parameter.grad == 0.25).all()) for parameter in model.parameters()),
        "weights": all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True)),
        "again": evaluate(boosted, evaluation_batches(data, 2, world.rank, world.world_size), world),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("size", "labelled"), [(1, False), (13, False), (16, False), (13, True)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_sample_counts_once_and_nothing_moves(
    run_case: Run, world_size: int, size: int, labelled: bool, precision: str
) -> None:
    for result in run_case(evaluation_case, world_size, size=size, labelled=labelled, precision=precision):
        assert result["loss"] == pytest.approx(result["expected"], rel=1e-6 if precision == "fp32" else 1e-2)
        assert result["again"] == result["loss"]
        assert all(result[key] for key in ("training", "random", "gradients", "weights"))


def test_parts_that_were_at_rest_stay_at_rest() -> None:
    model, boosted = make(ALONE)
    model.model.decoder.layers[0].eval()
    modes = {name: module.training for name, module in boosted.named_modules()}
    evaluate(boosted, evaluation_batches(RandomTokens(2, LENGTH, VOCABULARY, 0), 2), ALONE)
    assert {name: module.training for name, module in boosted.named_modules()} == modes


def test_a_batch_that_fails_leaves_the_model_in_training() -> None:
    _, boosted = make(ALONE)
    ids = torch.full((1, LENGTH), VOCABULARY)
    with pytest.raises(IndexError):
        evaluate(boosted, [Batch(ids, ids, LENGTH - 1)], ALONE)
    assert all(module.training for module in boosted.modules())


def test_nothing_to_count_is_said() -> None:
    _, boosted = make(ALONE)
    ids = torch.zeros((1, LENGTH), dtype=torch.int64)
    with pytest.raises(DataError, match="no token"):
        evaluate(boosted, [Batch(ids, torch.full_like(ids, -100), 0)], ALONE)


def test_weights_that_are_no_numbers_give_a_loss_that_is_none() -> None:
    model, boosted = make(ALONE)
    nn.init.constant_(model.model.decoder.final_layer_norm.weight, float("nan"))
    loss = evaluate(boosted, evaluation_batches(RandomTokens(2, LENGTH, VOCABULARY, 0), 2), ALONE)
    assert loss != loss


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_are_pinned_for_a_gpu_alone(device: str) -> None:
    pinned = []

    def batches(*_: Any, pin: bool) -> list[Batch]:
        pinned.append(pin)
        return []

    nothing = SimpleNamespace(drain=lambda: None, start_clock=lambda: None, evaluation=lambda *_: None)
    session: Any = SimpleNamespace(
        config=SimpleNamespace(schedule=SimpleNamespace(eval_every=1)),
        recipe=SimpleNamespace(evaluate=lambda *_: Evaluation(1.0)),
        _evaluated_step=-1,
        step=0,
        recorder=nothing,
        layout=SimpleNamespace(batch_size=2),
        data=SimpleNamespace(evaluation=batches),
        world=World(0, 1, 0, torch.device(device)),
        model=None,
    )
    Session.evaluate(session)
    assert pinned == [device == "cuda"]
