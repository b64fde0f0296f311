"""What the chat template makes of the keys of a row, told by rendering: with a key and without it, as text or object.

No list of keys and no reading of the template's source says it, so that it holds for any template.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from glm_edge_ft.data.conversation import Conversation
from glm_edge_ft.data.json_text import JsonMistake, decode_value
from glm_edge_ft.errors import elide

if TYPE_CHECKING:
    from glm_edge_ft.data.template import ChatTemplate  # `convert` needs no transformers

CALL_KEYS = frozenset({"tool_calls", "function_call"})
_OBJECT_KEYS = frozenset({"arguments", "parameters"})  # of a call, of a tool's description
_DEPTH = 4  # of `tool_calls.function.arguments.city`: what is in the arguments no template picks from


def unrendered_keys(conversation: Conversation, text: str, template: ChatTemplate) -> tuple[str, ...]:
    """Return a remark for each key of the messages, and of `tools`, that changes nothing in `text`, their rendering."""
    messages = [message.fields for message in conversation.messages]
    extras = [
        {key: value for key, value in fields.items() if key not in ("role", "content") and value is not None}
        for fields in messages
    ]
    if not any(extras) and not conversation.tools:
        return ()

    def is_same_with(changed: Sequence[Mapping[str, Any]]) -> bool:
        replaced = [
            {key: new.get(key, value) for key, value in fields.items() if key in new or key not in extra}
            for fields, extra, new in zip(messages, extras, changed, strict=True)
        ]
        return template.try_render(replaced, conversation.tools) == text

    def is_same(index: int, new: Mapping[str, Any]) -> bool:
        return is_same_with([*extras[:index], new, *extras[index + 1 :]])

    if is_same_with([{} for _ in extras]):
        found = [(index, key) for index, extra in enumerate(extras) for key in extra]
    else:
        found = []
        for index, extra in enumerate(extras):
            if extra and conversation.messages[index].text.strip() and is_same(index, {**extra, "content": ""}):
                found.append((index, "content"))  # some templates write a call instead of it
            found += [(index, path) for path in _unrendered_paths(extra, text, functools.partial(is_same, index))]
    names = dict.fromkeys(
        f"key {elide(path, 80)!r} of {conversation.messages[index].role} messages" for index, path in found
    )
    if conversation.tools:
        whole = {"tools": list(conversation.tools)}
        paths = _unrendered_paths(whole, text, lambda new: template.try_render(messages, new.get("tools")) == text)
        names |= {"'tools'" if path == "tools" else f"key {elide(path, 80)!r}": None for path in paths}
    return tuple(f"the model's chat template does not render {name}" for name in names)


def _unrendered_paths(whole: dict[str, Any], text: str, is_unrendered: Callable[[Any], bool]) -> list[str]:
    """Return the keys, as `tool_calls.function.strict`, that can be left out. What `text` has as JSON is rendered."""
    found: list[str] = []
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        path = waiting.pop(0)
        holders = [one for one in _at(whole, path) if not path or json.dumps(one, ensure_ascii=False) not in text]
        for key in dict.fromkeys(key for holder in holders for key in holder if holder[key] is not None):
            smaller = copy.deepcopy(whole)
            for holder in _at(smaller, path):
                holder.pop(key, None)
            if is_unrendered(smaller):
                found.append(".".join((*path, key)))
            elif len(path) + 1 < _DEPTH and key not in _OBJECT_KEYS:
                waiting.append((*path, key))
    return found


def _at(value: Any, path: tuple[str, ...]) -> list[dict[str, Any]]:
    # The objects under a path of keys; lists on the way are taken apart.
    if isinstance(value, list):
        return [holder for element in value for holder in _at(element, path)]
    if not isinstance(value, dict):
        return []
    return _at(value.get(path[0]), path[1:]) if path else [value]


class DecodedCalls(NamedTuple):
    """A conversation with objects for the JSON texts `decoded`, and the arguments of its calls that stayed texts."""

    conversation: Conversation
    decoded: list[str]
    other_arguments: list[str]


def decode_calls(conversation: Conversation, keys: frozenset[str] = CALL_KEYS | _OBJECT_KEYS) -> DecodedCalls:
    """Decode the JSON texts under `keys` of calls and tools; some tools encode them, or encode them twice."""
    decoded: list[str] = []
    others: list[str] = []

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, str):
            found = decode_json(value) if key in keys else None
            if found is not None:
                decoded.append(value)
                return walk(found, key) if key in CALL_KEYS else found
            others.extend([value] if key == "arguments" and value else [])
        elif isinstance(value, list):
            return [walk(element, key) for element in value]
        elif isinstance(value, dict) and key not in _OBJECT_KEYS:  # what is in those is the user's
            return {name: walk(element, name) for name, element in value.items()}
        return value

    messages = []
    for message in conversation.messages:
        calls = {key: walk(message.fields[key], key) for key in message.fields if key in CALL_KEYS}
        messages.append(replace(message, fields={**message.fields, **calls}) if calls else message)
    tools = None if conversation.tools is None else tuple(walk(list(conversation.tools), "tools"))
    return DecodedCalls(replace(conversation, messages=tuple(messages), tools=tools), decoded, others)


def decode_json(text: str) -> dict[str, Any] | list[Any] | None:
    """Return the object or list that a text holds as JSON, encoded once or more often, or None."""
    value: Any = text
    while isinstance(value, str):
        text = value.strip()
        try:
            value, end = decode_value(text)
        except JsonMistake:
            return None
        if end != len(text):
            return None
    return value if isinstance(value, dict | list) else None


def as_template_expects(conversation: Conversation, template: ChatTemplate) -> Conversation:
    """Return the conversation with what other tools write in two ways in the one that the chat template takes.

    - A reply that is all in other keys has no content, as null is given to a template. Where that fails, it is empty.
    - `tool_calls` and `function_call` as JSON text become objects. So do `arguments` of a call and `parameters` of a
      tool where the template fails on the text or writes it as a JSON string; OpenAI's format has texts there, and some
      templates expect that.
    """
    messages = conversation.messages
    if not all("content" in message.fields for message in messages) and _rendered(template, conversation) is None:
        messages = tuple(replace(message, fields={"content": "", **message.fields}) for message in messages)
        conversation = replace(conversation, messages=messages)
    if conversation.tools is None and all(CALL_KEYS.isdisjoint(message.fields) for message in messages):
        return conversation
    whole, found, _ = decode_calls(conversation, CALL_KEYS)
    objects, texts, strings = decode_calls(whole)
    text = _rendered(template, whole)
    is_text_refused = text is None or any(_quoted(argument) in text for argument in texts)
    if texts and is_text_refused and _rendered(template, objects) is not None:
        whole, found = objects, found + texts
    else:
        strings = strings + texts
    notes = ["JSON text in a tool or a call of one is given to the chat template as an object"] if found else []
    if text is not None and any(_quoted(argument) in text for argument in strings):
        notes.append("the arguments of a call are a text that is no JSON object, which is rendered as a JSON string")
    return replace(whole, notes=(*whole.notes, *notes))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _rendered(template: ChatTemplate, conversation: Conversation) -> str | None:
    return template.try_render([message.fields for message in conversation.messages], conversation.tools)
