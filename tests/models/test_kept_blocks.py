"""Blocks keep what they compute where there is room: the same numbers, fewer of them computed twice."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from albireo.models import OPT, ActivationRoom, KeptBlocks, enable_activation_checkpointing, initialise, materialise
from albireo.models.kept_blocks import kept_count

BLOCKS = 6
IDS = torch.arange(32).view(2, 16)
# What a block's input takes: 2 x 16 tokens of fp32.
HIDDEN = 2 * 16 * 4

sizes = st.integers(0, 2**40)


@given(blocks=st.integers(1, 200), block_bytes=st.integers(1, 2**34), input_bytes=sizes, gradients=sizes, more=sizes)
def test_as_many_are_kept_as_raise_the_peak_by_no_more_than_is_allowed(
    blocks: int, block_bytes: int, input_bytes: int, gradients: int, more: int
) -> None:
    count = kept_count(blocks, block_bytes, input_bytes, ActivationRoom(gradients, more))

    def begins_with(kept: int) -> int:
        return blocks * input_bytes + kept * block_bytes

    most = max(begins_with(1), gradients + block_bytes) + more
    assert 1 <= count <= blocks
    assert begins_with(count) <= most
    assert count == blocks or begins_with(count + 1) > most


def built(dropout: float = 0.0) -> PreTrainedModel:
    config = OPT.config_for("tiny", vocab_size=64, dropout=dropout)
    config.num_hidden_layers = BLOCKS
    model = OPT.make_model(config)
    materialise(model, torch.device("cpu"))
    initialise(model, 0)
    return model.train()


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    return [block for _, block in OPT.blocks(model)]


def step(model: PreTrainedModel, number: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(number)
    model.zero_grad()
    model(input_ids=IDS + number, labels=IDS, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def seen_of_a_block(model: PreTrainedModel) -> int:
    """Return what the last block keeps, beside its input and its weights."""
    lines: list[str] = []
    kept = KeptBlocks(blocks_of(model), lambda: ActivationRoom(1), say=lines.append)
    step(model, 0)
    assert kept.block_bytes is None
    step(model, 1)
    assert lines == []
    assert kept.block_bytes is not None
    return kept.block_bytes


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_same_and_fewer_blocks_run_twice(dropout: float) -> None:
    plain, model = built(dropout), built(dropout)
    enable_activation_checkpointing(model, preserve_rng_state=dropout > 0, family=OPT)
    width = model.config.hidden_size
    room = 2 * seen_of_a_block(model) + BLOCKS * HIDDEN * width
    lines: list[str] = []
    KeptBlocks(blocks_of(model), lambda: ActivationRoom(room), say=lines.append)
    runs: list[int] = []
    for number, block in enumerate(blocks_of(model)):
        block.fc1.register_forward_hook(lambda *_, number=number: runs.append(number))
    counts = []
    for number in range(4):
        want, got = step(plain, number), step(model, number)
        assert all(torch.equal(want[name], got[name]) for name in want)
        counts.append(len(runs))
        runs.clear()
    # The second step looks, with the last block alone kept.
    assert counts == [2 * BLOCKS - 1] * 2 + [2 * BLOCKS - 3] * 2
    assert lines == [f"keeping    the activations of 3 of {BLOCKS} blocks: they fit where gradients will be"]


def test_what_a_block_keeps_is_what_autograd_saves_beside_input_and_weights() -> None:
    model = built()
    enable_activation_checkpointing(model, preserve_rng_state=False, family=OPT)
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    last = blocks_of(model)[-1]
    hidden = torch.randn(2, 16, model.config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        last(hidden)
    others = {p.untyped_storage().data_ptr() for p in (hidden, *last.parameters())}
    want = sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in others)
    # A mask comes into a block in a model, and is not one that it keeps.
    assert want <= seen_of_a_block(model) <= want + 2 * 16 * 16 * 4


def test_an_evaluation_and_a_forward_that_fails_decide_nothing() -> None:
    model = built()
    enable_activation_checkpointing(model, preserve_rng_state=False, family=OPT)
    kept = KeptBlocks(blocks_of(model), lambda: ActivationRoom(2**40))
    model.eval()
    model(input_ids=IDS, use_cache=False)
    model.train()
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    last = blocks_of(model)[-1]

    def fail(*_: object) -> None:
        raise RuntimeError("planned")

    handle = last.fc2.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planned"):
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    assert kept.block_bytes is None
    assert [block.gradient_checkpointing for block in blocks_of(model)] == [True] * (BLOCKS - 1) + [False]
    step(model, 0)
    assert [block.gradient_checkpointing for block in blocks_of(model)] == [False] * BLOCKS


def test_without_room_the_last_block_alone_keeps_and_nobody_asks_again() -> None:
    model = built()
    enable_activation_checkpointing(model, preserve_rng_state=False, family=OPT)
    asked: list[None] = []
    KeptBlocks(blocks_of(model), lambda: asked.append(None))
    for number in range(4):
        step(model, number)
    assert len(asked) == 1
    assert [block.gradient_checkpointing for block in blocks_of(model)] == [True] * (BLOCKS - 1) + [False]


def test_room_that_raises_the_peak_is_said() -> None:
    model = built()
    enable_activation_checkpointing(model, preserve_rng_state=False, family=OPT)
    lines: list[str] = []
    KeptBlocks(blocks_of(model), lambda: ActivationRoom(0, more=2**40), say=lines.append)
    for number in range(2):
        step(model, number)
    assert len(lines) == 1
    assert lines[0] == (f"keeping    the activations of {BLOCKS} of {BLOCKS} blocks: it takes 0.00 GB more")


def test_nothing_of_the_first_step_stays() -> None:
    model = built()
    enable_activation_checkpointing(model, preserve_rng_state=False, family=OPT)
    KeptBlocks(blocks_of(model), lambda: ActivationRoom(2**40))
    before = sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    for number in range(2):
        step(model, number)
    model.zero_grad()
    after = sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    assert after <= before
    last = blocks_of(model)[-1]
    assert not last._forward_hooks
    assert not last._forward_pre_hooks
