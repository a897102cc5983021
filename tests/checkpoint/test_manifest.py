from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from albireo.checkpoint import open_checkpoint
from albireo.checkpoint.documents import decode_document, encode_document
from albireo.checkpoint.manifest import FileRecord, Listing, Manifest, listing_name, merge_listings, tensor_file_name
from albireo.checkpoint.slices import Piece, TensorInfo
from albireo.errors import CheckpointError

INFO = TensorInfo((4,), torch.float32)
SHA256 = "0" * 64


def listing(rank: int, start: int, stop: int, **changes: Any) -> Listing:
    record = FileRecord(tensor_file_name(rank, 1), 100, SHA256, (Piece("x", start, stop),))
    members = {"step": 5, "rank": rank, "world_size": 2, "tensors": {"x": INFO}, "files": (record,), "state": {}}
    return Listing(**{**members, **changes})


def records() -> list[FileRecord]:
    return [FileRecord(listing_name(rank), 10, SHA256) for rank in range(2)]


def test_what_ranks_wrote_becomes_one_manifest_that_comes_back() -> None:
    manifest = merge_listings([listing(0, 0, 3), listing(1, 3, 4)], records(), {"a": 1}, {"y": "x"})
    again = Manifest.from_json(decode_document(encode_document(manifest.to_json()), "manifest.json"))
    assert again == manifest
    assert [record.name for record in again.files] == [
        "rank-00000.json",
        "rank-00001.json",
        "rank-00000-00001.safetensors",
        "rank-00001-00001.safetensors",
    ]


def test_a_listing_comes_back() -> None:
    one = listing(0, 0, 3)
    assert Listing.from_json(decode_document(encode_document(one.to_json()), "rank-00000.json")) == one


