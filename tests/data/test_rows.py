"""Reading data files: every layout gives the same rows, and what is wrong is named by its place."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge_ft.data.json_stream import PlacedValue, stream_values
from glm_edge_ft.data.rows import RawRow, is_message, iter_rows, limit_problems
from glm_edge_ft.errors import Problem

FIRST: dict[str, Any] = {
    "messages": [{"role": "user", "content": "你好\u2028"}, {"role": "assistant", "content": 'a "b" \\ {[,\n'}]
}
SECOND: dict[str, Any] = {
    "messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "二"}],
    "id": 7,
}
ROWS = [FIRST, SECOND]
COMPACT = [json.dumps(row, ensure_ascii=False) for row in ROWS]
INDENTED = [json.dumps(row, ensure_ascii=False, indent=2) for row in ROWS]

LAYOUTS = {
    "array.json": json.dumps(ROWS, ensure_ascii=False),
    "lines.jsonl": "\n".join(COMPACT) + "\n",
    "lines-without-last-newline.jsonl": "\n".join(COMPACT),
    "pretty-array.jsonl": json.dumps(ROWS, ensure_ascii=False, indent=2),
    "pretty-array.json": json.dumps(ROWS, ensure_ascii=False, indent=4) + "\n",
    "row-a-line-array.jsonl": "[\n" + ",\n".join(COMPACT) + "\n]\n",
    "indented-objects.jsonl": "\n".join(INDENTED),
    "indented-objects.json": "\n\n".join(INDENTED) + "\n",
    "one-line-array.jsonl": json.dumps(ROWS) + "\n",
    "lines.json": "\n".join(COMPACT),
    "crlf.jsonl": "\r\n".join(COMPACT) + "\r\n",
    "blank-lines.jsonl": "\n\n" + "\n \n\t\n".join(COMPACT) + "\n\n",
    "bom.jsonl": "\ufeff" + "\n".join(COMPACT),
    "bom-array.json": "\ufeff" + json.dumps(ROWS, indent=1),
    "unindented-array.json": json.dumps(ROWS, indent=0),
}


def read(path: Path) -> list[RawRow | Problem]:
    """Return everything that a file yields."""
    return list(iter_rows(path))


def values(path: Path) -> list[Any]:
    """Return the values of a file without any problem in it."""
    rows = read(path)
    assert all(isinstance(row, RawRow) for row in rows), rows
    return [row.value for row in rows if isinstance(row, RawRow)]


def problems(path: Path) -> list[str]:
    """Return the problems of a file as text."""
    return [str(row) for row in read(path) if isinstance(row, Problem)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    """D1: an array, lines, indented objects, each under any name."""
    path = tmp_path / name
    path.write_bytes(LAYOUTS[name].encode("utf-8"))
    assert values(path) == ROWS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n".join(json.dumps(row["messages"]) for row in ROWS), [row["messages"] for row in ROWS]),
        (json.dumps([row["messages"] for row in ROWS]), [row["messages"] for row in ROWS]),
        (json.dumps(FIRST["messages"]), [FIRST["messages"]]),
        (json.dumps(FIRST["messages"], indent=2), [FIRST["messages"]]),
    ],
)
def test_a_conversation_may_be_the_list_of_its_messages(tmp_path: Path, text: str, expected: list[Any]) -> None:
    """D1: rows that are lists, one a line, in an array, or alone."""
    path = tmp_path / "train.json"
    path.write_text(text, encoding="utf-8")
    assert values(path) == expected


def test_rows_know_where_they_begin(tmp_path: Path) -> None:
    """D2: line and column of the opening bracket, for lines and for a pretty-printed array."""
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n" + COMPACT[0] + "\n\n  " + COMPACT[1] + "\n", encoding="utf-8")
    assert [(row.line, row.column) for row in read(lines) if isinstance(row, RawRow)] == [(2, 1), (4, 3)]
    array = tmp_path / "array.json"
    array.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
    second = 3 + json.dumps(FIRST, indent=2).count("\n")
    assert [(row.line, row.column) for row in read(array) if isinstance(row, RawRow)] == [(2, 3), (second, 3)]


def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    """D2: `train.jsonl:2:2: reason`, and reading goes on."""
    path = tmp_path / "train.jsonl"
    path.write_text(f"{COMPACT[0]}\n{{bad\n{COMPACT[1]}\n", encoding="utf-8")
    first, second, third = read(path)
    assert isinstance(first, RawRow)
    assert isinstance(third, RawRow)
    assert (first.line, third.line) == (1, 3)
    assert str(second) == "train.jsonl:2:2: expecting property name enclosed in double quotes, found 'b'"


def test_a_bad_first_line_does_not_hide_the_others(tmp_path: Path) -> None:
    """D2: a first line that is cut off is one problem, at its line."""
    path = tmp_path / "train.jsonl"
    path.write_text(f"{COMPACT[0][:20]}\n{COMPACT[1]}\n", encoding="utf-8")
    first, second = read(path)
    assert isinstance(first, Problem)
    assert first.where == "train.jsonl:1:16"
    assert isinstance(second, RawRow)
    assert second.value == SECOND


@pytest.mark.parametrize(
    ("line", "where", "reason"),
    [
        ('{"messages": [1, 2}', "train.jsonl:2:19", "expecting ',' delimiter, found '}'"),
        ('{"messages": [', "train.jsonl:2:15", "the text ends in the middle of a value"),
        ('{"messages": "abc', "train.jsonl:2:14", "a string that begins here has no closing quote"),
        ('{"a": [1, 2,]}', "train.jsonl:2:13", "a comma"),
        ('{"a": 1,}', "train.jsonl:2:9", "a comma"),
        ('{"a": 1}, ', "train.jsonl:2:9", "a comma after the value"),
        ('{"a": 1} {"b": 2}', "train.jsonl:2:10", "more text after the end of the value"),
        ('{"a": 1, // why', "train.jsonl:2:10", "a comment: JSON has no comments"),
        ('{"a": /* why */ 1}', "train.jsonl:2:7", "a comment: JSON has no comments"),
        ("# why", "train.jsonl:2:1", "a comment: JSON has no comments"),
        ("{'a': 1}", "train.jsonl:2:2", "single quotes"),
        ('{"a": True}', "train.jsonl:2:7", "True is Python, not JSON"),
        ('{"a": None}', "train.jsonl:2:7", "None is Python, not JSON"),
        ('{"a": "x\ty"}', "train.jsonl:2:9", "the control character '\\t' inside a string"),
        ('{"a": "\\x"}', "train.jsonl:2:8", "an unknown escape in a string"),
        ('{"a": NaN}', "train.jsonl:2:1", "NaN is not a JSON value"),
        ('{"a": -Infinity}', "train.jsonl:2:1", "-Infinity is not a JSON value"),
        ('{"a": 1e999}', "train.jsonl:2:1", "the number 1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "train.jsonl:2:1", "a number with thousands of digits"),
        ("[" * 100_000, "train.jsonl:2:1", "nested more than 64 levels deep"),
        ("[" * 100 + "]" * 100, "train.jsonl:2:1", "nested more than 64 levels deep"),
        ('{"role": 1, "role": 2}', "train.jsonl:2:1", "key 'role' stands twice in one object"),
        ('{"a": "\\ud800"}', "train.jsonl:2:8", "half of a surrogate pair"),
        ('{"\\uDC00": 1}', "train.jsonl:2:3", "half of a surrogate pair"),
    ],
)
def test_a_bad_line_says_why(tmp_path: Path, line: str, where: str, reason: str) -> None:
    """D2: every kind of mistake, with its line and column, and the row after it is still read."""
    path = tmp_path / "train.jsonl"
    path.write_text(f"{COMPACT[0]}\n{line}\n{COMPACT[1]}\n", encoding="utf-8")
    rows = read(path)
    assert len(rows) == 3
    problem = rows[1]
    assert isinstance(problem, Problem)
    assert problem.where == where
    assert reason in problem.what
    assert isinstance(rows[2], RawRow)


def test_whole_surrogate_pairs_and_escapes_are_text(tmp_path: Path) -> None:
    """D3: an emoji written as two escapes is one character; a backslash before u is no escape."""
    path = tmp_path / "train.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00", "b": "\\\\ud800"}', encoding="utf-8")
    assert values(path) == [{"a": "😀", "b": "\\ud800"}]


@pytest.mark.parametrize("text", ["", "\n \r\n\t\n", "[]", " [ ] \n", "\ufeff"])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_a_file_without_rows_says_so(tmp_path: Path, name: str, text: str) -> None:
    """D2: an empty file, blank lines and an empty array are "0 conversations"."""
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8"))
    assert problems(path) == [f"{name}: 0 conversations: the file holds no row\n    -> write one conversation a line"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (COMPACT[0].encode("utf-16"), "is UTF-16, not UTF-8"),
        (COMPACT[0].encode("utf-16-le"), "is not a text file: it holds zero bytes"),
        (COMPACT[0].replace("\u2028", "").encode("gb18030"), "it may be GBK"),
        (b"\x1f\x8b\x08\x00", "is a compressed file"),
        (b"PAR1....", "is a parquet file by its content"),
        (b'{"a": "\xff"}\n', "byte 0xff is not UTF-8"),
    ],
)
def test_bytes_that_are_not_utf8_are_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    """D2: other encodings and binary files are one plain problem."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    assert len(problems(path)) == 1
    assert expected in problems(path)[0]


