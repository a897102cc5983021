"""Where instructions come from, and what is malformed in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_instructions import records, write_instructions

from albireo.data import Instruction, check_instructions, open_instructions
from albireo.errors import DataError


def test_an_array_and_lines_are_the_same_records(tmp_path: Path) -> None:
    array = open_instructions(str(write_instructions(tmp_path / "a.json", 7)))
    lines = open_instructions(str(write_instructions(tmp_path / "b.jsonl", 7)))
    assert array.splits == lines.splits
    assert array.fingerprint() == lines.fingerprint()
    assert len(array.splits["train"]) == 7
    first = records(7)[0]
    assert array.splits["train"][0] == Instruction(first["instruction"], first["input"], first["output"])
    other = open_instructions(str(write_instructions(tmp_path / "c.json", 7, seed=6)))
    assert other.fingerprint() != array.fingerprint()


def test_a_folder_tells_its_parts_by_name(tmp_path: Path) -> None:
    write_instructions(tmp_path / "train.jsonl", 5)
    write_instructions(tmp_path / "valid.json", 2, seed=9)
    (tmp_path / "README.md").write_text("about them")
    source = open_instructions(str(tmp_path))
    assert {split: len(part) for split, part in source.splits.items()} == {"train": 5, "validation": 2}
    assert "2 files" in source.description


def test_malformed_records_are_counted_and_named(tmp_path: Path) -> None:
    made: list[Any] = [*records(8), "no object", {"instruction": "a", "output": ""}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(made))
    source = open_instructions(str(path), max_malformed=2)
    assert len(source.splits["train"]) == 8
    assert source.malformed == (
        f"{path} record 9: it is a string, not an object",
        f'{path} record 10: its "output" is empty',
    )
    # A share below 1, a number from 1 on.
    assert len(open_instructions(str(path), max_malformed=0.2).malformed) == 2
    for limit in (0.0, 0.19, 1.0):
        with pytest.raises(DataError, match=r"2 of 10 records .* are malformed") as refused:
            open_instructions(str(path), max_malformed=limit)
        assert "record 9: it is a string" in str(refused.value)
        assert f"--max-malformed {limit:g} allows {1 if limit == 1 or limit == 0.19 else 0}" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_lines_that_are_no_json_are_malformed_records(tmp_path: Path) -> None:
    path = write_instructions(tmp_path / "a.jsonl", 3)
    path.write_bytes(path.read_bytes() + b'\n{"instruction": \n\n"caf\xe9"\n')
    source = open_instructions(str(path), max_malformed=2)
    assert len(source.splits["train"]) == 3
    assert source.malformed[0].startswith(f"{path} line 4 is not JSON")
    assert "is not UTF-8" in source.malformed[1]


def test_many_malformed_ones_do_not_make_a_long_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([1] * 500))
    with pytest.raises(DataError, match=r"500 of 500 .* and 497 more$"):
        open_instructions(str(path))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "text", "is not a file of instructions by its name"),
        ("a.json", "", "holds no records"),
        ("a.json", "[]", "holds no records"),
        ("a.json", '[{"instruction": "a", "output": "b"}', "is not JSON"),
        ("a.json", '{"data": []}', 'has no field "instruction"'),
        ("a.json", "[" * 100_000, "is not JSON that can be read"),
        ("a.jsonl", "\n\n", "holds no records"),
    ],
)
def test_a_file_that_is_none_says_why(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        open_instructions(str(tmp_path / name))


def test_what_can_be_known_at_once_is(tmp_path: Path) -> None:
    check_instructions("synthetic")
    check_instructions(str(write_instructions(tmp_path / "a.json", 2)))
    check_instructions("owner/name")
    for name, said in (
        (str(tmp_path / "nothing.json"), "no such file"),
        ("owner", "is named owner/name"),
        ("", "no data was named"),
    ):
        with pytest.raises(DataError, match=said):
            check_instructions(name)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match="holds no file of instructions"):
        check_instructions(str(tmp_path / "pictures"))


def tables(*, columns: dict[str, list[Any]], rows: int) -> dict[str, Any]:
    datasets = pytest.importorskip("datasets")
    return {"train": datasets.Dataset.from_dict({name: values[:rows] for name, values in columns.items()})}


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    made = records(6)
    columns = {
        "instruction": [record["instruction"] for record in made],
        "input": [record.get("input", "") for record in made],
        "output": [*(record["output"] for record in made[:-1]), ""],
        "text": ["whole"] * 6,
    }
    source = open_instructions("owner/name", load=lambda *_: tables(columns=columns, rows=6), max_malformed=1)
    assert len(source.splits["train"]) == 5
    assert source.malformed == ('row 5 of the train split: its "output" is empty',)
    assert "of the Hugging Face hub" in source.description
    del columns["output"]
    with pytest.raises(DataError, match='has no column "output"; its columns are: instruction, input, text'):
        open_instructions("owner/name", load=lambda *_: tables(columns=columns, rows=6))
    with pytest.raises(DataError, match="has no rows"):
        open_instructions("owner/name", load=lambda *_: tables(columns=columns, rows=0))


def test_made_up_ones_are_the_same_each_time() -> None:
    source = open_instructions("synthetic")
    assert source.fingerprint() == open_instructions("synthetic").fingerprint()
    assert open_instructions("synthetic", seed=1).fingerprint() != source.fingerprint()
    kinds = {record.instruction for record in source.splits["train"]}
    assert "Count the words." in kinds
    assert any(record.input for record in source.splits["train"])
