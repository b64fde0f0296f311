"""The content of a message: text parts and image parts, each checked and its mistakes named by place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glm_edge_ft.errors import ProblemList

_TEXT_FIX = '{"type": "text", "text": "..."}'
_IMAGE_FIX = '{"type": "image", "image": "path/to/image.jpg"}'


@dataclass(frozen=True)
class TextPart:
    """A piece of text in a message."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """An image in a message: its path as the file has it, relative to the data file's folder."""

    path: str


Part = TextPart | ImagePart


def parse_parts(
    where: str, raw: dict[str, Any], role: str | None, problems: ProblemList, *, takes_images: bool
) -> list[Part] | None:
    """Return the content of a message as parts, or None where something is wrong with it; a string is one text part.

    Args:
        where: the place of the message.
        raw: the message.
        role: who speaks; None if that is unknown.
        problems: takes every mistake.
        takes_images: whether image parts are allowed; else `problems` gets one for each.
    """
    if "content" not in raw:
        problems.add(where, f"key 'content' is missing; the keys are: {listed_keys(raw)}", "write the text")
        return None
    content = raw["content"]
    if isinstance(content, str):
        return [TextPart(content)]
    if not isinstance(content, list) or not content:
        fix = 'write a string, or [{"type": "text", "text": "..."}]'
        problems.add(where, f"'content' must be a string or a list of parts, it is {shown(content)}", fix)
        return None
    parts: list[Part] = []
    for index, raw_part in enumerate(content):
        part = _part(f"{where}.content[{index}]", raw_part, role, problems, takes_images=takes_images)
        if part is not None:
            parts.append(part)
    return parts if len(parts) == len(content) else None


def _part(where: str, part: Any, role: str | None, problems: ProblemList, *, takes_images: bool) -> Part | None:
    fix = f"{_TEXT_FIX} or {_IMAGE_FIX}" if takes_images else _TEXT_FIX
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        problems.add(where, f"a part must be an object with a 'type', this one is {shown(part)}", f"write {fix}")
    elif part["type"] in ("image", "image_url") and not takes_images:
        problems.add(
            where, "an image part in chat fine-tuning", "use finetune_vision.py with a GLM-Edge-V model for images"
        )
    elif part["type"] == "image":
        return _image_part(where, part, role, problems)
    elif part["type"] != "text":
        problems.add(where, f"unknown part type {part['type']!r}", f"write {fix}")
    elif not isinstance(part.get("text"), str):
        problems.add(where, f"'text' must be a string, it is {shown(part.get('text'))}", f"write {_TEXT_FIX}")
    else:
        return TextPart(part["text"])
    return None


def _image_part(where: str, part: dict[str, Any], role: str | None, problems: ProblemList) -> ImagePart | None:
    path = part.get("image")
    if role is not None and role != "user":
        problems.add(where, f"an image part in a message of the role {role!r}", "put the image into a user message")
    elif "image" not in part:
        problems.add(where, f"key 'image' is missing; the keys are: {listed_keys(part)}", f"write {_IMAGE_FIX}")
    elif not isinstance(path, str) or not path.strip() or "\0" in path:
        problems.add(where, f"'image' must be the path of a file, it is {shown(path)}", f"write {_IMAGE_FIX}")
    elif path.lower().startswith(("http://", "https://", "data:", "ftp://", "file://")):
        fix = "save the image as a file and write its path, relative to the folder of the data file"
        problems.add(where, f"'image' must be the path of a file, not a URL, it is {shown(path)}", fix)
    else:
        return ImagePart(path)
    return None


def template_content(parts: Sequence[Part]) -> list[dict[str, str]]:
    """Return the parts as the chat template gets them."""
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image", "image": part.path}
        for part in parts
    ]


def listed_keys(value: dict[str, Any]) -> str:
    """Return an object's keys for a message; eight of them at most."""
    return ", ".join(repr(key[:40]) for key in list(value)[:8]) or "none"


def shown(value: Any) -> str:
    """Return a value for a message: its kind and the beginning of its JSON."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    kind = kinds.get(type(value), type(value).__name__)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return f"{kind}: {text if len(text) <= 60 else text[:57] + '...'}"
