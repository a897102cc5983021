"""The arithmetic of memory, and the one line that helps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from albireo.config import RunConfig, merge
from albireo.errors import OutOfMemoryError
from albireo.training.memory_needs import (
    MemoryUse,
    advice,
    check_states_fit,
    explain_out_of_memory,
    explain_out_of_memory_at_start,
    is_out_of_memory,
)
from albireo.training.state_bytes import Memory

GB = 2**30
OFFLOADED = {"plugin": "low_level_zero", "cpu_offload": True, "precision": "bf16"}


def config_of(**options: object) -> RunConfig:
    return merge(RunConfig(), {"batch_size": 8, "model": "125m", **options})


def use_of(
    *,
    weights: int = 1,
    gradients: int = 1,
    states: int = 2,
    logits: int = 1,
    activations: int = 0,
    is_host: bool = False,
) -> MemoryUse:
    """Sizes in GB."""
    parts = [weights * GB, gradients * GB, states * GB, logits * GB]
    return MemoryUse(*parts, peak=sum(parts) + activations * GB, is_host=is_host)


def test_what_nobody_claims_are_activations() -> None:
    assert use_of(activations=7).activations == 7 * GB
    assert MemoryUse(5, 5, 5, 5, peak=3).activations == 0


@pytest.mark.parametrize("spare", [0, 1, GB])
def test_what_fits_exactly_is_let_through(spare: int) -> None:
    check_states_fit(1000, available_bytes=16_000 + spare, where="this has", config=config_of())


def test_what_nobody_can_know_is_let_through() -> None:
    check_states_fit(10**15, available_bytes=None, where="this has", config=config_of())


def test_a_byte_too_few_is_refused_with_all_numbers() -> None:
    with pytest.raises(OutOfMemoryError) as raised:
        check_states_fit(GB, available_bytes=16 * GB - 1, where="this machine has", config=config_of(model="1.3b"))
    said = str(raised.value)
    assert "--model 1.3b with --plugin torch_ddp needs 16.0 GB" in said
    assert "16 bytes for each of 1,073,741,824 parameters" in said
    assert "this machine has 16.0 GB" in said
    assert "smaller --model" in said
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "memory", "available_gb", "said"),
    [
        # On a device, the first of what shards or offloads that fits is named, with what it takes.
        (
            {},
            "device",
            15,
            ("--plugin torch_ddp needs 16.0 GB", "--plugin low_level_zero --cpu-offload takes 4.0 GB there"),
        ),
        ({}, "device", 3, ("needs 16.0 GB", "GB: take a smaller --model")),
        ({"gpus": 2}, "device", 10, ("(16 bytes for", "--plugin low_level_zero takes 10.0 GB there")),
        ({"gpus": 2}, "device", 9, ("(16 bytes for", "--plugin torch_fsdp takes 8.0 GB there")),
        ({"gpus": 8}, "device", 5, ("(16 bytes for", "--plugin torch_fsdp takes 4.0 GB there")),
        (OFFLOADED, "device", 3, ("low_level_zero --cpu-offload needs 4.0 GB", "GB: take a smaller --model")),
        (OFFLOADED, "host", 15, ("low_level_zero --cpu-offload needs 16.0 GB", "GB: take a smaller --model")),
        (
            {**OFFLOADED, "gpus": 8},
            "host",
            2,
            ("needs 2.2 GB", "(2.25 bytes for", "--plugin torch_fsdp --cpu-offload takes 2.0 GB there"),
        ),
        # On a CPU, offloading moves nothing.
        ({}, "one", 15, ("GB: take a smaller --model",)),
        ({"gpus": 2}, "one", 10, ("--plugin low_level_zero takes 10.0 GB there",)),
        (OFFLOADED, "one", 17, ("needs 18.0 GB", "--plugin low_level_zero takes 14.0 GB there")),
    ],
)
def test_a_refusal_names_what_would_fit(
    options: dict[str, object], memory: Memory, available_gb: int, said: tuple[str, ...]
) -> None:
    config = config_of(**{"precision": "fp32", **options})
    with pytest.raises(OutOfMemoryError) as raised:
        check_states_fit(GB, available_bytes=available_gb * GB, where="there is", config=config, memory=memory)
    for words in said:
        assert words in str(raised.value)


def test_what_is_frozen_needs_no_gradient_and_no_states() -> None:
    """1% trained: 4 bytes of weights each, and 12 more for one in a hundred."""
    check_states_fit(10**6, available_bytes=4_120_000, where="there is", config=config_of(), trained=10**4)
    with pytest.raises(OutOfMemoryError, match=r"4\.12 bytes for each of 1,000,000 parameters"):
        check_states_fit(10**6, available_bytes=4_119_999, where="there is", config=config_of(), trained=10**4)


def test_memory_that_runs_out_at_the_start_is_counted_for_the_plugin() -> None:
    error = explain_out_of_memory_at_start(GB, config_of(**OFFLOADED), where="NVIDIA H200", memory="host")
    assert "low_level_zero --cpu-offload takes 16.0 GB" in str(error)


def test_a_cap_that_is_too_low_can_be_raised() -> None:
    with pytest.raises(OutOfMemoryError, match="raise --mem-cap"):
        check_states_fit(
            GB, available_bytes=2 * GB, where="--mem-cap leaves", config=config_of(mem_cap=2.0), memory="device"
        )


@pytest.mark.parametrize(
    ("use", "options", "said"),
    [
        (use_of(activations=9), {}, "--checkpointing keeps one block's activations instead of all"),
        (use_of(activations=9), {"checkpointing": True}, "--batch-size 4 --accumulate 2 takes less at a time"),
        (
            use_of(activations=9),
            {"checkpointing": True, "accumulate": 3},
            "--batch-size 4 --accumulate 6 takes less at a time",
        ),
        (
            use_of(activations=9),
            {"checkpointing": True, "batch_size": 7},
            "--batch-size 1 --accumulate 7 takes less at a time",
        ),
        (
            use_of(activations=9),
            {"checkpointing": True, "batch_size": 9},
            "--batch-size 3 --accumulate 3 takes less at a time",
        ),
        (use_of(activations=9), {"checkpointing": True, "batch_size": 1}, "a smaller --sequence-length takes less"),
        (use_of(activations=3, is_host=True), {}, "--checkpointing and a smaller --batch-size take less"),
        (
            use_of(activations=3, is_host=True),
            {"checkpointing": True},
            "a smaller --batch-size, or a smaller --model, takes less",
        ),
        (use_of(activations=3, is_host=True), {"batch_size": 1}, "--checkpointing takes less"),
        (use_of(is_host=True), {}, "take a smaller --model"),
        (use_of(is_host=True), {"batch_size": 1, "checkpointing": True}, "take a smaller --model"),
        (
            use_of(activations=3),
            {},
            "--plugin low_level_zero --cpu-offload keeps optimizer states in host memory, and --checkpointing takes less",
        ),
        (
            use_of(),
            {"checkpointing": True, "mem_cap": 4.0},
            "--plugin low_level_zero --cpu-offload keeps optimizer states in host memory",
        ),
        (
            use_of(),
            {"checkpointing": True, "gpus": 2},
            "--plugin low_level_zero shares optimizer states out over ranks",
        ),
        (
            use_of(is_host=True),
            {"checkpointing": True, "gpus": 2},
            "--plugin low_level_zero shares optimizer states out over ranks",
        ),
        (use_of(activations=1), {"batch_size": 1, "mem_cap": 4.0, **OFFLOADED}, "--checkpointing takes less"),
        (use_of(), {"checkpointing": True, "mem_cap": 4.0, **OFFLOADED}, "raise --mem-cap, or take a smaller --model"),
    ],
)
def test_the_advice_is_about_what_took_most(use: MemoryUse, options: dict[str, object], said: str) -> None:
    assert advice(use, config_of(**options)) == said


@given(batch=st.integers(1, 512), accumulate=st.integers(1, 64))
def test_a_smaller_batch_that_is_advised_leaves_the_global_batch_as_it_is(batch: int, accumulate: int) -> None:
    config = config_of(checkpointing=True, batch_size=batch, accumulate=accumulate)
    words = advice(use_of(activations=99), config).split()
    if batch == 1:
        assert words[2] == "--sequence-length"
        return
    smaller, more = int(words[1]), int(words[3])
    assert words[0::2][:2] == ["--batch-size", "--accumulate"]
    assert smaller < batch
    assert smaller * more == batch * accumulate


@given(
    sizes=st.lists(st.integers(0, 80), min_size=5, max_size=5),
    checkpointing=st.booleans(),
    batch=st.integers(1, 9),
    mem_cap=st.sampled_from([0.0, 6.0]),
    plugin=st.sampled_from([{}, {"plugin": "low_level_zero"}, {"plugin": "torch_fsdp", "gpus": 4}, OFFLOADED]),
    is_host=st.booleans(),
)
def test_there_is_always_an_advice_that_is_not_yet_followed(
    sizes: list[int], checkpointing: bool, batch: int, mem_cap: float, plugin: dict[str, object], is_host: bool
) -> None:
    names = ("weights", "gradients", "states", "logits", "activations")
    config = config_of(checkpointing=checkpointing, batch_size=batch, mem_cap=mem_cap, **plugin)
    said = advice(use_of(**dict(zip(names, sizes, strict=True)), is_host=is_host), config)
    assert said.count("--") >= 1
    assert not (is_host and "--cpu-offload" in said)
    assert not (plugin == OFFLOADED and "--cpu-offload" in said)
    assert not (checkpointing and "--checkpointing" in said)
    assert not (batch == 1 and "--batch-size" in said)
    assert not (mem_cap == 0 and "--mem-cap" in said)


def test_the_line_names_every_part() -> None:
    error = explain_out_of_memory(use_of(activations=20), config_of(), where="NVIDIA H200")
    assert isinstance(error, OutOfMemoryError)
    assert str(error) == (
        "out of memory on NVIDIA H200: weights 1.0 GB, gradients 1.0 GB, optimizer states 2.0 GB, activations 20.0 GB, "
        "logits 1.0 GB; --checkpointing keeps one block's activations instead of all"
    )
    assert error.exit_code == 2


def refused_by_torch() -> BaseException:
    """What torch itself raises where the host has no such memory."""
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (refused_by_torch(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("NCCL error: ncclUnhandledCudaError: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("out of memory"), False),
        (OutOfMemoryError("already explained"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failed_allocation_is_known_by_what_raised_it(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_sizes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        use_of().weights = 3  # type: ignore[misc]
