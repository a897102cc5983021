"""Fixtures for all tests, and the checks that a test leaves nothing behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from rank_pool import RankPool
from train_server import TrainServer

from albireo.distributed import World

# A shared machine may be slow for a moment: how long an example takes says nothing about what it shows.
settings.register_profile("albireo", deadline=None)
settings.load_profile("albireo")

# Variables that pytest, or a library at its first use, sets for the whole process.
_SET_BY_OTHERS = {
    "KINETO_LOG_LEVEL",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
}


# A library may tell its pool of threads to end without waiting for it (transformers does, after loading a model): such
# threads end by themselves, and one that has not within this time is a leak.
_SECONDS_TO_END = 10.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is not for here, each with its reason."""
    for item in items:
        if item.get_closest_marker("full") is not None and os.environ.get("ALBIREO_TEST_FULL") != "1":
            item.add_marker(pytest.mark.skip(reason="part of the whole matrix, which .ci/full runs"))
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and there is none here"))


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaks a thread, an environment variable, a process group or a global setting of torch."""
    variables = dict(os.environ)
    threads = set(threading.enumerate())
    settings = _torch_settings()
    yield
    left = {key for key, value in os.environ.items() if variables.get(key) != value} | (
        set(variables) - set(os.environ)
    )
    assert not left - _SET_BY_OTHERS, f"the test changed environment variables: {sorted(left - _SET_BY_OTHERS)}"
    extra = [thread for thread in threading.enumerate() if thread not in threads and not thread.daemon]
    if request.node.get_closest_marker("compiles") is None:
        deadline = time.monotonic() + _SECONDS_TO_END
        for thread in extra:
            thread.join(max(0.0, deadline - time.monotonic()))
        extra = [thread for thread in extra if thread.is_alive()]
        assert not extra, f"the test left threads running: {[thread.name for thread in extra]}"
    assert not dist.is_initialized(), "the test left a process group"
    assert _torch_settings() == settings, "the test changed a global setting of torch"


def _torch_settings() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that some machines have beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the folder of real data {folder.name} is not beside this repository")
    return folder


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Two ranks, started once for all tests."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Four ranks, started once for all tests."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture
def run_case(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Run a case on 1, 2 or 4 ranks: `run_case(case, world_size, **arguments)`; on one in this process."""

    def run(case: Callable[..., Any], world_size: int, **arguments: Any) -> list[Any]:
        if world_size == 1:
            return [case(World(0, 1, 0, torch.device("cpu")), **arguments)]
        return request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size]).run(case, **arguments)

    return run


@pytest.fixture(scope="session")
def train_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainServer]:
    """A server that runs `albireo` in a process of its own without the seconds that imports take."""
    server = TrainServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokenized data that all tests share: the same text is tokenized once."""
    return tmp_path_factory.mktemp("cache")
