"""Rows of other tools' data formats, each turned into a row that `parse_conversation` reads.

What a format has of its own gets this project's names: who speaks, what is said, where pictures stand. All other keys
stay, so that what they say of pictures and of what is learned is honoured, and what has no meaning is named, as it is
in a file of this project. Sources: the data format pages of Stanford Alpaca, LLaMA-Factory (alpaca and sharegpt),
ms-swift (messages, and query/response), LLaVA, Qwen-VL, OpenAI, and the AdvertiseGen task of ChatGLM's demonstrations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from glm_edge_ft.data.calls import CALLS
from glm_edge_ft.data.parts import IMAGE_MARKER, PICTURE_KEYS, listed_keys, shown

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "observation"),
}
_SPEAKERS_OF_CALLS = frozenset({"function_call", "tool_call", "function"})
_PREFERENCES = (
    *("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images"),
    *("preferred_output", "non_preferred_output"),
)
_JUDGEMENTS = ("label", "kto_tag")  # of KTO: whether a reply is a good one
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_INLINE_IMAGE = re.compile(r"<img>(.*?)</img>", flags=re.DOTALL)
# As tools write it, at the beginning or the end of a line; inside of one it may be a word of a text on HTML.
_MARKER = re.compile(r"^[ \t]*<(image|video|audio)>|<(image|video|audio)>[ \t]*$", flags=re.MULTILINE)
_GROUNDING = re.compile(r"<(?:bbox|ref-object|ref|box)>")


class UnconvertibleError(Exception):
    """A row cannot be converted; the arguments are why not, with the value that was seen, and what to do about it."""


Messages = list[dict[str, Any]]
Reader = Callable[[Mapping[str, Any]], tuple[Messages, set[str]]]
"""Returns the messages of a row, and the keys that they were read from."""


def read_alpaca(row: Mapping[str, Any]) -> tuple[Messages, set[str]]:
    """`instruction`, `input`, `output`; perhaps `system`, `history` (pairs of question and reply) and `images`."""
    question = "\n".join(text for text in (_text(row, "instruction"), _text(row, "input", "")) if text)
    messages = [*_system(row), *_history(row), *_pair(question, _text(row, "output"))]
    return messages, {"instruction", "input", "output", "system", "history"}


def read_turns(row: Mapping[str, Any]) -> tuple[Messages, set[str]]:
    """`conversations` or `messages` of `from` and `value`, or of role and content, or else `query` and `response`.

    Perhaps with `system`, `history` beside a query, `tools`, `images`. `tool_calls` stay as they are.
    """
    if "query" in row and not {"conversations", "messages"} & row.keys():
        messages = [*_system(row), *_history(row), *_pair(_text(row, "query"), _text(row, "response"))]
        return messages, {"query", "response", "history", "system"}
    key = "conversations" if "conversations" in row else "messages"
    messages = [_turn(turn, index) for index, turn in enumerate(_list(row, key))]
    if any("tool_calls" in message for message in messages):  # a template that renders calls calls the results so
        messages = [{**one, "role": "tool"} if one["role"] == "observation" else one for one in messages]
    return [*_system(row), *messages], {key, "system"}


def read_advertisegen(row: Mapping[str, Any]) -> tuple[Messages, set[str]]:
    """`content`, attributes of a product, and `summary`, the advertisement."""
    return _pair(_text(row, "content"), _text(row, "summary")), {"content", "summary"}


READERS: dict[str, Reader] = {
    "alpaca": read_alpaca,
    "sharegpt": read_turns,
    "swift": read_turns,
    "advertisegen": read_advertisegen,
    "llava": read_turns,
    "qwen-vl": read_turns,
    "openai": read_turns,
}


def translate(row: Mapping[str, Any], form: str) -> dict[str, Any]:
    """Return a row of another format as one that `parse_conversation` reads: `messages`, and every key beside them.

    Args:
        row: the row as read.
        form: a key of READERS.

    Raises:
        UnconvertibleError: the row says something that cannot be said here.
    """
    _refuse_other_meanings(row)
    messages, used = READERS[form](row)
    others = {key: value for key, value in row.items() if key not in used}
    if others.pop("messages", None):
        raise UnconvertibleError(f"'messages' beside what {form} has", "keep one of them; is --from right?")
    texts = [text for message in messages if message["role"] == "user" for text in _texts(message)]
    others |= _inline_images(row, messages)
    marked = next((mark for text in texts if (mark := _MARKER.search(text))), None)
    if marked and not (marked[0].strip() == IMAGE_MARKER and _has_images(others, messages)):
        what = f"{marked[0].strip()} in the texts, and nothing that it stands for"
        raise UnconvertibleError(what, "give the picture under 'images', or take the marker out")
    if row.get("objects") and any(_GROUNDING.search(text) for message in messages for text in _texts(message)):
        fix = "write names and coordinates into the texts, as the model is to read and write them"
        raise UnconvertibleError("'objects' fill in places of the texts, such as <bbox>", fix)
    return {**others, "messages": messages, "tools": _tools(row)}


def _refuse_other_meanings(row: Mapping[str, Any]) -> None:
    """Refuse what would turn into another lesson if only the texts were taken."""
    preference = next((key for key in _PREFERENCES if row.get(key)), None)
    if preference is not None:
        fix = "write the better reply as the only one: which of two replies is better is not learned here"
        raise UnconvertibleError(f"a preference between replies ({preference!r})", fix)
    judgement = next((key for key in _JUDGEMENTS if row.get(key) is False), None)
    if judgement is not None:
        raise UnconvertibleError(f"{judgement!r} is false: a reply that is not to be learned")
    _refuse_media(row, "the row")


def _refuse_media(holder: Mapping[str, Any], where: str) -> None:
    media = next((key for key in _OTHER_MEDIA if holder.get(key)), None)
    if media is not None:
        raise UnconvertibleError(f"{where} shows more than texts and pictures ({media!r})", "the models see pictures")


# ---- pictures --------------------------------------------------------------------------------------------------------


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message["content"]
    parts = content if isinstance(content, list) else [{"text": content}]
    return [part["text"] for part in parts if isinstance(part.get("text"), str)]


def _has_images(row: Mapping[str, Any], messages: Messages) -> bool:
    return any(holder.get(key) for holder in (row, *messages) for key in PICTURE_KEYS)


def _inline_images(row: Mapping[str, Any], messages: Messages) -> dict[str, Any]:
    """Put markers in the place of `<img>path</img>`, as Qwen-VL has it, and return the paths as `images` of the row."""
    found: list[str] = []

    def marker(image: re.Match[str]) -> str:
        found.append(image[1].strip())
        return IMAGE_MARKER

    for message in messages:
        content, before = message["content"], len(found)
        if isinstance(content, str):
            message["content"] = _INLINE_IMAGE.sub(marker, content)
        else:
            for part in content:
                if isinstance(part.get("text"), str):
                    part["text"] = _INLINE_IMAGE.sub(marker, part["text"])
        if len(found) > before and message["role"] != "user":
            raise UnconvertibleError(f"a picture in a turn of the {message['role']}", "only a user shows pictures")
    if found and _has_images(row, messages):
        raise UnconvertibleError("pictures both in <img> and under 'image' or 'images'", "keep one of them")
    return {"images": found} if found else {}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a content, with a type; an image part has its path under `image` then, whoever wrote it."""
    part = {"type": next((kind for kind in ("text", "image") if kind in part), None), **part}
    if part["type"] not in ("image", "image_url"):
        return part
    key = next((key for key in ("image", "image_url", "path", "url") if part.get(key)), None)
    if key is None:  # stands for an image of the row
        return {name: value for name, value in part.items() if value} | {"type": "image"}
    path = part[key].get("url", part[key].get("path")) if isinstance(part[key], dict) else part[key]
    others = {name: value for name, value in part.items() if name not in ("type", key)}
    return {"type": "image", "image": _local(path), **others}


