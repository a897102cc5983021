"""Compiled blocks: the same numbers, compiled once for all blocks, whatever the batch that follows."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from albireo.errors import ModelError
from albireo.models import GPT2, build_model, compile_blocks, configure_model, resolve_model

needs_a_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


@needs_a_compiler
@pytest.mark.compiles
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_compilation_serves_all_blocks_of_a_kind_and_changes_no_number(checkpointing: bool) -> None:
    choice = resolve_model("tiny")
    config, _ = configure_model(choice, init="random")
    config.num_hidden_layers = 3
    model = build_model(choice, config, init="random", seed=1)
    ids = torch.randint(0, 4096, (2, 16), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        backbone = choice.family.backbone(model)
        hidden = backbone(**choice.family.forward_arguments(ids)).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape).roll(7, -1)).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    hooked: list[str] = []
    blocks = choice.family.blocks(model)
    for name, block in blocks:
        block.register_forward_pre_hook(lambda *_, name=name: hooked.append(name))
    assert compile_blocks(model, choice.family, checkpointing=checkpointing, preserve_rng_state=False) == 3
    compiled = gradients()
    # With checkpointing, the last block is of its own kind: it keeps what the others compute again.
    kinds = 2 if checkpointing else 1
    assert counters["stats"]["unique_graphs"] == kinds
    assert hooked == [name for name, _ in blocks], "hooks stay outside, and fire once a block"
    # A key's bias has no true gradient: what is compared there is measured by the size of all the others.
    rms = torch.cat([gradient.flatten() for gradient in plain]).square().mean().sqrt()
    for ours, theirs in zip(compiled, plain, strict=True):
        scale = max(theirs.norm(), rms * theirs.numel() ** 0.5)
        assert ((ours - theirs).norm() / scale).item() < 1e-5
    gradients()
    assert counters["stats"]["unique_graphs"] == kinds


def test_without_a_compiler_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    choice = resolve_model("tiny")
    config, _ = configure_model(choice, init="random")
    model = build_model(choice, config, init="random", seed=1)
    with pytest.raises(ModelError, match=r"needs a C\+\+ compiler"):
        compile_blocks(model, choice.family)


@pytest.mark.parametrize(("ragged", "dynamic"), [(True, True), (False, None)])
def test_batches_of_many_shapes_are_compiled_for_once(
    monkeypatch: pytest.MonkeyPatch, ragged: bool, dynamic: bool | None
) -> None:
    """Without being told, torch compiles for the first shape, and at the second one for all."""
    asked = []

    def note(function: Any, **options: Any) -> Any:
        asked.append(options)
        return function

    monkeypatch.setattr("torch.compile", note)
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/cc")
    choice = resolve_model("tiny", GPT2)
    model = build_model(choice, choice.config(), init="random", seed=0)
    assert compile_blocks(model, GPT2, ragged=ragged) == 2
    assert asked == [{"dynamic": dynamic}] * 2