def test_bytes_that_are_not_utf8_in_an_array_are_refused(tmp_path: Path) -> None:
    """D2: the same in a pretty-printed array, which is read piece by piece."""
    path = tmp_path / "train.json"
    path.write_bytes(json.dumps(ROWS, indent=2).encode() + b"\n\xff")
    assert "byte 0xff on this line or soon after is not UTF-8" in problems(path)[0]


def test_missing_files_folders_and_other_kinds_are_refused(tmp_path: Path) -> None:
    """D2: what cannot be a data file is one plain problem."""
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    table = tmp_path / "train.csv"
    table.write_text("a,b\n")
    assert problems(tmp_path / "absent.jsonl")[0].startswith(f"absent.jsonl: no such file: {tmp_path / 'absent.jsonl'}")
    assert "is a folder" in problems(folder)[0]
    assert "unsupported kind of file '.csv'" in problems(table)[0]


def test_a_mistake_inside_an_array_is_named_by_line_and_column(tmp_path: Path) -> None:
    """D2: in a file of another name than `.json`, JSON is JSON."""
    path = tmp_path / "train.jsonl"
    path.write_text('[\n  {\n    "messages": [\n      {"role": "user",},\n      // Multi_turns\n    ]\n  }\n]\n')
    assert problems(path)[0].startswith("train.jsonl:4:2")
    assert "a comma" in problems(path)[0]
    path.write_text('[\n  {\n    "messages": [\n      {"role": "user"},\n      // Multi_turns\n    ]\n  }\n]\n')
    assert problems(path)[0].startswith("train.jsonl:5:7: a comment: JSON has no comments")


