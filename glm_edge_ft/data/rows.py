"""Data files to raw rows: `.jsonl`, `.json` and `.parquet`, streamed, each value exactly as the file has it.

The layout is told by the content, not by the name: one value a line, one array (pretty-printed or on one line), or
objects one after another all give the same rows. Nothing here infers a schema, so no field is added, none lost, and no
text changed. In a `.json` file comments (`// ...`) and commas before a closing bracket are read over and remarked on.
(A parquet struct column stores a null for every field that a row lacks; such nulls cannot be told from
real ones and are left out. A parquet column of JSON strings has no such limit.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from glm_edge_ft.data.json_stream import stream_values
from glm_edge_ft.data.json_text import WHITESPACE, JsonMistake, decode_value, loosened
from glm_edge_ft.errors import Problem
from glm_edge_ft.files import DATA_SUFFIXES, LFS_POINTER

MAXIMUM_PROBLEMS_SHOWN = 20
_SAMPLE_BYTES = 1 << 20
_JSON_KEYS = frozenset({"messages", "conversations", "tools"})
_MESSAGE_KEYS = frozenset({"role", "content", "from"})


@dataclass(frozen=True)
class RawRow:
    """One row of a data file, untouched.

    Attributes:
        file: the name shown to the user.
        line: 1-based line on which the row begins; in a parquet file the 1-based row number.
        column: 1-based column on which it begins.
        value: what the file has there: whatever JSON can say.
    """

    file: str
    line: int
    column: int
    value: Any

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}"


def iter_rows(
    path: Path, name: str | None = None, remark: Callable[[str], None] = lambda text: None
) -> Iterator[RawRow | Problem]:
    """Yield the rows of a data file in order, and a `Problem` in the place of each one that cannot be read.

    Memory does not grow with the file. A line-oriented file goes on after a bad line. A file without any row yields
    one problem that says "0 conversations".

    Args:
        path: the file.
        name: how messages call it; the file's own name by default.
        remark: is told what is no JSON and read all the same, once.
    """
    name = name or path.name
    refusal = file_problem(path, name)
    if refusal is not None:
        yield refusal
        return
    rows = (
        _parquet_rows(path, name)
        if path.suffix.lower() == ".parquet"
        else _without_lone_array(_json(path, name, remark))
    )
    first = next(rows, None)
    if first is None:
        yield Problem(name, "0 conversations: the file holds no row", "write one conversation a line")
        return
    yield from map(_decoded, itertools.chain([first], rows))


def _decoded(row: RawRow | Problem) -> RawRow | Problem:
    """Return the row with lists and objects where `messages` or `tools` hold them as JSON text, as tables often do."""
    if isinstance(row, Problem) or not isinstance(row.value, dict):
        return row
    decoded = {}
    for key in _JSON_KEYS & row.value.keys():
        value = row.value[key]
        try:
            if isinstance(value, str):
                decoded[key] = _from_text(value)
            elif isinstance(value, list) and any(isinstance(element, str) for element in value):
                decoded[key] = [_from_text(element) if isinstance(element, str) else element for element in value]
        except JsonMistake as mistake:
            return Problem(row.place, f"{key!r}, character {mistake.position + 1}: {mistake.reason}", mistake.fix)
    return replace(row, value=row.value | decoded) if decoded else row


def _from_text(text: str) -> Any:
    """Return the list or object that a text holds, None of an empty text, and any other text as it is."""
    text = text.strip()
    if not text or text[0] not in "[{":
        return text or None
    value, end = decode_value(text)
    if end != len(text):
        raise _extra_data(text, end)
    return value


def limit_problems(problems: Iterable[Problem], name: str, limit: int = MAXIMUM_PROBLEMS_SHOWN) -> list[Problem]:
    """Return the first `limit` problems and, where there are more, one that says how many more."""
    iterator = iter(problems)
    shown = list(itertools.islice(iterator, limit))
    more = sum(1 for _ in iterator)
    return [*shown, Problem(name, f"... and {more} more")] if more else shown


def file_problem(path: Path, name: str) -> Problem | None:
    """Return why a file cannot be a data file at all, or None."""
    if not path.exists():
        return Problem(name, f"no such file: {path}", "check data_config and the data folder")
    if path.is_dir():
        return Problem(name, f"{path} is a folder", f"name a file that ends in {', '.join(DATA_SUFFIXES)}")
    if not path.is_file():
        return Problem(name, f"{path} is a pipe or a device, and a data file is read more than once", "name a file")
    if path.suffix.lower() not in DATA_SUFFIXES:
        return Problem(name, f"unsupported kind of file {path.suffix!r}", f"use one of {', '.join(DATA_SUFFIXES)}")
    try:
        with path.open("rb") as handle:
            head = handle.read(4096)
    except OSError as error:
        return Problem(name, f"cannot be read: {error.strerror}")
    if head.startswith(LFS_POINTER):
        return Problem(name, "is a pointer of Git LFS, not the data", "fetch the file itself: git lfs pull")
    return None if path.suffix.lower() == ".parquet" else _refusal_of_bytes(head, name)


def _refusal_of_bytes(head: bytes, name: str) -> Problem | None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Problem(name, "is UTF-16, not UTF-8", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)")
    if head.startswith(b"PAR1"):
        return Problem(name, "is a parquet file by its content", "give it the ending .parquet")
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        return Problem(name, "is a compressed file", "unpack it first")
    if b"\x00" in head:
        return Problem(name, "is not a text file: it holds zero bytes", "save it as JSON in UTF-8")
    return None


def _without_lone_array(rows: Iterator[RawRow | Problem]) -> Iterator[RawRow | Problem]:
    # `[]` alone in a file is an array of no rows; among other rows it is a conversation without messages.
    first = next(rows, None)
    if first is None:
        return
    second = next(rows, None)
    if second is None and isinstance(first, RawRow) and first.value == []:
        return
    yield first
    if second is not None:
        yield second
        yield from rows


def _json(path: Path, name: str, remark: Callable[[str], None]) -> Iterator[RawRow | Problem]:
    told: list[int] = []

    def tell(line: int) -> None:
        if not told:
            told.append(line)
            remark(f"{name}:{line}: a // comment or a comma before a closing bracket: not JSON, and read all the same")

    loosen = tell if path.suffix.lower() == ".json" else None
    with path.open("rb") as handle:
        sample = handle.read(_SAMPLE_BYTES)
        handle.seek(0)
        if _is_line_oriented(sample, len(sample) < _SAMPLE_BYTES, is_loose=loosen is not None):
            yield from _json_lines(handle, name, loosen)
        else:
            for value in stream_values(handle, name, is_message, loosen=loosen):
                yield value if isinstance(value, Problem) else RawRow(name, value.line, value.column, value.value)


def is_message(value: Any) -> bool:
    """Say whether the first element of an array makes the array one conversation, not an array of conversations."""
    return isinstance(value, dict) and "messages" not in value and not _MESSAGE_KEYS.isdisjoint(value)


def _is_line_oriented(sample: bytes, whole: bool, is_loose: bool) -> bool:
    text = sample.decode("utf-8-sig", errors="replace")
    lines = (loosened(text)[0] if is_loose else text).split("\n")
    if not whole:
        lines.pop()  # most likely cut
    texts = list(itertools.islice((line.strip() for line in lines if line.strip()), 50))
    if not texts:
        return False
    if _complete_container(texts[0]) is not None:
        return True
    if texts[0] in ("[", "{"):
        return False
    # The first line is bad, or the first of a value over many lines. It is bad if a later line is a row by itself.
    return any(
        not is_message(value) for value in map(_complete_container, texts[1:]) if value is not None and value != {}
    )


def _complete_container(text: str) -> Any | None:
    if text[:1] not in ("{", "["):
        return None
    try:
        value, end = decode_value(text)
    except JsonMistake:
        return None
    return value if end == len(text) else None


def _json_lines(handle: BinaryIO, name: str, loosen: Callable[[int], None] | None) -> Iterator[RawRow | Problem]:
    for number, raw in enumerate(handle, start=1):
        data = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        try:
            text = data.decode("utf-8").rstrip(" \t\r\n")
        except UnicodeDecodeError as error:
            yield not_utf8(name, number, data, error)
            return
        if loosen is not None:
            text, _, first = loosened(text)
            text = text.rstrip(" \t\r\n")
            if first is not None:
                loosen(number)
        start = WHITESPACE.match(text).end()  # type: ignore[union-attr]  # the pattern matches anywhere
        if start == len(text):
            continue
        try:
            value, end = decode_value(text, start)
            if end != len(text):
                raise _extra_data(text, end)
        except JsonMistake as mistake:
            yield Problem(f"{name}:{number}:{mistake.position + 1}", mistake.reason, mistake.fix)
            continue
        if isinstance(value, list) and value and not is_message(value[0]):
            yield from (RawRow(name, number, start + 1, element) for element in value)
        else:
            yield RawRow(name, number, start + 1, value)


def _extra_data(text: str, end: int) -> JsonMistake:
    position = WHITESPACE.match(text, end).end()  # type: ignore[union-attr]
    if text[position:] == ",":
        return JsonMistake(position, "a comma after the value", "remove the comma at the end of the line")
    return JsonMistake(position, f"more text after the end of the value: {text[position : position + 20]!r}", "")


def not_utf8(name: str, line: int, data: bytes, error: UnicodeDecodeError) -> Problem:
    """Return the problem for bytes that are not UTF-8; the rest of the file is not read after it."""
    try:
        data[error.start :].decode("gb18030")
        hint = "it may be GBK: save it as UTF-8 (iconv -f GB18030 -t UTF-8 OLD > NEW)"
    except UnicodeDecodeError:
        hint = "save the file as UTF-8"
    return Problem(f"{name}:{line}", f"byte 0x{data[error.start]:02x} is not UTF-8; the rest was not read", hint)


def _parquet_rows(path: Path, name: str) -> Iterator[RawRow | Problem]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            bad = {
                field.name: ParquetColumn(str(field.type))
                for field in file.schema_arrow
                if not _is_json_type(field.type)
            }
            if "messages" in bad:
                what = f"column 'messages' has the type {bad['messages']}"
                yield Problem(name, what, "write it as a list of structs of text, or as JSON text")
                return
            columns = [field.name for field in file.schema_arrow if field.name not in bad]
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRow(name, number, 1, _without_nulls(value) | bad)
    except (pyarrow.ArrowException, OSError) as error:
        yield Problem(name, f"is not a readable parquet file: {str(error).splitlines()[0]}")


@dataclass(frozen=True)
class ParquetColumn:
    """What a row has in the place of a value that JSON cannot say, such as bytes: the type of its column."""

    kind: str

    def __str__(self) -> str:
        return self.kind


def _is_json_type(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        return _is_json_type(kind.value_type)
    if types.is_struct(kind):
        return all(_is_json_type(field.type) for field in kind)
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_boolean,
        types.is_integer,
        types.is_floating,
    )
    return any(test(kind) for test in tests) or types.is_null(kind)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(element) for element in value]
    if isinstance(value, dict):
        return {key: _without_nulls(element) for key, element in value.items() if element is not None}
    return value
