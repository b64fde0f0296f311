"""Keys of rows and the chat template: each is rendered, named in the report, or turned into what is rendered."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge_ft.data.dataset import build_dataset
from glm_edge_ft.data.rows import RawRow, iter_rows
from glm_edge_ft.data.workers import encode_chunk
from tests.conftest import EncoderMaker
from tests.data.reading import AS_TEXT, CALL, CALLING, REPLY, USER, encoded, learned, raw, refusal, remarks

WriteRows = Callable[..., Path]


def test_keys_that_change_nothing_are_named(make_encoder: EncoderMaker) -> None:
    """K21: of rows, messages, parts and tools; a template that renders a key makes it no remark."""
    row = {
        "messages": [
            {**USER, "name": "Bo"},
            {**REPLY, "reasoning_content": "hm", "tool_calls": [{**CALL, "id": "7"}], "refusal": None},
            {"role": "user", "content": [{"type": "text", "text": "more", "cache_control": {"type": "ephemeral"}}]},
            REPLY,
        ],
        "tools": [CALL],
        "documents": [{"title": "a", "text": "b"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    outside = [
        "key 'cache_control' of a content part has no meaning here and is ignored",
        "key 'chat_template_kwargs' has no meaning here and is ignored",
        "key 'documents' has no meaning here and is ignored",
    ]
    missing = "the model's chat template does not render key"
    assert remarks(make_encoder("chatml"), row) == [
        *outside,
        "the model's chat template does not render 'tools'",
        f"{missing} 'name' of user messages",
        f"{missing} 'reasoning_content' of assistant messages",
        f"{missing} 'tool_calls' of assistant messages",
    ]
    assert remarks(make_encoder(CALLING), row) == [
        *outside,
        f"{missing} 'name' of user messages",
        f"{missing} 'reasoning_content' of assistant messages",
        f"{missing} 'tool_calls.id' of assistant messages",
        f"{missing} 'tool_calls.type' of assistant messages",
    ]


def test_a_key_that_only_some_messages_show_is_named_for_the_others(make_encoder: EncoderMaker) -> None:
    """K21: what counts is the message, not the key."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.first %}{{ m.name }}{% endif %}{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{**USER, "name": "Bo"}, {**REPLY, "name": "Al"}, {**USER, "name": "Bo"}, REPLY]
    assert remarks(make_encoder(template), turns) == [
        "the model's chat template does not render key 'name' of assistant messages",
        "the model's chat template does not render key 'name' of user messages",
    ]
    assert remarks(make_encoder(template), [{**USER, "name": "Bo"}, REPLY]) == []


def test_a_content_that_a_call_displaces_is_named(make_encoder: EncoderMaker) -> None:
    """K21: templates such as Llama's write the call instead of the content."""
    template = CALLING.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}")
    turns = [USER, {**REPLY, "tool_calls": [CALL]}]
    assert "the model's chat template does not render key 'content' of assistant messages" in remarks(
        make_encoder(template), turns
    )
    assert not any("'content'" in remark for remark in remarks(make_encoder(CALLING), turns))


def test_parquet_columns_that_json_cannot_say_are_named(make_encoder: EncoderMaker, tmp_path: Path) -> None:
    """K21: bytes, times; nulls that the format adds to structs say nothing."""
    path = tmp_path / "train.parquet"
    rows = [
        {"messages": [USER, {**REPLY, "name": "Al"}], "digest": b"\0\1", "when": datetime.datetime(2024, 1, 1)},
        {"messages": [{**USER, "name": None}, REPLY], "digest": b"", "when": None, "meta": {"a": None, "b": 1}},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), path)
    dataset, _ = build_dataset([path], make_encoder("chatml"), 1, tmp_path / "cache", progress=False)
    assert list(dataset.report.notices) == [
        "key 'digest' has no meaning here and is ignored (2 rows)",
        "key 'meta' has no meaning here and is ignored (1 row)",
        "key 'when' has no meaning here and is ignored (2 rows)",
        "the model's chat template does not render key 'name' of assistant messages (1 row)",
    ]


