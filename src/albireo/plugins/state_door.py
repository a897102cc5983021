"""Saving and loading as scripts call it: models, optimizers and schedules by a file's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from albireo.distributed import World
from albireo.errors import ConfigError
from albireo.files import FileOperations
from albireo.optim import OptimizerWrapper
from albireo.plugins import state_files
from albireo.plugins.base import ModelWrapper, Plugin

__all__ = ["StateDoor"]


class StateDoor:
    """The part of the facade that saves and loads. Nothing is pickled: files are safetensors and JSON.

    Attributes:
        plugin: the mechanism.
        world: the ranks.
    """

    plugin: Plugin
    world: World

    def save_model(
        self,
        model: ModelWrapper,
        checkpoint: str | Path,
        shard: bool = False,
        gather_dtensor: bool = True,
        prefix: str | None = None,
        size_per_shard: int = 1024,
        use_safetensors: bool = False,
        use_async: bool = False,
    ) -> None:
        """Save a model's weights as safetensors; every rank calls this.

        Args:
            model: the boosted model.
            checkpoint: a file; with `shard` a folder, which Hugging Face's `from_pretrained` opens if the model is one
                of transformers. What else lies in it stays.
            shard: write several files and an index.
            gather_dtensor: True; weights are always written whole.
            prefix: put before each name.
            size_per_shard: the size of one of several files, in MB (2**20 bytes).
            use_safetensors: files are safetensors in any case; never pickles.
            use_async: False.

        Raises:
            ConfigError: an option is not there.
            CheckpointError: the name is a pickled file's, or nothing could be written; what was there stays.
        """
        place = _place(checkpoint, size_per_shard if shard else None, gather_dtensor, use_async)
        state_files.save_model(self.plugin, _checked(model), place, self.world, prefix=prefix or "")

    def load_model(self, model: ModelWrapper, checkpoint: str | Path, strict: bool = True) -> state_files.LoadedNames:
        """Fill a model from a file, a folder or an index; every rank calls this, and reads it.

        Args:
            model: the boosted model.
            checkpoint: a safetensors file, a folder of them, or their index.
            strict: refuse names that only one of model and file has; without it they are left as they are.

        Returns:
            The names that were left, by kind.

        Raises:
            CheckpointError: the file is missing, damaged or pickled, or of another model.
        """
        return state_files.load_model(self.plugin, _checked(model), Path(checkpoint), self.world, strict=strict)

    def save_optimizer(
        self,
        optimizer: OptimizerWrapper,
        checkpoint: str | Path,
        shard: bool = False,
        gather_dtensor: bool = True,
        prefix: str | None = None,
        size_per_shard: int = 1024,
        use_async: bool = False,
    ) -> None:
        """Save an optimizer's states and settings as safetensors; every rank calls this.

        Args:
            optimizer: the boosted optimizer.
            checkpoint: a file; with `shard` a folder, which may be the model's.
            shard: write several files and an index.
            gather_dtensor: True; states are always written whole.
            prefix: None.
            size_per_shard: the size of one of several files, in MB (2**20 bytes).
            use_async: False.

        Raises:
            ConfigError: an option is not there.
            CheckpointError: see `save_model`, or a state has no form in a file.
        """
        if prefix:
            raise ConfigError("an optimizer's states go by the names of the model's parameters: leave prefix out")
        place = _place(checkpoint, size_per_shard if shard else None, gather_dtensor, use_async)
        state_files.save_optimizer(self.plugin, _checked_optimizer(optimizer), place, self.world)

    def load_optimizer(self, optimizer: OptimizerWrapper, checkpoint: str | Path) -> None:
        """Fill an optimizer with what `save_optimizer` wrote; every rank calls this, and reads it.

        Args:
            optimizer: the boosted optimizer, with the same parameters in the same groups.
            checkpoint: the file or folder.

        Raises:
            CheckpointError: the file is missing, damaged or pickled, or of another optimizer.
        """
        state_files.load_optimizer(self.plugin, _checked_optimizer(optimizer), Path(checkpoint), self.world)

    def save_lr_scheduler(self, lr_scheduler: Any, checkpoint: str | Path) -> None:
        """Save a schedule's state as JSON; every rank calls this.

        Args:
            lr_scheduler: one of torch's, or anything with a `state_dict` of plain values.
            checkpoint: the file.

        Raises:
            CheckpointError: see `save_model`, or the state has no form in JSON.
        """
        state_files.save_lr_scheduler(lr_scheduler, Path(checkpoint), self.world, FileOperations())

    def load_lr_scheduler(self, lr_scheduler: Any, checkpoint: str | Path) -> None:
        """Put a schedule where `save_lr_scheduler` found it; every rank calls this, and reads it.

        Args:
            lr_scheduler: one of the same kind.
            checkpoint: the file.

        Raises:
            CheckpointError: the file is missing, damaged or pickled, or of another kind of schedule.
        """
        state_files.load_lr_scheduler(lr_scheduler, Path(checkpoint), self.world)


def _checked(model: ModelWrapper) -> ModelWrapper:
    if not isinstance(model, ModelWrapper):
        raise ConfigError(f"give the model that boost returned, not a {type(model).__name__}")
    return model


def _checked_optimizer(optimizer: OptimizerWrapper) -> OptimizerWrapper:
    if not isinstance(optimizer, OptimizerWrapper):
        raise ConfigError(f"give the optimizer that boost returned, not a {type(optimizer).__name__}")
    return optimizer


def _place(checkpoint: str | Path, shard_mb: int | None, gather_dtensor: bool, use_async: bool) -> state_files.Place:
    if not gather_dtensor:
        raise ConfigError("what is saved is always whole: leave gather_dtensor=True")
    if use_async:
        raise ConfigError("use_async is not there: leave it out, and the call returns when all is on the disk")
    return state_files.Place(Path(checkpoint), shard_mb, FileOperations())
