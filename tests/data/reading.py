"""Shared parts of the tests of rows: a user's turn, a reply, a call of a tool, and what becomes of a row."""

from __future__ import annotations

from typing import Any

import pytest

from glm_edge_ft.data.encoding import ConversationEncoder, EncodedRow
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.data.workers import encode_chunk
from glm_edge_ft.errors import UserError

USER = {"role": "user", "content": "hello there"}
REPLY = {"role": "assistant", "content": "my friend"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Beijing"}}}
CALLING = (
    "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"
)
"""A template of tool calls: it writes a call's function as JSON, and neither its `id` nor its `type`."""
AS_TEXT = CALLING.replace("call.function | tojson", "call.function.name + ' ' + call.function.arguments")
"""One that takes the arguments as OpenAI's format has them: a text."""


def raw(value: Any) -> RawRow:
    """Return a row of line 3 of train.jsonl."""
    return RawRow("train.jsonl", 3, 1, value)


def encoded(encoder: ConversationEncoder, value: Any) -> EncodedRow:
    """Encode a value that gives a row."""
    row = encoder.encode(encoder.parse(raw(value)))
    assert isinstance(row, EncodedRow), row
    return row


def refusal(encoder: ConversationEncoder, value: Any) -> str:
    """Return what is wrong with a row, which must be at its place."""
    with pytest.raises(UserError) as caught:
        encoder.encode(encoder.parse(raw(value)))
    assert all(problem.where.startswith("train.jsonl:3") for problem in caught.value.problems)
    return str(caught.value)


def remarks(encoder: ConversationEncoder, value: Any) -> list[str]:
    """Return what the report would say of a row."""
    chunk = encode_chunk([raw(value)], encoder)
    assert not chunk.problems
    return sorted(chunk.notes)


def learned(encoder: ConversationEncoder, value: Any) -> str:
    """Return the supervised text of a row."""
    row = encoded(encoder, value)
    return str(encoder.tokenizer.backend.decode(row.input_ids[row.loss_mask].tolist(), skip_special_tokens=False))
