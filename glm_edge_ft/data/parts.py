"""The content of a message: text parts and image parts, and the images that a row or a message names beside it."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glm_edge_ft.data.json_text import JsonMistake, decode_value
from glm_edge_ft.errors import ProblemList, elide, shorten

IMAGE_MARKER = "<image>"
IMAGE_KEYS = ("image", "images")
_PART_TYPES = ("text", "image", "image_url")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_MAXIMUM_PATH = 4096  # bytes, of Linux
_TEXT_FORM = '{"type": "text", "text": "..."}'
_IMAGE_FORM = '{"type": "image", "image": "path/to/image.jpg"}'
_USE_VISION = "use finetune_vision.py with a GLM-Edge-V model for images"
_IMAGE_KEY = re.compile("image|img|picture|photo", re.IGNORECASE)
_IMAGE_PATH = re.compile(r"(https?://|data:image/)|.*\.(png|jpe?g|webp|bmp|gif|tiff?)$", re.IGNORECASE | re.DOTALL)
_UNUSED_MARKER = re.compile(f"{IMAGE_MARKER}|<video>|<img>.*?</img>", re.DOTALL)


Part = dict[str, str]
"""`{"type": "text", "text": ...}`, or `{"type": "image", "image": ...}` with a path relative to the data file's folder.

