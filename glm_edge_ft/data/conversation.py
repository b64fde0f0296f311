"""Raw row to `Conversation`: typed messages, checked, with every error named by its place.

The chat template gets each message as the file has it, with three exceptions: keys that say what is learned
(`DECISION_KEYS`) are taken out; keys that name images become image parts; and the content has one form throughout. In
chat fine-tuning that is a string, where a list of text parts is joined; in vision fine-tuning it is a list of parts,
where a string becomes one text part. What is dropped on the way is named in `Conversation.notes`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from glm_edge_ft.data.parts import (
    IMAGE_KEYS,
    Part,
    RowFindings,
    check_image_parts,
    has_unused_marker,
    insert_images,
    listed_keys,
    named_images,
    parse_parts,
    shown,
    unread_image_key,
)
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.errors import elide

ROLES_ALWAYS = ("system", "user", "assistant")
ROLES_IF_RENDERED = ("tool", "observation")
ROLE_NAMES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "observation"),
}
"""The names that other tools have for the roles, in lower case."""

_LEARNED_KEYS = ("loss", "train", "training", "trainable", "weight", "loss_mask", "loss_scale", "loss_weight")
_INVERTED_KEY = "masked"  # torchtune: true is not learned
_DETAIL_KEYS = ("train_detail", "training_detail")  # axolotl: parts of a turn by their characters
DECISION_KEYS = frozenset((*_LEARNED_KEYS, _INVERTED_KEY, *_DETAIL_KEYS))
"""Keys by which data files say what is learned: `loss` here and in ms-swift, `weight` in OpenAI's and Mistral's format,
`train` in axolotl. None of them is for the chat template.
"""
_NO_FIELDS = DECISION_KEYS.union(IMAGE_KEYS)
_NO_REPLY = _NO_FIELDS | {"role", "content"}
_OTHER_MESSAGES_KEYS = ("message", "conversations", "conversation", "Messages", "dialog", "dialogue", "chat")
_FORM = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}; '
    "`python -m glm_edge_ft convert` reads the formats of other tools"
)


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    supervised: bool  # True for an assistant turn that bears loss
    fields: Mapping[str, Any]  # what the chat template gets: role, content and every further key of the file

    @property
    def parts(self) -> list[Part]:
        """The content as parts, in order; a string is one text part."""
        content = self.fields.get("content", [])
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def texts(self) -> list[str]:
        """The text of the content, in the pieces that the template gets."""
        content = self.fields.get("content", [])
        return [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]

    @property
    def text(self) -> str:
        """The text of the content as one string, images left out."""
        return "".join(self.texts)

    @property
    def images(self) -> list[str]:
        """Paths of the message's images as written, in order."""
        return [part["image"] for part in self.parts if "image" in part]

    def shortened(self, length: int) -> Message:
        """Return the message with the first `length` characters of its text, and with all of its images."""
        content: Any = self.text[:length]
        if not isinstance(self.fields["content"], str):
            content = []
            for part in self.parts:
                kept = {**part, "text": part["text"][:length]} if "text" in part else part
                length -= len(kept.get("text", ""))
                if kept.get("text") != "":  # the template would separate empty pieces
                    content.append(kept)
        return replace(self, fields={**self.fields, "content": content})


@dataclass(frozen=True)
class Conversation:
    """A checked conversation and where it came from."""

    messages: tuple[Message, ...]  # at least one of them of the assistant
    tools: tuple[Mapping[str, Any], ...] | None  # what the template gets as `tools`
    file: str  # name of the data file
    line: int  # 1-based line (parquet: row) on which the conversation begins
    ignored_keys: tuple[str, ...] = ()  # keys beside `messages` and `tools` that have no meaning here
    notes: tuple[str, ...] = ()  # what else of the row has no effect, or is read in another way than it is written

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}"

    @property
    def images(self) -> list[str]:
        """Paths of all images as written, in order."""
        return [path for message in self.messages for path in message.images]


class _ReadMessage(NamedTuple):
    """A message whose parts may still lack the images that the row names."""

    role: str
    parts: list[Part]
    raw: Mapping[str, Any]
    is_learned: bool


