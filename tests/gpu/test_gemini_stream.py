"""States streamed through a GPU: what is stepped there has the bits of what is stepped there without being streamed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from albireo.booster import Booster
from albireo.data import RandomTokens
from albireo.distributed import join_world
from albireo.memory import Gemini, streamed_steps
from albireo.memory.stream_pieces import PIECE_STEP, pieces_of
from albireo.models import build_model, configure_model, resolve_model
from albireo.optim import adamw, decay_groups
from albireo.plugins import GeminiPlugin
from albireo.training.causal_lm import CausalLanguageModel

pytestmark = pytest.mark.gpu

STREAMED = {
    "weights stay": {"offload_optim_frac": 1.0, "stream_optim_frac": 1.0},
    "weights travel": {"offload_optim_frac": 1.0, "offload_param_frac": 1.0, "stream_optim_frac": 1.0},
    "beside states on the device": {"offload_optim_frac": 0.6, "offload_param_frac": 0.5, "stream_optim_frac": 1.0},
}


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(mode=False)


def trained(steps: int, *, accumulate: int = 1, max_norm: float = 1.0, **options: Any) -> dict[str, Any]:
    choice = resolve_model("tiny")
    config, _ = configure_model(choice, init="random")
    config.num_hidden_layers = 4
    model = build_model(choice, config, init="random", seed=0, device="cpu")
    optimizer = adamw(decay_groups(model.named_parameters(), 0.01), 1e-3)
    plugin = GeminiPlugin(min_chunk_size_m=0.05, initial_scale=2.0**10, **options)
    booster = Booster(plugin=plugin, world=join_world(single=True))
    boosted, stepped, *_ = booster.boost(CausalLanguageModel(model, choice.family), optimizer)
    losses = []
    for number in range(steps):
        batches = []
        for micro in range(accumulate):
            first = 4 * (number * accumulate + micro)
            rows = RandomTokens(4096, 64, 4096, 0).__getitems__(range(first, first + 4))
            ids = torch.stack([row["input_ids"] for row in rows]).pin_memory()
            batches.append({"input_ids": ids, "labels": ids})
        output = booster.train_step(boosted, stepped, batches, [252] * accumulate, max_norm=max_norm)
        losses.append([float(output.loss), float(output.grad_norm)])
    inner = cast("Gemini", boosted.gemini)
    inner.flush()
    torch.cuda.synchronize()
    tensors = []
    for fragment in boosted.fragments:
        state = stepped.unwrap().state[fragment.master]
        tensors += [fragment.master, state["exp_avg"], state["exp_avg_sq"]]
    weights = [parameter.detach().cpu().clone() for parameter in plugin.readable_weights(boosted)]
    kept = {id(f.parameter): f.master for f in boosted.fragments}
    order = [id(parameter) for parameter in boosted.unwrap().parameters()]
    return {
        "losses": losses,
        "masters": [kept[key].detach().cpu().clone() for key in order],
        "numbers": sum(tensor.double().sum().item() for tensor in tensors),
        "weights": weights,
        "gemini": inner,
    }


@pytest.mark.parametrize("small", [False, True], ids=["whole chunks", "small pieces"])
@pytest.mark.parametrize(("precision", "accumulate"), [("fp32", 1), ("bf16", 1), ("bf16", 3), ("fp16", 2)])
def test_streamed_steps_have_the_bits_of_the_devices(
    precision: str, accumulate: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = trained(6, precision=precision, accumulate=accumulate, placement_policy="static")
    assert wanted["gemini"].manager.streamed_steps is None
    if small:
        # The root's embedding has several pieces of this size.
        monkeypatch.setattr(streamed_steps, "slot_elements", lambda _: PIECE_STEP)
        monkeypatch.setattr(streamed_steps, "pieces_of", partial(pieces_of, step=PIECE_STEP))
    for way, options in STREAMED.items():
        got = trained(6, precision=precision, accumulate=accumulate, **options)
        assert got["gemini"].manager.streamed_steps is not None, way
        assert got["losses"] == wanted["losses"], way
        assert all(map(torch.equal, got["masters"], wanted["masters"])), way


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_host_and_stream_side_by_side_are_the_same_in_every_run(max_norm: float) -> None:
    options = {"offload_optim_frac": 1.0, "offload_param_frac": 0.5, "stream_optim_frac": 0.5}
    first, second = (trained(40, precision="bf16", max_norm=max_norm, **options) for _ in range(2))
    assert first["gemini"].placement.streamed
    assert first["losses"] == second["losses"]
    assert all(map(torch.equal, first["masters"], second["masters"]))
    assert first["numbers"] == second["numbers"]
