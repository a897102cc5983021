"""What a run's checkpoint holds, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from albireo.booster import Booster
from albireo.checkpoint import Checkpoint, Snapshot, TensorSlice, save_checkpoint, whole
from albireo.device import capture_random_state, restore_random_state
from albireo.errors import CheckpointError
from albireo.files import FileOperations
from albireo.optim import OptimizerWrapper, set_scheduler_step
from albireo.plugins import ModelWrapper

__all__ = ["Position", "RunState"]


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        samples: the global sample index: how many samples all ranks together have seen.
    """

    step: int
    samples: int


@dataclass
class RunState:
    """Everything that a step changes: saved and loaded as one.

    Attributes:
        booster: the plugin and the ranks.
        model: the boosted model.
        optimizer: the boosted optimizer.
        scheduler: the learning rate's.
        names: tensors to their names in the model's own family.
        aliases: further names of tied tensors.
        identity: JSON values that must be the same when the run goes on, such as the data's fingerprint.
    """

    booster: Booster
    model: ModelWrapper
    optimizer: OptimizerWrapper
    scheduler: torch.optim.lr_scheduler.LambdaLR
    names: Mapping[torch.Tensor, str]
    aliases: Mapping[str, str]
    identity: Mapping[str, str]

    def save(self, folder: Path, position: Position, *, keep: int, files: FileOperations) -> None:
        """Write a checkpoint; every rank calls this.

        Args:
            folder: where a run's checkpoints are.
            position: where the run stands.
            keep: how many checkpoints remain.
            files: writes to the disk.
        """
        shared: dict[str, Any] = {
            "step": position.step,
            "samples": position.samples,
            "scheduler": {"last_epoch": self.scheduler.last_epoch},
            "scaler": self.optimizer.scaler_state(),
            "plugin": self.booster.plugin.name,
            "precision": self.booster.plugin.precision,
            "identity": dict(self.identity),
        }
        snapshot = Snapshot(
            step=position.step,
            slices=self._slices(),
            shared_state=shared,
            aliases={f"model/{name}": f"model/{first}" for name, first in self.aliases.items()},
        )
        save_checkpoint(folder, snapshot, ranks=self.booster.world, files=files, keep=keep)

    def load(self, checkpoint: Checkpoint) -> Position:
        """Take everything from a checkpoint.

        Args:
            checkpoint: a whole one.

        Returns:
            Where the run stands.

        Raises:
            CheckpointError: it belongs to another model or other data.
        """
        state = checkpoint.shared_state
        for key, value in self.identity.items():
            saved = state.get("identity", {}).get(key)
            if saved != value:
                raise CheckpointError(
                    f"{checkpoint.path} was made with another {key}: {saved} then, {value} now; give what it was, or "
                    "begin a new run"
                )
        position = Position(_number(checkpoint, "step"), _number(checkpoint, "samples"))
        scaler = state.get("scaler")
        if not isinstance(scaler, Mapping) or not all(isinstance(value, int | float) for value in scaler.values()):
            raise CheckpointError(f"{checkpoint.path} holds no scaler's state: it was not made by a training run")
        self.booster.plugin.import_state(self.model, self.optimizer, self.names, checkpoint)
        self.optimizer.load_scaler_state(dict(scaler))
        set_scheduler_step(self.scheduler, _number(checkpoint, "scheduler", "last_epoch"))
        self._load_random_state(checkpoint)
        return position

    def _slices(self) -> Iterator[TensorSlice]:
        world = self.booster.world
        yield from self.booster.plugin.export_state(self.model, self.optimizer, self.names, world)
        for name, state in capture_random_state(world.device).items():
            yield whole(f"random/{world.rank}/{name}", state)

    def _load_random_state(self, checkpoint: Checkpoint) -> None:
        world = self.booster.world
        if checkpoint.world_size != world.world_size:
            return  # states of other ranks fit no rank of this run; each step seeds its own where they are used
        prefix = f"random/{world.rank}/"
        state = {}
        for name in checkpoint.names(prefix):
            shape, _ = checkpoint.info(name)
            state[name.removeprefix(prefix)] = checkpoint.read(name).reshape(shape)
        restore_random_state(state, world.device)


def _number(checkpoint: Checkpoint, *keys: str) -> int:
    """Return a whole number of the shared state, which the checksums vouch for but not for who wrote it."""
    value: Any = checkpoint.shared_state
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{checkpoint.path} does not say its {'.'.join(keys)}: it was not made by a training run")
    return value
