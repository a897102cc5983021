from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from albireo.data import hub_source
from albireo.data.hub_source import HubSource, candidates, default_loader, open_hub
from albireo.errors import DataError

datasets = pytest.importorskip("datasets", reason="needs the package datasets, of the extra hub")

ROWS = {
    "train": ["", " = Title = \n", "some text\n"],
    "validation": ["to evaluate on\n"],
    "test": ["to leave aside\n"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set as the hub has them: a parquet file a split."""
    folder = tmp_path_factory.mktemp("hub") / "little"
    folder.mkdir()
    for split, rows in ROWS.items():
        table = datasets.Dataset.from_dict({"text": rows, "number": list(range(len(rows)))})
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


@pytest.fixture(scope="module")
def cache(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `datasets` keeps of a data set of the hub that it has loaded once."""
    cache = tmp_path_factory.mktemp("cache")
    default_loader(cache, reachable=lambda: True)(str(folder), None)
    (version,) = cache.glob("*/*/*/*/dataset_info.json")
    kept = cache / "owner___little" / "default" / "0.0.0"
    kept.mkdir(parents=True)
    version.parent.rename(kept / version.parent.name)
    info = kept / version.parent.name / "dataset_info.json"
    info.write_text(info.read_text().replace(version.parent.parent.parent.name, "default"))
    return cache


def test_a_data_set_is_read_through_datasets(folder: Path, tmp_path: Path) -> None:
    online = default_loader(tmp_path, reachable=lambda: True)
    source = open_hub("owner/little", load=lambda _, config: online(str(folder), config))
    assert source.splits == ("train", "validation")
    assert list(source.documents("train")) == ROWS["train"]
    assert list(source.documents("validation")) == ROWS["validation"]
    assert source.describe() == (
        "owner/little of the Hugging Face hub: train 3 rows (train); validation 1 rows (validation); left aside: test"
    )
    assert source.fingerprint() == open_hub("else/where", load=lambda *_: online(str(folder), None)).fingerprint()


def test_the_cache_is_read_where_the_hub_cannot_be_reached(cache: Path) -> None:
    load = default_loader(cache, reachable=lambda: False)
    assert list(open_hub("owner/little", load=load).documents()) == ROWS["train"]
    assert list(open_hub("owner/little/default", load=load).documents()) == ROWS["train"]
    for name in ("owner/little/other", "owner/unknown", "wikitext/wikitext-2-raw-v1"):
        with pytest.raises(DataError, match=rf"there is no file or folder {name}, and no such data set: the Hugging Face "
                           r"hub cannot be reached, or HF_HUB_OFFLINE is set; give a local text file"):  # fmt: skip
            open_hub(name, load=load)


def test_the_hub_is_asked_once_whether_it_is_there(cache: Path) -> None:
    asked = []
    load = default_loader(cache, reachable=lambda: bool(asked.append(1)))
    with pytest.raises(DataError):
        open_hub("two/meanings", load=load)
    assert len(asked) == 1


def table(rows: list[Any], column: str = "text") -> Any:
    return datasets.Dataset.from_dict({column: rows})


def test_the_fingerprint_is_of_the_texts() -> None:
    def fingerprint(**tables: Any) -> str:
        return HubSource("x", tables).fingerprint()

    prints = [
        fingerprint(train=table(["ab", "c"])),
        fingerprint(train=table(["a", "bc"])),
        fingerprint(train=table(["ab"]), validation=table(["c"])),
    ]
    assert len(set(prints)) == 3
    assert fingerprint(part=table(["ab", "c"])) == prints[0]


def test_rows_are_read_in_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_source, "_ROWS", 3)
    rows = [str(number) for number in range(10)]
    assert list(HubSource("x", {"train": table(rows)}).documents()) == rows


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, "the data set x has no rows"),
        ({"train": []}, "the data set x has no rows"),
        ({"train": ("body", ["a"])}, 'the train split of x has no column "text"; its columns are: body'),
        ({"train": ["a"], "validation": ("body", ["a"])}, 'the validation split of x has no column "text"'),
    ],
)
def test_data_sets_that_cannot_be_used(tables: dict[str, Any], message: str) -> None:
    made = {
        split: table(rows[1], rows[0]) if isinstance(rows, tuple) else table(rows) for split, rows in tables.items()
    }
    with pytest.raises(DataError, match=message):
        HubSource("x", made)


def test_rows_without_text_are_named() -> None:
    with pytest.raises(DataError, match='field "text" of row 1 of the train split of x is null; expected a string'):
        list(HubSource("x", {"train": table(["a", None])}).documents())


@pytest.mark.parametrize(
    ("name", "meanings"),
    [
        ("owner/name/config", [("owner/name", "config")]),
        ("owner/name", [("owner/name", None), ("owner", "name")]),
        ("wikitext/wikitext-2-raw-v1", [("Salesforce/wikitext", "wikitext-2-raw-v1")]),
        ("wikimedia/wikipedia/20231101.en", [("wikimedia/wikipedia", "20231101.en")]),
    ],
)
def test_what_a_name_may_mean(name: str, meanings: list[tuple[str, str | None]]) -> None:
    assert candidates(name) == meanings


def test_both_meanings_of_two_parts_are_tried() -> None:
    tried = []

    def load(repository: str, config: str | None) -> Any:
        tried.append((repository, config))
        if config is None:
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'glue/mrpc' doesn't exist on the Hub")
        return {"train": table(["a"])}

    assert list(open_hub("glue/mrpc", load=load).documents()) == ["a"]
    assert tried == [("glue/mrpc", None), ("glue", "mrpc")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist\nmore"), "no such data set: Dataset 'a/b' doesn't exist; give a local"),
        (ConnectionError("Couldn't reach it"), "no such data set: the Hugging Face hub cannot be reached"),
        (ValueError("BuilderConfig 'b' not found. Available: ['c']"), "a/b cannot be loaded: BuilderConfig 'b' not found"),
        (RuntimeError("Dataset scripts are no longer supported"), "cannot be loaded: Dataset scripts"),
        (datasets.exceptions.DatasetGenerationError("broken file"), "cannot be loaded: broken file"),
        (OSError(28, "No space left on device"), "cannot be loaded: .*No space left"),
    ],
)  # fmt: skip
def test_what_the_hub_says_becomes_one_line(error: Exception, message: str) -> None:
    def load(repository: str, config: str | None) -> Any:
        raise error

    with pytest.raises(DataError, match=message) as caught:
        open_hub("a/b", load=load)
    assert "\n" not in str(caught.value)
    assert "more" not in str(caught.value)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"needs the package datasets: pip install 'albireo\[hub\]'; or give a local text"
    ):
        open_hub("owner/name")