def parse_conversation(row: RawRow, rendered_roles: frozenset[str], max_images: int | None = None) -> Conversation:
    """Check a raw row of a data file and return the conversation.

    Args:
        row: the value as read: an object with `messages`, or the list of messages itself.
        rendered_roles: the roles that the checkpoint's chat template renders (`ReplyFormat.rendered_roles`).
        max_images: in vision fine-tuning, most images of a conversation; None: chat fine-tuning, which takes none.

    Raises:
        UserError: every error of the row, each with `file:line` and the message's index.
    """
    place, found = row.place, RowFindings(takes_images=max_images is not None)
    keys: dict[str, Any] = row.value if isinstance(row.value, dict) else {"messages": row.value}
    raw_messages = _raw_messages(place, row.value, keys, found)
    # Beside the messages, such a key may have another meaning: one with a value of another kind is left to the report.
    decisions = {key: keys[key] for key in DECISION_KEYS & keys.keys()}
    decisions = {key: value for key, value in decisions.items() if isinstance(value, list) or _is_bool(value)}
    is_learned = read_learned(place, decisions, None, found) is not False
    paths = named_images(place, keys, found)
    read = [
        _read_message(f"{place}: messages[{index}]", raw, rendered_roles, found)
        for index, raw in enumerate(raw_messages)
    ]
    found.raise_if_any()
    turns = [turn for turn in read if turn is not None]
    insert_images(place, [(turn.role, turn.parts) for turn in turns], paths, found)
    found.raise_if_any()
    if max_images is not None:
        _check_images(place, turns, [keys, *raw_messages], max_images, found)
    if not any(turn.role == "assistant" for turn in turns):
        found.add(place, "no assistant turn: there is nothing to learn", "add the reply, or remove the row")
    found.raise_if_any()
    used = {"messages", "tools", *decisions, *IMAGE_KEYS}
    return Conversation(
        messages=tuple(_message(turn, is_learned, found.takes_images) for turn in turns),
        tools=None if keys.get("tools") is None else tuple(keys["tools"]),
        file=row.file,
        line=row.line,
        ignored_keys=tuple(key for key, element in keys.items() if key not in used and element is not None),
        notes=tuple(dict.fromkeys(found.notes)),
    )


def _raw_messages(place: str, value: Any, keys: Mapping[str, Any], found: RowFindings) -> list[Any]:
    tools, messages = keys.get("tools"), keys.get("messages")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        found.add(place, f"'tools' must be a list of objects, it is {shown(tools)}", "write one JSON schema a tool")
    if not isinstance(value, dict | list):
        found.add(place, f"a row must be an object or a list, this one is {shown(value)}", f"write {_FORM}")
    elif "messages" not in keys:
        near = [key for key in keys if key in _OTHER_MESSAGES_KEYS] or difflib.get_close_matches(
            "messages", keys, 1, 0.7
        )
        fix = f"did you mean 'messages' by {near[0]!r}?" if near else f"a row holds a whole conversation: write {_FORM}"
        found.add(place, f"key 'messages' is missing; the keys are: {listed_keys(keys)}", fix)
    elif not isinstance(messages, list) or not messages:
        what = f"'messages' must be a list of at least a user and an assistant message, it is {shown(messages)}"
        found.add(place, what, f"write {_FORM}, or remove the row")
    found.raise_if_any()
    return list(keys["messages"])


def _read_message(where: str, raw: Any, rendered_roles: frozenset[str], found: RowFindings) -> _ReadMessage | None:
    if not isinstance(raw, dict) or "role" not in raw:
        missing = f"key 'role' is missing; the keys are: {listed_keys(raw)}" if isinstance(raw, dict) else ""
        what = missing or f"a message must be an object, this one is {shown(raw)}"
        found.add(where, what, 'write {"role": ..., "content": ...}')
        return None
    role, content = _role(where, raw["role"], rendered_roles, found), raw.get("content")
    paths = named_images(where, raw, found)
    if role == "assistant" and content in (None, []) and any(raw[key] is not None for key in raw.keys() - _NO_REPLY):
        parts: list[Part] | None = []  # the reply is all in other keys, such as `tool_calls`
    else:
        parts = parse_parts(where, raw, role, found)
    learned = read_learned(where, raw, role, found)
    if learned is None and role == "assistant":
        found.notes += [f"key {key!r} says nothing: the turn is learned" for key in sorted(DECISION_KEYS & raw.keys())]
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and not DECISION_KEYS.isdisjoint(part):
            what = f"{min(DECISION_KEYS & part.keys())!r} in a part of the content"
            found.add(f"{where}.content[{index}]", what, "a turn is learned whole or not at all: write it there")
    if role is None or parts is None:
        return None
    insert_images(where, [(role, parts)], paths, found)
    return _ReadMessage(role, parts, raw, learned is not False)


