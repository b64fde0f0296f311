"""Rows of other tools' formats: each keeps its meaning, or is left out with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from glm_edge_ft.data.conversation import parse_conversation
from glm_edge_ft.data.convert_formats import FORMATS
from glm_edge_ft.data.rows import RawRow
from tests.data.converting import PART, convert, good, messages, turns

TEXT = {"type": "text", "text": "Q"}
QUESTION, REPLY = messages()
NOT_LEARNED: list[dict[str, Any]] = [
    {"weight": 0},
    {"train": False},
    {"loss_mask": 0},
    {"loss": 0},
    {"loss_scale": 0.0},
    {"masked": True},
]


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("alpaca", {"instruction": "Q", "input": "", "output": "A"}, messages()),
        (
            "alpaca",
            {"instruction": "翻译", "input": "hello", "output": "你好", "system": "S", "history": [["Q", "A"]]},
            [{"role": "system", "content": "S"}, *messages(), *messages("翻译\nhello", "你好")],
        ),
        ("sharegpt", {"system": "S", "conversations": turns()}, [{"role": "system", "content": "S"}, *messages()]),
        ("swift", {"messages": messages()}, messages()),
        ("swift", {"query": "Q", "response": "A", "history": []}, messages()),
        ("swift", {"messages": [QUESTION, {**REPLY, "loss": False}, *messages()]}, None),
        ("advertisegen", {"content": "Q", "summary": "A"}, messages()),
        ("llava", {"conversations": turns()}, messages()),
    ],
)
def test_each_format_becomes_messages(tmp_path: Path, form: str, row: dict[str, Any], expected: Any) -> None:
    """Texts are carried as they are; a system prompt, earlier turns and `loss` stay."""
    conversion, rows = convert(tmp_path, form, row)
    assert rows == [{"messages": row["messages"] if expected is None else expected}]
    assert (conversion.written, conversion.left_out, conversion.notes) == (1, [], {})


def test_tools_are_carried_as_written(tmp_path: Path) -> None:
    """D3: a JSON string becomes the list that it says, with its null."""
    tools = [{"name": "f", "parameters": {"x": {"default": None}}}]
    row = {"conversations": turns(), "tools": json.dumps(tools)}
    assert convert(tmp_path, "sharegpt", row)[1] == [{"messages": messages(), "tools": tools}]


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("alpaca", {"instruction": "Q"}, "key 'output' is missing; the keys are: 'instruction'"),
        ("alpaca", {"instruction": "Q", "output": 7}, "'output' must be a string, it is a number: 7"),
        ("alpaca", {"instruction": "Q", "output": "A", "history": [["Q"]]}, "'history' must be a list of question"),
        ("alpaca", [1], "a row must be an object"),
        ("sharegpt", {"conversations": []}, "'conversations' must be a list of turns, it is a list: []"),
        ("sharegpt", {"conversations": [{"from": "nobody", "value": "Q"}]}, "turn 0: unknown speaker a string"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "Q"}]}, "turn 0: unknown speaker"),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "turn 0: the text must be a string"),
        ("sharegpt", {"conversations": turns()[:1]}, "no assistant turn"),
        ("sharegpt", {"conversations": [turns()[0], {**turns()[1], "content": "B"}]}, "two names for one thing"),
        ("sharegpt", {"conversations": turns(), "messages": messages()}, "'messages' beside what"),
        # images
        ("swift", {"messages": messages(), "images": [{"bytes": "x"}]}, "'images' must be the path of a file"),
        ("swift", {"messages": messages(), "images": ["http://x/a.png"]}, "'images' must be the path of a file"),
        ("llava", {"conversations": turns("<image>Q")}, "<image> in the texts, and nothing that it stands for"),
        ("llava", {"image": "a", "conversations": turns("Q", "<image>")}, "it is not clear where"),
        ("llava", {"image": "/p.png", "conversations": turns("<image>Q", "A <image>")}, "it is not clear where"),
        ("llava", {"image": "/p.png", "images": ["/q.png"], "conversations": turns()}, "different images"),
        ("llava", {"image_path": "p.png", "conversations": turns()}, "an image under 'image_path'"),
        ("qwen-vl", {"conversations": turns("Q", "<img>/p.png</img>")}, "turn of the assist"),
        ("qwen-vl", {"images": ["/q.png"], "conversations": turns("<img>/p.png</img>")}, "both in <img>"),
        (
            "openai",
            {"messages": messages([{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])},
            "must be the path of a file",
        ),
        # boxes, films, sounds
        (
            "swift",
            {
                "messages": messages("Where is <ref-object>?", "<bbox>"),
                "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]},
                "images": ["/p.png"],
            },
            "'objects'",
        ),
        ("swift", {"messages": messages("<video>Q"), "videos": ["/v.mp4"]}, "'videos'"),
        ("swift", {"messages": messages(audio="a.wav")}, "'audio'"),
        ("llava", {"video": "v.mp4", "conversations": turns("<video>\nQ")}, "'video'"),
        ("llava", {"conversations": turns("<video>\nQ")}, "<video> in the texts"),
        ("openai", {"messages": messages([{"type": "input_audio", "input_audio": {}}])}, "a part must have the type"),
        # judgements and preferences
        ("sharegpt", {"conversations": turns(), "label": False}, "'label' is false"),
        ("alpaca", {"instruction": "Q", "output": "A", "kto_tag": False}, "'kto_tag' is false"),
        ("alpaca", {"instruction": "Q", "chosen": "A", "rejected": "B"}, "a preference between replies"),
        ("sharegpt", {"conversations": turns()[:1], "chosen": turns()[1], "rejected": turns()[1]}, "a preference"),
        ("swift", {"messages": messages(), "rejected_response": "B"}, "a preference"),
        ("openai", {"input": {"messages": []}, "preferred_output": [{}], "non_preferred_output": [{}]}, "a preference"),
    ],
)
def test_a_row_that_cannot_be_converted_is_named(tmp_path: Path, form: str, row: Any, reason: str) -> None:
    """K23: the others are written; the report has file, line and reason."""
    conversion, rows = convert(tmp_path, form, good(form), row, good(form))
    assert rows == [{"messages": messages()}] * 2
    (problem,) = conversion.left_out
    assert problem.where.startswith("source.jsonl:2")
    assert reason in f"{problem.where}: {problem.what}"
    assert any("could not be converted" in line for line in conversion.lines(tmp_path / "new.jsonl"))


# ---- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", NOT_LEARNED)
@pytest.mark.parametrize(
    ("form", "key", "exchange"),
    [
        ("openai", "messages", messages()),
        ("swift", "messages", messages()),
        ("sharegpt", "conversations", turns()),
        ("llava", "conversations", turns()),
        ("qwen-vl", "conversations", turns()),
    ],
)
def test_a_reply_that_is_not_to_be_learned_is_not_learned(
    tmp_path: Path, form: str, key: str, exchange: list[dict[str, Any]], flag: dict[str, Any]
) -> None:
    """K20: in every format, by whatever name; where no reply of a row is to be learned, it is left out."""
    marked = [exchange[0], {**exchange[1], **flag}]
    rows = [{key: [*marked, *exchange]}, {key: exchange, **flag}, {key: marked}, {key: exchange}]
    conversion, written = convert(tmp_path, form, *rows)
    assert written == [
        {"messages": [QUESTION, {**REPLY, "loss": False}, *messages()]},
        {"messages": messages()},
    ]
    assert [problem.where for problem in conversion.left_out] == ["source.jsonl:2", "source.jsonl:3"]
    assert "no reply of it is learned" in conversion.left_out[0].what


@pytest.mark.parametrize("flag", NOT_LEARNED[:4])
def test_a_row_of_one_exchange_that_is_not_to_be_learned_is_left_out(tmp_path: Path, flag: dict[str, Any]) -> None:
    """K20: Alpaca and query/response, whose flags stand beside the texts; another value of such a key is named."""
    row = {"instruction": "Q", "output": "A"}
    conversion, written = convert(tmp_path / "a", "alpaca", row | flag, row | {"loss": 2.5}, row | {"weight": 1})
    assert written == [{"messages": messages()}] * 2
    assert [problem.where for problem in conversion.left_out] == ["source.jsonl:1"]
    assert conversion.notes == {"key 'loss' has no meaning here": 1}
    row = {"query": "Q", "response": "A"}
    conversion, written = convert(tmp_path / "b", "swift", row | flag, row)
    assert (len(conversion.left_out), len(written)) == (1, 1)


def test_a_share_of_a_reply_or_of_its_weight_is_left_out_with_the_reason(tmp_path: Path) -> None:
    """K20: neither half a weight nor a mask of characters can be kept."""
    flags: list[dict[str, Any]] = [{"weight": 0.5}, {"loss_mask": [0, 1]}, {"train_detail": [{"begin_offset": 0}]}]
    rows = [{"messages": [QUESTION, {**REPLY, **flag}]} for flag in flags]
    conversion, written = convert(tmp_path, "openai", *rows, {"messages": messages()})
    assert (len(written), len(conversion.left_out)) == (1, 3)
    assert all(key in str(problem) for flag, problem in zip(flags, conversion.left_out, strict=True) for key in flag)


# ---- images ----------------------------------------------------------------------------------------------------------


def test_images_stand_where_their_markers_stood(tmp_path: Path) -> None:
    """Paths start from the new file's folder; the line break at a marker goes with it."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "a.png")
    row = {"id": "7", "image": "a.png", "conversations": turns("<image>\nQ")}
    conversion, rows = convert(tmp_path, "llava", row, images=tmp_path / "images")
    image = {"type": "image", "image": str(Path("..", "images", "a.png"))}
    assert rows[0]["messages"][0] == {"role": "user", "content": [image, TEXT]}
    assert (conversion.with_images, conversion.missing_images) == (1, [])
    assert conversion.notes == {"key 'id' has no meaning here": 1}


