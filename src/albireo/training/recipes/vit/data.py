"""The pictures of a run: those that can be read, decoded by worker processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from albireo.config import PictureConfig, RunConfig
from albireo.data import (
    AnyBatch,
    BatchLayout,
    PictureForm,
    Pictures,
    StepLoader,
    default_cache_folder,
    evaluation_pictures,
    open_pictures,
    picture_batching,
    prepare_pictures,
)
from albireo.device.cores import usable_cores
from albireo.distributed import World
from albireo.errors import DataError
from albireo.training.progress import Progress
from albireo.training.recipe import RunData

__all__ = ["CLASSES_FILE", "PictureRunData", "check_run_data", "load_run_data", "picture_options", "read_classes"]

CLASSES_FILE = "classes.json"
_MOST_WORKERS = 8
_MOST_NAMED = 10


@dataclass(frozen=True)
class PictureRunData(RunData):
    """Pictures.

    Attributes:
        form: what they become.
        classes: their names.
        workers: processes that read ahead.
        augments: each is another part of itself in each epoch.
    """

    train: Pictures
    held_out: Pictures
    form: PictureForm
    classes: tuple[str, ...]
    workers: int
    augments: bool

    def steps(self, layout: BatchLayout, *, seed: int, start_sample: int = 0, steps: int, pin: bool) -> StepLoader:
        """See the base class."""
        return StepLoader(
            self.train,
            layout,
            seed=seed,
            start_sample=start_sample,
            steps=steps,
            pin_memory=pin,
            num_workers=self.workers,
            batching=picture_batching(augment=self.augments),
        )

    def evaluation(self, batch_size: int, world: World, *, pin: bool) -> Iterator[AnyBatch]:  # noqa: ARG002
        """See the base class."""
        return evaluation_pictures(self.held_out, batch_size, world.rank, world.world_size)

    def save(self, folder: Path) -> None:
        """Write the image processor, as transformers loads it, and the names of the classes."""
        self.form.save(folder)
        (folder / CLASSES_FILE).write_text(json.dumps(self.classes) + "\n")


def picture_options(config: RunConfig) -> PictureConfig:
    """Return the data's section of the recipe vit.

    Raises:
        TypeError: it is another recipe's configuration.
    """
    if not isinstance(config.data, PictureConfig):
        raise TypeError(f"expected the configuration of the recipe vit, not of {config.recipe}")
    return config.data


def read_classes(processor: Path) -> tuple[str, ...]:
    """Return the names of the classes that a run has written.

    Args:
        processor: the folder that `PictureRunData.save` wrote.

    Raises:
        DataError: they are not there.
    """
    try:
        return tuple(str(name) for name in json.loads((processor / CLASSES_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{processor / CLASSES_FILE} cannot be read: {error}") from error


def check_run_data(config: RunConfig) -> None:
    """Say at once what is wrong with a path, or with the form of a name on the hub; no picture is read.

    Args:
        config: a resolved configuration.

    Raises:
        DataError: there is nothing of that name.
    """
    data = picture_options(config)
    if data.is_made_up or Path(data.data).expanduser().exists():
        return
    from albireo.data.hub_source import candidates

    candidates(data.data)


def load_run_data(config: RunConfig, form: PictureForm, progress: Progress) -> PictureRunData:
    """Prepare what the configuration names.

    Args:
        config: a resolved configuration.
        form: what the model wants of a picture.
        progress: shows how far it is.

    Raises:
        DataError: there are no such pictures, or too few, or too many are damaged.
    """
    data = picture_options(config)
    seed = config.schedule.seed
    source = open_pictures(data.data, seed=seed)
    # What is made up is whole, and need not be looked at twice.
    cache = None if data.is_made_up else Path(data.cache) if data.cache else default_cache_folder()
    with progress.task("looking at the pictures", len(source.labels)) as task:
        made = prepare_pictures(
            source,
            form,
            holdout_share=data.holdout,
            augment=data.augment,
            max_damaged=data.max_damaged,
            seed=seed,
            cache_folder=cache,
            progress=lambda _done, _total: task.advance(1),
        )
    fingerprint = (
        f"pictures {source.fingerprint()[:12]} of {form.height} x {form.width}, {len(made.train)} to train on and "
        f"{len(made.held_out)} held out, {'random parts' if data.augment else 'whole'}, of the classes {', '.join(source.classes)}"
    )
    lines = [
        f"data       {source.description}",
        f"samples    {len(made.train):,} to train on, {len(made.held_out):,} held out",
    ]
    lines += [f"left out   {name} cannot be read" for name in made.damaged[:_MOST_NAMED]]
    if len(made.damaged) > _MOST_NAMED:
        lines.append(f"left out   {len(made.damaged) - _MOST_NAMED} more cannot be read")
    return PictureRunData(
        train=made.train,
        held_out=made.held_out,
        fingerprint=fingerprint,
        lines=tuple(lines),
        form=form,
        classes=source.classes,
        workers=_workers(config),
        augments=data.augment,
    )


def _workers(config: RunConfig) -> int:
    """Return how many processes a rank has read for it: two cores are left to it, and on few there is none to spare."""
    given = picture_options(config).workers
    if given is not None:
        return given
    return max(0, min(_MOST_WORKERS, usable_cores() // config.plugin.gpus - 2))
