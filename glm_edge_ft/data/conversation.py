"""Raw row to `Conversation`: typed messages, checked, with every mistake named by its place.

What the chat template will see of a message is what the file says, with three exceptions: keys that say what is learned
(`learned.py`) are taken out; so are keys that name pictures, which become image parts; and the content has one form
throughout. In chat fine-tuning that is a string, where a list of text parts is joined; in vision fine-tuning it is a
list of parts, where a string becomes one text part. Keys that are dropped on the way are named in `Conversation.notes`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from glm_edge_ft.data.learned import DECISION_KEYS, read_learned
from glm_edge_ft.data.parts import (
    PICTURE_KEYS,
    ImagePart,
    Part,
    TextPart,
    leftover_markers,
    listed_keys,
    named_pictures,
    parse_parts,
    picture_elsewhere,
    place_pictures,
    shown,
    template_content,
)
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.errors import ProblemList, elide

ROLES_ALWAYS = ("system", "user", "assistant")
ROLES_IF_RENDERED = ("tool", "observation")
_ROLE_SYNONYMS = {
    **dict.fromkeys(("human", "instruction", "question", "prompt", "customer"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "ai", "chatgpt", "answer", "response", "chatglm"), "assistant"),
    **dict.fromkeys(("function", "ipython", "environment"), "tool"),
}
_MESSAGES_LOOKALIKES = ("message", "conversations", "conversation", "Messages", "dialog", "dialogue", "chat")
_NO_FIELDS = DECISION_KEYS.union(PICTURE_KEYS)  # keys of a message that the chat template does not get
_NO_REPLY = _NO_FIELDS | {"role", "content"}
_SHAPE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: who speaks.
        text: the text of the content as one string, images left out.
        supervised: True for an assistant turn that bears loss.
        fields: the mapping that the chat template gets: role, content and every further key of the file.
        parts: the content in vision fine-tuning, in order; empty in chat fine-tuning, where `text` is all of it.
    """

    role: str
    text: str
    supervised: bool
    fields: Mapping[str, Any]
    parts: tuple[Part, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of the message's images as written, in order."""
        return tuple(part.path for part in self.parts if isinstance(part, ImagePart))

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of the content, in the pieces that the template gets."""
        return tuple(part.text for part in self.parts if isinstance(part, TextPart)) if self.parts else (self.text,)

    def shortened(self, length: int) -> Message:
        """Return the message with the first `length` characters of its text, and with all of its images."""
        text = self.text[:length]
        if not self.parts:
            return replace(self, text=text, fields={**self.fields, "content": text})
        parts: list[Part] = []
        for part in self.parts:
            if isinstance(part, TextPart):
                part = TextPart(part.text[:length])  # noqa: PLW2901
                length -= len(part.text)
            if part != TextPart(""):  # what nothing is left of goes, so that the template separates no empty pieces
                parts.append(part)
        return replace(self, text=text, parts=tuple(parts), fields={**self.fields, "content": template_content(parts)})


@dataclass(frozen=True)
class Conversation:
    """A checked conversation and where it came from.

    Attributes:
        messages: the turns, at least one of them of the assistant.
        tools: what the template gets as `tools`, or None.
        file: name of the data file.
        line: 1-based line (parquet: row) on which the conversation begins.
        ignored_keys: keys beside `messages` and `tools` that have no meaning here.
        notes: what else of the row has no effect, or is read in another way than it is written.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None
    file: str
    line: int
    ignored_keys: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}"

    @property
    def images(self) -> tuple[str, ...]:
        """Paths of all images as written, in order."""
        return tuple(path for message in self.messages for path in message.images)