LOOSE = r"""// the rows
[ // "one
  {
    "messages": [
      {"role": "system", "content": "see https://a.b//c, ] and \\",}, // and "this", ]
      // Multi_turns
      {"role": "user", "content": "// no comment, }\""},
    ],
  }, // then

  {"messages": [{"role": "user", "content": "x",},]},
  // no more ]
] // the end
// of it"""
LOOSE_VALUES = [
    {
        "messages": [
            {"role": "system", "content": "see https://a.b//c, ] and \\"},
            {"role": "user", "content": '// no comment, }"'},
        ]
    },
    {"messages": [{"role": "user", "content": "x"}]},
]


@pytest.mark.parametrize("chunk", [*range(1, 20), 4096])
def test_comments_and_trailing_commas_are_read_over(chunk: int) -> None:
    """K32: wherever the chunks end; each row keeps its place, and texts stay as they are."""
    told: list[int] = []
    found = list(stream_values(io.BytesIO(LOOSE.encode()), "x", is_message, chunk, told.append))
    assert [(value.line, value.column, value.value) for value in found if isinstance(value, PlacedValue)] == [
        (3, 3, LOOSE_VALUES[0]),
        (11, 3, LOOSE_VALUES[1]),
    ]
    assert len(found) == 2
    assert told[0] == 1


