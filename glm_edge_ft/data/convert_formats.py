"""Rows of other tools' data formats, each turned into a row that `parse_conversation` reads.

What a format has of its own gets this project's names: who speaks, what is said, where images stand. All other keys
stay, so that what they say of images and of what is learned is honoured, and what has no meaning is named, as it is in
a file of this project. Sources: the data format pages of Stanford Alpaca, LLaMA-Factory (alpaca and sharegpt), ms-swift
(messages, and query/response), LLaVA, Qwen-VL, OpenAI, and the AdvertiseGen task of ChatGLM's demonstrations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from glm_edge_ft.data.conversation import ROLE_NAMES
from glm_edge_ft.data.parts import IMAGE_KEYS, IMAGE_MARKER, listed_keys, shown
from glm_edge_ft.data.rendering import CALL_KEYS, decode_json
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.errors import UserError

FORMATS = ("alpaca", "sharegpt", "swift", "advertisegen", "llava", "qwen-vl", "openai")
# One exchange a row: the keys of the question, of which only the first must be there, and the key of the reply.
_EXCHANGES = {
    "alpaca": (("instruction", "input"), "output"),
    "advertisegen": (("content",), "summary"),
    "query": (("query",), "response"),
}
_PREFERENCE = "a preference between replies", "write the better reply as the only one: a preference is not learned here"
_MEDIA = "more than texts and images", "the models see images only"
_OTHER_MEANINGS = {
    **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images"), _PREFERENCE),
    **dict.fromkeys(("preferred_output", "non_preferred_output"), _PREFERENCE),
    **dict.fromkeys(("video", "videos", "audio", "audios"), _MEDIA),
}
_JUDGEMENTS = ("label", "kto_tag")  # of KTO: whether a reply is a good one
_INLINE_IMAGE = re.compile(r"<img>(.*?)</img>", flags=re.DOTALL)
# As tools write it, at the beginning or the end of a line; inside of one it may be a word of a text on HTML.
_MARKER = re.compile(r"^[ \t]*<(image|video|audio)>|<(image|video|audio)>[ \t]*$", flags=re.MULTILINE)
_GROUNDING = re.compile(r"<(?:bbox|ref-object|ref|box)>")

Messages = list[dict[str, Any]]


class _UnconvertibleError(Exception):
    """A row cannot be converted; the arguments are why not, with the value that was seen, and what to do about it."""


def translate(row: RawRow, form: str) -> RawRow:
    """Return a row of another format as one that `parse_conversation` reads: `messages`, and every key beside them.

    Raises UserError with the row's place where the row says something that cannot be said here.
    """
    try:
        if not isinstance(row.value, dict):
            raise _UnconvertibleError("a row must be an object")
        return replace(row, value=_translated(row.value, form))
    except _UnconvertibleError as error:
        raise UserError.single(row.place, *error.args) from None


def _translated(row: Mapping[str, Any], form: str) -> dict[str, Any]:
    _refuse_other_meanings(row, "the row")
    is_query = form not in _EXCHANGES and "query" in row and not {"conversations", "messages"} & row.keys()
    exchange = _EXCHANGES.get("query" if is_query else form)
    if exchange is not None:
        questions, reply = exchange
        used = {*questions, reply, "system", "history"}
        texts = [_text(row, key, None if key == questions[0] else "") for key in questions]
        messages = [*_history(row), *_pair("\n".join(filter(None, texts)), _text(row, reply))]
    else:
        key = "conversations" if "conversations" in row else "messages"
        used = {key, "system"}
        messages = [_turn(turn, index) for index, turn in enumerate(_turns(row, key))]
        if any("tool_calls" in message for message in messages):  # templates that render calls call the results so
            messages = [one | ({"role": "tool"} if one["role"] == "observation" else {}) for one in messages]
    if system := _text(row, "system", ""):
        messages.insert(0, {"role": "system", "content": system})
    others = {key: value for key, value in row.items() if key not in used}
    if others.pop("messages", None):
        raise _UnconvertibleError(f"'messages' beside what {form} has", "keep one of them; is --from right?")
    others |= _inline_images(row, messages)
    _check_markers(others, messages)
    return {**others, "messages": messages, "tools": _tools(row)}


def _refuse_other_meanings(holder: Mapping[str, Any], where: str) -> None:
    """Refuse what would turn into another lesson if only the texts were taken."""
    for key in sorted(holder.keys() & _OTHER_MEANINGS.keys()):
        if holder[key]:
            what, fix = _OTHER_MEANINGS[key]
            raise _UnconvertibleError(f"{where} holds {what} ({key!r})", fix)
    for key in _JUDGEMENTS:
        if holder.get(key) is False:
            raise _UnconvertibleError(f"{key!r} is false: a reply that is not to be learned")


# ---- images ----------------------------------------------------------------------------------------------------------


def _text_parts(message: Mapping[str, Any]) -> Messages:
    """Return the parts of a message that hold a text; a content that is a string is such a part itself."""
    content = message["content"]
    return [part for part in content if isinstance(part.get("text"), str)] if isinstance(content, list) else []


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in _text_parts(message)]


def _names_images(row: Mapping[str, Any], messages: Messages) -> bool:
    return any(holder.get(key) for holder in (row, *messages) for key in IMAGE_KEYS)


def _inline_images(row: Mapping[str, Any], messages: Messages) -> dict[str, Any]:
    """Put markers in the place of `<img>path</img>`, as Qwen-VL has it, and return the paths as `images` of the row."""
    found: list[str] = []
    for message in messages:
        paths = [path.strip() for text in _texts(message) for path in _INLINE_IMAGE.findall(text)]
        if paths and message["role"] != "user":
            raise _UnconvertibleError(f"an image in a turn of the {message['role']}", "only a user shows images")
        found += paths
        for holder, key in ((message, "content"), *((part, "text") for part in _text_parts(message))):
            if isinstance(holder[key], str):
                holder[key] = _INLINE_IMAGE.sub(IMAGE_MARKER, holder[key])
    if found and _names_images(row, messages):
        raise _UnconvertibleError("images both in <img> and under 'image' or 'images'", "keep one of them")
    return {"images": found} if found else {}


def _check_markers(row: Mapping[str, Any], messages: Messages) -> None:
    texts = [text for message in messages if message["role"] == "user" for text in _texts(message)]
    marked = next((mark[0].strip() for text in texts if (mark := _MARKER.search(text))), None)
    if marked and not (marked == IMAGE_MARKER and _names_images(row, messages)):
        what = f"{marked} in the texts, and nothing that it stands for"
        raise _UnconvertibleError(what, "give the image under 'images', or take the marker out")
    if row.get("objects") and any(_GROUNDING.search(text) for message in messages for text in _texts(message)):
        fix = "write names and coordinates into the texts, as the model is to read and write them"
        raise _UnconvertibleError("'objects' fill in places of the texts, such as <bbox>", fix)


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part of a content with a type; an image part has its path under `image` then, whoever wrote it."""
    part = {"type": next((kind for kind in ("text", "image") if kind in part), None), **part}
    if part["type"] not in ("image", "image_url"):
        return part
    key = next((key for key in ("image", "image_url", "path", "url") if part.get(key)), None)
    if key is None:  # stands for an image of the row
        return {name: value for name, value in part.items() if value} | {"type": "image"}
    path = part[key].get("url", part[key].get("path")) if isinstance(part[key], dict) else part[key]
    if isinstance(path, str) and path.lower().startswith("file:"):
        path = url2pathname(urlsplit(path).path)
    others = {name: value for name, value in part.items() if name not in ("type", key)}
    return {"type": "image", "image": path, **others}