def parse_conversation(row: RawRow, rendered_roles: frozenset[str], max_images: int | None = None) -> Conversation:
    """Check a raw row of a data file and return the conversation.

    Args:
        row: the value as read: an object with `messages`, or the list of messages itself.
        rendered_roles: the roles that the checkpoint's chat template renders (`ReplyFormat.rendered_roles`).
        max_images: in vision fine-tuning, most images of a conversation; None: chat fine-tuning, which takes none.

    Raises:
        UserError: every mistake of the row, each with `file:line` and the message's index.
    """
    problems, notes = ProblemList(), list[str]()
    place, takes_images = row.place, max_images is not None
    keys: dict[str, Any] = row.value if isinstance(row.value, dict) else {"messages": row.value}
    raw_messages = _raw_messages(place, row.value, keys)
    learned, honoured = _row_learned(place, keys, problems)
    pictures = named_pictures(place, keys, problems, takes_images=takes_images)
    drafts = [
        _draft(f"{place}: messages[{index}]", raw, rendered_roles, problems, notes, bool(pictures), takes_images)
        for index, raw in enumerate(raw_messages)
    ]
    problems.raise_if_any()
    whole = [draft for draft in drafts if draft is not None]
    place_pictures(place, [(draft.role, draft.parts) for draft in whole], pictures, problems)
    problems.raise_if_any()
    messages = tuple(_message(draft, learned=learned, takes_images=takes_images) for draft in whole)
    if not any(message.role == "assistant" for message in messages):
        problems.add(place, "no assistant turn: there is nothing to learn", "add the reply, or remove the row")
    if max_images is not None:
        _check_images(place, messages, [keys, *raw_messages], max_images, problems)
        notes += [note for draft in whole if draft.role == "user" for note in leftover_markers(draft.parts)]
    problems.raise_if_any()
    used = {"messages", "tools", *honoured, *PICTURE_KEYS}
    ignored = tuple(key for key, element in keys.items() if key not in used and element is not None)
    tools = None if keys.get("tools") is None else tuple(keys["tools"])
    return Conversation(messages, tools, row.file, row.line, ignored, tuple(dict.fromkeys(notes)))


def _raw_messages(place: str, value: Any, keys: dict[str, Any]) -> list[Any]:
    """Return the list of messages of a row, whose `tools` are right. Raises UserError."""
    problems = ProblemList()
    if not isinstance(value, dict | list):
        problems.add(place, f"a row must be an object or a list, this one is {shown(value)}", f"write {_SHAPE}")
        problems.raise_if_any()
    _check_tools(place, keys.get("tools"), problems)
    messages = _messages_of(place, keys, problems)
    problems.raise_if_any()
    if not isinstance(messages, list):
        problems.add(place, f"'messages' must be a list, it is {shown(messages)}", f"write {_SHAPE}")
    elif not messages:
        problems.add(place, "'messages' is empty", "write at least a user and an assistant message, or remove the row")
    problems.raise_if_any()
    return list(messages)


def _messages_of(place: str, value: dict[str, Any], problems: ProblemList) -> Any:
    if "messages" in value:
        return value["messages"]
    for key in _MESSAGES_LOOKALIKES:
        if key in value:
            problems.add(place, f"key {key!r} found, 'messages' missing", "did you mean 'messages'?")
            return None
    if {"role", "content"} & set(value):
        fix = "a line must hold a whole conversation: put the messages in a list under 'messages'"
    elif {"from", "value"} & set(value):
        fix = f"write 'role' and 'content' in place of 'from' and 'value': {_SHAPE}"
    else:
        near = difflib.get_close_matches("messages", list(value), 1, 0.7)
        fix = f"did you mean 'messages' by {near[0]!r}?" if near else f"write {_SHAPE}"
    problems.add(place, f"key 'messages' is missing; the keys are: {listed_keys(value)}", fix)
    return None


def _check_tools(place: str, tools: Any, problems: ProblemList) -> None:
    if tools is None:
        return
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        problems.add(place, f"'tools' must be a list of objects, it is {shown(tools)}", "write one JSON schema a tool")


def _row_learned(place: str, keys: dict[str, Any], problems: ProblemList) -> tuple[bool, frozenset[str]]:
    """Return whether the turns of a row may be learned, and the keys beside `messages` that say so.

    Such a key may have another meaning there, so that a value that says neither is left to the report.
    """
    said = {key: keys[key] for key in DECISION_KEYS & keys.keys() if isinstance(keys[key], list) or keys[key] in (0, 1)}
    return read_learned(place, said, None, problems) is not False, frozenset(said)


@dataclass(frozen=True)
class _Draft:
    """A message whose pictures may not be among its parts yet."""

    role: str
    parts: list[Part]
    raw: Mapping[str, Any]
    learned: bool | None


