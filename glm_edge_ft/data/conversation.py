"""Raw row to `Conversation`: typed messages, checked, with every mistake named by its place.

What the chat template will see of a message is what the file says, with two exceptions: `loss` is ours and is taken
out, and the content has one form throughout. In chat fine-tuning that is a string, where a list of text parts is
joined; in vision fine-tuning it is a list of parts, where a string becomes one text part.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from glm_edge_ft.data.parts import ImagePart, Part, TextPart, listed_keys, parse_parts, shown, template_content
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.errors import ProblemList

ROLES_ALWAYS = ("system", "user", "assistant")
ROLES_IF_RENDERED = ("tool", "observation")
_ROLE_SYNONYMS = {
    **dict.fromkeys(("human", "instruction", "question", "prompt", "customer"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "ai", "chatgpt", "answer", "response", "chatglm"), "assistant"),
    **dict.fromkeys(("function", "ipython", "environment"), "tool"),
}
_MESSAGES_LOOKALIKES = ("message", "conversations", "conversation", "Messages", "dialog", "dialogue", "chat")
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
        messages: the turns, at least one of them supervised.
        tools: what the template gets as `tools`, or None.
        file: name of the data file.
        line: 1-based line (parquet: row) on which the conversation begins.
        ignored_keys: keys beside `messages` and `tools` that have no meaning here.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None
    file: str
    line: int
    ignored_keys: tuple[str, ...] = ()

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
    problems = ProblemList()
    place, value = row.place, row.value
    tools: Any = None
    ignored: tuple[str, ...] = ()
    if isinstance(value, dict):
        tools = value.get("tools")
        ignored = tuple(key for key in value if key not in ("messages", "tools"))
        _check_tools(place, tools, problems)
        raw_messages = _messages_of(place, value, problems)
    else:
        raw_messages = value
        if not isinstance(value, list):
            problems.add(place, f"a row must be an object or a list, this one is {shown(value)}", f"write {_SHAPE}")
    problems.raise_if_any()
    if not isinstance(raw_messages, list):
        problems.add(place, f"'messages' must be a list, it is {shown(raw_messages)}", f"write {_SHAPE}")
    elif not raw_messages:
        problems.add(place, "'messages' is empty", "write at least a user and an assistant message, or remove the row")
    problems.raise_if_any()
    takes_images = max_images is not None
    parsed = [
        _message(place, index, raw, rendered_roles, problems, takes_images=takes_images)
        for index, raw in enumerate(raw_messages)
    ]
    problems.raise_if_any()
    messages = tuple(message for message in parsed if message is not None)
    _check_supervision(place, messages, problems)
    _check_image_count(place, messages, max_images, problems)
    problems.raise_if_any()
    return Conversation(messages, tuple(tools) if tools is not None else None, row.file, row.line, ignored)


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


def _message(
    place: str,
    index: int,
    raw: Any,
    rendered_roles: frozenset[str],
    problems: ProblemList,
    *,
    takes_images: bool,
) -> Message | None:
    where = f"{place}: messages[{index}]"
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
    parts = parse_parts(where, raw, role, problems, takes_images=takes_images)
    supervised = role == "assistant" and raw.get("loss", True) is True
    _check_loss(where, raw, role, problems)
    if role is None or parts is None:
        return None
    fields = {key: element for key, element in raw.items() if key != "loss"}
    content = raw["content"]
    text = content if isinstance(content, str) else "".join(part.text for part in parts if isinstance(part, TextPart))
    if not takes_images:
        fields["content"] = text
        return Message(role, text, supervised, fields)
    fields["content"] = template_content(parts)
    return Message(role, text, supervised, fields, tuple(parts))


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
    problems.add(where, f"unknown role {role!r}", fix)
    return None


def _check_loss(where: str, raw: dict[str, Any], role: str | None, problems: ProblemList) -> None:
    if "loss" not in raw:
        return
    loss = raw["loss"]
    if not isinstance(loss, bool):
        problems.add(where, f"'loss' must be true or false, it is {shown(loss)}", "write false to leave a reply out")
    elif loss and role is not None and role != "assistant":
        problems.add(where, f"'loss': true on a {role} message", "only assistant turns bear loss: remove the key")


def _check_supervision(place: str, messages: tuple[Message, ...], problems: ProblemList) -> None:
    if not any(message.role == "assistant" for message in messages):
        problems.add(place, "no assistant turn: there is nothing to learn", "add the reply, or remove the row")
    elif not any(message.supervised for message in messages):
        problems.add(place, "every assistant turn says 'loss': false", "leave one of them in, or remove the row")


def _check_image_count(
    place: str, messages: tuple[Message, ...], max_images: int | None, problems: ProblemList
) -> None:
    if max_images is None:
        return
    count = sum(len(message.images) for message in messages)
    if count > max_images:
        problems.add(
            place,
            f"the conversation has {count} images, max_images is {max_images}",
            "split the conversation, or raise max_images if the model takes several (the released ones take one)",
        )
