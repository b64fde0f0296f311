"""Rows as other tools write them: each key of them has its effect, is named in the report, or is refused by place."""

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
from PIL import Image
from tokenizers import Tokenizer

from glm_edge_ft.data.dataset import build_dataset
from glm_edge_ft.data.encoding import ConversationEncoder, DroppedRow, EncodedRow
from glm_edge_ft.data.image_check import ImageCheck
from glm_edge_ft.data.prompts import encode_prompts
from glm_edge_ft.data.rows import RawRow, iter_rows
from glm_edge_ft.data.workers import encode_chunk
from glm_edge_ft.errors import Problem, UserError
from tests.conftest import EncoderMaker
from tests.data.vision import vision_encoder

WriteRows = Callable[..., Path]
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


# ---- what is learned -------------------------------------------------------------------------------------------------

NOT_LEARNED: list[dict[str, Any]] = [
    *({key: value} for key in ("loss", "train", "weight", "loss_mask", "loss_scale") for value in (0, 0.0, False)),
    {"training": False},
    {"trainable": 0},
    {"masked": True},
    {"weight": 0, "train": False},
]


@pytest.mark.parametrize("keys", NOT_LEARNED)
def test_a_turn_marked_in_any_tools_way_is_read_but_not_learned(
    make_encoder: EncoderMaker, keys: dict[str, Any]
) -> None:
    """K20: its text is in the row and bears no loss; evaluation does not take it as a reference."""
    encoder = make_encoder("chatml")
    messages = [USER, {**REPLY, "content": "a bad reply", **keys}, USER, REPLY]
    row = encoded(encoder, messages)
    plain = encoded(encoder, [USER, {**REPLY, "content": "a bad reply"}, USER, REPLY])
    assert row.input_ids.tolist() == plain.input_ids.tolist()
    assert learned(encoder, messages) == "my friend<|im_end|>"
    assert [sample.reference for sample in encode_prompts(encoder, encoder.parse(raw(messages)))] == ["my friend"]
    assert remarks(encoder, messages) == []


@pytest.mark.parametrize("keys", [{"weight": 1}, {"train": True}, {"loss": 1.0}, {"masked": False}])
def test_a_turn_that_is_said_to_be_learned_is(make_encoder: EncoderMaker, keys: dict[str, Any]) -> None:
    """K20: one and true change nothing."""
    encoder = make_encoder("chatml")
    assert (
        encoded(encoder, [USER, {**REPLY, **keys}]).loss_mask.tolist()
        == encoded(encoder, [USER, REPLY]).loss_mask.tolist()
    )


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([USER, {**REPLY, "weight": 0.5}], "messages[1]: 'weight' is 0.5: weights other than 0 and 1"),
        ([USER, {**REPLY, "loss_scale": 2}], "messages[1]: 'loss_scale' is 2: weights other"),
        ([USER, {**REPLY, "train": "false"}], "messages[1]: 'train' must be true or false"),
        ([USER, {**REPLY, "loss_mask": [0, 1]}], "messages[1]: 'loss_mask' must be true or false, it is a list"),
        ([USER, {**REPLY, "train_detail": [{"begin_offset": 0}]}], "messages[1]: 'train_detail' marks parts of a turn"),
        ([USER, {**REPLY, "loss": True, "weight": 0}], "messages[1]: 'loss' and 'weight' contradict each other"),
        ([{**USER, "weight": 1}, REPLY], "messages[0]: 'weight': 1 on a user message"),
        ([USER, {**REPLY, "content": [{"type": "text", "text": "a", "loss": False}]}], "'loss' in a part"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make_encoder: EncoderMaker, turns: Any, expected: str) -> None:
    """K20: a fraction, another kind of value, a part of a turn, two words that contradict, a turn of the user."""
    assert expected in refusal(make_encoder("chatml"), turns)