# ---- texts and turns -------------------------------------------------------------------------------------------------


def _text(row: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = default if row.get(key) is None and default is not None else _value(row, key)
    if not isinstance(value, str):
        raise _UnconvertibleError(f"{key!r} must be a string, it is {shown(value)}")
    return value


def _turns(row: Mapping[str, Any], key: str) -> list[Any]:
    value = _value(row, key)
    if not isinstance(value, list) or not value:
        raise _UnconvertibleError(f"{key!r} must be a list of turns, it is {shown(value)}")
    return value


def _tools(row: Mapping[str, Any]) -> Any:
    tools = row.get("tools") or None  # `iter_rows` has decoded a text already, but not the texts in it
    if not isinstance(tools, list):
        return tools
    return [decode_json(tool) or tool if isinstance(tool, str) else tool for tool in tools]


def _value(row: Mapping[str, Any], key: str) -> Any:
    if key not in row:
        raise _UnconvertibleError(f"key {key!r} is missing; the keys are: {listed_keys(row)}", "is --from right?")
    return row[key]


def _pair(question: str, reply: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def _history(row: Mapping[str, Any]) -> Messages:
    history = row.get("history") or []
    is_right = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )
    if not is_right:
        raise _UnconvertibleError(f"'history' must be a list of question and reply pairs, it is {shown(history)}")
    return [message for pair in history for message in _pair(*pair)]


def _turn(turn: Any, index: int) -> dict[str, Any]:
    place = f"turn {index}"
    if not isinstance(turn, dict):
        raise _UnconvertibleError(f"{place} must be an object, it is {shown(turn)}")
    others = {key: value for key, value in turn.items() if value is not None}
    speaker = others.pop("from" if "from" in others else "role", None)
    content = others.pop("value" if "value" in others else "content", None)
    if twice := sorted({"from", "role", "value", "content"} & others.keys()):
        raise _UnconvertibleError(f"{place} has two names for one thing ({twice[0]!r} is one)", "keep one of them")
    role = ROLE_NAMES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        fix = f"known ones: {', '.join(ROLE_NAMES)}; write a call of a tool as 'tool_calls'"
        raise _UnconvertibleError(f"{place}: unknown speaker {shown(speaker)}", fix)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = [_part(part) for part in content]
    elif content is None and not CALL_KEYS.isdisjoint(others):
        content = ""
    elif not isinstance(content, str):
        raise _UnconvertibleError(f"{place}: the text must be a string, it is {shown(content)}")
    _refuse_other_meanings(others, place)
    return {"role": role, "content": content, **others}