def _local(path: Any) -> Any:
    is_url = isinstance(path, str) and path.lower().startswith("file:")
    return url2pathname(urlsplit(path).path) if is_url else path


# ---- parts of a row --------------------------------------------------------------------------------------------------


def _text(row: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = row.get(key)
    if value is None and default is not None:
        return default
    if key not in row:
        raise UnconvertibleError(f"key {key!r} is missing; the keys are: {listed_keys(row)}", "is --from right?")
    if not isinstance(value, str):
        raise UnconvertibleError(f"{key!r} must be a string, it is {shown(value)}")
    return value


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    if key not in row:
        raise UnconvertibleError(f"key {key!r} is missing; the keys are: {listed_keys(row)}", "is --from right?")
    if not isinstance(row[key], list) or not row[key]:
        raise UnconvertibleError(f"{key!r} must be a list of turns, it is {shown(row[key])}")
    return list(row[key])


def _system(row: Mapping[str, Any]) -> Messages:
    text = _text(row, "system", "")
    return [{"role": "system", "content": text}] if text else []


def _pair(question: str, reply: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def _history(row: Mapping[str, Any]) -> Messages:
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
    others = {key: value for key, value in turn.items() if value is not None}
    speaker = others.pop("from" if "from" in others else "role", None)
    content = others.pop("value" if "value" in others else "content", None)
    twice = sorted({"from", "role", "value", "content"} & others.keys())
    if twice:
        raise UnconvertibleError(f"{place} has two names for one thing ({twice[0]!r} is one)", "keep one of them")
    if isinstance(speaker, str) and speaker in _SPEAKERS_OF_CALLS:
        raise UnconvertibleError(f"{place} calls a tool ({speaker!r}), which has no common form", "write it by hand")
    if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
        raise UnconvertibleError(f"{place}: unknown speaker {shown(speaker)}", f"known ones: {', '.join(_ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = [_part(part) for part in content]
    elif content is None and not CALLS.isdisjoint(others):
        content = ""
    elif not isinstance(content, str):
        raise UnconvertibleError(f"{place}: the text must be a string, it is {shown(content)}")
    _refuse_media(others, place)
    return {"role": _ROLES[speaker.lower()], "content": content, **others}


def _tools(row: Mapping[str, Any]) -> Any:
    value = row.get("tools")
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value or None
        if isinstance(value, list):
            value = [json.loads(tool) if isinstance(tool, str) else tool for tool in value]
    except (ValueError, RecursionError) as error:
        raise UnconvertibleError(f"'tools' is no JSON: {error}") from error
    return value