def _role(where: str, role: Any, rendered_roles: frozenset[str], found: RowFindings) -> str | None:
    if role in ROLES_ALWAYS:
        return str(role)
    allowed = [*ROLES_ALWAYS, *(known for known in ROLES_IF_RENDERED if known in rendered_roles)]
    if role in allowed:
        return str(role)
    lowered = str(role).strip().lower()
    near = ROLE_NAMES.get(lowered) or next(iter(difflib.get_close_matches(lowered, allowed, 1, 0.6)), None)
    fix = f"did you mean {near!r}?" if near in allowed else f"write one of {', '.join(allowed)}"
    unknown = f"unknown role {elide(repr(role), 80)}"
    is_known = role in ROLES_IF_RENDERED
    found.add(where, f"the model's chat template does not render the role {role!r}" if is_known else unknown, fix)
    return None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | int | float) and value in (0, 1)


def read_learned(where: str, turn: Mapping[str, Any], role: str | None, found: RowFindings) -> bool | None:
    """Return whether a turn says that it is learned, by a key of `DECISION_KEYS`; None where it says nothing, as null.

    `found` gets values that cannot be honoured, and turns of other roles that say that they are learned.
    """
    if DECISION_KEYS.isdisjoint(turn):
        return None
    said: dict[str, bool] = {}
    for key in sorted(DECISION_KEYS & turn.keys()):
        value = turn[key]
        if _is_bool(value) and key not in _DETAIL_KEYS:
            said[key] = bool(value) is not (key == _INVERTED_KEY)
        elif value is not None and (key not in _DETAIL_KEYS or value != []):
            kind = "chooses parts of a turn" if key in _DETAIL_KEYS else "must be true or false (or 1 or 0)"
            what = f"{key!r} {kind}, it is {shown(value)}"
            fix = "a turn is learned whole or not at all: write false to leave it out, repeat the row to weigh it more"
            found.add(where, what, fix)
    if len(set(said.values())) > 1:
        found.add(where, f"{' and '.join(map(repr, said))} contradict each other", "keep one of them")
    is_learned = all(said.values()) if said else None
    if is_learned and role not in (None, "assistant"):
        what = f"{min(said)!r} says that a {role} message is learned"
        found.add(where, what, "only assistant turns are learned: remove the key")
    return is_learned


def _check_images(
    place: str, turns: Sequence[_ReadMessage], raw: list[Mapping[str, Any]], max_images: int, found: RowFindings
) -> None:
    for index, turn in enumerate(turns):
        check_image_parts(f"{place}: messages[{index}]", turn.parts, found)
    count = sum("image" in part for turn in turns for part in turn.parts)
    if count > max_images:
        what = f"the conversation has {count} images, max_images is {max_images}"
        fix = "split the conversation, or raise max_images if the model takes several (the released ones take one)"
        found.add(place, what, fix)
    elsewhere = [key for holder in raw if (key := unread_image_key(holder)) is not None]
    if elsewhere and not count:
        what = f"an image under {elsewhere[0]!r}, which is not read, and no other image in the row"
        found.add(place, what, "write it under 'image'")
    if any(has_unused_marker(turn.parts) for turn in turns if turn.role == "user"):
        found.notes.append("<image>, <video> or <img> in the text of a user turn shows no image")


def _message(turn: _ReadMessage, is_learned: bool, takes_images: bool) -> Message:
    fields = {key: element for key, element in turn.raw.items() if key not in _NO_FIELDS}
    if turn.parts:
        fields["content"] = turn.parts if takes_images else "".join(part["text"] for part in turn.parts)
    else:
        fields.pop("content", None)  # as transformers leaves null keys out
    return Message(turn.role, turn.role == "assistant" and is_learned and turn.is_learned, fields)
