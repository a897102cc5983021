"""A block that is recomputed in backward: the same numbers, nothing kept, and as little computed twice as there is to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from albireo.models import GPT2, OPT, VIT, Family, enable_activation_checkpointing, initialise, materialise
from albireo.models.recomputation import recompute_in_backward


def built(family: Family) -> PreTrainedModel:
    model = family.make_model(family.config_for("tiny", **({} if family is VIT else {"vocab_size": 64})))
    materialise(model, torch.device("cpu"))
    initialise(model, 0)
    return model.train()


def inputs_of(family: Family, model: PreTrainedModel) -> dict[str, Tensor]:
    if family is VIT:
        side = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, side, side), "labels": torch.tensor([0, 1])}
    ids = torch.arange(24).view(2, 12)
    return {"input_ids": ids, "labels": ids, "attention_mask": (torch.arange(12) < torch.tensor([[12], [9]])).long()}


@pytest.mark.parametrize("family", [OPT, GPT2, VIT], ids=["opt", "gpt2", "vit"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_gradients_are_those_of_torchs_own_and_of_no_checkpointing(
    family: Family, autocast: torch.dtype | None
) -> None:
    models = [built(family) for _ in range(3)]
    enable_activation_checkpointing(models[1], preserve_rng_state=False)
    enable_activation_checkpointing(models[2], preserve_rng_state=False, family=family)
    torch.manual_seed(1)
    batch = inputs_of(family, models[0])
    for model in models:
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**batch).loss
        loss.backward()
    wanted = [parameter.grad for parameter in models[0].parameters()]
    assert all(gradient is not None for gradient in wanted)
    for model in models[1:]:
        for want, parameter in zip(wanted, model.parameters(), strict=True):
            assert parameter.grad is not None
            assert torch.equal(want, parameter.grad)  # type: ignore[arg-type]


def test_every_block_but_the_last_runs_twice_and_its_last_product_once() -> None:
    model = built(OPT)
    enable_activation_checkpointing(model, preserve_rng_state=False, family=OPT)
    begun, ended = [], []
    blocks = [block for _, block in OPT.blocks(model)]
    for number, block in enumerate(blocks):
        block.fc1.register_forward_pre_hook(lambda *_, number=number: begun.append(number))
        block.fc2.register_forward_hook(lambda *_, number=number: ended.append(number))
    model(**inputs_of(OPT, model)).loss.backward()
    assert sorted(begun) == sorted([*range(len(blocks)), *range(len(blocks) - 1)])
    assert sorted(ended) == list(range(len(blocks)))


class Block(nn.Module):
    """Saves several tensors for backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        made: Tensor = self.down(torch.tanh(self.up(hidden)))
        return made + hidden


Recompute = Callable[..., Any]


def of_torch(function: Recompute, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def gone_through(recompute: Recompute | None, way: str) -> list[Tensor]:
    """Return gradients of two blocks, gone through in some way."""
    blocks = [Block(), Block()]
    hidden = torch.linspace(-1, 1, 24).view(3, 8).requires_grad_(way != "frozen input")
    if way == "frozen block":
        blocks[0].requires_grad_(False)
    out: Any = hidden
    for block in blocks:
        out = block(out) if recompute is None else recompute(block, out)
    wanted = [t for t in (hidden, *blocks[0].parameters(), *blocks[1].parameters()) if t.requires_grad]
    loss = (out**2).sum()
    if way == "twice":
        once = torch.autograd.grad(loss, wanted, retain_graph=True)
        again = torch.autograd.grad(loss, wanted)
        return [*once, *again]
    if way == "second order":
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return list(torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted))
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("way", ["once", "twice", "second order", "frozen input", "frozen block"])
def test_a_graph_can_be_gone_through_as_any_other(way: str) -> None:
    want, torchs, got = (gone_through(recompute, way) for recompute in (None, of_torch, recompute_in_backward))
    assert len(want) == len(got) == len(torchs)
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_what_is_saved_is_gone_after_forward_and_after_backward() -> None:
    block, alive = Block(), []
    block.up.register_forward_hook(lambda _, __, output: alive.append(weakref.ref(output)))
    hidden = torch.ones(3, 8, requires_grad=True)
    out = recompute_in_backward(block, hidden)
    assert [made() for made in alive] == [None]
    gc.disable()
    try:
        tensors = sum(1 for thing in gc.get_objects() if issubclass(type(thing), Tensor))
        out.sum().backward()
        block.zero_grad()
        hidden.grad = None
        # No cycle: what was computed again goes as it is used, and not when the collector comes by.
        assert [made() for made in alive] == [None, None]
        assert sum(1 for thing in gc.get_objects() if issubclass(type(thing), Tensor)) <= tensors
    finally:
        gc.enable()


def test_without_a_gradient_it_is_a_call() -> None:
    with torch.no_grad():
        assert recompute_in_backward(lambda number, tensor: tensor + number, 2, torch.ones(2)).tolist() == [3.0, 3.0]


def test_an_input_that_is_changed_in_place_is_found() -> None:
    block, hidden = Block(), torch.ones(3, 8, requires_grad=True)
    between = hidden * 1
    out = recompute_in_backward(block, between)
    between.add_(1)
    with pytest.raises(RuntimeError, match="changed in place after its forward"):
        out.sum().backward()


@pytest.mark.parametrize("kind", ["shape", "fewer"])
def test_a_block_that_computes_something_else_is_found(kind: str) -> None:
    calls = []

    def changing(tensor: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == 1:
            return tensor.sin().exp()
        return tensor.view(-1).sin().exp() if kind == "shape" else tensor * 1

    out = recompute_in_backward(changing, torch.ones(2, 2, requires_grad=True))
    with pytest.raises(RuntimeError, match="computed something else in backward than in forward"):
        out.sum().backward()


def test_an_error_of_the_block_comes_through() -> None:
    calls = []

    def failing(tensor: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise ValueError("planned")
        return tensor.exp()

    out = recompute_in_backward(failing, torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match="planned"):
        out.sum().backward()
