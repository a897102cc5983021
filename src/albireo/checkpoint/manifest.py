"""What the JSON of a checkpoint says: the listing that each rank writes, and the manifest made of them. Pure.

Whatever is read is checked here in all that can be checked without looking at other files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from albireo.checkpoint.documents import JSON, Fields
from albireo.checkpoint.slices import DTYPE_CODES, MAX_ELEMENTS, Piece, TensorInfo, check_coverage, check_name
from albireo.errors import CheckpointError

__all__ = [
    "MANIFEST_NAME",
    "FileRecord",
    "Listing",
    "Manifest",
    "listing_name",
    "merge_listings",
    "tensor_file_name",
]

MANIFEST_NAME = "manifest.json"

# A name of this form has no folder in it, so nothing that a manifest says can lead out of its own folder.
_FILE_NAME = re.compile(r"rank-([0-9]{5,9})(?:\.json|-[0-9]{5,9}\.safetensors)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
_MAX_DIMENSIONS = 64


def listing_name(rank: int) -> str:
    """Return the name of the file with a rank's listing and state."""
    return f"rank-{rank:05d}.json"


def tensor_file_name(rank: int, number: int) -> str:
    """Return the name of a rank's tensor file; they are numbered from 1."""
    return f"rank-{rank:05d}-{number:05d}.safetensors"


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint.

    Attributes:
        name: without any folder.
        size_bytes: its length.
        sha256: of its content, in hexadecimal.
        pieces: what its elements are, in their order; empty for JSON.
    """

    name: str
    size_bytes: int
    sha256: str
    pieces: tuple[Piece, ...] = ()

    def to_json(self) -> dict[str, JSON]:
        """Return the record as JSON."""
        content: dict[str, JSON] = {"name": self.name, "size_bytes": self.size_bytes, "sha256": self.sha256}
        if self.pieces:
            content["slices"] = [list(piece) for piece in self.pieces]
        return content


@dataclass(frozen=True)
class Listing:
    """What one rank wrote, and its own state.

    Attributes:
        step, rank, world_size: of the save.
        tensors: every tensor that the rank gave a slice of, without the elements.
        files: its tensor files.
        state: the rank's own JSON.
    """

    step: int
    rank: int
    world_size: int
    tensors: Mapping[str, TensorInfo]
    files: tuple[FileRecord, ...]
    state: Mapping[str, JSON]

    def to_json(self) -> dict[str, JSON]:
        """Return the listing as JSON."""
        return {
            "step": self.step,
            "rank": self.rank,
            "world_size": self.world_size,
            "tensors": _tensors_to_json(self.tensors),
            "files": [record.to_json() for record in self.files],
            "state": self.state,
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Listing:
        """Check a parsed listing.

        Raises:
            CheckpointError: naming the file and the part that is wrong.
        """
        tensors = _tensors_from_json(fields)
        return cls(
            step=fields.integer("step"),
            rank=fields.integer("rank"),
            world_size=fields.integer("world_size", minimum=1),
            tensors=tensors,
            files=_files_from_json(fields, tensors),
            state=fields.mapping("state"),
        )


@dataclass(frozen=True)
class Manifest:
    """What a whole checkpoint is made of.

    Attributes:
        step: how many optimizer steps were done.
        world_size: how many ranks saved it.
        shared_state: JSON that is the same for all ranks.
        aliases: second names of tensors, such as tied weights have, to the names they are saved under.
        tensors: every tensor, without its elements.
        files: every file but the manifest itself.
    """

    step: int
    world_size: int
    shared_state: Mapping[str, Any]
    aliases: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    files: tuple[FileRecord, ...]

    def check(self) -> None:
        """Check that the parts agree.

        Raises:
            CheckpointError: an element is missing or comes twice, an alias leads nowhere, or a rank's file is missing.
        """
        check_coverage(self.tensors, (piece for record in self.files for piece in record.pieces))
        for alias, name in self.aliases.items():
            check_name(alias)
            if alias in self.tensors:
                raise CheckpointError(f"{alias} is the alias of {name}, but a tensor of that name is saved as well")
            if name not in self.tensors:
                raise CheckpointError(f"{alias} is the alias of {name}, but no tensor of that name is saved")
        names = [record.name for record in self.files]
        if len(set(names)) != len(names):
            raise CheckpointError("a file is listed twice")
        listings = {name for name in names if name.endswith(".json")}
        for rank in range(self.world_size):
            if listing_name(rank) not in listings:
                raise CheckpointError(f"{listing_name(rank)}, one of {self.world_size} ranks' states, is not listed")
        for name in names:
            if _rank_of(name) >= self.world_size:
                raise CheckpointError(f"{name} is listed, but only {self.world_size} ranks have saved")

    def to_json(self) -> dict[str, JSON]:
        """Return the manifest as JSON."""
        return {
            "step": self.step,
            "world_size": self.world_size,
            "shared_state": self.shared_state,
            "aliases": dict(self.aliases),
            "tensors": _tensors_to_json(self.tensors),
            "files": [record.to_json() for record in self.files],
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Manifest:
        """Check a parsed manifest.

        Raises:
            CheckpointError: naming the file and the part that is wrong.
        """
        tensors = _tensors_from_json(fields)
        aliases = fields.mapping("aliases")
        if not all(isinstance(name, str) for name in aliases.values()):
            raise CheckpointError(f"{fields.where}: aliases must lead to names of tensors")
        manifest = cls(
            step=fields.integer("step"),
            # Bounded by the files that stand there, so that a huge number costs no time.
            world_size=fields.integer("world_size", minimum=1, maximum=len(fields.array("files"))),
            shared_state=fields.mapping("shared_state"),
            aliases=aliases,
            tensors=tensors,
            files=_files_from_json(fields, tensors),
        )
        try:
            manifest.check()
        except CheckpointError as error:
            raise CheckpointError(f"{fields.where}: {error}") from error
        return manifest


def merge_listings(
    listings: Sequence[Listing],
    records: Sequence[FileRecord],
    shared_state: Mapping[str, JSON],
    aliases: Mapping[str, str],
) -> Manifest:
    """Make the manifest of what all ranks wrote.

    Args:
        listings: in the order of the ranks; at least one.
        records: of the files that the listings lie in.
        shared_state: see `Manifest`.
        aliases: see `Manifest`.

    Raises:
        CheckpointError: the listings do not belong together, or what they list is not a whole checkpoint.
    """
    step = listings[0].step
    tensors: dict[str, TensorInfo] = {}
    for rank, listing in enumerate(listings):
        if (listing.rank, listing.step, listing.world_size) != (rank, step, len(listings)):
            raise CheckpointError(
                f"{listing_name(rank)} is of rank {listing.rank} of {listing.world_size} at step {listing.step}, but "
                f"this is a save of {len(listings)} ranks at step {step}"
            )
        for name, info in listing.tensors.items():
            if tensors.setdefault(name, info) != info:
                raise CheckpointError(
                    f"rank {rank} saves {name} as {_describe(info)}, a rank before it as {_describe(tensors[name])}"
                )
    manifest = Manifest(
        step=step,
        world_size=len(listings),
        shared_state=shared_state,
        aliases=dict(aliases),
        tensors=tensors,
        files=(*records, *(record for listing in listings for record in listing.files)),
    )
    manifest.check()
    return manifest


def _describe(info: TensorInfo) -> str:
    return f"{str(info.dtype).removeprefix('torch.')} of shape {info.shape}"


def _rank_of(name: str) -> int:
    match = _FILE_NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{name[:100]!r} is not the name of a file of a checkpoint")
    return int(match.group(1))


def _tensors_to_json(tensors: Mapping[str, TensorInfo]) -> dict[str, JSON]:
    return {
        name: {"dtype": DTYPE_CODES[info.dtype], "shape": list(info.shape)} for name, info in sorted(tensors.items())
    }


def _tensors_from_json(fields: Fields) -> dict[str, TensorInfo]:
    tensors = {}
    for name, value in fields.mapping("tensors").items():
        check_name(name)
        entry = Fields(value, f"{fields.where}: {name}")
        code = entry.text("dtype")
        if code not in _DTYPES:
            raise CheckpointError(f"{entry.where}: {code[:50]!r} is not a dtype of a checkpoint")
        shape = entry.array("shape")
        if len(shape) > _MAX_DIMENSIONS or not all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in shape):
            raise CheckpointError(f"{entry.where}: its shape must be a list of sizes from 0")
        tensors[name] = TensorInfo(tuple(shape), _DTYPES[code])
        if tensors[name].elements > MAX_ELEMENTS:
            raise CheckpointError(f"{entry.where}: its shape has more elements than any tensor can")
    return tensors


def _files_from_json(fields: Fields, tensors: Mapping[str, TensorInfo]) -> tuple[FileRecord, ...]:
    records = []
    for index, value in enumerate(fields.array("files")):
        entry = Fields(value, f"{fields.where}: file {index}")
        name = entry.text("name")
        _rank_of(name)  # refuses every name that leads elsewhere
        sha256 = entry.text("sha256")
        if _SHA256.fullmatch(sha256) is None:
            raise CheckpointError(f"{entry.where}: {name} has no SHA-256 but {sha256[:80]!r}")
        pieces = () if name.endswith(".json") else tuple(_pieces_from_json(entry, tensors))
        records.append(FileRecord(name=name, size_bytes=entry.integer("size_bytes"), sha256=sha256, pieces=pieces))
    return tuple(records)


def _pieces_from_json(entry: Fields, tensors: Mapping[str, TensorInfo]) -> list[Piece]:
    pieces = []
    for value in entry.array("slices"):
        if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str) or value[0] not in tensors:
            raise CheckpointError(f"{entry.where}: a slice must be [name of a listed tensor, start, stop]")
        name, start, stop = value
        elements = tensors[name].elements
        if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= elements:
            raise CheckpointError(f"{entry.where}: a slice of {name} does not lie within its {elements} elements")
        pieces.append(Piece(name, start, stop))
    if not pieces:
        raise CheckpointError(f"{entry.where}: a tensor file must have slices")
    return pieces
