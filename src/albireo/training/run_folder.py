"""The run folder: all that a run leaves behind, and the lock that keeps a second writer out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock

from albireo.errors import RunFolderError
from albireo.files import FileOperations

__all__ = ["RunFolder", "replace_file"]


def replace_file(path: Path, data: bytes, files: FileOperations | None = None) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old one or the new one, never a part.

    Args:
        path: the file to make or replace; its folder must exist.
        data: the whole content.
        files: what touches the disk.

    Raises:
        RunFolderError: the file cannot be written (disk full, no permission, no such folder).
    """
    files = files if files is not None else FileOperations()
    try:
        files.replace(path, data)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error


class RunFolder:
    """One run on disk: where its files lie, its configuration, its summary and its lock.

    Made by `RunFolder.create` for a new run or by `RunFolder.open` for one that goes on, not by the constructor.

    Args:
        path: the folder, which exists.
        is_new: the folder must not hold a configuration yet when the first one is written.
        files: what touches the disk.
    """

    def __init__(self, path: Path, *, is_new: bool, files: FileOperations | None = None) -> None:
        self.path = path
        self._is_new = is_new
        self._made_here = is_new
        # Folders that were not there before, the innermost first.
        self._made: list[Path] = []
        self._files = files if files is not None else FileOperations()

    @classmethod
    def create(
        cls,
        path: Path | str | None = None,
        name: str = "opt-tiny",
        now: datetime | None = None,
        files: FileOperations | None = None,
    ) -> RunFolder:
        """Make the folder of a new run, with its parents.

        Args:
            path: the folder, or None for `runs/NAME-YYYYmmdd-HHMMSS`, with a number behind it where that is taken.
            name: the first part of the default folder's name; characters that no file name can hold become dashes.
            now: the time in the default folder's name; local time if None.
            files: what touches the disk.

        Raises:
            RunFolderError: `path` is a file, holds a run already, or cannot be made or written.
        """
        files = files if files is not None else FileOperations()
        target = Path(path) if path is not None else Path("runs")
        made = [place for place in (target, *target.parents) if not place.exists()]
        try:
            if path is None:
                now = now if now is not None else datetime.now().astimezone()
                folder = cls._make_unique(Path("runs"), f"{name}-{now:%Y%m%d-%H%M%S}", files)
            else:
                folder = Path(path)
                files.make_directory(folder)
        except OSError as error:
            wanted = path if path is not None else "runs"
            if isinstance(error, FileExistsError | NotADirectoryError):
                raise RunFolderError(f"cannot make the run folder {wanted}: {error.filename} is a file") from error
            raise RunFolderError(f"cannot make the run folder {wanted}: {error.strerror or error}") from error
        run = cls(folder, is_new=True, files=files)
        run._made = made if path is not None else [folder, *made]
        run._refuse_an_older_run()
        try:
            # The lock's file is needed anyway, and making it is the one honest test of whether the folder is writable.
            run.lock_path.touch()
        except OSError as error:
            raise RunFolderError(f"cannot write in the run folder {folder}: {error.strerror}") from error
        return run

    @classmethod
    def open(cls, path: Path | str, files: FileOperations | None = None) -> RunFolder:
        """Take up the folder of a run that was started before.

        Raises:
            RunFolderError: there is no run in `path`.
        """
        run = cls(Path(path), is_new=False, files=files)
        if not run.path.exists():
            raise RunFolderError(f"no run in {path}: there is no such folder")
        if not run.path.is_dir():
            raise RunFolderError(f"no run in {path}: it is a file, not a run's folder")
        if not run.config_path.is_file():
            raise RunFolderError(f"no run in {path}: it has no config.json")
        return run

    @property
    def config_path(self) -> Path:
        """The resolved configuration, JSON."""
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        """A line of JSON for each step and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def loss_plot_path(self) -> Path:
        """The picture of the losses."""
        return self.path / "loss.png"

    @property
    def accuracy_plot_path(self) -> Path:
        """The picture of the accuracy, where there is right and wrong."""
        return self.path / "accuracy.png"

    @property
    def predictions_path(self) -> Path:
        """A picture of held-out pictures and what the model takes them for."""
        return self.path / "predictions.png"

    @property
    def confusion_path(self) -> Path:
        """A picture of how often each class is taken for each."""
        return self.path / "confusion.png"

    @property
    def summary_path(self) -> Path:
        """What the run came to, JSON."""
        return self.path / "summary.json"

    @property
    def checkpoints_path(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def model_path(self) -> Path:
        """The trained model, a Hugging Face folder."""
        return self.path / "model"

    @property
    def adapter_path(self) -> Path:
        """The trained adapter, a folder that peft loads, where one was trained instead of all of the model."""
        return self.path / "adapter"

    @property
    def processor_path(self) -> Path:
        """What makes a model's inputs, such as its tokenizer, as transformers loads it."""
        return self.path / "processor"

    @property
    def lock_path(self) -> Path:
        """The file that is locked while a process writes the run; it stays when the lock is gone."""
        return self.path / "run.lock"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write `config.json`, whole or not at all. Hold the lock.

        Raises:
            RunFolderError: the file cannot be written, or another process put a run into this new folder meanwhile.
        """
        if self._is_new:
            # Two processes may both have found the folder empty; the one that got the lock second comes here late.
            self._refuse_an_older_run()
        replace_file(self.config_path, _to_json(config), self._files)
        self._is_new = False

    def read_config(self) -> dict[str, Any]:
        """Read `config.json`.

        Raises:
            RunFolderError: the file is missing, is no JSON (the message names line and column), or is no object.
        """
        return _read_object(self.config_path)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, whole or not at all. Hold the lock.

        Raises:
            RunFolderError: the file cannot be written.
        """
        replace_file(self.summary_path, _to_json(summary), self._files)

    @contextmanager
    def lock(self, timeout_seconds: float = 5.0) -> Iterator[None]:
        """Be the only process that writes this run.

        The kernel holds the lock for the process: it is gone when the process ends, however it ends.

        Args:
            timeout_seconds: how long to wait for another writer, which may have been killed a moment ago and still be
                on its way out.

        Raises:
            RunFolderError: another process still holds the lock after that time, or the folder cannot be locked.
        """
        # Not per thread: the lock belongs to the process, and another thread may be the one that lets it go.
        lock = filelock.FileLock(self.lock_path, timeout=timeout_seconds, thread_local=False)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise RunFolderError(
                f"another process is writing the run in {self.path}; wait until it has ended, or choose another --output"
            ) from error
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunFolderError(f"cannot lock the run folder {self.path}: {reason}") from error
        try:
            yield
        finally:
            lock.release()

    def discard_if_not_begun(self) -> None:
        """Remove what `create` and the first `write_config` left, if the run came no further.

        What the user had in the folder stays, and so does a run that has rows or checkpoints.
        """
        if self.metrics_path.exists() or self.checkpoints_path.exists() or not self._made_here:
            return
        for path in (self.config_path, self.lock_path):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()  # one that holds something of the user's stays, and so do those above it

    def _refuse_an_older_run(self) -> None:
        if self.config_path.exists():
            raise RunFolderError(
                f"{self.path} already holds a run; go on with it by --resume {self.path}, or choose another --output"
            )
        for part in (self.metrics_path, self.checkpoints_path):
            # Such a folder cannot be resumed, and a new run's rows and checkpoints must not mix with the old ones.
            if part.exists():
                raise RunFolderError(
                    f"{self.path} holds {part.name} of a run but no config.json, so --resume cannot go on with it;"
                    " choose another --output"
                )

    @staticmethod
    def _make_unique(parent: Path, name: str, files: FileOperations) -> Path:
        files.make_directory(parent)
        safe_name = "".join(character if character.isalnum() or character in "._-" else "-" for character in name)
        folder, number = parent / safe_name, 1
        while True:
            # mkdir itself is the test: two runs started in one second must not both find the name free.
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
                folder = parent / f"{safe_name}-{number}"
            else:
                files.sync_directory(parent)
                return folder


def _to_json(mapping: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(mapping), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes().decode())
    except json.JSONDecodeError as error:
        raise RunFolderError(
            f"{path} is damaged at line {error.lineno}, column {error.colno}: {error.msg}; it must be JSON"
        ) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, a number of a thousand digits, a million brackets
        raise RunFolderError(f"{path} is damaged: {error}; it must be JSON in UTF-8") from error
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content
