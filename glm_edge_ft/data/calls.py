"""Calls of tools, and descriptions of tools, that another tool wrote as JSON text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from glm_edge_ft.data.conversation import Conversation
from glm_edge_ft.data.json_text import JsonMistake, decode_value

CALLS = frozenset({"tool_calls", "function_call"})
OBJECTS = frozenset({"arguments", "parameters"})


def decode_calls(conversation: Conversation, keys: frozenset[str] = CALLS | OBJECTS) -> tuple[Conversation, list[str]]:
    """Return the conversation with the texts under `keys` decoded, and those texts."""
    texts: list[str] = []

    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, str) and key in keys and (decoded := _object_in(value)) is not None:
            texts.append(value)
            return walk(decoded, key) if key in CALLS else decoded
        if isinstance(value, list):
            return [walk(element, key) for element in value]
        if isinstance(value, dict) and key not in OBJECTS:  # what is in those is the user's
            return {name: walk(element, name) for name, element in value.items()}
        return value

    messages = tuple(
        replace(
            message, fields={key: walk(value, key) if key in CALLS else value for key, value in message.fields.items()}
        )
        if CALLS & message.fields.keys()
        else message
        for message in conversation.messages
    )
    tools = None if conversation.tools is None else tuple(walk(list(conversation.tools)))
    return replace(conversation, messages=messages, tools=tools), texts


def _object_in(text: str) -> dict[str, Any] | list[Any] | None:
    value: Any = text
    while isinstance(value, str):  # some are encoded twice
        text = value.strip()
        try:
            value, end = decode_value(text)
        except JsonMistake:
            return None
        if end != len(text):
            return None
    return value if isinstance(value, dict | list) else None
