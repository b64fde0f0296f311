"""Rows of other tools' data formats, each turned into a row of this project's.

A format is a function from the row as read to a list of messages and the images that belong to them; `to_row` puts the
images where `<image>` stands in the texts. Sources: the data format pages of Stanford Alpaca, LLaMA-Factory (alpaca and
sharegpt), ms-swift (messages, and query/response), LLaVA, and the AdvertiseGen task of ChatGLM's demonstrations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from glm_edge_ft.data.parts import listed_keys, shown

IMAGE_MARKER = "<image>"
_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "observation"),
}
_CALLS = frozenset({"function_call", "tool_call", "function"})


class UnconvertibleError(Exception):
    """A row cannot be converted.

    Attributes:
        what: why not, with the value that was seen.
        fix: what to do about it.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


@dataclass(frozen=True)
class Source:
    """What a format says of a row.

    Attributes:
        messages: role and content of each turn; content is a string, or a list of parts that is kept as it is.
        images: paths of the row's images in their order, as written.
        tools: descriptions of tools, or None.
        used: the keys of the row that were read.
    """

    messages: list[dict[str, Any]]
    images: list[str]
    tools: list[Any] | None
    used: frozenset[str]


Reader = Callable[[Mapping[str, Any]], Source]


def read_alpaca(row: Mapping[str, Any]) -> Source:
    """`instruction`, `input`, `output`; perhaps `system`, `history` (pairs of question and reply) and `images`."""
    question = "\n".join(text for text in (_text(row, "instruction"), _text(row, "input", "")) if text)
    messages = [*_system(row), *_history(row), *_pair(question, _text(row, "output"))]
    return _source(row, messages, {"instruction", "input", "output", "system", "history"})


def read_sharegpt(row: Mapping[str, Any]) -> Source:
    """`conversations` with `from` and `value` (or role and content); perhaps `system`, `tools` and `images`."""
    key = "conversations" if "conversations" in row else "messages"
    messages = [*_system(row), *(_turn(turn, index) for index, turn in enumerate(_list(row, key)))]
    return _source(row, messages, {key, "system"})


def read_swift(row: Mapping[str, Any]) -> Source:
    """`messages` with role and content, or `query`, `response` and `history`; perhaps `system`, `tools`, `images`."""
    if "messages" in row:
        return read_sharegpt({key: value for key, value in row.items() if key != "conversations"})
    messages = [*_system(row), *_history(row), *_pair(_text(row, "query"), _text(row, "response"))]
    return _source(row, messages, {"query", "response", "history", "system"})


def read_advertisegen(row: Mapping[str, Any]) -> Source:
    """`content`, attributes of a product, and `summary`, the advertisement."""
    return _source(row, _pair(_text(row, "content"), _text(row, "summary")), {"content", "summary"})


def read_llava(row: Mapping[str, Any]) -> Source:
    """`conversations` with `from` and `value`, and the path of one `image`, or none."""
    return read_sharegpt(row)


READERS: dict[str, Reader] = {
    "alpaca": read_alpaca,
    "sharegpt": read_sharegpt,
    "swift": read_swift,
    "advertisegen": read_advertisegen,
    "llava": read_llava,
}


def to_row(source: Source, image_path: Callable[[str], str]) -> dict[str, Any]:
    """Return a row of this project's format.

    Args:
        source: what the other format says.
        image_path: turns a path as written there into one that holds for the new file.

    Raises:
        UnconvertibleError: markers of images and images do not match.
    """
    images = [image_path(path) for path in source.images]
    marked = sum(_markers(message) for message in source.messages)
    if marked not in (0, len(images)) or (marked and not images):
        what = f"{marked} {IMAGE_MARKER} in the texts, and {len(images)} images"
        raise UnconvertibleError(what, f"write one {IMAGE_MARKER} for each image, or none at all")
    messages = []
    for message in source.messages:
        content = message["content"]
        if isinstance(content, str) and message["role"] == "user" and images:
            if not marked:
                content, marked = IMAGE_MARKER * len(images) + content, len(images)
            content = _parts(content, images)
        elif isinstance(content, str) and marked and IMAGE_MARKER in content:
            raise UnconvertibleError(f"{IMAGE_MARKER} in a turn of the {message['role']}", "only a user shows images")
        elif isinstance(content, list):
            content = [
                {**part, "image": image_path(part["image"])} if isinstance(part.get("image"), str) else part
                for part in content
            ]
        messages.append({**message, "content": content})
    return {"messages": messages} | ({"tools": source.tools} if source.tools is not None else {})


