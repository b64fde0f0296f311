"""What of a row the chat template does not render, told by what it does: it is rendered with a key and without it."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from glm_edge_ft.data.calls import CALLS, OBJECTS, decode_calls
from glm_edge_ft.data.conversation import Conversation
from glm_edge_ft.data.parts import cut
from glm_edge_ft.data.template import TemplateRefusal

Render = Callable[[Conversation], str]
_DEPTH = 3  # `tool_calls[].function.arguments`; what is in there is the content of a call, which no template picks from


def unrendered_keys(conversation: Conversation, text: str, render: Render) -> tuple[str, ...]:
    """Return a remark for each key of the messages, and of `tools`, that changes nothing in what is rendered.

    Args:
        conversation: the whole conversation.
        text: what is rendered of it.
        render: renders a conversation; raises TemplateRefusal.
    """
    extras = [
        (index, key)
        for index, message in enumerate(conversation.messages)
        if len(message.fields) > 1
        for key, value in message.fields.items()
        if key not in ("role", "content") and value is not None
    ]
    if not extras and not conversation.tools:
        return ()

    def is_unrendered(other: Conversation) -> bool:
        try:
            return render(other) == text
        except TemplateRefusal:
            return False

    def is_unrendered_with(index: int, key: str, value: Any) -> bool:
        return is_unrendered(_with(conversation, index, key, value))

    names: dict[str, None] = {}
    if extras and is_unrendered(_without(conversation, extras)):
        names = {_name(conversation, *extra): None for extra in extras}
    else:
        for index, key in extras:
            found = [""] if is_unrendered(_without(conversation, [(index, key)])) else []
            value = conversation.messages[index].fields[key]
            if conversation.messages[index].text.strip() and is_unrendered_with(index, "content", ""):
                names[_name(conversation, index, "content")] = None  # some templates write a call instead of it
            found = found or _paths(value, text, functools.partial(is_unrendered_with, index, key))
            names |= {_name(conversation, index, key + path): None for path in found}
    remarks = [f"the model's chat template does not render {name}" for name in names]
    if conversation.tools:
        if is_unrendered(replace(conversation, tools=None)):
            return (*remarks, "the model's chat template ignores 'tools'")
        tools = list(conversation.tools)
        paths = _paths(tools, text, lambda new: is_unrendered(replace(conversation, tools=tuple(new))))
        remarks += [f"the model's chat template does not render key {cut('tools' + path)!r}" for path in paths]
    return tuple(remarks)


def _name(conversation: Conversation, index: int, key: str) -> str:
    return f"key {cut(key)!r} of {conversation.messages[index].role} messages"


def _without(conversation: Conversation, keys: list[tuple[int, str]]) -> Conversation:
    messages = list(conversation.messages)
    for index, key in keys:
        fields = {name: value for name, value in messages[index].fields.items() if name != key}
        messages[index] = replace(messages[index], fields=fields)
    return replace(conversation, messages=tuple(messages))


def _with(conversation: Conversation, index: int, key: str, value: Any) -> Conversation:
    messages = list(conversation.messages)
    messages[index] = replace(messages[index], fields={**messages[index].fields, key: value})
    return replace(conversation, messages=tuple(messages))


def _paths(value: Any, text: str, is_unrendered: Callable[[Any], bool]) -> list[str]:
    """Return the paths below a rendered value that are not: `.function.strict`. What stands in the text as JSON is."""
    found: list[str] = []
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        path = waiting.pop(0)
        holders = [holder for holder in _at(value, path) if json.dumps(holder, ensure_ascii=False) not in text]
        for key in dict.fromkeys(key for holder in holders for key in holder if holder[key] is not None):
            smaller = copy.deepcopy(value)
            for holder in _at(smaller, path):
                holder.pop(key, None)
            if is_unrendered(smaller):
                found.append("".join(f".{name}" for name in (*path, key)))
            elif len(path) + 1 < _DEPTH and key not in OBJECTS:
                waiting.append((*path, key))
    return found


def _at(value: Any, path: tuple[str, ...]) -> list[dict[str, Any]]:
    # The objects under a path of keys; lists on the way are taken apart.
    if isinstance(value, list):
        return [holder for element in value for holder in _at(element, path)]
    if not isinstance(value, dict):
        return []
    return _at(value.get(path[0]), path[1:]) if path else [value]


def with_objects(conversation: Conversation, render: Render) -> Conversation:
    """Return the conversation with lists and objects where another tool wrote them as JSON text.

    `tool_calls` and `function_call` are always taken so. `arguments` of a call, and `parameters` of a tool, are texts
    in OpenAI's format, and some templates expect that: they become objects where the template fails on the text, or
    writes it as a JSON string, quotes and backslashes before each quote of it.
    """
    if conversation.tools is None and not any(CALLS & message.fields.keys() for message in conversation.messages):
        return conversation
    whole, notes = decode_calls(conversation, CALLS)
    objects, texts = decode_calls(whole, OBJECTS)
    if texts:
        try:
            text = render(whole)
            as_objects = any(json.dumps(written, ensure_ascii=False) in text for written in texts)
        except TemplateRefusal:
            as_objects = True
        whole, notes = (objects, notes + texts) if as_objects else (whole, notes)
    note = "JSON text in a tool or a call of one is given to the chat template as an object"
    return replace(whole, notes=(*whole.notes, note)) if notes else whole
