"""A JSON document that is too large to hold: one array, or values one after another, read piece by piece."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from glm_edge_ft.data.json_text import WHITESPACE, JsonMistake, decode_value, end_of_refused_value, loosened
from glm_edge_ft.errors import Problem

CHUNK_BYTES = 1 << 20
_MAYBE_CUT = re.compile(r"[-+0-9.eE]*\Z")  # what was read so far may end in the middle of a number
_NEXT_VALUE = re.compile(r"\n(?=[{\[])")


@dataclass(frozen=True)
class PlacedValue:
    """A parsed value and the 1-based line and column on which it begins."""

    line: int
    column: int
    value: Any


class _Reader:
    """A window on the text of a file that knows the line and column of each character in it."""

    def __init__(self, handle: BinaryIO, chunk_bytes: int, loosen: Callable[[int], None] | None = None) -> None:
        self.handle = handle
        self.loosen = loosen
        self.unsettled = ""  # what more text may make a comment or a comma that closes
        self.chunk_bytes = chunk_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.position = 0
        self.ended = False
        self._line = 1
        self._line_start = 0

    def fill(self, size: int | None = None) -> None:
        """Read more text behind the window. Raises UnicodeDecodeError."""
        data = self.handle.read(size or self.chunk_bytes)
        self.ended = not data
        text, first = self.decoder.decode(data, final=self.ended), None
        if self.loosen is not None:
            text, self.unsettled, first = loosened(self.unsettled + text, self.ended)
        self.text += text
        if self.loosen is not None and first is not None:
            self.loosen(self.place(len(self.text) - len(text) + first)[0])

    def consume(self, end: int) -> None:
        """Move the position to `end`, and forget what lies before it from time to time."""
        self._line, column = self.place(end)
        self._line_start = end - column + 1
        self.position = end
        if end > self.chunk_bytes:
            self.text = self.text[end:]
            self.position = 0
            self._line_start -= end

    def skip_whitespace(self) -> str:
        """Move to the next character that is not whitespace and return it, or "" at the end of the file."""
        while True:
            self.consume(WHITESPACE.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text) or self.ended:
                return self.text[self.position : self.position + 1]
            self.fill()

    def place(self, position: int) -> tuple[int, int]:
        """Return the 1-based (line, column) of a character at or behind the position."""
        lines = self.text.count("\n", self.position, position)
        start = self.text.rfind("\n", self.position, position) + 1 if lines else self._line_start
        return self._line + lines, position - start + 1

    def decode(self, start: int) -> tuple[Any, int]:
        """Parse the value at `start`, reading on as long as more text may complete it. Raises JsonMistake."""
        size = self.chunk_bytes
        while True:
            try:
                value, end = decode_value(self.text, start)
                if self.ended or not _MAYBE_CUT.match(self.text, end):
                    return value, end
            except JsonMistake as mistake:
                if self.ended or not mistake.incomplete:
                    raise
            self.fill(size)
            size *= 2

    def next_line_with_value(self) -> bool:
        """Move to the next line that begins with a bracket; return False if there is none."""
        while True:
            match = _NEXT_VALUE.search(self.text, self.position)
            if match:
                self.consume(match.end())
                return True
            if self.ended:
                return False
            self.consume(max(self.position, len(self.text) - 1))
            self.fill()


def stream_values(
    handle: BinaryIO,
    name: str,
    is_message: Callable[[Any], bool],
    chunk_bytes: int = CHUNK_BYTES,
    loosen: Callable[[int], None] | None = None,
) -> Iterator[PlacedValue | Problem]:
    """Yield the rows of a JSON document: the elements of its arrays, and the values that stand outside of one.

    An array whose first element is a message is one row. After a mistake outside an array, reading goes on at the next
    line that begins with a bracket; after one inside an array it ends.

    Args:
        handle: the file, at its beginning, UTF-8 with or without BOM.
        name: how messages call the file.
        is_message: tells from the first element of an array whether the array is one conversation.
        chunk_bytes: how much is read at once.
        loosen: is told the line of comments and trailing commas, which are read over then; None refuses them.
    """
    reader = _Reader(handle, chunk_bytes, loosen)
    try:
        while first := reader.skip_whitespace():
            if first == "[" and _is_array_of_rows(reader, is_message):
                if not (yield from _array_rows(reader, name)):
                    return
            else:
                yield from _one_value(reader, name)
    except UnicodeDecodeError as error:
        line = reader.place(len(reader.text))[0]
        yield Problem(
            f"{name}:{line}",
            f"byte 0x{error.object[error.start]:02x} on this line or soon after is not UTF-8; the rest was not read",
            "save the file as UTF-8 (from GBK: iconv -f GB18030 -t UTF-8 OLD > NEW)",
        )


def _problem(reader: _Reader, name: str, mistake: JsonMistake) -> Problem:
    line, column = reader.place(mistake.position)
    return Problem(f"{name}:{line}:{column}", mistake.reason, mistake.fix)


def _one_value(reader: _Reader, name: str) -> Iterator[PlacedValue | Problem]:
    start = reader.position
    line, column = reader.place(start)
    try:
        value, end = reader.decode(start)
    except JsonMistake as mistake:
        yield _problem(reader, name, mistake)
        end_of_value = end_of_refused_value(reader.text, start)
        if end_of_value is not None:
            reader.consume(end_of_value)
        elif not reader.next_line_with_value():
            reader.consume(len(reader.text))
        return
    yield PlacedValue(line, column, value)
    reader.consume(end)


def _is_array_of_rows(reader: _Reader, is_message: Callable[[Any], bool]) -> bool:
    position = reader.position + 1
    while True:
        position = WHITESPACE.match(reader.text, position).end()  # type: ignore[union-attr]
        if position < len(reader.text) or reader.ended:
            break
        reader.fill()
    if reader.text[position : position + 1] == "]":
        return False
    try:
        return not is_message(reader.decode(position)[0])
    except JsonMistake:
        return True


def _array_rows(reader: _Reader, name: str) -> Generator[PlacedValue | Problem, None, bool]:
    # Returns whether reading can go on behind the array.
    opening = reader.place(reader.position)
    reader.consume(reader.position + 1)
    while True:
        character = reader.skip_whitespace()
        start = reader.position
        line, column = reader.place(start)
        if not character:
            yield Problem(
                f"{name}:{line}:{column}", f"the file ends inside the array of line {opening[0]}", "close it with ]"
            )
            return False
        try:
            value, end = reader.decode(start)
        except JsonMistake as mistake:
            yield _problem(reader, name, _after_comma(reader.text, start, mistake))
            end_of_value = end_of_refused_value(reader.text, start)
            if end_of_value is None:
                yield Problem(f"{name}:{line}", "the rest of this array was not read")
                return False
            end = end_of_value
        else:
            yield PlacedValue(line, column, value)
        reader.consume(end)
        separator = reader.skip_whitespace()
        if separator == "]":
            reader.consume(reader.position + 1)
            return True
        if separator != ",":
            line, column = reader.place(reader.position)
            yield Problem(
                f"{name}:{line}:{column}",
                f"expected ',' or ']' after an element of the array, found {separator or 'the end of the file'!r}",
                "put a comma between two conversations and ] at the end",
            )
            return False
        reader.consume(reader.position + 1)


def _after_comma(text: str, start: int, mistake: JsonMistake) -> JsonMistake:
    if text[start] == "]":
        return JsonMistake(start, "a comma before ']'", "remove the comma")
    return mistake