def test_an_image_without_a_marker_opens_the_first_question(tmp_path: Path) -> None:
    """As ms-swift reads it."""
    row = {"messages": [{"role": "system", "content": "S"}, *messages()], "images": [{"path": "/nowhere/a.png"}]}
    conversion, rows = convert(tmp_path, "swift", row)
    parts = [{"type": "image", "image": "/nowhere/a.png"}, TEXT]
    assert [message["content"] for message in rows[0]["messages"]] == ["S", parts, "A"]
    (missing,) = conversion.missing_images
    assert str(missing).startswith("source.jsonl:1: no such image: ")


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("qwen-vl", {"conversations": turns("<img>/p.png</img>\nQ")}),
        ("swift", {"query": "<img> /p.png </img>Q", "response": "A"}),
        ("llava", {"image": "/p.png", "images": None, "conversations": turns()}),
        ("llava", {"image": None, "images": ["/p.png"], "conversations": turns()}),
        ("llava", {"image": "/p.png", "images": [], "conversations": turns()}),
        ("llava", {"image": "/p.png", "images": ["/p.png"], "conversations": turns()}),
        ("swift", {"messages": messages(), "images": [{"path": "/p.png", "bytes": None}]}),
        ("openai", {"messages": messages(image="/p.png")}),
        ("openai", {"messages": messages([{"type": "image_url", "image_url": {"url": "/p.png"}}, TEXT])}),
        ("openai", {"messages": messages([{"type": "image_url", "image_url": "file:///p.png"}, TEXT])}),
        ("swift", {"images": ["/p.png"], "messages": messages([{"type": "image"}, TEXT])}),
        ("alpaca", {"instruction": "<image>Q", "output": "A", "images": ["/p.png"]}),
        ("qwen-vl", {"messages": messages([{"image": "/p.png"}, {"text": "Q"}])}),
        ("qwen-vl", {"messages": messages([{"text": "<img>/p.png</img>Q"}])}),
    ],
)
def test_an_image_is_kept_wherever_a_format_names_it(tmp_path: Path, form: str, row: dict[str, Any]) -> None:
    """K19, K23: in the text, beside it, in the message, as a part; null and an empty list name none."""
    conversion, written = convert(tmp_path, form, row)
    assert written == [{"messages": messages([PART, TEXT])}]
    assert (conversion.with_images, conversion.notes) == (1, {})


