from typing import Any

import pytest
import torch
from rank_pool import RankPool

from albireo.distributed import World, current_world, join_world
from albireo.errors import LaunchError


def talk(world: World) -> dict[str, Any]:
    total = world.sum_in_place(torch.tensor([float(world.rank + 1)])).item()
    shared = world.share_from_main({"text": "café", "numbers": [1, 2.5, None]} if world.is_main else "not this")
    gathered = world.gather_numbers([world.rank * 0.1])
    world.barrier()
    same = current_world()
    return {"total": total, "shared": shared, "gathered": gathered, "current": [same.rank, same.world_size]}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_speak(size: int, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    for rank, answer in enumerate(pool.run(talk)):
        assert answer["total"] == size * (size + 1) / 2
        assert answer["shared"] == {"text": "café", "numbers": [1, 2.5, None]}
        assert answer["gathered"] == [[number * 0.1] for number in range(size)]
        assert answer["current"] == [rank, size]


def test_a_single_rank_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join_world()
    assert (world.rank, world.world_size, world.is_main) == (0, 1, True)
    assert talk(world)["gathered"] == [[0.0]]
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("rank", "size", "message"), [("2", "2", "does not lie below"), ("a", "2", "must be whole numbers")]
)
def test_an_impossible_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, rank: str, size: str, message: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(LaunchError, match=message):
        join_world()


def fail_on_one(world: World) -> None:
    if world.rank == 1:
        raise ValueError("rank one is unwell")


def test_the_pool_reports_a_failure(two_ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="rank one is unwell"):
        two_ranks.run(fail_on_one)