@pytest.mark.parametrize(
    ("second", "aliases", "message"),
    [
        (listing(1, 2, 4), {}, "elements 2 to 3 of 4 of x are given twice"),
        (listing(1, 3, 4, step=4), {}, r"rank-00001\.json is of rank 1 of 2 at step 4, but"),
        (listing(1, 3, 4, world_size=3), {}, "is of rank 1 of 3"),
        (listing(0, 3, 4), {}, "is of rank 0 of 2"),
        (
            listing(1, 3, 4, tensors={"x": TensorInfo((2, 2), torch.float32)}),
            {},
            r"rank 1 saves x as float32 of shape \(2, 2\), a rank before it as float32 of shape \(4,\)",
        ),
        (listing(1, 3, 4), {"y": "z"}, "y is the alias of z, but no tensor of that name is saved"),
        (listing(1, 3, 4), {"x": "x"}, "a tensor of that name is saved as well"),
        (listing(1, 3, 4), {"y@": "x"}, "cannot name a tensor"),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(second: Listing, aliases: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        merge_listings([listing(0, 0, 3), second], records(), {}, aliases)


def change(path: tuple[Any, ...], value: object) -> Callable[[dict[str, Any]], None]:
    """Return what sets one value deep inside a manifest."""

    def apply(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return apply


TENSOR_FILE = ("files", 1)
FORGERIES: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    *(
        (change((*TENSOR_FILE, "name"), name), "is not the name of a file of a checkpoint")
        for name in (
            "../../secret.safetensors",
            "/etc/passwd",
            "..",
            "",
            "manifest.json",
            "rank-00000-00001.safetensors/../../x",
            "rank-00000-00001.safetensors\n",
            "a/rank-00000-00001.safetensors",
            "rank-\u0660\u0660\u0660\u0660\u0660.json",
        )
    ),
    (change((*TENSOR_FILE, "name"), "rank-00001-00001.safetensors"), "but only 1 ranks have saved"),
    (change((*TENSOR_FILE, "name"), "rank-00000.json"), "elements 0 to .* are missing"),
    (change((*TENSOR_FILE, "name"), 5), "name must be text, but is 5"),
    (change((*TENSOR_FILE, "size_bytes"), -1), "size_bytes must be a whole number of 0"),
    (change((*TENSOR_FILE, "size_bytes"), 2**63), "size_bytes must be a whole number"),
    (change((*TENSOR_FILE, "size_bytes"), 10**300), "but is a huge number"),
    (change((*TENSOR_FILE, "size_bytes"), 2**62), r"has \d+ bytes, but \d+ were written"),
    (change((*TENSOR_FILE, "size_bytes"), 1.0), "size_bytes must be a whole number"),
    (change((*TENSOR_FILE, "size_bytes"), True), "size_bytes must be a whole number"),
    (change((*TENSOR_FILE, "sha256"), "0" * 64), "rank-00000-00001.safetensors was altered"),
    (change((*TENSOR_FILE, "sha256"), "short"), "has no SHA-256 but 'short'"),
    (change((*TENSOR_FILE, "slices"), []), "a tensor file must have slices"),
    (change((*TENSOR_FILE, "slices", 0), ["model/weight", 0, 13]), "does not lie within its 12 elements"),
    (change((*TENSOR_FILE, "slices", 0), ["optimizer/step", 0, -1]), "does not lie within its 1 elements"),
    (change((*TENSOR_FILE, "slices", 0), ["optimizer/step", True, 1]), "does not lie within"),
    (change((*TENSOR_FILE, "slices", 0), ["other", 0, 1]), "a slice must be"),
    (change((*TENSOR_FILE, "slices", 0), ["optimizer/step", 0]), "a slice must be"),
    (change((*TENSOR_FILE, "slices", 0), {}), "a slice must be"),
    (change(("tensors", "model/weight", "dtype"), "F64"), r"has \d+ bytes, but its slices need \d+"),
    (change(("tensors", "model/weight", "dtype"), "I32"), "its header does not list the slices"),
    (change(("tensors", "model/weight", "dtype"), "pickle"), "'pickle' is not a dtype of a checkpoint"),
    (change(("tensors", "model/weight", "shape"), [4, 3]), "its header does not list the slices"),
    (change(("tensors", "model/weight", "shape"), [13]), "elements 12 to 13 of 13 of model/weight are missing"),
    (change(("tensors", "model/weight", "shape"), [-3, -4]), "its shape must be a list of sizes from 0"),
    (change(("tensors", "model/weight", "shape"), [2**62, 2**62]), "more elements than any tensor can"),
    (change(("tensors", "model/weight", "shape"), [1] * 100), "its shape must be a list"),
    (change(("tensors", "model/weight", "shape"), [12.0]), "its shape must be a list"),
    (change(("tensors", "model/weight"), None), "model/weight must be a JSON object"),
    (change(("tensors", "extra"), {"dtype": "F32", "shape": [1]}), "elements 0 to 1 of 1 of extra are missing"),
    (change(("aliases", "model/head"), "nothing"), "model/head is the alias of nothing, but no tensor"),
    (change(("aliases", "model/head"), 3), "aliases must lead to names of tensors"),
    (change(("world_size",), 0), "world_size must be a whole number"),
    (change(("world_size",), 2), r"rank-00001\.json, one of 2 ranks' states, is not listed"),
    (change(("world_size",), 10**12), "world_size must be a whole number of 1 to 2"),
    (change(("step",), 8), "of step 8, which the folder's name is not|of another checkpoint"),
    (change(("step",), -7), "step must be a whole number"),
    (change(("shared_state",), []), "shared_state must be an object"),
    (change(("files",), {}), "files must be a list"),
    (lambda content: content["files"].append(content["files"][1]), "given twice"),
    (lambda content: content["files"].append(content["files"][0]), "a file is listed twice"),
    (lambda content: content["files"].pop(1), "elements 0 to .* are missing"),
    (lambda content: content["files"].pop(0), "is not listed|whole number"),
    (lambda content: content.pop("tensors"), "tensors is missing"),
]


@pytest.mark.parametrize("number", range(len(FORGERIES)))
def test_a_forged_manifest_with_a_right_checksum_is_refused(
    tmp_path: Path, save_tiny: Callable[..., Path], number: int
) -> None:
    forge, message = FORGERIES[number]
    path = save_tiny(tmp_path, 7)
    content = json.loads((path / "manifest.json").read_text())
    assert [file["name"] for file in content["files"]] == ["rank-00000.json", "rank-00000-00001.safetensors"]
    for key in ("format", "version", "sha256"):
        del content[key]
    (path / "manifest.json").write_bytes(encode_document(content))
    open_checkpoint(path)
    forge(content)
    (path / "manifest.json").write_bytes(encode_document(content))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rank_state_of_another_rank_is_refused(tmp_path: Path, save_tiny: Callable[..., Path]) -> None:
    one, two = save_tiny(tmp_path / "one", 7), save_tiny(tmp_path / "two", 8)
    manifest = json.loads((one / "manifest.json").read_text())
    for key in ("format", "version", "sha256"):
        del manifest[key]
    manifest["files"][0] = json.loads((two / "manifest.json").read_text())["files"][0]
    (one / "manifest.json").write_bytes(encode_document(manifest))
    (one / "rank-00000.json").write_bytes((two / "rank-00000.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"rank-00000\.json is of another checkpoint or rank"):
        open_checkpoint(one)