While a row is read, the path "" stands for an image that the row or the message names beside the content.
"""


class RowFindings(ProblemList):
    """What is found while a row is read: problems, and `notes` for the report; `takes_images` in vision fine-tuning."""

    def __init__(self, takes_images: bool) -> None:
        super().__init__()
        self.takes_images = takes_images
        self.notes: list[str] = []


def parse_parts(where: str, message: Mapping[str, Any], role: str | None, found: RowFindings) -> list[Part] | None:
    """Return the content of a message as parts, a string as one text part; None where something is wrong with it.

    `found` gets every problem, and a note for each key of a part that has no effect. The role is None if it is unknown.
    """
    content = message.get("content")
    if isinstance(content, str):
        decoded = _parts_in_text(content)
        if decoded is not None:
            how = "read as those parts" if role == "user" else "learned or read as that text"
            found.notes.append(f"the content of a {role} turn is JSON text of parts: it is {how}")
        if decoded is None or role != "user":
            return [_text_part(content)]
        content = decoded
    if not isinstance(content, list) or not content:
        missing = f"key 'content' is missing; the keys are: {listed_keys(message)}"
        wrong = f"'content' must be a string or a list of parts, it is {shown(content)}"
        found.add(where, wrong if "content" in message else missing, f"write a string, or [{_TEXT_FORM}]")
        return None
    parsed = [_part(f"{where}.content[{index}]", part, role, found) for index, part in enumerate(content)]
    parts = [part for part in parsed if part is not None]
    return parts if len(parts) == len(parsed) else None


def _text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def _image_part(path: str) -> Part:
    return {"type": "image", "image": path}


def _parts_in_text(text: str) -> list[Any] | None:
    # A column of strings holds a list of parts as JSON text. Other JSON texts have no such types in them.
    if not text.lstrip().startswith("[") or '"type"' not in text:
        return None
    try:
        parts, end = decode_value(text, len(text) - len(text.lstrip()))
    except JsonMistake:
        return None
    is_parts = not text[end:].strip() and all(
        isinstance(part, dict) and part.get("type") in _PART_TYPES and (part["type"] == "image" or part["type"] in part)
        for part in parts
    )
    return parts if is_parts else None


def _part(where: str, part: Any, role: str | None, found: RowFindings) -> Part | None:
    kind = part.get("type") if isinstance(part, dict) else None
    parsed: Part | None = None
    if kind in ("image", "image_url") and not found.takes_images:
        found.add(where, "an image part in chat fine-tuning", _USE_VISION)
    elif kind == "image" and role not in ("user", None):
        found.add(where, f"an image part in a message of the role {role!r}", "put the image into a user message")
    elif kind == "image" and _without_nulls(part) == {"type": "image"}:
        parsed = _image_part("")
    elif kind == "image" and "image" not in part:
        found.add(where, f"key 'image' is missing; the keys are: {listed_keys(part)}", f"write {_IMAGE_FORM}")
    elif kind == "image":
        parsed = _image_part(part["image"]) if _is_path(where, "image", part["image"], found) else None
    elif kind != "text":
        form = f"{_TEXT_FORM} or {_IMAGE_FORM}" if found.takes_images else _TEXT_FORM
        found.add(where, f"a part must have the type 'text' or 'image', this one is {shown(part)}", f"write {form}")
    elif not isinstance(part.get("text"), str):
        found.add(where, f"'text' must be a string, it is {shown(part.get('text'))}", f"write {_TEXT_FORM}")
    elif any(part.get(key) for key in (*IMAGE_KEYS, "image_url")):
        found.add(where, "a text part that names an image", f"write the image as a part of its own: {_IMAGE_FORM}")
    else:
        parsed = _text_part(part["text"])
    if parsed is not None:
        unused = [key for key, value in part.items() if key not in ("type", kind) and value is not None]
        found.notes += [
            f"key {elide(key, 80)!r} of a content part has no meaning here and is ignored" for key in unused
        ]
    return parsed


def _without_nulls(part: Any) -> Any:
    return {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part


def _is_path(where: str, key: str, path: Any, problems: ProblemList) -> bool:
    is_path = isinstance(path, str) and path.strip() and "\0" not in path
    if not is_path or _URL.match(path) or len(path) > _MAXIMUM_PATH:
        what = f"{key!r} must be the path of a file, it is {shown(path)}"
        fix = "save the image as a file (no URL, no base64 text is read); its path starts from the data file's folder"
        problems.add(where, what, f"{fix}: {_IMAGE_FORM}")
        return False
    return True


def named_images(where: str, holder: Mapping[str, Any], found: RowFindings) -> list[str]:
    """Return the paths that a row or a message has under `image` or `images`, as GLM-4V, LLaVA, ms-swift and TRL write.

    Null and an empty list are no image; an object with nothing but a `path` is that path.
    """
    lists: list[list[str]] = []
    for key in IMAGE_KEYS if not holder.keys().isdisjoint(IMAGE_KEYS) else ():
        value = holder.get(key)
        values = map(_without_nulls, value if isinstance(value, list) else [value])
        paths = [
            element["path"] if isinstance(element, dict) and element.keys() == {"path"} else element
            for element in values
            if element is not None and element != {}
        ]
        if paths and not found.takes_images:
            found.add(where, f"{key!r} in chat fine-tuning: {shown(value)}", _USE_VISION)
            return []
        if good := [path for path in paths if _is_path(where, key, path, found)]:
            lists.append(good)
    if lists and lists[0] != lists[-1]:
        found.add(where, "'image' and 'images' name different images", "keep one of them")
    return lists[0] if lists else []


def image_paths_in(value: Any, key: str = "") -> Iterator[str]:
    """Yield what stands as the path of an image anywhere in a row, which may be wrong in other ways."""
    if isinstance(value, dict):
        for name, element in value.items():
            yield from image_paths_in(element, name)
    elif isinstance(value, list):
        for element in value:
            yield from image_paths_in(element, key)
    elif key in IMAGE_KEYS and _is_path("", key, value, ProblemList()):
        yield value


def insert_images(
    where: str, turns: Sequence[tuple[str, list[Part]]], paths: Sequence[str], found: RowFindings
) -> None:
    """Put the images that a row or a message names into its user turns.

    Each takes the place of one marker: `<image>` in a text, with the line break at it, or an image part without a path.
    Without markers they come before the text of the only user turn, or a single one before that of the first. Where it
    is not clear which image belongs where, `found` gets a problem.

    `where` is the place of the row or the message; `turns` are role and parts of each turn, which are changed.
    """
    if not paths:
        return
    written = [part["image"] for _, parts in turns for part in parts if part.get("image")]
    if written == list(paths):
        return
    users = [parts for role, parts in turns if role == "user"]
    user_markers = sum(map(_markers, itertools.chain(*users)))
    other_markers = sum(_markers(part) for _, parts in turns for part in parts) - user_markers
    if not written and not other_markers and user_markers == len(paths):
        remaining = iter(paths)
        for parts in users:
            parts[:] = [new for part in parts for new in _filled(part, remaining)]
    elif not written and not other_markers and not user_markers and users and 1 in (len(paths), len(users)):
        users[0][:0] = map(_image_part, paths)
    else:
        what = (
            f"it is not clear where {len(paths)} images under 'image' or 'images' belong ({shown(paths[0])}): "
            f"{len(users)} user turns with {user_markers} {IMAGE_MARKER}, {other_markers} in other turns, "
            f"{len(written)} image parts with a path"
        )
        found.add(where, what, f"write each image as a part of a user's content: {_IMAGE_FORM}")


def check_image_parts(where: str, parts: Sequence[Part], found: RowFindings) -> None:
    """Add a problem for each image part that is still without a path: no image is named for it."""
    for index, part in enumerate(parts):
        if part == _image_part(""):
            what = "an image part without a path, and no image is named for it"
            found.add(f"{where}.content[{index}]", what, f"write {_IMAGE_FORM}")


def _markers(part: Part) -> int:
    return part["text"].count(IMAGE_MARKER) if "text" in part else not part["image"]


def _filled(part: Part, paths: Iterator[str]) -> Iterator[Part]:
    if not _markers(part):
        yield part
        return
    for number, piece in enumerate(re.split(rf"\n?{IMAGE_MARKER}\n?", part.get("text", IMAGE_MARKER))):
        if number:
            yield _image_part(next(paths))
        if piece:
            yield _text_part(piece)


def unread_image_key(holder: Mapping[str, Any]) -> str | None:
    """Return a key that is not read though its name and its value both speak of an image: `image_path: a.png`."""
    for key, value in holder.items():
        values = value if isinstance(value, list) else [value]
        is_image = any(isinstance(element, str) and _IMAGE_PATH.match(element) for element in values)
        if key not in IMAGE_KEYS and is_image and _IMAGE_KEY.search(key):
            return key
    return None


def has_unused_marker(parts: Sequence[Part]) -> bool:
    """Return whether a text holds what other tools write in the place of an image or a video, and is read as text."""
    return any(_UNUSED_MARKER.search(part.get("text", "")) for part in parts)


def listed_keys(value: Mapping[str, Any]) -> str:
    """Return an object's keys for a message; eight of them at most."""
    return ", ".join(repr(key[:40]) for key in list(value)[:8]) or "none"


def shown(value: Any) -> str:
    """Return a value for a message: its kind and the beginning of its JSON."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    kind = kinds.get(type(value), type(value).__name__)
    size = f" ({len(value):,} characters)" if isinstance(value, str) and len(value) > 60 else ""
    return f"{kind}: {shorten(json.dumps(value, ensure_ascii=False, default=str), 60)}{size}"
