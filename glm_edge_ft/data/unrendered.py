"""What the chat template makes of the keys of a row, told by rendering: with a key and without it, as text or object.

No list of keys and no reading of the template's source says it, so that it holds for any template.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from glm_edge_ft.data.calls import CALLS, OBJECTS, decode_calls
from glm_edge_ft.data.conversation import Conversation
from glm_edge_ft.data.template import TemplateRefusal
from glm_edge_ft.errors import elide

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
        for key, value in message.fields.items()
        if key not in ("role", "content") and value is not None
    ]
    if not extras and not conversation.tools:
        return ()

    def is_unrendered(other: Conversation) -> bool:
        return _rendered(other, render) == text

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
        remarks += [f"the model's chat template does not render key {elide('tools' + path, 80)!r}" for path in paths]
    return tuple(remarks)


def _name(conversation: Conversation, index: int, key: str) -> str:
    return f"key {elide(key, 80)!r} of {conversation.messages[index].role} messages"


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


def as_template_expects(conversation: Conversation, render: Render) -> Conversation:
    """Return the conversation with what other tools write in two ways in the one that the chat template takes.

    - A reply that is all in other keys has no content, as null is given to a template. Where that fails, it is empty.
    - `tool_calls` and `function_call` as JSON text become what the text holds. So do `arguments` of a call and
      `parameters` of a tool where the template fails on the text, or writes it as a JSON string, quotes and backslashes
      before each quote of it. OpenAI's format has texts there, and some templates expect that.
    """
    messages = conversation.messages
    if not all("content" in message.fields for message in messages) and _rendered(conversation, render) is None:
        messages = tuple(replace(one, fields={"content": "", **one.fields}) for one in messages)
    conversation = replace(conversation, messages=messages)
    if conversation.tools is None and not any(CALLS & message.fields.keys() for message in messages):
        return conversation
    whole, found = decode_calls(conversation, CALLS)
    objects, texts = decode_calls(whole, OBJECTS)
    text = _rendered(whole, render)
    is_json_in_json = text is None or any(map(text.__contains__, map(_json_text, texts)))
    if texts and is_json_in_json and _rendered(objects, render) is not None:
        whole, found = objects, found + texts
    notes = ["JSON text in a tool or a call of one is given to the chat template as an object"] if found else []
    if text is not None and any(_json_text(written) in text for written in _argument_texts(whole) if written):
        notes.append("the arguments of a call are a text that is no JSON object, which is rendered as a JSON string")
    return replace(whole, notes=(*whole.notes, *notes))


def _rendered(conversation: Conversation, render: Render) -> str | None:
    try:
        return render(conversation)
    except TemplateRefusal:
        return None


def _json_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _argument_texts(conversation: Conversation) -> list[str]:
    values: list[Any] = [message.fields.get(key) for message in conversation.messages for key in CALLS]
    found: list[str] = []
    while values:
        value = values.pop()
        if isinstance(value, dict):
            found += [value["arguments"]] if isinstance(value.get("arguments"), str) else []
            values += [element for key, element in value.items() if key != "arguments"]
        elif isinstance(value, list):
            values += value
    return found
