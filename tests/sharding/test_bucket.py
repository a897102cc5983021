"""Where a bucket has its fp32 weights: as fp32 numbers, as what computes itself, or in two halves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from albireo.distributed import World
from albireo.sharding import make_buckets

ALONE = World(0, 1, 0, torch.device("cpu"))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in ((70, 3), (65,), ())]


def test_halves_hold_fp32_weights_in_16_bits_more() -> None:
    plain = [parameter.detach().clone() for parameter in parameters()]
    (bucket,) = make_buckets(
        members := parameters(), dict.fromkeys(members, torch.bfloat16), ALONE, bucket_elements=1000, in_halves=True
    )
    assert bucket.master is None
    assert bucket.rest is not None
    assert bucket.rest.element_size() == 2
    assert bucket.rest.numel() == bucket.layout.partition_numel
    for fragment, wide in zip(bucket.fragments, reversed(plain), strict=True):
        assert torch.equal(fragment.parameter, wide.to(torch.bfloat16))
        assert torch.allclose(fragment.weights(), wide.reshape(-1), rtol=2**-23, atol=0)
        # Nobody takes it for weights by mistake.
        assert fragment.master.shape == fragment.weights().shape
        assert fragment.master.isnan().all()
        assert fragment.master.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_than_bf16_are_not_halved(dtype: torch.dtype) -> None:
    members = parameters()
    (bucket,) = make_buckets(members, dict.fromkeys(members, dtype), ALONE, bucket_elements=1000, in_halves=True)
    assert bucket.rest is None
    assert bucket.master is not None
    for fragment in bucket.fragments:
        assert torch.equal(fragment.weights(), fragment.master)


@pytest.mark.parametrize("in_halves", [False, True])
def test_weights_can_be_replaced(in_halves: bool) -> None:
    members = parameters()
    dtypes = dict.fromkeys(members, torch.bfloat16)
    (bucket,) = make_buckets(members, dtypes, ALONE, bucket_elements=1000, in_halves=in_halves)
    for fragment in bucket.fragments:
        weights = fragment.weights()
        weights.copy_(torch.arange(weights.numel()) / 64 + 1)
        fragment.replace_weights(weights)
    bucket.publish().wait()
    for fragment in bucket.fragments:
        wanted = torch.arange(fragment.cut.numel) / 64 + 1
        assert torch.allclose(fragment.weights(), wanted, rtol=2**-23, atol=0)
        assert torch.equal(fragment.compute, fragment.weights().to(torch.bfloat16))


def test_an_optimizer_steps_what_is_joined_and_a_failure_leaves_the_halves() -> None:
    members = parameters()
    dtypes = dict.fromkeys(members, torch.bfloat16)
    (bucket,) = make_buckets(members, dtypes, ALONE, bucket_elements=1000, in_halves=True)
    before = [fragment.weights() for fragment in bucket.fragments]

    def fail() -> None:
        with bucket.joined():
            for fragment in bucket.fragments:
                fragment.master.detach().fill_(5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(f.weights(), wide) for f, wide in zip(bucket.fragments, before, strict=True))
    with bucket.joined():
        optimizer = torch.optim.SGD([fragment.master for fragment in bucket.fragments], lr=0.5)
        for fragment in bucket.fragments:
            fragment.master.grad = torch.ones(fragment.cut.numel)
        optimizer.step()
        optimizer.zero_grad()
    for fragment, wide in zip(bucket.fragments, before, strict=True):
        assert torch.allclose(fragment.weights(), wide - 0.5, rtol=2**-22, atol=2**-24)
        assert fragment.master.isnan().all()
