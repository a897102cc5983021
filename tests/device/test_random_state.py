import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from albireo.device import capture_random_state, restore_random_state, seed_everything

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def states_put_back() -> Iterator[None]:
    state = capture_random_state(CPU)
    yield
    restore_random_state(state, CPU)


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002  the generator under test
        float(np.random.randn()),  # noqa: NPY002
        float(torch.rand(())),
    ]


def test_a_state_that_is_put_back_gives_the_same_numbers() -> None:
    draw()  # leaves a second Gaussian in wait, in Python and in NumPy
    state = capture_random_state(CPU)
    first = draw()
    assert draw() != first
    restore_random_state(state, CPU)
    assert draw() == first


def test_seeds_depend_on_every_part() -> None:
    seen = set()
    for parts in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (12, 3), (1, 23)):
        seed_everything(*parts)
        seen.add(tuple(draw()))
    assert len(seen) == 5
    seed_everything(1, 2, 3)
    assert tuple(draw()) in seen
