import pytest
import torch

from albireo.distributed import World
from albireo.distributed.probe import all_reduce_on_rank, check_all_reduce


def test_two_ranks_sum_over_gloo() -> None:
    check = check_all_reduce("gloo", 2)
    assert (check.backend, check.ranks, check.ok, check.why) == ("gloo", 2, True, "")
    assert 0 < check.start_seconds < 60
    assert check.bytes_per_second is not None
    assert 1e6 < check.bytes_per_second < 1e12


def test_ranks_that_hang_are_given_up() -> None:
    # Not even Python starts in this time.
    check = check_all_reduce("gloo", 2, timeout_seconds=0.001)
    assert not check.ok
    assert "did not end within 0.001 s" in check.why
    assert check.bytes_per_second is None


def test_a_wrong_sum_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(_entry: str, payload: dict[str, object], ranks: int, **_: object) -> None:
        monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.zero_())
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        for rank in range(ranks):
            all_reduce_on_rank(World(rank, ranks, rank, torch.device("cpu")), payload)
        monkeypatch.undo()

    monkeypatch.setattr("albireo.distributed.probe.launch_ranks", launch)
    check = check_all_reduce("gloo", 2)
    assert not check.ok
    assert check.why == "the sum is wrong on rank 0"
