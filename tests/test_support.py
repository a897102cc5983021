"""What the tests themselves stand on: a case that goes wrong is told, and the ranks are there for the next one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from tiny_models import small_opt
from tiny_texts import write_text
from train_server import TrainServer

from albireo.distributed import World


def leaving_case(_world: World) -> None:
    raise SystemExit(3)


def interrupted_case(_world: World) -> None:
    raise KeyboardInterrupt


def unspeakable_case(_world: World) -> Any:
    return {1, 2}


def devices_case(world: World) -> list[Any]:
    return [world.device.type, torch.cuda.device_count(), os.environ["CUDA_VISIBLE_DEVICES"]]


@pytest.mark.parametrize(
    ("case", "said"),
    [(leaving_case, "SystemExit: 3"), (interrupted_case, "KeyboardInterrupt"), (unspeakable_case, "TypeError")],
)
def test_a_case_that_goes_wrong_is_told_and_the_ranks_live(two_ranks: RankPool, case: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=f"{case.__name__} failed on 2 ranks") as failure:
        two_ranks.run(case)
    assert said in str(failure.value)
    assert two_ranks.run(devices_case) == [["cpu", 0, ""]] * 2


def test_runs_of_the_server_see_no_gpu_and_hear_ctrl_c(train_server: TrainServer, tmp_path: Path) -> None:
    script = tmp_path / "tell.py"
    script.write_text(
        "import os, signal\nprint([os.environ['CUDA_VISIBLE_DEVICES'], signal.getsignal(signal.SIGINT)])\n"
    )
    ended = train_server.run(["run", "--nproc-per-node", "1", str(script)])
    assert ended.code == 0, ended.errors
    assert ended.output.strip() == str(["", signal.default_int_handler])


def test_the_same_seed_makes_the_same_model_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    one, same, other = small_opt(seed=1), small_opt(seed=1), small_opt(seed=2, tie_word_embeddings=False)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), same.parameters(), strict=True))
    assert other.lm_head.weight is not other.model.decoder.embed_tokens.weight
    assert one.training
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_made_up_texts_are_the_same_for_a_seed(tmp_path: Path) -> None:
    one, same, other = (
        write_text(tmp_path / str(number), lines=9, seed=seed).read_text() for number, seed in enumerate((1, 1, 2))
    )
    assert one == same != other
    assert one.count("\n") == 8
