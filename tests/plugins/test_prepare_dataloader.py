import random
from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import RankPool
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from albireo.data import EpochSampler
from albireo.distributed import World
from albireo.errors import ConfigError
from albireo.plugins import TorchDDPPlugin


class Drawn(Dataset[Any]):
    """Samples that are drawn anew each time, as augmentation does."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> list[float]:
        return [index, torch.rand(1).item(), random.random(), float(np.random.rand())]  # noqa: NPY002


def read(loader: DataLoader[Any], epochs: int = 1) -> list[Any]:
    return [[column.tolist() for column in batch] for _ in range(epochs) for batch in loader]


def test_the_seed_decides_the_order_and_every_pass_is_an_epoch() -> None:
    state = torch.get_rng_state(), random.getstate()
    plugin = TorchDDPPlugin()
    first = [batch.tolist() for _ in range(2) for batch in plugin.prepare_dataloader(range(10), 5, shuffle=True)]  # type: ignore[arg-type]
    loader = plugin.prepare_dataloader(range(10), 5, shuffle=True)  # type: ignore[arg-type]
    again = [batch.tolist() for _ in range(2) for batch in loader]
    assert again[:2] == first[:2]
    assert again[2:] != first[:2]
    assert sorted(again[2] + again[3]) == list(range(10))
    loader.sampler.set_epoch(0)  # type: ignore[attr-defined]  # the call that scripts make, on one rank too
    assert [batch.tolist() for batch in loader] == first[:2]
    other = plugin.prepare_dataloader(range(10), 5, shuffle=True, seed=5)  # type: ignore[arg-type]
    assert [batch.tolist() for batch in other] != first[:2]
    plain = plugin.prepare_dataloader(range(10), 4, drop_last=True)  # type: ignore[arg-type]
    assert [batch.tolist() for batch in plain] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


def test_workers_draw_by_the_seed_and_each_something_else() -> None:
    state = torch.get_rng_state()
    plugin = TorchDDPPlugin()
    one, same, other = (read(plugin.prepare_dataloader(Drawn(), 4, num_workers=2, seed=seed)) for seed in (7, 7, 8))
    assert one == same
    assert [batch[0] for batch in one] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for kind in (1, 2, 3):
        numbers = [number for batch in (*one, *other) for number in batch[kind]]
        assert len(set(numbers)) == 16
    assert torch.equal(torch.get_rng_state(), state)


def test_arguments_of_torchs_loader_are_passed_on() -> None:
    plugin = TorchDDPPlugin()
    loader = plugin.prepare_dataloader(range(4), 2, pin_memory=True, collate_fn=sum)  # type: ignore[arg-type]
    assert list(loader) == [1, 5]
    assert isinstance(loader.sampler, EpochSampler)
    assert loader.pin_memory == torch.cuda.is_available()
    own = plugin.prepare_dataloader(range(4), 2, distributed_sampler_cls=DistributedSampler)  # type: ignore[arg-type]
    assert type(own.sampler) is DistributedSampler


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


def test_what_cannot_be_shared_out_is_refused() -> None:
    plugin = TorchDDPPlugin()
    with pytest.raises(ConfigError, match=r"DistCoordinator\(\).rank"):
        plugin.prepare_dataloader(Stream(), 2)
    with pytest.raises(ConfigError, match="distributed_sampler_cls instead of sampler"):
        plugin.prepare_dataloader(range(4), 2, sampler=[1, 2])  # type: ignore[arg-type]


def share_case(world: World) -> list[Any]:
    plugin = TorchDDPPlugin()
    loader = plugin.prepare_dataloader(range(12), 3, shuffle=True)  # type: ignore[arg-type]
    drawn = plugin.prepare_dataloader(Drawn(), 4, num_workers=1, seed=7)
    return [[batch.tolist() for batch in loader], read(drawn)]


def test_ranks_share_the_samples(two_ranks: RankPool) -> None:
    (first, first_drawn), (second, second_drawn) = two_ranks.run(share_case)
    assert [len(batches) for batches in (first, second)] == [2, 2]
    assert sorted(index for batch in (*first, *second) for index in batch) == list(range(12))
    assert first_drawn[0][0] == [0, 2, 4, 6]
    assert not set(first_drawn[0][1]) & set(second_drawn[0][1])
    alone = TorchDDPPlugin().prepare_dataloader(range(12), 6, shuffle=True)  # type: ignore[arg-type]
    # One rank with the batch of both sees the same samples in the same steps.
    for batch, *parts in zip(alone, first, second, strict=True):
        assert sorted(batch.tolist()) == sorted(parts[0] + parts[1])
