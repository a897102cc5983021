"""Pictures and their classes: out of folders, a hub data set, or made up."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from albireo.data.mixing import random_bits, random_key
from albireo.data.split_names import assign_splits
from albireo.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FolderPictures", "HubPictures", "MadeUpPictures", "PictureSource", "open_pictures", "read_picture"]

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ROLES = ("train", "training", "valid", "validation", "val", "dev", "test", "testing")
_MADE_UP_CLASSES = ("cross", "disc", "square")
_MADE_UP_SIZE = 64


class PictureSource(ABC):
    """Pictures, each of one class, by number.

    Attributes:
        classes: their names; a class's number is its place.
        labels: each picture's class.
        held_out: the numbers of pictures of a part of the data's own to evaluate on; empty where it has none.
        description: where they are from, in words.
        is_made_up: they are made as they are asked for, so that none can be damaged.
    """

    is_made_up: ClassVar[bool] = False
    classes: tuple[str, ...]
    labels: Sequence[int]
    held_out: Sequence[int]
    description: str

    @abstractmethod
    def open(self, number: int) -> Image:
        """Return a picture, read whole.

        Args:
            number: from 0.

        Raises:
            OSError: it is damaged.
            ValueError: the same.
        """

    @abstractmethod
    def name(self, number: int) -> str:
        """Return what the user calls a picture."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return what is another wherever the pictures are."""


class FolderPictures(PictureSource):
    """Files in folders of classes, which may be in folders of parts.

    Args:
        name: as the user gave it.
        folder: `CLASS/PICTURE`, or `PART/CLASS/PICTURE` where a part is called train, test or the like.

    Raises:
        DataError: there is no such folder, or what is in it is not pictures of classes.
    """

    def __init__(self, name: str, folder: Path) -> None:
        parts, aside = _parts_of(name, folder)
        found = {part: _merged(_classes_of(name, place) for place in places) for part, places in parts.items()}
        self.classes = tuple(sorted(found["train"]))
        if unknown := sorted(set(found["held out"]) - set(self.classes)):
            raise DataError(f"{name}: the class {unknown[0]} is to be evaluated on, and is not in what is trained on")
        if len(self.classes) < 2:
            raise DataError(f"{name} has one class only, {self.classes[0]}: there is nothing to tell apart")
        rows = [
            (part, self.classes.index(kind), file)
            for part, kinds in found.items()
            for kind in sorted(kinds)
            for file in kinds[kind]
        ]
        self._folder = folder
        self._files = [file for _, _, file in rows]
        self.labels = [label for _, label, _ in rows]
        self.held_out = [number for number, (part, _, _) in enumerate(rows) if part == "held out"]
        self.description = f"{name}: {len(rows):,} pictures of {len(self.classes)} classes" + (
            f"; left aside: {', '.join(aside)}" if aside else ""
        )

    def open(self, number: int) -> Image:
        """See the base class."""
        return read_picture(self._files[number])

    def name(self, number: int) -> str:
        """See the base class."""
        return str(self._files[number])

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names and sizes."""
        digest = hashlib.sha256(b"pictures 1")
        for file in self._files:
            digest.update(f"{file.relative_to(self._folder)}\0{file.stat().st_size}\0".encode())
        return digest.hexdigest()


class HubPictures(PictureSource):
    """The rows of a hub data set with a column of pictures and one of classes.

    Args:
        name: what the user called it.
        tables: the data sets by split, each a `datasets.Dataset`.

    Raises:
        DataError: there are no such columns, or no rows.
    """

    def __init__(self, name: str, tables: Mapping[str, Any]) -> None:
        import datasets

        plan = assign_splits(str(split) for split, table in tables.items() if len(table))
        if not plan.train:
            raise DataError(f"the data set {name} has no rows")
        held = plan.validation or tuple(part for part in plan.left_aside if _has_role(part))
        features = tables[plan.train[0]].features
        pictures = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
        kinds = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        if not pictures or not kinds:
            raise DataError(
                f"the data set {name} has no column of pictures beside one of classes; its columns are: {', '.join(features)}"
            )
        self._name, self._column = name, pictures[0]
        self.classes = tuple(features[kinds[0]].names)
        if len(self.classes) < 2:
            raise DataError(f"the data set {name} has one class only: there is nothing to tell apart")
        # As bytes: whether they are a picture is found out here.
        raw = datasets.Image(decode=False)
        parts = [(part, tables[part].cast_column(self._column, raw)) for part in (*plan.train, *held)]
        self._rows = [(part, row) for part, table in parts for row in range(len(table))]
        self._tables = dict(parts)
        self.labels = [int(label) for part, table in parts for label in table[kinds[0]]]
        trained = sum(len(self._tables[part]) for part in plan.train)
        self.held_out = range(trained, len(self.labels))
        self.description = (
            f"{name} of the Hugging Face hub: {len(self.labels):,} pictures of {len(self.classes)} classes"
        )

    def open(self, number: int) -> Image:
        """See the base class."""
        part, row = self._rows[number]
        found = self._tables[part][row][self._column]
        return read_picture(io.BytesIO(found["bytes"]) if found["bytes"] is not None else Path(found["path"]))

    def name(self, number: int) -> str:
        """See the base class."""
        part, row = self._rows[number]
        return f"row {row} of the {part} split of {self._name}"

    def fingerprint(self) -> str:
        """Return the SHA-256 of what `datasets` calls the tables' own fingerprints."""
        marks = [getattr(table, "_fingerprint", "") for table in self._tables.values()]
        return hashlib.sha256("\0".join(["hub pictures 1", *marks]).encode()).hexdigest()


