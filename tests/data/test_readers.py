from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.data.readers import _cut, read_lines, read_records, reading
from albireo.errors import DataError


def lines(tmp_path: Path, content: bytes, **options: int) -> list[str]:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    return list(read_lines(file, **options))


def records(tmp_path: Path, content: bytes, field: str = "text") -> list[str]:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    return list(read_records(file, field))


def test_lines_keep_their_breaks(tmp_path: Path) -> None:
    assert lines(tmp_path, " = Title = \n\ntwo\r\nwörd\x0b\u2028 x".encode()) == [
        " = Title = \n",
        "\n",
        "two\n",
        "wörd\x0b\u2028 x",
    ]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert lines(tmp_path, b"\xef\xbb\xbfone\n") == ["one\n"]
    assert records(tmp_path, b'\xef\xbb\xbf{"text": "one"}\n') == ["one"]


@pytest.mark.parametrize("longest", [7, 8, 9, 64])
def test_long_lines_are_cut_before_a_space_and_nothing_is_lost(tmp_path: Path, longest: int) -> None:
    text = "some words and aVeryLongWordWithoutASpace and äöü€😀äöü€😀😀 end\nnext line\n"
    cut = lines(tmp_path, text.encode(), longest_line_bytes=longest)
    assert "".join(cut) == text
    assert max(len(piece.encode()) for piece in cut) <= 2 * longest
    if longest == 64:
        assert cut == ["some words and aVeryLongWordWithoutASpace and", " äöü€😀äöü€😀😀 end\n", "next line\n"]


@given(st.text(max_size=60), st.integers(4, 12))
def test_a_cut_falls_between_two_characters(text: str, longest: int) -> None:
    data = text.encode(errors="ignore")[:longest]
    if len(data) < 4:
        return
    end = _cut(data)
    assert 0 < end <= len(data)
    if end < len(data):
        data[:end].decode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good\nbad \xff byte\n", r"a\.txt is not UTF-8 text: byte 0xff at offset 9 "),
        (b"\xef\xbb\xbfgood\n\xc3(\n", "byte 0xc3 at offset 8 "),
        ("text".encode("utf-16"), "byte 0xff at offset 0 "),
        (b"end \xe2\x82", "byte 0xe2 at offset 4 "),
    ],
)
def test_bytes_that_are_not_utf8_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        lines(tmp_path, content)


def test_offsets_are_right_behind_a_long_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at offset 31 "):
        lines(tmp_path, b"0123456 89 " * 2 + b"\n" + b"abc def \xff", longest_line_bytes=8)


def test_records_of_lines_and_of_an_array(tmp_path: Path) -> None:
    rows = [{"text": "one\nline"}, {"text": "", "id": 2}, {"text": "dreißig"}]
    assert records(tmp_path, "\n\n".join(map(json.dumps, rows)).encode()) == ["one\nline", "", "dreißig"]
    assert records(tmp_path, b" \n" + json.dumps(rows, indent=1).encode()) == ["one\nline", "", "dreißig"]
    assert records(tmp_path, b'{"body": "x"}', "body") == ["x"]
    assert records(tmp_path, b"") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": }\n', r"a\.jsonl line 2 is not JSON: Expecting value"),
        (b'\n["x"', r"a\.jsonl is not JSON"),
        (b'{"text": "a"}\n\n"only a string"\n', r"line 3 holds a string; expected an object such as"),
        (b'{"text": "a"}\n[1]\n', r"line 2 holds an array"),
        (b"3\n", r"line 1 holds a number"),
        (b'[{"text": "a"}, null]', r"record 2 holds null"),
        (b'{"body": "a", "id": 1}', r'line 1 has no field "text"; its fields are: body, id'),
        (b"{}", r"its fields are: none"),
        (b'{"text": null}', r'field "text" of .*a\.jsonl line 1 is null; expected a string'),
        (b'{"text": true}', r"line 1 is true; expected a string"),
        (b'{"text": 1.5}', r"line 1 is a number; expected a string"),
        (b'{"text": ["a"]}', r"line 1 is an array; expected a string"),
        (b'{"text": "ok"}\n{"text": "half \\ud83d"}', r"line 2 is not valid Unicode: half a surrogate pair at character 5"),
        (b'{"text": "ok"}\n{"text": "\xff"}', r"byte 0xff at offset 25 "),
        (b'{"text": ' + b"[" * 100_000, r"line 1 is not JSON that can be read: it is nested too deeply"),
        (b'{"text": ' + b"9" * 10_000 + b"}", r"line 1 is not JSON"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_used_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        records(tmp_path, content)
    assert len(str(caught.value)) < 400


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt cannot be read: No such file"), reading(tmp_path / "gone.txt"):
        pass
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        list(read_lines(tmp_path))