def test_texts_that_only_look_like_markers_stay_texts(tmp_path: Path) -> None:
    """K23: a question on HTML, boxes that are written out, and a good reply of KTO."""
    question = "What does the <video> element do, and <img>?"
    reply = "<ref>dog</ref><box>(1,2),(3,4)</box>, <audio>, <image>"
    conversion, rows = convert(tmp_path, "qwen-vl", {"conversations": turns(question, reply), "label": True})
    assert [message["content"] for message in rows[0]["messages"]] == [question, reply]
    assert conversion.notes["key 'label' has no meaning here"] == 1


# ---- no key is lost --------------------------------------------------------------------------------------------------


def test_what_is_no_text_and_no_image_is_kept_or_named(tmp_path: Path) -> None:
    """K21, K23: keys of messages stay for templates that render them; keys of rows and parts are counted."""
    part = {"type": "image_url", "image_url": {"url": "/p.png"}, "detail": "high"}
    developer = {"role": "developer", "content": "S", "name": "x", "refusal": None}
    row: dict[str, Any] = {"id": 1, "source": "s", "none": None, "messages": [developer, *messages([part, TEXT])]}
    row["messages"][2]["reasoning_content"] = "R"
    conversion, rows = convert(tmp_path, "openai", row, row)
    assert rows[0]["messages"][0] == {"role": "system", "content": "S", "name": "x"}
    assert rows[0]["messages"][2] == {"role": "assistant", "content": "A", "reasoning_content": "R"}
    text = "\n".join(conversion.lines(tmp_path / "new.jsonl"))
    assert [text.count(f"key '{key}' ") for key in ("id", "source", "detail", "none")] == [1, 1, 1, 0]
    assert text.count(": 2 rows") == 3


