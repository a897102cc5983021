import torch

from albireo.data import EpochSampler


def passes(sampler: EpochSampler, count: int = 3) -> list[list[int]]:
    return [list(sampler) for _ in range(count)]


def test_each_pass_is_another_epoch_by_itself() -> None:
    sampler = EpochSampler(range(20), 1, 0, shuffle=True, seed=3)  # type: ignore[arg-type]
    first, second, third = passes(sampler)
    assert sorted(first) == sorted(second) == sorted(third) == list(range(20))
    assert first != second != third != first
    assert passes(EpochSampler(range(20), 1, 0, shuffle=True, seed=3)) == [first, second, third]  # type: ignore[arg-type]
    assert passes(EpochSampler(range(20), 1, 0, shuffle=True, seed=4))[0] != first  # type: ignore[arg-type]


def test_an_epoch_that_is_set_is_the_next_pass() -> None:
    sampler = EpochSampler(range(20), 1, 0, shuffle=True, seed=3)  # type: ignore[arg-type]
    first, second, third = passes(sampler)
    for epoch, expected in ((1, second), (0, first), (2, third)):
        sampler.set_epoch(epoch)
        assert list(sampler) == expected
    sampler.set_epoch(1)
    assert passes(sampler, 2) == [second, third]


def test_ranks_share_an_epoch_and_no_global_state_moves() -> None:
    state = torch.get_rng_state()
    ranks = [passes(EpochSampler(range(20), 4, rank, shuffle=True, seed=3)) for rank in range(4)]  # type: ignore[arg-type]
    for epoch in range(3):
        assert sorted(index for rank in ranks for index in rank[epoch]) == list(range(20))
    assert torch.equal(torch.get_rng_state(), state)


def test_without_shuffling_every_pass_is_the_same() -> None:
    sampler = EpochSampler(range(5), 2, 1, shuffle=False)  # type: ignore[arg-type]
    assert passes(sampler, 2) == [[1, 3, 0], [1, 3, 0]]