def _draft(
    where: str,
    raw: Any,
    rendered_roles: frozenset[str],
    problems: ProblemList,
    notes: list[str],
    has_pictures: bool,
    takes_images: bool,
) -> _Draft | None:
    if not isinstance(raw, dict):
        problems.add(
            where, f"a message must be an object, this one is {shown(raw)}", 'write {"role": ..., "content": ...}'
        )
        return None
    if "role" not in raw and ("from" in raw or "value" in raw):
        problems.add(
            where, "keys 'from' and 'value' found", "write 'role' and 'content' in place of 'from' and 'value'"
        )
        return None
    role = _role(where, raw, rendered_roles, problems)
    pictures = named_pictures(where, raw, problems, takes_images=takes_images)
    parts = parse_parts(
        where,
        raw,
        role,
        problems,
        notes,
        takes_images=takes_images,
        has_pictures=has_pictures or bool(pictures),
        may_be_absent=role == "assistant" and any(raw[key] is not None for key in raw.keys() - _NO_REPLY),
    )
    learned = read_learned(where, raw, role, problems)
    if learned is None and role == "assistant":
        notes += [f"key {key!r} says nothing: the turn is learned" for key in sorted(DECISION_KEYS & raw.keys())]
    for index, part in enumerate(raw["content"] if isinstance(raw.get("content"), list) else ()):
        if isinstance(part, dict) and not DECISION_KEYS.isdisjoint(part):
            what = f"{sorted(DECISION_KEYS & part.keys())[0]!r} in a part of the content"
            problems.add(f"{where}.content[{index}]", what, "a turn is learned whole or not at all: write it there")
    if role is None or parts is None:
        return None
    place_pictures(where, [(role, parts)], pictures, problems)
    return _Draft(role, parts, raw, learned)


def _message(draft: _Draft, *, learned: bool, takes_images: bool) -> Message:
    fields = {key: element for key, element in draft.raw.items() if key not in _NO_FIELDS}
    text = "".join(part.text for part in draft.parts if isinstance(part, TextPart))
    if draft.parts:
        fields["content"] = template_content(draft.parts) if takes_images else text
    else:
        fields.pop("content", None)  # a reply that is all in other keys: null, as the chat template gets it
    supervised = draft.role == "assistant" and learned and draft.learned is not False
    return Message(draft.role, text, supervised, fields, tuple(draft.parts) if takes_images else ())


def _role(where: str, raw: dict[str, Any], rendered_roles: frozenset[str], problems: ProblemList) -> str | None:
    if "role" not in raw:
        problems.add(where, f"key 'role' is missing; the keys are: {listed_keys(raw)}", "write who speaks")
        return None
    role = raw["role"]
    if role in ROLES_ALWAYS:
        return str(role)
    allowed = [*ROLES_ALWAYS, *(known for known in ROLES_IF_RENDERED if known in rendered_roles)]
    if not isinstance(role, str):
        problems.add(where, f"'role' must be a string, it is {shown(role)}", f"write one of {', '.join(allowed)}")
        return None
    if role in allowed:
        return role
    if role in ROLES_IF_RENDERED:
        problems.add(
            where, f"the model's chat template does not render the role {role!r}", f"use one of {', '.join(allowed)}"
        )
        return None
    lowered = role.strip().lower()
    near = [_ROLE_SYNONYMS.get(lowered, lowered)] if _ROLE_SYNONYMS.get(lowered, lowered) in allowed else []
    near = near or difflib.get_close_matches(lowered, allowed, 1, 0.6)
    fix = f"did you mean {near[0]!r}?" if near else f"write one of {', '.join(allowed)}"
    problems.add(where, f"unknown role {elide(role, 80)!r}", fix)
    return None


def _check_images(
    place: str, messages: tuple[Message, ...], raw: list[dict[str, Any]], max_images: int, problems: ProblemList
) -> None:
    count = sum(len(message.images) for message in messages)
    if count > max_images:
        problems.add(
            place,
            f"the conversation has {count} images, max_images is {max_images}",
            "split the conversation, or raise max_images if the model takes several (the released ones take one)",
        )
    elsewhere = [key for holder in raw if (key := picture_elsewhere(holder)) is not None]
    if elsewhere and not count:
        what = f"a picture under {elsewhere[0]!r}, which is not read, and no other picture in the row"
        problems.add(place, what, "write it under 'image'")