@pytest.mark.parametrize("keys", [{"weight": 0}, {"train": False}, {"loss": 0}, {"loss_mask": 0}])
def test_a_row_marked_as_a_whole_is_dropped_and_counted(
    make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """K20: at the row's level, or in each of its assistant turns."""
    rows = [
        {"messages": [USER, REPLY]},
        {"messages": [USER, REPLY], **keys},
        {"messages": [USER, {**REPLY, **keys}, USER, {**REPLY, **keys}]},
    ]
    dataset, _ = build_dataset([write_rows(rows)], make_encoder("chatml"), 1, tmp_path / "cache", progress=False)
    assert (len(dataset), dataset.report.dropped_rows) == (1, 2)
    assert [place.split(": ")[0] for place in dataset.report.dropped] == ["train.jsonl:2", "train.jsonl:3"]
    assert not any(key in notice for key in keys for notice in dataset.report.notices)
    with pytest.raises(UserError, match="all 1 rows are dropped"):
        build_dataset(
            [write_rows(rows[1:2], "none.jsonl")], make_encoder("chatml"), 1, tmp_path / "cache", progress=False
        )


def test_a_number_beside_the_messages_may_mean_anything(make_encoder: EncoderMaker) -> None:
    """K20: what is no word on learning is named; a list can only be one word a turn or token, and is refused."""
    encoder = make_encoder("chatml")
    assert remarks(encoder, {"messages": [USER, REPLY], "weight": 71.5}) == [
        "key 'weight' has no meaning here and is ignored"
    ]
    assert "train.jsonl:3: 'loss_mask'" in refusal(encoder, {"messages": [USER, REPLY], "loss_mask": [0, 1]})


def test_a_null_says_nothing_and_is_named(make_encoder: EncoderMaker) -> None:
    """K20: as tables write a key that only other turns have."""
    encoder = make_encoder("chatml")
    turns = [{**USER, "weight": None}, {**REPLY, "weight": None}]
    assert learned(encoder, turns) == "my friend<|im_end|>"
    assert remarks(encoder, turns) == ["key 'weight' says nothing: the turn is learned"]


# ---- keys that the template does not render --------------------------------------------------------------------------


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
        f"{missing} 'name' of user messages",
        f"{missing} 'reasoning_content' of assistant messages",
        f"{missing} 'tool_calls' of assistant messages",
        "the model's chat template ignores 'tools'",
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


# ---- replies that are calls of tools ---------------------------------------------------------------------------------


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


# ---- JSON in JSON ----------------------------------------------------------------------------------------------------

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


# ---- pictures --------------------------------------------------------------------------------------------------------

A, B = ({"type": "image", "image": name} for name in ("a.png", "b.png"))


def seen(backend: Tokenizer, value: Any) -> list[Any]:
    """Return the contents of the user turns as the template gets them, with room for three images."""
    conversation = vision_encoder(backend, max_images=3).parse(raw(value))
    return [message.fields["content"] for message in conversation.messages if message.role == "user"]


def words_of(text: str) -> dict[str, str]:
    """Return a text part."""
    return {"type": "text", "text": text}


def asks(content: Any) -> dict[str, Any]:
    """Return a user turn."""
    return {"role": "user", "content": content}


HELLO = words_of("hello there")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{**USER, "image": "a.png"}, REPLY], [[A, HELLO]]),
        ([{**USER, "images": ["a.png", "b.png"]}, REPLY], [[A, B, HELLO]]),
        ([USER, REPLY, {**USER, "image": "b.png"}, REPLY], [[HELLO], [B, HELLO]]),
        ([asks("see <image>\nwhat?") | {"image": "a.png"}, REPLY], [[words_of("see "), A, words_of("what?")]]),
        ({"messages": [USER, REPLY], "image": "a.png"}, [[A, HELLO]]),
        ({"messages": [USER, REPLY, USER, REPLY], "images": ["a.png"]}, [[A, HELLO], [HELLO]]),
        ({"messages": [USER, REPLY], "images": [{"path": "a.png", "bytes": None}]}, [[A, HELLO]]),
        (
            {"messages": [asks("<image>one"), REPLY, asks("two<image>"), REPLY], "images": ["a.png", "b.png"]},
            [[A, words_of("one")], [words_of("two"), B]],
        ),
        ({"messages": [asks([{"type": "image"}, HELLO]), REPLY], "images": ["a.png"]}, [[A, HELLO]]),
        ({"messages": [asks([A, HELLO]), REPLY], "images": ["a.png"]}, [[A, HELLO]]),
        ({"messages": [{**USER, "image": None}, {**REPLY, "images": []}], "images": None}, [[HELLO]]),
        ({"messages": [USER, REPLY], "images": [{"path": None, "bytes": None}]}, [[HELLO]]),
        ({"messages": [USER, REPLY], "image": "a.png", "images": None}, [[A, HELLO]]),
        ({"messages": [asks([{"type": "image", "text": None}, HELLO]), REPLY], "image": "a.png"}, [[A, HELLO]]),
        ([asks(json.dumps([A, HELLO])), REPLY], [[A, HELLO]]),
    ],
)
def test_pictures_of_other_layouts_become_image_parts(backend: Tokenizer, value: Any, expected: list[Any]) -> None:
    """K19: in a message's key, beside the messages, with markers or without."""
    assert seen(backend, value) == expected
    assert [note for note in remarks(vision_encoder(backend, max_images=3), value) if "'image" in note] == []


