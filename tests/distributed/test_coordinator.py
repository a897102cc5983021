import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rank_pool import RankPool

from albireo.distributed import DistCoordinator, World


def views(world: World, folder: str) -> dict[str, Any]:
    coordinator = DistCoordinator()
    log = Path(folder) / "log"

    def note(text: str) -> None:
        with log.open("a") as file:
            file.write(text + "\n")

    with coordinator.priority_execution():
        note(f"first {coordinator.rank}")
    coordinator.block_all()
    with coordinator.priority_execution(executor_rank=1):
        note(f"then {coordinator.rank}")
    coordinator.block_all()
    with contextlib.suppress(ZeroDivisionError), coordinator.priority_execution():
        assert coordinator.is_master() is False or 1 / 0

    @coordinator.on_master_only()
    def master(number: int) -> int:
        """Doubles."""
        note("master")
        return number * 2

    doubled = master(3)
    coordinator.block_all()
    alone = [dist.new_group([rank]) for rank in range(2)][coordinator.rank]
    return {
        "numbers": [coordinator.rank, coordinator.world_size, coordinator.local_rank],
        "master": coordinator.is_master(),
        "node": coordinator.is_node_master(),
        "last": coordinator.is_last_process(),
        "alone": [coordinator.is_master(alone), coordinator.is_last_process(alone)],
        "doubled": doubled,
        "name": [master.__name__, master.__doc__],
        "two views": vars(DistCoordinator()) == vars(coordinator),
    }


def test_ranks_see_who_they_are_and_wait_for_each_other(two_ranks: RankPool, tmp_path: Path) -> None:
    first, second = two_ranks.run(views, folder=str(tmp_path))
    assert first["numbers"] == [0, 2, 0]
    assert second["numbers"] == [1, 2, 1]
    assert [first[key] for key in ("master", "node", "last")] == [True, True, False]
    assert [second[key] for key in ("master", "node", "last")] == [False, False, True]
    assert [first["doubled"], second["doubled"]] == [6, None]
    for view in (first, second):
        assert view["name"] == ["master", "Doubles."]
        assert view["two views"]
        assert view["alone"] == [True, True]
    log = (tmp_path / "log").read_text().splitlines()
    assert log == ["first 0", "first 1", "then 1", "then 0", "master"]


def test_alone_it_is_a_world_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    coordinator = DistCoordinator()
    assert (coordinator.rank, coordinator.world_size, coordinator.local_rank) == (0, 1, 0)
    assert coordinator.is_master()
    assert coordinator.is_node_master()
    assert coordinator.is_last_process()
    with coordinator.priority_execution():
        coordinator.print_on_master("a line")
    coordinator.print_on_node_master({"any": "thing"})
    coordinator.block_all()
    assert coordinator.on_master_only()(lambda: 5)() == 5
    assert capsys.readouterr().out == "a line\n{'any': 'thing'}\n"