LOOSE_LINES = "\n".join(json.dumps(value)[:-1] + ",} // row" for value in LOOSE_VALUES)


@pytest.mark.parametrize("text", [LOOSE, LOOSE_LINES])
def test_such_a_file_is_remarked_on_once(tmp_path: Path, text: str) -> None:
    """K32: in a `.json` file of either layout; other mistakes keep their place, and in `.jsonl` all are refused."""
    path, told = tmp_path / "train.json", list[str]()
    path.write_text(text)
    rows = list(iter_rows(path, remark=told.append))
    assert [row.value for row in rows if isinstance(row, RawRow)] == LOOSE_VALUES
    assert len(rows) == len(LOOSE_VALUES)
    assert [line.partition(": ")[0] for line in told] == ["train.json:1"]
    path.write_text(text.replace('"x"', "x"))
    line = text[: text.index('"x"')].count("\n") + 1
    assert problems(path)[0].startswith(f"train.json:{line}:")
    other = tmp_path / "train.jsonl"
    other.write_text(text)
    assert any(word in problems(other)[0] for word in ("a comment", "a comma before"))


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ('[\n{"a": 1},\n]', "train.jsonl:3:1", "a comma before ']'"),
        ('[\n{"a": 1}\n{"b": 1}\n]', "train.jsonl:3:1", "expected ',' or ']' after an element of the array, found '{'"),
        ('[\n{"a": 1},\n', "train.jsonl:3:1", "the file ends inside the array of line 1"),
        ('[\n{"a": 1}\n', "train.jsonl:3:1", "expected ',' or ']' after an element of the array, found 'the end"),
    ],
)
def test_a_broken_array_keeps_the_rows_before(tmp_path: Path, text: str, where: str, reason: str) -> None:
    """D2: the end and the joints of an array."""
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    row, problem = read(path)[:2]
    assert isinstance(row, RawRow)
    assert row.value == {"a": 1}
    assert isinstance(problem, Problem)
    assert problem.where == where
    assert reason in problem.what


def test_a_bad_indented_object_does_not_hide_the_next(tmp_path: Path) -> None:
    """D2: reading goes on at the next line that begins with a bracket."""
    path = tmp_path / "train.jsonl"
    path.write_text('{\n  "a": 1,,\n}\n{\n  "b": 1, "b": 2\n}\n{\n  "c": 3\n}\n')
    first, second, third = read(path)
    assert str(first).startswith("train.jsonl:2:10: ")
    assert str(second) == "train.jsonl:4:1: key 'b' stands twice in one object"
    assert isinstance(third, RawRow)
    assert (third.line, third.value) == (7, {"c": 3})


def test_problems_are_limited() -> None:
    """D2: up to 20 at once, then how many more."""
    many = [Problem(f"train.jsonl:{line}", "bad") for line in range(1, 31)]
    assert limit_problems(many[:20], "train.jsonl") == many[:20]
    assert limit_problems(many, "train.jsonl") == [*many[:20], Problem("train.jsonl", "... and 10 more")]