def test_calls_of_tools_are_objects_and_their_results_are_of_the_tool(tmp_path: Path) -> None:
    """K22, K25: JSON text, of one encoding or two, is decoded and named."""

    def call(arguments: Any) -> dict[str, Any]:
        return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for number, arguments in enumerate(('{"x": 1}', json.dumps('{"x": 1}'), {"x": 1})):
        conversation: list[dict[str, Any]] = [
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call(arguments)]},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
            REPLY,
        ]
        row = {"messages": conversation, "tools": json.dumps([json.dumps(tool)])}
        conversion, rows = convert(tmp_path / str(number), "openai", row)
        assert rows[0]["tools"] == [tool]
        assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant", "tool", "assistant"]
        assert rows[0]["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [call({"x": 1})]}
        assert rows[0]["messages"][2] == {"role": "tool", "content": "7", "tool_call_id": "1"}
        assert len(conversion.notes) == (not isinstance(arguments, dict))
        conversation[1]["tool_calls"] = json.dumps(conversation[1]["tool_calls"])
        assert convert(tmp_path / f"{number} whole", "openai", row)[1] == rows


KINDS: tuple[Any, ...] = (None, True, False, 0, 1, 0.5, 10**30, "", "x", "<image>", "<img>a</img>", '{"a": 1}', [], {})
KEYS = ["messages", "conversations", "images", "videos", "tools", "label", "weight", "train_detail", "history"]
TURN_KEYS = ("from", "role", "value", "content", "weight", "image", "images", "tool_calls", "function_call", "name")


def anything(random: Random, depth: int = 0) -> Any:
    """Return any JSON value."""
    if depth < 3 and random.random() < 0.4:
        part = anything(random, depth + 1)
        return [part] if random.random() < 0.5 else {random.choice(("type", "text", "image", "path", "name")): part}
    return random.choice(KINDS)


def test_whatever_a_row_holds_is_a_row_or_a_reason(tmp_path: Path) -> None:
    """K23: no exception; what is written is read without a remark on a row's keys, and has a reply to learn."""
    random = Random(0)
    rows = []
    for number in range(1500):
        some = [dict(random.choice((*messages(), *turns()))) for _ in range(random.randint(1, 3))]
        random.choice(some)[random.choice(TURN_KEYS)] = anything(random)
        row = {"messages": some} if number % 2 else {"instruction": "Q", "output": "A", "query": "Q", "response": "A"}
        rows.append(row | {random.choice([*KEYS, "objects"]): anything(random) for _ in range(random.randint(0, 2))})
    for form in ("alpaca", "openai", "advertisegen"):
        conversion, written = convert(tmp_path / form, form, *rows, good(form))
        assert conversion.written + len(conversion.left_out) == len(rows) + 1
        for number, new in enumerate(written):
            read = parse_conversation(RawRow("new.jsonl", number, 1, new), frozenset(("tool", "observation")), 10**6)
            assert not read.ignored_keys
            assert any(message.supervised for message in read.messages)


@pytest.mark.parametrize("form", FORMATS)
def test_no_key_is_lost_without_a_word(tmp_path: Path, form: str) -> None:
    """K23: a value that stands under an unknown key of a row, a turn or a part is written, or its key is named."""
    reply = {**REPLY, "zz_reply": {"a": ["zz reply value"]}}
    row = {"messages": [*messages([{**TEXT, "zz_part": "zz part value"}], zz_turn="zz turn value")[:1], reply]}
    if form in ("alpaca", "advertisegen"):
        row = good(form)
    conversion, _ = convert(tmp_path, form, row | {"zz_row": "zz row value"})
    text = (tmp_path / "out" / "new.jsonl").read_text(encoding="utf-8")
    named = "\n".join(conversion.lines(tmp_path / "new.jsonl"))
    for kind in ("row", *(("part", "turn", "reply") if "messages" in row else ())):
        assert (f"zz {kind} value" in text) != (f"'zz_{kind}'" in named), kind
