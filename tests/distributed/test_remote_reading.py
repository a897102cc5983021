"""The main rank reads what the others hold, and a failure there is one everywhere."""

from __future__ import annotations

from typing import Any

import torch

from albireo.distributed import World
from albireo.distributed.host_gather import gather_json
from albireo.distributed.remote_reading import Fetch, let_main_read
from albireo.errors import AlbireoError


def tensors_of(rank: int) -> list[torch.Tensor]:
    return [
        torch.arange(10.0) + 100 * rank,
        torch.arange(4, dtype=torch.int64) - rank,
        torch.full((3,), rank).bfloat16(),
    ]


def reading_case(world: World) -> dict[str, Any]:
    found: list[list[float]] = []

    def action(fetch: Fetch) -> None:
        for rank in reversed(range(world.world_size)):
            for number, tensor in enumerate(tensors_of(rank)):
                out = torch.zeros(2, dtype=tensor.dtype)
                fetch(rank, number, 1, out)
                found.append(out.tolist())

    let_main_read(world, tensors_of(world.rank), action)

    def fail(fetch: Fetch) -> None:
        fetch(world.world_size - 1, 0, 0, torch.zeros(1))
        raise ValueError("no room left")

    try:
        let_main_read(world, tensors_of(world.rank), fail)
        said = "nothing"
    except (AlbireoError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    # And the ranks still understand each other.
    return {"found": found, "said": said, "gathered": gather_json({"rank": world.rank}, world)}


def test_the_main_rank_reads_all_and_a_failure_is_everybodys(two_ranks: Any) -> None:
    first, second = two_ranks.run(reading_case)
    wanted = [tensor[1:3].tolist() for rank in (1, 0) for tensor in tensors_of(rank)]
    assert first == {"found": wanted, "said": "ValueError: no room left", "gathered": [{"rank": 0}, {"rank": 1}]}
    assert second == {"found": [], "said": "AlbireoError: no room left", "gathered": None}


def test_alone_it_reads_its_own() -> None:
    out = torch.zeros(2)
    let_main_read(World(0, 1, 0, torch.device("cpu")), tensors_of(0), lambda fetch: fetch(0, 0, 3, out))
    assert out.tolist() == [3.0, 4.0]
