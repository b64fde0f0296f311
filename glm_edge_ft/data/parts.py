"""The content of a message: text parts and image parts, each checked and its mistakes named by place."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glm_edge_ft.data.json_text import JsonMistake, decode_value
from glm_edge_ft.errors import ProblemList, elide, shorten

IMAGE_MARKER = "<image>"
_TYPES = ("text", "image", "image_url")
PICTURE_KEYS = ("image", "images")
_URL = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
_LONGEST_PATH = 4096  # of Linux, in bytes
_TEXT_FIX = '{"type": "text", "text": "..."}'
_IMAGE_FIX = '{"type": "image", "image": "path/to/image.jpg"}'
_CHAT_FIX = "use finetune_vision.py with a GLM-Edge-V model for images"
_PLACE_FIX = f"write each picture as a part of a user's content: {_IMAGE_FIX}"
_PICTURE_NAME = re.compile("image|img|picture|photo", re.IGNORECASE)
_PICTURE = re.compile(r"(https?://|data:image/)|.*\.(png|jpe?g|webp|bmp|gif|tiff?)$", re.IGNORECASE | re.DOTALL)
_MARKS = {
    IMAGE_MARKER: re.compile(IMAGE_MARKER).search,
    "<video>": re.compile("<video>").search,
    "<img>...</img>": re.compile("<img>.*?</img>", re.DOTALL).search,
}


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
    where: str,
    raw: Mapping[str, Any],
    role: str | None,
    problems: ProblemList,
    notes: list[str],
    *,
    takes_images: bool,
    has_pictures: bool,
    may_be_absent: bool,
) -> list[Part] | None:
    """Return the content of a message as parts, or None where something is wrong with it; a string is one text part.

    Args:
        where: the place of the message.
        raw: the message.
        role: who speaks; None if that is unknown.
        problems: takes every mistake.
        notes: takes the keys of parts that have no effect.
        takes_images: whether image parts are allowed; else `problems` gets one for each.
        has_pictures: whether the row or the message names pictures: an image part without a path stands for one.
        may_be_absent: whether other keys may hold all of a reply (`tool_calls`): without a content it has no part.
    """
    content = raw.get("content")
    if may_be_absent and (content is None or content == []):
        return []
    if "content" not in raw:
        problems.add(where, f"key 'content' is missing; the keys are: {listed_keys(raw)}", "write the text")
        return None
    if isinstance(content, str):
        listed = _parts_in_text(content)
        if listed is None:
            return [TextPart(content)]
        if role != "user":
            notes.append(f"the content of a {role} turn is JSON text of parts: it is learned or read as that text")
            return [TextPart(content)]
        notes.append("the content of a user turn is JSON text of parts: it is read as those parts")
        content = listed
    if not isinstance(content, list) or not content:
        fix = 'write a string, or [{"type": "text", "text": "..."}]'
        problems.add(where, f"'content' must be a string or a list of parts, it is {shown(content)}", fix)
        return None
    parts: list[Part] = []
    for index, raw_part in enumerate(content):
        place = f"{where}.content[{index}]"
        if has_pictures and role == "user" and _without_nulls(raw_part) == {"type": "image"}:
            part: Part | None = ImagePart("")
        else:
            part = _part(place, raw_part, role, problems, takes_images=takes_images)
        if part is not None:
            parts.append(part)
            used = ("type", "text") if isinstance(part, TextPart) else ("type", "image")
            unused = [key for key in raw_part if key not in used and raw_part[key] is not None]
            notes += [f"key {elide(key, 80)!r} of a content part has no meaning here and is ignored" for key in unused]
    return parts if len(parts) == len(content) else None


def _parts_in_text(text: str) -> list[Any] | None:
    # What a column of strings makes of a list of parts. A text that merely is JSON has no types of parts in it.
    if not text.lstrip().startswith("[") or '"type"' not in text:
        return None
    try:
        parts, end = decode_value(text, len(text) - len(text.lstrip()))
    except JsonMistake:
        return None
    is_parts = not text[end:].strip() and all(
        isinstance(part, dict) and part.get("type") in _TYPES and (part["type"] == "image" or part["type"] in part)
        for part in parts
    )
    return parts if is_parts else None


def _without_nulls(part: Any) -> Any:
    return {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part


def _part(where: str, part: Any, role: str | None, problems: ProblemList, *, takes_images: bool) -> Part | None:
    fix = f"{_TEXT_FIX} or {_IMAGE_FIX}" if takes_images else _TEXT_FIX
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        problems.add(where, f"a part must be an object with a 'type', this one is {shown(part)}", f"write {fix}")
    elif part["type"] in ("image", "image_url") and not takes_images:
        problems.add(where, "an image part in chat fine-tuning", _CHAT_FIX)
    elif part["type"] == "image":
        return _image_part(where, part, role, problems)
    elif part["type"] != "text":
        problems.add(where, f"unknown part type {elide(part['type'], 80)!r}", f"write {fix}")
    elif not isinstance(part.get("text"), str):
        problems.add(where, f"'text' must be a string, it is {shown(part.get('text'))}", f"write {_TEXT_FIX}")
    elif any(part.get(key) for key in (*PICTURE_KEYS, "image_url")):
        problems.add(where, "a text part that names a picture", f"write the picture as a part of its own: {_IMAGE_FIX}")
    else:
        return TextPart(part["text"])
    return None


def _image_part(where: str, part: dict[str, Any], role: str | None, problems: ProblemList) -> ImagePart | None:
    if role is not None and role != "user":
        problems.add(where, f"an image part in a message of the role {role!r}", "put the image into a user message")
    elif "image" not in part:
        problems.add(where, f"key 'image' is missing; the keys are: {listed_keys(part)}", f"write {_IMAGE_FIX}")
    elif _is_path(where, "image", part["image"], problems):
        return ImagePart(part["image"])
    return None


def _is_path(where: str, key: str, path: Any, problems: ProblemList) -> bool:
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        problems.add(where, f"{key!r} must be the path of a file, it is {shown(path)}", f"write {_IMAGE_FIX}")
    elif len(path) > _LONGEST_PATH or _URL.match(path):
        fix = "save the image as a file and write its path, relative to the folder of the data file"
        what = "a URL" if _URL.match(path) else "the content of one"
        problems.add(where, f"{key!r} must be the path of a file, not {what}, it is {shown(path)}", fix)
    else:
        return True
    return False


def named_pictures(
    where: str, holder: Mapping[str, Any], problems: ProblemList, *, takes_images: bool
) -> tuple[str, ...]:
    """Return the paths that a row or a message has under `image` and `images`: as GLM-4V, LLaVA, ms-swift and TRL do.

    Null and an empty list are no picture; an object with nothing but a `path` is that path.
    """
    found: list[tuple[str, ...]] = []
    for key in PICTURE_KEYS if not holder.keys().isdisjoint(PICTURE_KEYS) else ():
        value = holder.get(key)
        values = value if isinstance(value, list) else [value]
        values = [element for element in map(_without_nulls, values) if element is not None and element != {}]
        if values and not takes_images:
            problems.add(where, f"{key!r} in chat fine-tuning: {shown(value)}", _CHAT_FIX)
            return ()
        paths: list[str] = []
        for element in values:
            path: Any = element["path"] if isinstance(element, dict) and element.keys() == {"path"} else element
            if _is_path(where, key, path, problems):
                paths.append(path)
        found += [tuple(paths)] if paths else []
    if len(set(found)) > 1:
        problems.add(where, "'image' and 'images' name different pictures", "keep one of them")
    return found[0] if found else ()


def claimed_pictures(value: Any, key: str = "") -> Iterator[str]:
    """Yield what stands as the path of a picture anywhere in a row, which may be wrong in other ways."""
    if isinstance(value, dict):
        for name, element in value.items():
            yield from claimed_pictures(element, name)
    elif isinstance(value, list):
        for element in value:
            yield from claimed_pictures(element, key)
    elif key in PICTURE_KEYS and _is_path("", key, value, ProblemList()):
        yield value


def place_pictures(
    where: str, turns: Sequence[tuple[str, list[Part]]], pictures: Sequence[str], problems: ProblemList
) -> None:
    """Put the pictures that a row or a message names into its user turns.

    Each takes the place of one marker: `<image>` in a text, with the line break at it, or an image part without a path.
    Without markers they come before the text of the only user turn, or a single one before that of the first.

    Args:
        where: the place of the row or the message.
        turns: role and parts of each turn; the parts of user turns are changed.
        pictures: paths in their order.
        problems: gets what is ambiguous.
    """
    if not pictures:
        return
    users = [parts for role, parts in turns if role == "user"]
    markers = [sum(map(_markers, parts)) for _, parts in turns]
    there = [part.path for _, parts in turns for part in parts if isinstance(part, ImagePart) and part.path]
    if there == list(pictures):
        return
    if not users or sum(markers) != sum(map(_markers, itertools.chain(*users))):
        what = f"a picture in a turn that is not the user's, or {IMAGE_MARKER} for one"
        problems.add(where, f"{what}: {shown(pictures[0])}", _PLACE_FIX)
    elif there or sum(markers) not in (0, len(pictures)):
        what = (
            f"{len(pictures)} pictures under 'image' or 'images', {sum(markers)} {IMAGE_MARKER} for them in the texts"
        )
        problems.add(where, f"{what}, {len(there)} image parts with a path", _PLACE_FIX)
    elif any(markers):
        names = iter(pictures)
        for parts in users:
            parts[:] = [new for part in parts for new in _filled(part, names)]
    elif len(pictures) > 1 and len(users) > 1:
        what = (
            f"{len(pictures)} pictures and {len(users)} user turns, but no {IMAGE_MARKER} that says where they belong"
        )
        problems.add(where, what, _PLACE_FIX)
    else:
        users[0][:0] = map(ImagePart, pictures)


def _markers(part: Part) -> int:
    return part.text.count(IMAGE_MARKER) if isinstance(part, TextPart) else not part.path


def _filled(part: Part, names: Iterator[str]) -> Iterator[Part]:
    if isinstance(part, ImagePart):
        yield ImagePart(next(names))
    elif not _markers(part):
        yield part
    else:
        for number, piece in enumerate(re.split(rf"\n?{IMAGE_MARKER}\n?", part.text)):
            if number:
                yield ImagePart(next(names))
            if piece:
                yield TextPart(piece)


def picture_elsewhere(holder: Mapping[str, Any]) -> str | None:
    """Return a key that is not read and whose name and value both speak of a picture: `image_path: a.png`."""
    for key, value in holder.items():
        values = value if isinstance(value, list) else [value]
        is_picture = any(isinstance(element, str) and _PICTURE.match(element) for element in values)
        if key not in PICTURE_KEYS and is_picture and _PICTURE_NAME.search(key):
            return key
    return None


def leftover_markers(parts: Sequence[Part]) -> list[str]:
    """Return a remark for each marker of a picture that stays text: no picture is shown there."""
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    return [
        f"{mark} in the text of a user turn shows no picture"
        for mark, found in _MARKS.items()
        if any(map(found, texts))
    ]


def template_content(parts: Sequence[Part]) -> list[dict[str, str]]:
    """Return the parts as the chat template gets them."""
    return [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image", "image": part.path}
        for part in parts
    ]


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