def test_parquet_columns_of_json_text_are_parsed(tmp_path: Path) -> None:
    """D1: a JSON column gives the same rows as the lines, nulls included; the line is the row number."""
    path = tmp_path / "train.parquet"
    rows = [{"messages": json.dumps([{"role": "user", "default": None}]), "tools": json.dumps([{"x": None}])}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    expected = {"messages": [{"role": "user", "default": None}], "tools": [{"x": None}]}
    assert [(row.line, row.value) for row in read(path) if isinstance(row, RawRow)] == [(1, expected), (2, expected)]


def test_parquet_struct_columns_lose_the_nulls_that_the_format_adds(tmp_path: Path) -> None:
    """D1: a field that only another row has is not there."""
    path = tmp_path / "train.parquet"
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "loss": False}], "id": 3}]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(
            rows,
            pyarrow.schema(
                [
                    (
                        "messages",
                        pyarrow.list_(
                            pyarrow.struct(
                                [("role", pyarrow.string()), ("content", pyarrow.string()), ("loss", pyarrow.bool_())]
                            )
                        ),
                    ),
                    ("id", pyarrow.int64()),
                ]
            ),
        ),
        path,
    )
    assert values(path) == rows


def test_parquet_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """D2: a broken file, a bad JSON cell, a column of another type."""
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 not really")
    assert "broken.parquet: is not a readable parquet file" in problems(broken)[0]
    cells = tmp_path / "cells.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": ["[]", "[{]"]}), cells)
    assert problems(cells) == [
        "cells.parquet:2: 'messages', character 3: expecting property name enclosed in double quotes, found ']'"
    ]
    typed = tmp_path / "typed.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": [b"x"]}), typed)
    assert problems(typed)[0].startswith("typed.parquet: column 'messages' has the type binary")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)
rows_of_any_kind = st.lists(
    st.fixed_dictionaries({"messages": st.lists(st.fixed_dictionaries({"role": st.text(), "x": json_values}))}),
    min_size=1,
    max_size=4,
)


@given(rows=rows_of_any_kind, indent=st.sampled_from([None, 0, 2]), chunk=st.integers(1, 40), ascii_only=st.booleans())
@settings(max_examples=150)
def test_streaming_gives_what_the_json_parser_gives(
    rows: list[Any], indent: int | None, chunk: int, ascii_only: bool
) -> None:
    """D3: an array and a sequence of objects, cut anywhere by the chunks, with the line of each row."""
    texts = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    told: list[int] = []
    for text in (json.dumps(rows, indent=indent, ensure_ascii=ascii_only), "\n".join(texts)):
        for loosen in (told.append, None):
            found = list(stream_values(io.BytesIO(text.encode("utf-8")), "x", is_message, chunk, loosen))
            assert [value.value if isinstance(value, PlacedValue) else value for value in found] == rows
    assert told == []
    lines = [1 + sum(text.count("\n") + 1 for text in texts[:index]) for index in range(len(rows))]
    assert [value.line for value in found if isinstance(value, PlacedValue)] == lines


@pytest.mark.parametrize("chunk", range(1, 8))
def test_a_number_at_the_end_of_a_chunk_is_whole(chunk: int) -> None:
    """D3: what was read so far may be a number by itself and still not all of it."""
    found = stream_values(io.BytesIO(b"[12345, 678.5e1]\n-90 true"), "x", is_message, chunk)
    assert [value.value for value in found if isinstance(value, PlacedValue)] == [12345, 6785.0, -90, True]


@given(content=st.binary(max_size=200) | st.text(alphabet='{}[]",:\\u08d/ \n', max_size=60).map(str.encode))
@settings(max_examples=300)
def test_no_bytes_raise(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """D2: whatever a file holds, it gives rows and problems, at least one of them, and no exception."""
    for name in ("fuzz.jsonl", "fuzz.json"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(content)
        assert read(path)
