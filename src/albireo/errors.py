"""Errors that tell a user, in one line, what is wrong and what to do instead.

Everything raised on purpose derives from `AlbireoError`. The command line prints such an error as one line and
exits with its `exit_code`; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "AlbireoError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Interrupted",
    "LaunchError",
    "ModelError",
    "OutOfMemoryError",
    "RunFolderError",
]


class AlbireoError(Exception):
    """An error that the user can act on; its message is one clear line."""

    exit_code = 2

    def __str__(self) -> str:
        """Return the message on one line, whatever the parts it was made of held."""
        return " ".join(super().__str__().split())


class ConfigError(AlbireoError):
    """An option has a wrong value, is unknown, or cannot go together with another."""


class DataError(AlbireoError):
    """The data cannot be read, or what was read cannot be trained on."""


class ModelError(AlbireoError):
    """The model or its tokenizer cannot be found, built or loaded, or the two do not agree."""


class CheckpointError(AlbireoError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class RunFolderError(AlbireoError):
    """A run folder cannot be written, is in use, or holds no run."""


class LaunchError(AlbireoError):
    """The ranks cannot be started, or one of them ended without saying why."""


class OutOfMemoryError(AlbireoError):
    """The memory that there is, or that a cap leaves, does not suffice."""


class Interrupted(AlbireoError):  # noqa: N818  not a fault: the user asked for it
    """The user stopped the run; it was saved and can go on."""

    exit_code = 130