@pytest.mark.parametrize(
    "value",
    [
        {"messages": [{"role": "user", "content": "<image>what?"}, REPLY], "images": ["a.png", "b.png"]},
        {"messages": [{"role": "user", "content": "<image><image>what?"}, REPLY], "images": ["a.png"]},
        {"messages": [USER, REPLY, USER, REPLY], "images": ["a.png", "b.png"]},
        {"messages": [USER, {"role": "assistant", "content": "<image>"}], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": [A, words_of("x")]}, REPLY], "images": ["b.png"]},
        {"messages": [{"role": "user", "content": "x", "image": "a.png"}, REPLY], "images": ["b.png"]},
        {"messages": [USER, REPLY], "image": "a.png", "images": ["b.png"]},
        {"messages": [USER, REPLY], "image": ""},
        {"messages": [USER, REPLY], "images": [{"bytes": "iVBORw0KGgo", "path": "a.png"}]},
        {"messages": [USER, REPLY], "image": "https://x.org/a.png"},
        [USER, {**REPLY, "image": "a.png"}],
        [{"role": "system", "content": "s", "image": "a.png"}, USER, REPLY],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}, REPLY],
        [{"role": "user", "content": [{"type": "image"}, words_of("x")]}, REPLY],
        [{"role": "user", "content": [{**words_of("x"), "image": "a.png"}]}, REPLY],
        [{**USER, "image_path": "a.JPG"}, REPLY],
        {"messages": [USER, REPLY], "imgs": ["https://x.org/a"]},
    ],
)
def test_a_picture_whose_place_is_not_clear_is_refused(backend: Tokenizer, value: Any) -> None:
    """K19: the other way to read the row would be a guess, and without the picture it would be another row."""
    assert refusal(vision_encoder(backend, max_images=3), value)


picture_keys = st.sampled_from(["image", "images", "image_path", "img", "picture", "image_url", "file", "media", "url"])
wrapped = st.sampled_from(
    [
        lambda path: path,
        lambda path: [path],
        lambda path: {"path": path},
        lambda path: [{"url": path}],
        lambda path: [{"bytes": None, "path": path}],
        lambda path: {"image": [path]},
    ]
)
contents = st.sampled_from(
    ["what?", "<image>what?", "what?\n<image>", "<image><image>", [HELLO], [{"type": "image"}, HELLO], [A, HELLO]]
)


@given(key=picture_keys, wrap=wrapped, level=st.integers(-1, 3), first=contents, second=contents)
@settings(max_examples=300)
def test_a_picture_never_vanishes(backend: Tokenizer, key: str, wrap: Any, level: int, first: Any, second: Any) -> None:
    """K19: it is shown, its key is named in the report, or the row is refused; and what is shown is in the ids."""
    row: dict[str, Any] = {"messages": [asks(first), dict(REPLY), asks(second), dict(REPLY)]}
    holder = row if level < 0 else row["messages"][level]
    holder[key] = wrap("new.png")
    encoder = vision_encoder(backend, max_images=3)
    chunk = encode_chunk([raw(row)], encoder)
    if not chunk.problems:
        count = 3 * len(chunk.images[0])
        assert chunk.ids.tolist().count(encoder.images.placeholder_id if encoder.images else -1) == count
        assert "new.png" in chunk.images[0] or any(repr(key) in note for note in chunk.notes)


