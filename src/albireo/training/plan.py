"""From flags, a file and an older run to one configuration and one folder. Loads nothing heavy, so it is quick."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albireo.config import RunConfig, config_from_mapping, merge, read_config_file, user_path
from albireo.errors import ConfigError
from albireo.training.run_folder import RunFolder

__all__ = ["RunPlan", "plan_run"]


@dataclass(frozen=True)
class RunPlan:
    """What the user asked for.

    Attributes:
        config: the options, as far as they are given.
        resume: the folder of the run that goes on, or None for a new one.
        output: the folder of a new run, or None for the default.
        begun: what the run that goes on was begun with; None for a new one.
    """

    config: RunConfig
    resume: Path | None
    output: Path | None
    begun: RunConfig | None = None

    def make_folder(self) -> RunFolder:
        """Open the run's folder; a new one is made, with the configuration in it before anything else happens.

        A run that is killed a moment later can then already be resumed.

        Raises:
            RunFolderError: the folder cannot be made, or holds another run.
        """
        if self.resume is not None:
            return RunFolder.open(self.resume)
        size = self.config.model.model.rstrip("/").rsplit("/", 1)[-1]
        folder = RunFolder.create(self.output, name=f"{self.config.recipe}-{size}")
        with folder.lock():
            folder.write_config(dataclasses.asdict(self.config))
        return folder


def plan_run(
    *,
    recipe: str,
    options: Mapping[str, Any],
    config_file: Path | None = None,
    resume: Path | None = None,
    output: Path | None = None,
) -> RunPlan:
    """Lay the layers over each other: defaults, an older run's configuration, a file, flags.

    Args:
        recipe: what is trained.
        options: flags by name.
        config_file: a JSON configuration.
        resume: the folder of a run to go on with.
        output: the folder of a new run.

    Raises:
        ConfigError: an unknown key or a wrong value.
        RunFolderError: there is no run to go on with.
    """
    config, begun = RunConfig.of(recipe), None
    if resume is not None:
        if output is not None and output.resolve() != resume.resolve():
            raise ConfigError("--resume goes on in the run's own folder: leave --output out")
        folder = RunFolder.open(resume)
        config = begun = config_from_mapping(folder.read_config(), where=str(folder.config_path), base=config)
    if config_file is not None:
        config = read_config_file(config_file, base=config)
    config = merge(config, options)
    return RunPlan(_with_absolute_paths(config), resume, output, begun)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """Make what exists as a path absolute: a run goes on from wherever its user stands."""
    model, data = config.model, config.data
    # Only checked: the families alone know whether the name is a size or a folder.
    user_path("--model", model.model)
    model = dataclasses.replace(model, **{name: _absolute(f"--{name}", getattr(model, name)) for name in model.paths})
    name = data.data if data.is_made_up else _absolute("--data", data.data)
    cache = None if data.cache is None else str(user_path("--cache", data.cache).absolute())
    return dataclasses.replace(config, model=model, data=dataclasses.replace(data, data=name, cache=cache))


def _absolute(flag: str, name: Any) -> Any:
    if name is None:
        return None
    path = user_path(flag, name)
    return str(path.resolve()) if path.exists() else name
