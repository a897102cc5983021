"""Pictures: what a folder means, what is left out, and what a model sees of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_pictures import write_pictures

from albireo.data import (
    BatchLayout,
    PictureForm,
    StepLoader,
    evaluation_pictures,
    load_picture_form,
    open_pictures,
    picture_batching,
    prepare_pictures,
)
from albireo.data.picture_source import HubPictures, MadeUpPictures
from albireo.errors import DataError, ModelError

FORM = PictureForm(16, 16)


def prepared(source: Any, **options: Any) -> Any:
    usual: dict[str, Any] = {
        "holdout_share": 0.25, "augment": False, "max_damaged": 0.1, "seed": 3, "cache_folder": None,
        "progress": lambda *_: None,
    }  # fmt: skip
    return prepare_pictures(source, FORM, **{**usual, **options})


def test_folders_of_classes_and_a_part_is_held_out_of_each(tmp_path: Path) -> None:
    source = open_pictures(str(write_pictures(tmp_path / "data", 8, classes=("b", "a", "c"))), seed=0)
    assert source.classes == ("a", "b", "c")
    made = prepared(source)
    held_out = [source.labels[number] for number in made.held_out.numbers]
    assert sorted(held_out) == [0, 0, 1, 1, 2, 2]
    assert len(made.train) == 18
    assert not set(made.train.numbers) & set(made.held_out.numbers)
    assert made.held_out.numbers == prepared(source).held_out.numbers
    assert made.held_out.numbers != prepared(source, seed=4).held_out.numbers


@pytest.mark.parametrize(("parts", "held", "aside"), [
    (("train", "test"), "test", ""),
    (("train", "validation"), "validation", ""),
    (("train", "val", "test"), "val", "; left aside: test"),
])  # fmt: skip
def test_parts_of_the_datas_own(tmp_path: Path, parts: tuple[str, ...], held: str, aside: str) -> None:
    for part in parts:
        write_pictures(tmp_path / part, 2 if part != "train" else 4)
    source = open_pictures(str(tmp_path), seed=0)
    made = prepared(source)
    assert {Path(source.name(number)).parts[-3] for number in made.held_out.numbers} == {held}
    assert {Path(source.name(number)).parts[-3] for number in made.train.numbers} == {"train"}
    assert source.description.endswith(f"classes{aside}")


def test_a_damaged_picture_is_named_once_and_left_out(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "data", 20)
    (folder / "red" / "000.png").write_bytes((folder / "red" / "000.png").read_bytes()[:60])
    (folder / "green" / "note.jpg").write_text("no picture")
    (folder / "green" / "note.txt").write_text("not even called one")
    source = open_pictures(str(folder), seed=0)
    looked = []
    for _ in range(2):
        made = prepared(source, cache_folder=tmp_path / "cache", progress=lambda done, _: looked.append(done))
        assert made.damaged == (str(folder / "green" / "note.jpg"), str(folder / "red" / "000.png"))
        assert len(made.train) + len(made.held_out) == 39
    # The second time it is known.
    assert len(looked) == 41
    with pytest.raises(
        DataError, match=r"2 of 41 pictures cannot be read, more than --max-damaged 0.02 allows: .*note.jpg"
    ):
        prepared(source, max_damaged=0.02)
    with pytest.raises(DataError, match="more than --max-damaged 1 allows"):
        prepared(source, max_damaged=1.0)


def test_what_is_no_data(tmp_path: Path) -> None:
    write_pictures(tmp_path / "one", 2, classes=("red",))
    write_pictures(tmp_path / "unknown" / "train", 2)
    write_pictures(tmp_path / "unknown" / "test", 2, classes=("blue", "red"))
    write_pictures(tmp_path / "hollow", 2)
    (tmp_path / "hollow" / "blue").mkdir()
    (tmp_path / "empty").mkdir()
    write_pictures(tmp_path / "loose" / "in", 1)
    for file in (tmp_path / "loose" / "in" / "red").iterdir():
        file.rename(tmp_path / "loose" / file.name)
    for part in ("in/red", "in/green", "in"):
        for file in (tmp_path / "loose" / part).iterdir():
            if file.is_file():
                file.unlink()
        (tmp_path / "loose" / part).rmdir()
    (tmp_path / "file.jpg").write_text("")
    cases = {
        "one": "has one class only, red",
        "unknown": "the class blue is to be evaluated on, and is not in what is trained on",
        "hollow": "the class blue has no pictures",
        "empty": "has no folders of classes: it is empty",
        "loose": "its pictures lie in no folder of a class",
        "file.jpg": "is a file: give a folder",
    }
    for name, said in cases.items():
        with pytest.raises(DataError, match=said):
            open_pictures(str(tmp_path / name), seed=0)


@pytest.mark.parametrize("size", [(24, 24), (40, 17)])
def test_a_whole_picture_is_what_transformers_processor_makes_of_it(size: tuple[int, int], tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    form = PictureForm(16, 12, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    form.save(tmp_path)
    assert load_picture_form(tmp_path, (16, 12)) == form
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    try:
        processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    except TypeError:  # older versions have another word
        processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    wanted = torch.as_tensor(np.asarray(processor(picture, return_tensors="np")["pixel_values"][0]))
    torch.testing.assert_close(form.normalised(form.whole(picture)), wanted.float(), rtol=1e-5, atol=1e-5)


@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 9), epoch=st.integers(0, 9))
@settings(deadline=None)
def test_a_random_part_is_decided_by_its_numbers(width: int, height: int, seed: int, epoch: int) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    part = FORM.part(picture, seed=seed, epoch=epoch, index=7)
    assert part.shape == (3, 16, 16)
    assert part.dtype == torch.uint8
    assert torch.equal(part, FORM.part(picture, seed=seed, epoch=epoch, index=7))


def test_each_epoch_has_other_parts_and_some_are_mirrored() -> None:
    ramp = np.tile(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (60, 1, 3))
    parts = [FORM.part(Image.fromarray(ramp), seed=0, epoch=epoch, index=0) for epoch in range(30)]
    assert len({bytes(part.numpy().tobytes()) for part in parts}) > 20
    mirrored = [bool(part[0, 0, 0] > part[0, 0, -1]) for part in parts]
    assert 5 < sum(mirrored) < 25


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_goes_on_sees_the_parts_that_it_would_have_seen(tmp_path: Path, workers: int) -> None:
    source = open_pictures(str(write_pictures(tmp_path / "data", 6)), seed=0)
    train = prepared(source, augment=True).train

    def batches(start: int, steps: int) -> list[torch.Tensor]:
        loader = StepLoader(
            train, BatchLayout(4), seed=1, start_sample=start, steps=steps, num_workers=workers,
            batching=picture_batching(augment=True),
        )  # fmt: skip
        return [batch.pixel_values for (batch,) in loader]  # type: ignore[attr-defined]

    whole = batches(0, 6)
    assert all(torch.equal(one, other) for one, other in zip(whole[2:], batches(8, 4), strict=True))
    assert len({batch.numpy().tobytes() for batch in whole}) == 6


@pytest.mark.parametrize(("batch_size", "ranks"), [(4, 1), (3, 2), (5, 4)])
def test_each_held_out_picture_counts_once_over_all_ranks(tmp_path: Path, batch_size: int, ranks: int) -> None:
    source = open_pictures(str(write_pictures(tmp_path / "data", 11)), seed=0)
    pictures = prepared(source, holdout_share=0.5).held_out
    shares = [list(evaluation_pictures(pictures, batch_size, rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch.labels) == batch_size for share in shares for batch in share)
    counted = [
        bytes(pixels.numpy().tobytes())
        for share in shares
        for batch in share
        for pixels, label in zip(batch.pixel_values, batch.labels, strict=True)
        if label >= 0
    ]
    assert sum(batch.tokens for share in shares for batch in share) == len(pictures)
    wanted = [bytes(pictures[place]["pixel_values"].numpy().tobytes()) for place in range(len(pictures))]
    assert sorted(counted) == sorted(wanted)


def test_a_hub_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = write_pictures(tmp_path / "data", 5)
    files = sorted(folder.rglob("*.png"))
    rows = {"image": [str(file) for file in files], "labels": [int(file.parent.name == "red") for file in files]}
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.ClassLabel(names=["green", "red"])})
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(tmp_path / "train.parquet"))
    loaded = datasets.load_dataset(
        "parquet", data_files={"train": str(tmp_path / "train.parquet"), "test": str(tmp_path / "train.parquet")},
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    source = HubPictures("owner/colours", loaded)
    assert source.classes == ("green", "red")
    made = prepared(source)
    assert (len(made.train), len(made.held_out)) == (10, 10)
    assert torch.equal(made.train[0]["pixel_values"], FORM.whole(Image.open(files[0])))
    assert source.name(3) == "row 3 of the train split of owner/colours"
    with pytest.raises(DataError, match="no column of pictures beside one of classes; its columns are: text"):
        HubPictures("owner/texts", {"train": datasets.Dataset.from_dict({"text": ["a"]})})


def test_made_up_pictures_are_not_made_to_see_whether_they_are_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    source = MadeUpPictures(30, 1)
    monkeypatch.setattr(MadeUpPictures, "open", never)
    data = prepared(source)
    assert data.damaged == ()
    assert len(data.train) + len(data.held_out) == 30


def test_made_up_pictures_can_be_told_apart_by_eye_and_are_always_the_same() -> None:
    one, other = MadeUpPictures(30, 1), MadeUpPictures(30, 1)
    assert all(one.open(number).tobytes() == other.open(number).tobytes() for number in range(30))
    assert one.open(0).tobytes() != MadeUpPictures(30, 2).open(0).tobytes()
    assert one.labels[:6] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("content", "said"), [
    ("{", "describes no image processor"),
    ('{"size": {"shortest_edge": 224}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}', "describes no"),
    ('{"size": 16, "image_mean": [0.5], "image_std": [0.5, 0.5, 0.5]}', "mean, std or resample"),
    ('{"size": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0, 0.5]}', "mean, std or resample"),
])  # fmt: skip
def test_a_damaged_image_processor(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ModelError, match=said):
        load_picture_form(tmp_path, (16, 16))


def test_an_image_processor_for_another_size(tmp_path: Path) -> None:
    values = {"size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="makes pictures of 32 x 32, and the model wants 16 x 16"):
        load_picture_form(tmp_path, (16, 16))