@pytest.mark.parametrize("holder", ["row", "message"])
def test_chat_fine_tuning_refuses_pictures_in_any_key(make_encoder: EncoderMaker, holder: str) -> None:
    """K19: it shows the model none; null and an empty list are none."""
    for key, value in (("image", "a.png"), ("images", ["a.png"])):
        keys = {key: value}
        row = {"messages": [USER, REPLY], **keys} if holder == "row" else [{**USER, **keys}, REPLY]
        assert "use finetune_vision.py" in refusal(make_encoder("chatml"), row)
    assert encoded(make_encoder("chatml"), {"messages": [{**USER, "images": []}, REPLY], "image": None})


def test_a_marker_without_a_picture_is_named(backend: Tokenizer) -> None:
    """K19: it may be a word of the text, so that it is no mistake; so may a key that is like a picture's."""
    encoder = vision_encoder(backend)
    for mark in ("<image>", "<img>a.png</img>", "<video>"):
        assert any("shows no picture" in note for note in remarks(encoder, [asks(mark), REPLY]))
    for keys in ({"image_id": 12}, {"image_caption": "a dog"}, {"source": "web/a.png"}):
        assert remarks(encoder, {"messages": [USER, REPLY], **keys})
    assert remarks(encoder, {"messages": [USER, REPLY], "image": "a.png", "image_path": "b/a.png"})


def test_bytes_of_pictures_in_parquet_are_refused(backend: Tokenizer, tmp_path: Path) -> None:
    """K19: as `datasets` writes a column of images."""
    path = tmp_path / "train.parquet"
    rows = [{"messages": [USER, REPLY], "images": [{"bytes": b"\x89PNG", "path": "a.png"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=r"train\.parquet:1: 'images' must be the path of a file"):
        build_dataset([path], vision_encoder(backend), 1, tmp_path / "cache", progress=False)


def test_bad_rows_and_bad_pictures_are_listed_together(
    backend: Tokenizer, write_rows: WriteRows, tmp_path: Path
) -> None:
    """K19: in the order of the file, 20 of them; where rows with bad pictures are left out, bad rows alone."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    good = {"messages": [USER, REPLY], "image": "a.png"}
    gone = {"messages": [USER, REPLY], "image": "gone.png"}
    both = {"message": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]}
    path = write_rows([good, gone, {"messages": []}, gone, good, both, *[gone] * 30])

    def found(on_bad_image: Any) -> list[Problem]:
        check = ImageCheck(on_bad_image, progress=False).problems_of
        with pytest.raises(UserError) as caught:
            build_dataset([path], vision_encoder(backend), 1, tmp_path / "c", progress=False, find_bad_images=check)
        return list(caught.value.problems)

    problems = found("error")
    assert [problem.where for problem in problems] == [
        *(f"train.jsonl:{line}" for line in (2, 3, 4, 6, *range(6, 22))),
        "train.jsonl",
    ]
    assert problems[-1].what == "... and 15 more"
    assert [("gone.png" in problem.what) for problem in problems[:5]] == [True, False, True, False, True]
    assert [problem.where for problem in found("skip")] == ["train.jsonl:3", "train.jsonl:6"]
    assert list((tmp_path / "c").iterdir()) == []


def test_a_dropped_row_is_no_evaluation_sample(make_encoder: EncoderMaker) -> None:
    """K20: nothing supervised, nothing compared."""
    encoder = make_encoder("chatml")
    conversation = encoder.parse(raw({"messages": [USER, REPLY], "train": False}))
    assert isinstance(encoder.encode(conversation), DroppedRow)
    assert encode_prompts(encoder, conversation) == []