def test_keys_that_differ_in_each_row_do_not_fill_the_report(
    make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path
) -> None:
    """K21: fifty of them, and how many more."""
    path = write_rows([{"messages": [USER, REPLY], f"k{number}": 1} for number in range(70)])
    dataset, _ = build_dataset([path], make_encoder("chatml"), 1, tmp_path / "cache", progress=False)
    assert len(dataset.report.notices) == 51
    assert dataset.report.notices[-1] == "... and 20 more remarks on keys"


KNOWN = {"role", "content", "messages", "tools", "image", "images", "type", "text"}
keys = st.text(max_size=12).filter(lambda key: key not in KNOWN)
said = st.recursive(
    st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=2) | st.dictionaries(st.text(max_size=5), children, max_size=2),
    max_leaves=4,
)
words = keys | st.sampled_from(["loss", "weight", "train", "loss_mask", "masked", "tool_calls", "reasoning", "name"])


@given(key=words, value=said, level=st.sampled_from(["row", "user", "assistant", "part"]), renders_calls=st.booleans())
@settings(max_examples=300)
def test_no_key_is_without_a_word(
    make_encoder: EncoderMaker, key: str, value: Any, level: str, renders_calls: bool
) -> None:
    """K21: it changes ids or mask, is named, is refused, drops the row, or says what is so anyway."""
    encoder = make_encoder(CALLING if renders_calls else "chatml")
    row: dict[str, Any] = {"messages": [{**USER, "content": [{"type": "text", "text": "hello"}]}, dict(REPLY)]}
    plain = encode_chunk([raw(row)], encoder)
    holders = {"row": row, "user": row["messages"][0], "assistant": row["messages"][1]}
    holders["part"] = row["messages"][0]["content"][0]
    holders[level][key] = value
    chunk = encode_chunk([raw(row)], encoder)
    is_changed = (chunk.ids.tolist(), chunk.mask.tolist()) != (plain.ids.tolist(), plain.mask.tolist())
    is_named = any(repr(key) in note or f"{key!r}"[:-1] + "." in note for note in chunk.notes)
    decides = level != "part" and key in ("loss", "weight", "train", "loss_mask", "masked") and value in (0, 1)
    assert chunk.problems or chunk.dropped or is_changed or is_named or decides


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_a_call_may_be_the_whole_reply(make_encoder: EncoderMaker, content: dict[str, Any]) -> None:
    """K22: content null, absent or empty, where the template renders the call."""
    turns = [USER, {"role": "assistant", **content, "tool_calls": [CALL]}]
    expected = '<call>{"name": "weather", "arguments": {"city": "Beijing"}}</call><|im_end|>'
    assert learned(make_encoder(CALLING), turns) == expected
    assert "messages[1]: the chat template renders nothing of this reply" in refusal(make_encoder("chatml"), turns)


@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_a_template_that_adds_to_the_content_gets_an_empty_one(
    make_encoder: EncoderMaker, content: dict[str, Any]
) -> None:
    """K22: it would fail on null."""
    encoder = make_encoder(CALLING.replace("{{ m.role }}\n{{ m.content }}", "{{ m.role + '\\n' + m.content }}"))
    turns = [USER, {"role": "assistant", **content, "tool_calls": [CALL]}]
    assert learned(encoder, turns) == learned(make_encoder(CALLING), turns)


def test_a_call_in_the_history_needs_no_rendering(make_encoder: EncoderMaker) -> None:
    """K22: a turn that is not learned may render as nothing, and is named."""
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL], "loss": False}, USER, REPLY]
    encoder = make_encoder("chatml")
    assert learned(encoder, turns) == "my friend<|im_end|>"
    assert remarks(encoder, turns) == [
        "the model's chat template does not render key 'tool_calls' of assistant messages"
    ]


