"""The random states of a process: seeded, captured and restored as one."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

__all__ = ["capture_random_state", "restore_random_state", "seed_everything", "seed_of"]


def seed_of(*parts: int) -> int:
    """Return one seed made of several numbers, such as a run's seed, a step and a rank.

    Args:
        parts: any whole numbers.

    Returns:
        63 bits, each of which depends on all parts: torch's generator on a CPU looks at the lowest 32 only.
    """
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(*parts: int) -> None:
    """Seed Python's, NumPy's and torch's generators, the devices' included.

    Args:
        parts: numbers that together make the seed, such as a run's seed, a step and a rank.
    """
    seed = seed_of(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries draw from this generator
    torch.manual_seed(seed)


def capture_random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of all generators as byte tensors on the CPU.

    Args:
        device: the rank's device.

    Returns:
        Name of the generator to its state: `python`, `numpy`, `torch`, and `device` on a GPU.
    """
    version, words, gauss = random.getstate()
    python = torch.tensor([version, *words, 0 if gauss is None else 1], dtype=torch.int64)
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  the generator that libraries use
    state = {
        "python": python,
        "python_gauss": torch.tensor([0.0 if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), int(position), int(has_gauss)], dtype=torch.int64),
        "numpy_gauss": torch.tensor([float(cached)], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `capture_random_state` returned.

    Args:
        state: the states; one that is missing is left as it is.
        device: the rank's device.
    """
    if "python" in state:
        version, *words, has_gauss = state["python"].tolist()
        gauss = float(state["python_gauss"][0]) if has_gauss else None
        random.setstate((version, tuple(words), gauss))
    if "numpy" in state:
        *keys, position, has_gauss = state["numpy"].tolist()
        cached = float(state["numpy_gauss"][0])
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "device" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