class MadeUpPictures(PictureSource):
    """Discs, squares and crosses in colours on noise, or noise alone, each decided by its number.

    Args:
        count: how many.
        seed: which.
        shows_shapes: without it there is nothing to be learnt, and a class is a number.
    """

    is_made_up = True

    def __init__(self, count: int, seed: int, *, shows_shapes: bool = True) -> None:
        self._seed, self._shows_shapes = seed, shows_shapes
        self.classes = _MADE_UP_CLASSES if shows_shapes else tuple(f"class {number}" for number in range(10))
        self.labels = [number % len(self.classes) for number in range(count)]
        self.held_out = ()
        what = "made up: discs, squares and crosses" if shows_shapes else "uniform noise"
        self.description = f"{what}, {count:,} pictures of {len(self.classes)} classes"

    def open(self, number: int) -> Image:
        """See the base class."""
        from PIL import Image

        side = _MADE_UP_SIZE
        words = random_bits(random_key(self._seed, number), np.arange(8 + side * side, dtype=np.uint64))
        noise = (words[8:] & np.uint64(63)).astype(np.uint8).reshape(side, side, 1)
        pixels = np.repeat(noise, 3, axis=2)
        if self._shows_shapes:
            draws = [float(word >> np.uint64(11)) / 2**53 for word in words[:8]]
            radius = side * (0.15 + 0.15 * draws[0])
            x, y = (radius + draw * (side - 2 * radius) for draw in draws[1:3])
            columns, rows = np.meshgrid(np.arange(side) - x, np.arange(side) - y)
            shapes = {
                "disc": columns**2 + rows**2 <= radius**2,
                "square": (abs(columns) <= radius * 0.85) & (abs(rows) <= radius * 0.85),
                "cross": (np.minimum(abs(columns), abs(rows)) <= radius * 0.3)
                & (np.maximum(abs(columns), abs(rows)) <= radius),
            }
            colour = np.array([96 + 159 * draw for draw in draws[3:6]], dtype=np.uint8)
            pixels[shapes[self.classes[self.labels[number]]]] = colour
        return Image.fromarray(pixels)

    def name(self, number: int) -> str:
        """See the base class."""
        return f"made-up picture {number}"

    def fingerprint(self) -> str:
        """See the base class."""
        return f"made up {len(self.labels)} {self._seed} {self._shows_shapes}"


def open_pictures(name: str, *, seed: int) -> PictureSource:
    """Return the pictures that a name means: a folder's, made-up ones, or those of a hub data set.

    Args:
        name: as the user gave it.
        seed: which made-up ones.

    Raises:
        DataError: there are none.
    """
    if name == "synthetic":
        return MadeUpPictures(600, seed)
    if name == "random":
        return MadeUpPictures(4096, seed, shows_shapes=False)
    folder = Path(name).expanduser()
    if folder.exists():
        return FolderPictures(name, folder)
    from albireo.data.hub_source import load_tables

    return HubPictures(name, load_tables(name))


def _has_role(name: str) -> bool:
    return name.lower() in _ROLES


def _parts_of(name: str, folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the folders that hold folders of classes, by what they are for, and the names of those left aside."""
    if not folder.is_dir():
        raise DataError(f"{name} is a file: give a folder that has a folder of pictures for each class")
    inside = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    if not inside:
        loose = any(_is_picture(path) for path in folder.iterdir())
        why = "its pictures lie in no folder of a class" if loose else "it is empty"
        raise DataError(f"{name} has no folders of classes: {why}")
    if not any(_has_role(part) for part in inside):
        return {"train": [folder], "held out": []}, []
    plan = assign_splits(inside)
    # A test part is what one evaluates on, where nothing else is.
    held_out = plan.validation or tuple(part for part in plan.left_aside if _has_role(part))
    aside = [part for part in plan.left_aside if part not in held_out]
    return {"train": [inside[p] for p in plan.train], "held out": [inside[p] for p in held_out]}, aside


def _merged(parts: Iterable[Mapping[str, list[Path]]]) -> dict[str, list[Path]]:
    merged: dict[str, list[Path]] = {}
    for part in parts:
        for kind, files in part.items():
            merged.setdefault(kind, []).extend(files)
    return merged


def _classes_of(name: str, folder: Path) -> dict[str, list[Path]]:
    """Return each class's files, in order."""
    kinds = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not kinds:
        raise DataError(f"{name}: {folder.name} has no folders of classes")
    found = {}
    for kind in kinds:
        files = sorted(path for path in kind.rglob("*") if _is_picture(path))
        if not files:
            raise DataError(f"{name}: the class {kind.name} has no pictures ({', '.join(_ENDINGS)}) in {kind}")
        found[kind.name] = files
    return found


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _ENDINGS and not path.name.startswith(".") and path.is_file()


def read_picture(file: Path | io.BytesIO) -> Image:
    """Return a file's picture in red, green and blue, read whole.

    Args:
        file: of any format that PIL reads.

    Raises:
        OSError: it is missing, damaged or no picture.
        ValueError: the same.
    """
    from PIL import Image

    try:
        with Image.open(file) as picture:
            # Turned as whoever took it held the camera is not what models were trained on: as it is.
            return picture.convert("RGB")
    except (Image.DecompressionBombError, SyntaxError, ArithmeticError, LookupError, MemoryError) as error:
        # What PIL's readers raise for damaged files besides.
        raise ValueError(str(error)) from error
