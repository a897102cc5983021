from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.checkpoint import names


@given(step=st.integers(0, 10**17))
def test_every_name_is_read_back(step: int) -> None:
    folder = Path("f")
    assert names.parse_name(names.step_path(folder, step).name) == (step, False)
    assert names.parse_name(names.again_path(folder, step).name) == (step, True)
    assert names.is_leftover(names.unfinished_path(folder, step).name)
    assert names.is_leftover(names.trash_path(names.again_path(folder, step)).name)


@pytest.mark.parametrize(
    "name", ["step-60", "step-000000060", "step-00000060x", "step-00000060.old", "step--0000060", "xstep-00000060"]
)
def test_other_names_are_left_alone(name: str) -> None:
    assert names.parse_name(name) is None
    assert not names.is_leftover(f".tmp-{name}")


def test_the_newest_comes_first_and_a_second_save_before_the_first(tmp_path: Path) -> None:
    for name in ["step-00000060", "step-00000060.again", "step-00000007", "step-123456789", ".tmp-step-00000099", "x"]:
        (tmp_path / name).mkdir()
    found = [(step, path.name) for step, path in names.find_checkpoints(tmp_path)]
    assert found == [
        (123456789, "step-123456789"),
        (60, "step-00000060.again"),
        (60, "step-00000060"),
        (7, "step-00000007"),
    ]
    assert names.checkpoint_path(tmp_path, 60).name == "step-00000060.again"
    assert names.checkpoint_path(tmp_path, 7).name == "step-00000007"


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert names.find_checkpoints(tmp_path / "nowhere") == []