def _markers(message: Mapping[str, Any]) -> int:
    return message["content"].count(IMAGE_MARKER) if isinstance(message["content"], str) else 0


def _parts(text: str, images: list[str]) -> str | list[dict[str, str]]:
    """Return text with markers as parts, taking the images off the list; the line break at a marker goes with it."""
    if IMAGE_MARKER not in text:
        return text
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(re.split(rf"\n?{IMAGE_MARKER}\n?", text)):
        if number:
            parts.append({"type": "image", "image": images.pop(0)})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


# ---- parts of a row --------------------------------------------------------------------------------------------------


def _source(row: Mapping[str, Any], messages: list[dict[str, Any]], used: set[str]) -> Source:
    return Source(messages, _images(row), _tools(row), frozenset(used | {"image", "images", "tools"}))


def _text(row: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key)
    if value is None and default is not None:
        return default
    if key not in row:
        raise UnconvertibleError(f"key {key!r} is missing; the keys are: {listed_keys(dict(row))}", "is --from right?")
    if not isinstance(value, str):
        raise UnconvertibleError(f"{key!r} must be a string, it is {shown(value)}")
    return value


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    if key not in row:
        raise UnconvertibleError(f"key {key!r} is missing; the keys are: {listed_keys(dict(row))}", "is --from right?")
    if not isinstance(row[key], list) or not row[key]:
        raise UnconvertibleError(f"{key!r} must be a list of turns, it is {shown(row[key])}")
    return list(row[key])


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = _text(row, "system", "")
    return [{"role": "system", "content": text}] if text else []


def _pair(question: str, reply: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def _history(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    history = row.get("history") or []
    is_right = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )
    if not is_right:
        raise UnconvertibleError(f"'history' must be a list of question and reply pairs, it is {shown(history)}")
    return [message for pair in history for message in _pair(*pair)]


def _turn(turn: Any, index: int) -> dict[str, Any]:
    place = f"turn {index}"
    if not isinstance(turn, dict):
        raise UnconvertibleError(f"{place} must be an object, it is {shown(turn)}")
    speaker = turn.get("from", turn.get("role"))
    content = turn.get("value", turn.get("content"))
    if speaker in _CALLS:
        raise UnconvertibleError(f"{place} calls a tool ({speaker!r}), which has no common form", "write it by hand")
    if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
        raise UnconvertibleError(f"{place}: unknown speaker {shown(speaker)}", f"known ones: {', '.join(_ROLES)}")
    is_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    if not isinstance(content, str) and not is_parts:
        raise UnconvertibleError(f"{place}: the text must be a string, it is {shown(content)}")
    kept = {"loss": turn["loss"]} if isinstance(turn.get("loss"), bool) else {}
    return {"role": _ROLES[speaker.lower()], "content": content, **kept}


def _images(row: Mapping[str, Any]) -> list[str]:
    value = row.get("images", row.get("image"))
    if value is None or value == []:
        return []
    found = []
    for image in value if isinstance(value, list) else [value]:
        path = image.get("path") if isinstance(image, dict) else image
        if not isinstance(path, str) or not path.strip():
            raise UnconvertibleError(f"an image must be the path of a file, it is {shown(image)}", "save it as a file")
        found.append(path)
    return found


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    value = row.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise UnconvertibleError(f"'tools' is no JSON: {error}") from error
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise UnconvertibleError(f"'tools' must be a list, it is {shown(value)}")
    return value
