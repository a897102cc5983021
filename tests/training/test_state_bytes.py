"""The table of bytes a parameter is what tensors really take."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Self

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from albireo.config import MachineFacts, RunConfig, merge, resolve
from albireo.distributed import World, process_group
from albireo.optim import adamw, host_stepper
from albireo.optim.host_kernel import TorchKernel
from albireo.plugins import make_plugin
from albireo.sharding import GradientOffload
from albireo.training.memory_use import measure_memory_use
from albireo.training.state_bytes import Memory, StateBytes, needs_of

WIDTH, LAYERS = 256, 6
PARAMETERS = LAYERS * WIDTH * WIDTH


def config_of(**options: Any) -> RunConfig:
    return resolve(merge(RunConfig(), options), MachineFacts("cpu", 1, bf16_is_native=False))


class Watch:
    """Looks at the memory of all tensors that have come since it began, and keeps the most; a context manager."""

    def __enter__(self) -> Self:
        gc.freeze()  # what there is already is not listed any more, which makes looking quick
        self.is_on = False
        self.most = 0
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()

    def look(self, model: nn.Module) -> None:
        if self.is_on:
            # Python knows of gradients once they are asked for.
            gradients = [parameter.grad for parameter in model.parameters()]
            found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
            storages = [tensor.untyped_storage() for tensor in found if not hasattr(tensor, "to_local")]
            self.most = max(self.most, sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
            del gradients


def held_case(world: World, *, options: dict[str, Any]) -> dict[str, float]:
    """Train two steps, and return what is held for a parameter at most, and what is measured as held at the end."""
    config = config_of(**options, gpus=world.world_size)
    group = process_group(world) if world.world_size == 1 else nullcontext()
    with group, pytest.MonkeyPatch.context() as patch, Watch() as watch:
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        plugin = make_plugin(config.plugin)
        # It takes a second to compile one, and makes no difference here.
        patch.setattr(host_stepper, "choose_kernel", lambda threads, **_: TorchKernel(threads))
        plain_send = GradientOffload.send

        def send(self: GradientOffload, *arguments: Any) -> None:
            # Several ranks reduce all before the first of it is sent; a single one sends while backward runs.
            if world.world_size > 1 and not self._sent:
                watch.look(model)
            plain_send(self, *arguments)

        patch.setattr(GradientOffload, "send", send)
        boosted, optimizer = plugin.configure(model, adamw([{"params": list(model.parameters())}], 1e-3), world)
        assert optimizer is not None
        for step in range(2):
            watch.is_on = step == 1  # now there are states, and the buffers on the host
            for number in range(config.optimizer.accumulate):
                last = number == config.optimizer.accumulate - 1
                with nullcontext() if last else plugin.accumulation_context(boosted):
                    optimizer.backward(boosted(torch.ones(2, WIDTH)).float().square().mean())
                watch.look(model)
            optimizer.step()
            optimizer.zero_grad()
        use = measure_memory_use(
            boosted.weight_tensors(),
            optimizer.unwrap(),
            config,
            parameters=PARAMETERS,
            device=world.device,
            logits_bytes=0,
            peak_bytes=0,
        )
        sizes = {"most": watch.most, "weights": use.weights, "gradients": use.gradients, "states": use.states}
        return {name: size / PARAMETERS for name, size in sizes.items()}


ZERO = {"plugin": "low_level_zero"}
CASES: list[tuple[dict[str, Any], dict[int, float]]] = [
    # options, and bytes on each rank by their number
    ({"plugin": "torch_ddp"}, {1: 16, 2: 16}),
    ({"plugin": "torch_ddp", "precision": "bf16", "accumulate": 2}, {2: 16}),
    ({"plugin": "torch_fsdp"}, {1: 16, 2: 8}),
    ({"plugin": "torch_fsdp", "precision": "bf16", "cpu_offload": True, "accumulate": 2}, {2: 8}),
    (ZERO, {1: 16, 2: 10}),
    ({**ZERO, "zero_stage": 1}, {2: 10}),
    ({**ZERO, "precision": "bf16"}, {1: 14, 2: 9}),
    ({**ZERO, "precision": "fp16", "accumulate": 2}, {1: 18, 2: 10}),
    ({**ZERO, "precision": "bf16", "zero_stage": 1, "accumulate": 2}, {2: 11}),
    ({**ZERO, "cpu_offload": True}, {1: 24, 2: 16}),
    ({**ZERO, "cpu_offload": True, "precision": "bf16"}, {1: 18, 2: 13}),
    ({**ZERO, "cpu_offload": True, "precision": "bf16", "accumulate": 2}, {1: 22}),
    ({**ZERO, "cpu_offload": True, "precision": "bf16", "accumulate": 3}, {1: 24}),
    ({**ZERO, "cpu_offload": True, "precision": "bf16", "accumulate": 2, "zero_stage": 1}, {2: 15}),
]


@pytest.mark.parametrize(
    ("options", "ranks", "wanted"),
    [(options, ranks, wanted) for options, by_ranks in CASES for ranks, wanted in by_ranks.items()],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_the_table_is_what_tensors_take(
    run_case: Callable[..., list[Any]], options: dict[str, Any], ranks: int, wanted: float
) -> None:
    needs = needs_of(config_of(**options, gpus=ranks))
    assert needs.bytes_per_parameter("one") == wanted
    parts = [needs.device, needs.host]
    # The buffers by which new weights travel are nobody's that can be asked.
    travelling = 0.0
    if options["plugin"] == "low_level_zero" and options.get("cpu_offload"):
        travelling = (2 if "precision" in options else 4) / ranks
    for held in run_case(held_case, ranks, options=options):
        # Some scratch comes to it, of which a large model has no more.
        assert wanted - 0.01 <= held["most"] <= wanted + 0.7
        assert held["weights"] == pytest.approx(sum(part.weights for part in parts) - travelling, rel=0.01)
        assert held["gradients"] == sum(part.gradients for part in parts)
        assert held["states"] == pytest.approx(sum(part.states for part in parts), rel=0.01)


@pytest.mark.parametrize(
    ("options", "device", "host"),
    [
        ({"plugin": "torch_ddp", "gpus": 8}, 16, 0),
        ({"plugin": "torch_fsdp", "gpus": 2}, 8, 0),
        # Before they are sharded, weights are whole and in fp32.
        ({"plugin": "torch_fsdp", "gpus": 8}, 4, 0),
        ({"plugin": "torch_fsdp", "gpus": 2, "cpu_offload": True}, 4, 8),
        ({**ZERO, "precision": "bf16", "cpu_offload": True}, 4, 16),
        ({**ZERO, "precision": "bf16", "cpu_offload": True, "gpus": 4}, 4, 4.5),
        ({**ZERO, "precision": "bf16", "cpu_offload": True, "accumulate": 2}, 4, 18),
        ({**ZERO, "precision": "bf16", "cpu_offload": True, "accumulate": 4}, 6, 18),
        ({**ZERO, "precision": "fp32", "cpu_offload": True, "gpus": 2}, 6, 10),
        ({**ZERO, "precision": "bf16", "gpus": 2, "zero_stage": 1, "accumulate": 4}, 11, 0),
    ],
)
def test_device_and_host_have_their_shares(options: dict[str, Any], device: float, host: float) -> None:
    needs = needs_of(config_of(**options))
    assert needs.bytes_per_parameter("device") == device
    assert needs.bytes_per_parameter("host") == host


plugins = st.fixed_dictionaries(
    {
        "plugin": st.sampled_from(["torch_ddp", "torch_fsdp", "low_level_zero"]),
        "precision": st.sampled_from(["fp32", "fp16", "bf16"]),
        "accumulate": st.integers(1, 4),
    }
)


@given(plugins, st.integers(1, 63), st.booleans(), st.sampled_from(["device", "host", "one"]))
def test_more_ranks_never_take_more_each(options: dict[str, Any], gpus: int, offload: bool, memory: Memory) -> None:
    options = {**options, "cpu_offload": offload and options["plugin"] != "torch_ddp"}
    if gpus == 1 and options["plugin"] == "low_level_zero":
        return  # a single rank needs no fp32 gradients, so that a second one may cost some
    few, more = (needs_of(config_of(**options, gpus=ranks)) for ranks in (gpus, gpus + 1))
    assert more.bytes_per_parameter(memory) <= few.bytes_per_parameter(memory)


@given(plugins, st.integers(1, 64))
def test_offloading_frees_the_device(options: dict[str, Any], gpus: int) -> None:
    if options["plugin"] == "torch_ddp":
        return
    kept, offloaded = (needs_of(config_of(**options, gpus=gpus, cpu_offload=on)) for on in (False, True))
    assert offloaded.bytes_per_parameter("device") <= kept.bytes_per_parameter("device")
    assert offloaded.bytes_per_parameter("host") > kept.bytes_per_parameter("host") == 0
    assert offloaded.device.states == 0


@pytest.mark.parametrize("options", [{}, {"offload_optim_frac": 1.0}, {"precision": "bf16", "gpus": 2, "mem_cap": 1.0}])
def test_what_gemini_takes_is_not_told_before_the_memories_are_known(options: dict[str, Any]) -> None:
    """Its planner refuses what cannot be, with the least that can; a table would refuse what can."""
    needs = needs_of(config_of(plugin="gemini", **options))
    for memory in ("device", "host", "one"):
        assert needs.bytes_per_parameter(memory) == 0  # type: ignore[arg-type]


def test_a_total_is_its_parts() -> None:
    assert StateBytes(1, 2, 4).total == 7