@pytest.mark.parametrize("turn", [{"role": "assistant", "content": None}, {"role": "assistant", "loss": False}])
def test_a_reply_without_anything_is_refused(make_encoder: EncoderMaker, turn: dict[str, Any]) -> None:
    """K22: null and absent mean that something else is there."""
    assert "messages[1]: " in refusal(make_encoder(CALLING), [USER, turn, USER, REPLY])


OBJECTS = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
ARGUMENTS = json.dumps(CALL["function"]["arguments"])  # type: ignore[index]
TEXTS: list[Any] = [
    [{"function": {"name": "weather", "arguments": ARGUMENTS}}],
    [{"function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}],
    json.dumps([{"function": {"name": "weather", "arguments": ARGUMENTS}}]),
    json.dumps([CALL]),
]


@pytest.mark.parametrize("calls", TEXTS)
def test_arguments_as_text_become_the_object_that_the_template_expects(make_encoder: EncoderMaker, calls: Any) -> None:
    """K25: no JSON in JSON is learned, and the report says what was done."""
    encoder = make_encoder(CALLING)
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": calls}]
    assert learned(encoder, turns) == learned(encoder, OBJECTS)
    assert "JSON text in a tool or a call of one is given to the chat template as an object" in remarks(encoder, turns)


def test_arguments_stay_text_where_the_template_expects_text(make_encoder: EncoderMaker) -> None:
    """K25: OpenAI's own form, as other templates want it."""
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": TEXTS[0]}]
    assert learned(make_encoder(AS_TEXT), turns) == '<call>weather {"city": "Beijing"}</call><|im_end|>'
    assert remarks(make_encoder(AS_TEXT), turns) == []


def test_arguments_that_are_no_object_are_named(make_encoder: EncoderMaker) -> None:
    """K25: they cannot be converted; a template that takes texts has nothing wrong with them."""
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]
    note = "the arguments of a call are a text that is no JSON object, which is rendered as a JSON string"
    assert note in remarks(make_encoder(CALLING), turns)
    assert remarks(make_encoder(AS_TEXT), turns) == []


def test_what_only_looks_like_json_stays_text(make_encoder: EncoderMaker) -> None:
    """K25: contents are texts, and a value among the arguments is the user's."""
    encoder = make_encoder(CALLING)
    inner = {"function": {"name": "f", "arguments": {"parameters": '{"a": 1}'}}}
    assert '"{\\"a\\": 1}"' in learned(encoder, [USER, {"role": "assistant", "content": "", "tool_calls": [inner]}])
    assert learned(encoder, [USER, {"role": "assistant", "content": '{"a": 1}'}]) == '{"a": 1}<|im_end|>'
    parts = json.dumps([{"type": "text", "text": "hi"}])
    assert learned(encoder, [USER, {"role": "assistant", "content": parts}]) == f"{parts}<|im_end|>"
    assert remarks(encoder, [USER, {"role": "assistant", "content": parts}])
    asked = encoded(
        encoder, [{"role": "user", "content": json.dumps([{"type": "text", "text": "hello there"}])}, REPLY]
    )
    assert asked.input_ids.tolist() == encoded(encoder, [USER, REPLY]).input_ids.tolist()


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.parquet"])
@pytest.mark.parametrize("is_text", [True, False], ids=["text", "list-of-texts"])
def test_columns_of_json_text_are_read(make_encoder: EncoderMaker, tmp_path: Path, name: str, is_text: bool) -> None:
    """K25: messages and tools as a table has them, an empty text among them, whatever the file's format."""
    rows = [
        {"messages": json.dumps([USER, REPLY]), "tools": json.dumps([CALL]) if is_text else [json.dumps(CALL)]},
        {"messages": json.dumps([USER, REPLY]), "tools": "" if is_text else []},
    ]
    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if name == "train.json" else "\n".join(map(json.dumps, rows)))
    encoder = make_encoder(CALLING)
    found = [encoder.parse(row) for row in iter_rows(path) if isinstance(row, RawRow)]
    assert [conversation.tools for conversation in found] == [(CALL,), None if is_text else ()]
    assert [message.text for message in found[1].messages] == ["hello there", "my friend"]
