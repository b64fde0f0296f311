"""JSON text to values, with mistakes said the way a person would: where, what, and what to write instead.

The standard parser does the work. On top of it, what would corrupt a data set in silence is refused: a key that stands
twice in one object, NaN and infinities, half a surrogate pair, nesting that later steps cannot walk.
"""

from __future__ import annotations

import json
import re
from typing import Any

from glm_edge_ft.errors import elide

MAXIMUM_DEPTH = 64
WHITESPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_LOOSE = re.compile(  # a string, passed over; a comment; a comma that closes; a group is set where more text may follow
    r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?(\Z))'
    r"|//[^\n]*(\Z)?|/(\Z)|,(?=(?:\s|//[^\n]*\n)*(?:[\]}]|(?:/|//[^\n]*)?(\Z)))",
    re.DOTALL,
)
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


class JsonMistake(Exception):
    """Why a text is not acceptable JSON.

    Attributes:
        position: index of the character in the text that was parsed.
        reason: what is wrong there.
        fix: what to write instead; may be empty.
        incomplete: True when the text ends before the value does, so that more text might complete it.
    """

    def __init__(self, position: int, reason: str, fix: str = "", incomplete: bool = False) -> None:
        super().__init__(position, reason, fix, incomplete)
        self.position = position
        self.reason = reason
        self.fix = fix
        self.incomplete = incomplete


class _RefusedValueError(ValueError):
    """Syntactically fine, but not acceptable; the parser does not tell its callbacks where they are."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedValueError(f"key {elide(key, 80)!r} stands twice in one object")
            seen.add(key)
    return value


def _refuse_constant(word: str) -> Any:
    raise _RefusedValueError(f"{word} is not a JSON value")


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _RefusedValueError(f"the number {text[:40]} is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float)
_PLAIN_DECODER = json.JSONDecoder()


def loosened(text: str, ended: bool = True) -> tuple[str, str, int | None]:
    """Return JSON with spaces in place of comments (`// ...`) and of commas before a closing bracket; strings stay.

    Args:
        text: begins outside of a string.
        ended: whether the text is whole.

    Returns:
        The text up to what may change when more text comes, the rest, and the place of the first change or None.
    """
    pieces: list[str] = []
    first, done = None, 0
    for match in _LOOSE.finditer(text):
        if match.lastindex and not ended:
            return "".join((*pieces, text[done : match.start()])), text[match.start() :], first
        if match[0].startswith("//") or (match[0] == "," and not match.lastindex):
            first = match.start() if first is None else first
            pieces += [text[done : match.start()], " " * len(match[0])]
            done = match.end()
    return "".join((*pieces, text[done:])), "", first


def decode_value(text: str, start: int = 0) -> tuple[Any, int]:
    """Parse the JSON value that begins at `start` and return it with the index just after it.

    Raises:
        JsonMistake: the text there is not acceptable JSON.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
        if text.count("{", start, end) + text.count("[", start, end) > MAXIMUM_DEPTH:
            _check_depth(value)
        surrogate = _SURROGATE_ESCAPE.search(text, start, end)
        if surrogate is not None and not _is_encodable(value):
            raise JsonMistake(surrogate.start(), *_HALF_SURROGATE)
    except json.JSONDecodeError as error:
        raise _mistake_from(text, error) from None
    except RecursionError:
        raise JsonMistake(start, *_TOO_DEEP) from None
    except _RefusedValueError as error:
        raise JsonMistake(start, str(error), "") from None
    except ValueError:  # the interpreter's limit on the digits of an integer
        raise JsonMistake(start, "a number with thousands of digits", "write it as a string") from None
    return value, end


def end_of_refused_value(text: str, start: int) -> int | None:
    """Return the index after a value that `decode_value` refused for its content, or None if it does not parse."""
    try:
        return _PLAIN_DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


_HALF_SURROGATE = (
    "half of a surrogate pair (\\uD800-\\uDFFF alone): it is no character and cannot be encoded",
    "write the whole character, or leave it out",
)
_TOO_DEEP = (f"nested more than {MAXIMUM_DEPTH} levels deep", "messages need only a few levels")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAXIMUM_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise RecursionError


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [child for child in value.values() if isinstance(child, dict | list)]
    return [child for child in value if isinstance(child, dict | list)]


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _mistake_from(text: str, error: json.JSONDecodeError) -> JsonMistake:
    position = error.pos
    found = text[position : position + 1]
    before = text[:position].rstrip(" \t\r\n")[-1:]
    if position >= len(text.rstrip(" \t\r\n")):
        return JsonMistake(position, "the text ends in the middle of a value", "was the file cut off?", incomplete=True)
    if error.msg.startswith("Unterminated string"):
        return JsonMistake(position, "a string that begins here has no closing quote", "was the file cut off?", True)
    reason, fix = _explain(text, position, found, before, error.msg)
    # Literals, numbers and escapes that stop at the very end may only be cut by the end of what was read so far.
    return JsonMistake(position, reason, fix, incomplete=len(text) - position < len("\\ud83d\\ude00"))


def _explain(  # a table of cases, first match wins
    text: str, position: int, found: str, before: str, message: str
) -> tuple[str, str]:
    if message.startswith("Invalid control character"):
        if found in "\r\n":
            return "a line break inside a string (or a missing closing quote)", "write a line break in a string as \\n"
        return f"the control character {found!r} inside a string", f"write it as \\u{ord(found):04x}"
    if message.startswith("Invalid \\"):
        return "an unknown escape in a string", "write a backslash as \\\\"
    if text.startswith(("//", "/*"), position) or found == "#":
        return "a comment: JSON has no comments", "remove it"
    if message.startswith("Illegal trailing comma"):  # Python 3.13 and later; points at the comma
        return "a comma after the last element", "remove the comma"
    if before == "," and found in "}]":
        return f"a comma before '{found}'", "remove the comma"
    if found == "'":
        return "single quotes", 'JSON strings stand in double quotes: "text"'
    for word, right in _PYTHON_WORDS.items():
        if text.startswith(word, position):
            return f"{word} is Python, not JSON", f"write {right}"
    return f"{message[:1].lower()}{message[1:]}, found {found!r}", ""
