"""Other tools' data formats become this project's, and what cannot is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from PIL import Image

from glm_edge_ft.data.conversation import parse_conversation
from glm_edge_ft.data.convert import Conversion, convert_file
from glm_edge_ft.data.convert_formats import READERS
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.errors import UserError

USER_AND_REPLY = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def convert(folder: Path, form: str, *rows: Any, images: Path | None = None) -> tuple[Conversion, list[Any]]:
    """Convert rows; return the report and the new file's rows."""
    source, target = folder / "source.jsonl", folder / "out" / "new.jsonl"
    target.parent.mkdir()
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    conversion = convert_file(source, target, form, images)
    return conversion, [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("form", "row", "messages"),
    [
        ("alpaca", {"instruction": "Q", "input": "", "output": "A"}, USER_AND_REPLY),
        (
            "alpaca",
            {"instruction": "翻译", "input": "hello", "output": "你好", "system": "S", "history": [["Q", "A"]]},
            [
                {"role": "system", "content": "S"},
                *USER_AND_REPLY,
                {"role": "user", "content": "翻译\nhello"},
                {"role": "assistant", "content": "你好"},
            ],
        ),
        (
            "sharegpt",
            {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            [{"role": "system", "content": "S"}, *USER_AND_REPLY],
        ),
        ("swift", {"messages": USER_AND_REPLY}, USER_AND_REPLY),
        ("swift", {"query": "Q", "response": "A", "history": []}, USER_AND_REPLY),
        ("swift", {"messages": [{**USER_AND_REPLY[0]}, {**USER_AND_REPLY[1], "loss": False}, *USER_AND_REPLY]}, None),
        ("advertisegen", {"content": "Q", "summary": "A"}, USER_AND_REPLY),
        ("llava", {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, USER_AND_REPLY),
    ],
)
def test_each_format_becomes_messages(
    tmp_path: Path, form: str, row: dict[str, Any], messages: list[dict[str, Any]] | None
) -> None:
    """Texts are carried as they are; a system prompt, earlier turns and `loss` stay."""
    conversion, rows = convert(tmp_path, form, row)
    assert rows == [{"messages": row["messages"] if messages is None else messages}]
    assert (conversion.written, conversion.left_out, conversion.notes) == (1, (), {})


def test_tools_are_carried_as_written(tmp_path: Path) -> None:
    """D3: a JSON string becomes the list that it says, with its null."""
    tools = [{"name": "f", "parameters": {"x": {"default": None}}}]
    row = {
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
        "tools": json.dumps(tools),
    }
    assert convert(tmp_path, "sharegpt", row)[1] == [{"messages": USER_AND_REPLY, "tools": tools}]


def test_images_stand_where_their_markers_stood(tmp_path: Path) -> None:
    """Paths start from the new file's folder; the line break at a marker goes with it."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "pictures" / "a.png")
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    row = {"id": "7", "image": "a.png", "conversations": turns}
    conversion, rows = convert(tmp_path, "llava", row, images=tmp_path / "pictures")
    image = {"type": "image", "image": str(Path("..", "pictures", "a.png"))}
    assert rows[0]["messages"][0] == {"role": "user", "content": [image, {"type": "text", "text": "Q"}]}
    assert (conversion.with_images, conversion.missing_images) == (1, ())
    assert conversion.notes == {"key 'id' has no meaning here": 1}


def test_an_image_without_a_marker_opens_the_first_question(tmp_path: Path) -> None:
    """As ms-swift reads it."""
    row = {"messages": [{"role": "system", "content": "S"}, *USER_AND_REPLY], "images": [{"path": "/nowhere/a.png"}]}
    conversion, rows = convert(tmp_path, "swift", row)
    parts = [{"type": "image", "image": "/nowhere/a.png"}, {"type": "text", "text": "Q"}]
    assert [message["content"] for message in rows[0]["messages"]] == ["S", parts, "A"]
    (missing,) = conversion.missing_images
    assert str(missing).startswith("source.jsonl:1: no such image: ")


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("alpaca", {"instruction": "Q"}, "key 'output' is missing; the keys are: 'instruction'"),
        ("alpaca", {"instruction": "Q", "output": 7}, "'output' must be a string, it is a number: 7"),
        ("alpaca", {"instruction": "Q", "output": "A", "history": [["Q"]]}, "'history' must be a list of question"),
        ("alpaca", [1], "a row must be an object"),
        ("sharegpt", {"conversations": []}, "'conversations' must be a list of turns, it is a list: []"),
        ("sharegpt", {"conversations": [{"from": "nobody", "value": "Q"}]}, "turn 0: unknown speaker a string"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "Q"}]}, "turn 0 calls a tool"),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "turn 0: the text must be a string"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Q"}]}, "no assistant turn"),
        ("swift", {"messages": USER_AND_REPLY, "images": [{"bytes": "x"}]}, "'images' must be the path of a file"),
        (
            "swift",
            {"messages": USER_AND_REPLY, "images": ["http://x/a.png"]},
            "'images' must be the path of a file, not a URL",
        ),
        (
            "llava",
            {"conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]},
            "<image> in the texts, and nothing that it stands for",
        ),
        (
            "llava",
            {"image": "a", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "<image>"}]},
            "a picture in a turn that is not the user's",
        ),
    ],
)
def test_a_row_that_cannot_be_converted_is_named(tmp_path: Path, form: str, row: Any, reason: str) -> None:
    """The others are written; the report has file, line and reason."""
    good = {
        "alpaca": {"instruction": "Q", "output": "A"},
        "swift": {"query": "Q", "response": "A"},
    }.get(form, {"conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]})
    conversion, rows = convert(tmp_path, form, good, row, good)
    assert rows == [{"messages": USER_AND_REPLY}] * 2
    (problem,) = conversion.left_out
    assert problem.where.startswith("source.jsonl:2")
    assert reason in f"{problem.where}: {problem.what}"
    assert any("could not be converted" in line for line in conversion.lines(tmp_path / "new.jsonl"))


def test_broken_json_is_reported_and_the_rest_converted(tmp_path: Path) -> None:
    """D2: line 2 is broken."""
    source = tmp_path / "source.jsonl"
    row = json.dumps({"content": "Q", "summary": "A"})
    source.write_text(f"{row}\n{{bad\n{row}\n", encoding="utf-8")
    conversion = convert_file(source, tmp_path / "new.jsonl", "advertisegen")
    assert conversion.written == 2
    assert conversion.left_out[0].where == "source.jsonl:2:2"


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("new.jsonl", "alpaka", "known ones: alpaca, sharegpt, swift, advertisegen, llava, qwen-vl, openai"),
        ("there.jsonl", "alpaca", "is there already"),
        ("new.txt", "alpaca", "let the name end in .jsonl"),
        ("source.json/new.jsonl", "alpaca", "cannot be written: "),
        ("new.jsonl", "llava", "not one row could be read as llava"),
    ],
)
def test_what_is_wrong_with_the_command_is_refused(tmp_path: Path, name: str, form: str, reason: str) -> None:
    """Nothing is written, nothing written over, no half file is left."""
    (tmp_path / "there.jsonl").write_text("x", encoding="utf-8")
    source = tmp_path / "source.json"
    source.write_text(json.dumps([{"instruction": "Q", "output": "A"}]), encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        convert_file(source, tmp_path / name, form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.json", "there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text(encoding="utf-8") == "x"


# ---- nothing is lost without a word ----

TURNS = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
PART = {"type": "image", "image": "/p.png"}
ASKED = [{"role": "user", "content": [PART, {"type": "text", "text": "Q"}]}, {"role": "assistant", "content": "A"}]


def marked(*turns: dict[str, Any], **flag: Any) -> list[dict[str, Any]]:
    """Return a talk of two exchanges whose first reply bears a flag."""
    question, reply = turns
    return [question, {**reply, **flag}, question, reply]


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"train": False}, {"loss_mask": 0}, {"loss": 0}, {"loss_scale": 0.0}, {"masked": True}]
)
@pytest.mark.parametrize(
    ("form", "key", "turns"),
    [
        ("openai", "messages", USER_AND_REPLY),
        ("swift", "messages", USER_AND_REPLY),
        ("sharegpt", "conversations", TURNS),
        ("llava", "conversations", TURNS),
        ("qwen-vl", "conversations", [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]),
    ],
)
def test_a_reply_that_is_not_to_be_learned_is_not_learned(
    tmp_path: Path, form: str, key: str, turns: list[dict[str, Any]], flag: dict[str, Any]
) -> None:
    """K20: in every format, by whatever name; where no reply of a row is to be learned, it is left out."""
    rows = [{key: marked(*turns, **flag)}, {key: turns, **flag}, {key: [turns[0], {**turns[1], **flag}]}, {key: turns}]
    conversion, written = convert(tmp_path, form, *rows)
    first = [*USER_AND_REPLY[:1], {**USER_AND_REPLY[1], "loss": False}, *USER_AND_REPLY]
    assert written == [{"messages": first}, {"messages": USER_AND_REPLY}]
    assert [problem.where for problem in conversion.left_out] == ["source.jsonl:2", "source.jsonl:3"]
    assert "no reply of it is learned" in conversion.left_out[0].what


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"loss_mask": 0}, {"loss": 0}])
def test_a_row_of_one_exchange_that_is_not_to_be_learned_is_left_out(tmp_path: Path, flag: dict[str, Any]) -> None:
    """K20: Alpaca and query/response, whose flags stand beside the texts; another value of such a key is named."""
    good = {"instruction": "Q", "output": "A"}
    conversion, written = convert(tmp_path, "alpaca", good | flag, good | {"loss": 2.5}, good | {"weight": 1})
    assert written == [{"messages": USER_AND_REPLY}] * 2
    assert [problem.where for problem in conversion.left_out] == ["source.jsonl:1"]
    assert conversion.notes == {"key 'loss' has no meaning here": 1}
    (tmp_path / "swift").mkdir()
    good = {"query": "Q", "response": "A"}
    conversion, written = convert(tmp_path / "swift", "swift", good | flag, good)
    assert (len(conversion.left_out), len(written)) == (1, 1)


def test_a_share_of_a_reply_or_of_its_weight_is_left_out_with_the_reason(tmp_path: Path) -> None:
    """K20: neither half a weight nor a mask of characters can be kept."""
    flags: list[dict[str, Any]] = [{"weight": 0.5}, {"loss_mask": [0, 1]}, {"train_detail": [{"begin_offset": 0}]}]
    rows = [{"messages": [USER_AND_REPLY[0], {**USER_AND_REPLY[1], **flag}]} for flag in flags]
    conversion, written = convert(tmp_path, "openai", *rows, {"messages": USER_AND_REPLY})
    assert (len(written), len(conversion.left_out)) == (1, 3)
    assert all(key in str(problem) for flag, problem in zip(flags, conversion.left_out, strict=True) for key in flag)


@pytest.mark.parametrize(
    ("form", "row"),
    [
        ("qwen-vl", {"conversations": [{"from": "user", "value": "<img>/p.png</img>\nQ"}, TURNS[1]]}),
        ("swift", {"query": "<img> /p.png </img>Q", "response": "A"}),
        ("llava", {"image": "/p.png", "images": None, "conversations": TURNS}),
        ("llava", {"image": None, "images": ["/p.png"], "conversations": TURNS}),
        ("llava", {"image": "/p.png", "images": [], "conversations": TURNS}),
        ("llava", {"image": "/p.png", "images": ["/p.png"], "conversations": TURNS}),
        ("swift", {"messages": USER_AND_REPLY, "images": [{"path": "/p.png", "bytes": None}]}),
        ("openai", {"messages": [{"role": "user", "content": "Q", "image": "/p.png"}, USER_AND_REPLY[1]]}),
        (
            "openai",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "/p.png"}},
                            {"type": "text", "text": "Q"},
                        ],
                    },
                    USER_AND_REPLY[1],
                ]
            },
        ),
        (
            "openai",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": "file:///p.png"}, {"type": "text", "text": "Q"}],
                    },
                    USER_AND_REPLY[1],
                ]
            },
        ),
        (
            "swift",
            {
                "images": ["/p.png"],
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
                    USER_AND_REPLY[1],
                ],
            },
        ),
        ("alpaca", {"instruction": "<image>Q", "output": "A", "images": ["/p.png"]}),
        (
            "qwen-vl",
            {"messages": [{"role": "user", "content": [{"image": "/p.png"}, {"text": "Q"}]}, USER_AND_REPLY[1]]},
        ),
        ("qwen-vl", {"messages": [{"role": "user", "content": [{"text": "<img>/p.png</img>Q"}]}, USER_AND_REPLY[1]]}),
    ],
)
def test_a_picture_is_kept_wherever_a_format_names_it(tmp_path: Path, form: str, row: dict[str, Any]) -> None:
    """K19, K23: in the text, beside it, in the message, as a part; null and an empty list name none."""
    conversion, written = convert(tmp_path, form, row)
    assert written == [{"messages": ASKED}]
    assert (conversion.with_images, conversion.notes) == (1, {})


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("qwen-vl", {"conversations": [TURNS[0], {"from": "gpt", "value": "<img>/p.png</img>"}]}, "turn of the assist"),
        (
            "qwen-vl",
            {"images": ["/q.png"], "conversations": [{"from": "user", "value": "<img>/p.png</img>"}, TURNS[1]]},
            "both in <img>",
        ),
        (
            "swift",
            {
                "messages": [
                    {"role": "user", "content": "Where is <ref-object>?"},
                    {"role": "assistant", "content": "<bbox>"},
                ],
                "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]},
                "images": ["/p.png"],
            },
            "'objects'",
        ),
        (
            "swift",
            {"messages": [{"role": "user", "content": "<video>Q"}, USER_AND_REPLY[1]], "videos": ["/v.mp4"]},
            "'videos'",
        ),
        ("llava", {"video": "v.mp4", "conversations": [{"from": "human", "value": "<video>\nQ"}, TURNS[1]]}, "'video'"),
        ("llava", {"conversations": [{"from": "human", "value": "<video>\nQ"}, TURNS[1]]}, "<video> in the texts"),
        ("swift", {"messages": [{"role": "user", "content": "Q", "audio": "a.wav"}, USER_AND_REPLY[1]]}, "'audio'"),
        (
            "openai",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
                    USER_AND_REPLY[1],
                ]
            },
            "unknown part type",
        ),
        (
            "llava",
            {
                "image": "/p.png",
                "conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A <image>"}],
            },
            "not the user's",
        ),
        ("llava", {"image": "/p.png", "images": ["/q.png"], "conversations": TURNS}, "different pictures"),
        (
            "openai",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
                    },
                    USER_AND_REPLY[1],
                ]
            },
            "not a URL",
        ),
        ("sharegpt", {"conversations": TURNS, "label": False}, "'label' is false"),
        ("alpaca", {"instruction": "Q", "output": "A", "kto_tag": False}, "'kto_tag' is false"),
        ("alpaca", {"instruction": "Q", "chosen": "A", "rejected": "B"}, "a preference between replies"),
        ("sharegpt", {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]}, "a preference"),
        ("swift", {"messages": USER_AND_REPLY, "rejected_response": "B"}, "a preference"),
        ("llava", {"image_path": "p.png", "conversations": TURNS}, "a picture under 'image_path'"),
        ("openai", {"input": {"messages": []}, "preferred_output": [{}], "non_preferred_output": [{}]}, "a preference"),
        ("sharegpt", {"conversations": [TURNS[0], {**TURNS[1], "content": "B"}]}, "two names for one thing"),
        ("sharegpt", {"conversations": TURNS, "messages": USER_AND_REPLY}, "'messages' beside what"),
    ],
)
def test_another_meaning_is_left_out_with_its_reason(tmp_path: Path, form: str, row: Any, reason: str) -> None:
    """K23: boxes, films, sounds, pictures in replies, judgements and preferences are no lesson for this project."""
    good = {"alpaca": {"instruction": "Q", "output": "A"}}.get(form, {"messages": USER_AND_REPLY})
    conversion, rows = convert(tmp_path, form, row, good)
    assert rows == [{"messages": USER_AND_REPLY}]
    (problem,) = conversion.left_out
    assert problem.where.startswith("source.jsonl:1")
    assert reason in problem.what


def test_texts_that_only_look_like_markers_stay_texts(tmp_path: Path) -> None:
    """K23: a question on HTML, boxes that are written out, and a good reply of KTO."""
    question = "What does the <video> element do, and <img>?"
    reply = "<ref>dog</ref><box>(1,2),(3,4)</box>, <audio>, <image>"
    row = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}], "label": True}
    conversion, rows = convert(tmp_path, "qwen-vl", row)
    assert [message["content"] for message in rows[0]["messages"]] == [question, reply]
    assert conversion.notes["key 'label' has no meaning here"] == 1


def test_what_is_no_text_and_no_picture_is_kept_or_named(tmp_path: Path) -> None:
    """K21, K23: keys of messages stay for templates that render them; keys of rows and parts are counted."""
    part = {"type": "image_url", "image_url": {"url": "/p.png"}, "detail": "high"}
    messages = [
        {"role": "developer", "content": "S", "name": "x", "refusal": None},
        {"role": "user", "content": [part, {"type": "text", "text": "Q"}]},
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
    ]
    row = {"id": 1, "source": "s", "none": None, "messages": messages}
    conversion, rows = convert(tmp_path, "openai", row, row)
    assert rows[0]["messages"][0] == {"role": "system", "content": "S", "name": "x"}
    assert rows[0]["messages"][2] == {"role": "assistant", "content": "A", "reasoning_content": "R"}
    text = "\n".join(conversion.lines(tmp_path / "new.jsonl"))
    for key in ("id", "source", "detail"):
        assert f"key '{key}' " in text and text.count(f"key '{key}' ") == 1
    assert text.count(": 2 rows") == 3
    assert "'none'" not in text


def test_calls_of_tools_are_objects_and_their_results_are_of_the_tool(tmp_path: Path) -> None:
    """K22, K25: JSON text, of one encoding or two, is decoded and named; what it cannot be decoded from stays."""

    def call(arguments: Any) -> dict[str, Any]:
        return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for number, arguments in enumerate(('{"x": 1}', json.dumps('{"x": 1}'), {"x": 1})):
        messages: list[dict[str, Any]] = [
            USER_AND_REPLY[0],
            {"role": "assistant", "content": None, "tool_calls": [call(arguments)]},
            {"role": "tool", "tool_call_id": "1", "content": "7"},
            USER_AND_REPLY[1],
        ]
        (tmp_path / str(number)).mkdir()
        row = {"messages": messages, "tools": json.dumps([json.dumps(tool)])}
        conversion, rows = convert(tmp_path / str(number), "openai", row)
        assert rows[0]["tools"] == [tool]
        assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant", "tool", "assistant"]
        assert rows[0]["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [call({"x": 1})]}
        assert rows[0]["messages"][2] == {"role": "tool", "content": "7", "tool_call_id": "1"}
        assert len(conversion.notes) == (not isinstance(arguments, dict))
        messages[1]["tool_calls"] = json.dumps(messages[1]["tool_calls"])
        (tmp_path / f"{number} whole").mkdir()
        assert convert(tmp_path / f"{number} whole", "openai", row | {"messages": messages})[1] == rows


def test_rows_that_are_left_out_are_counted_by_reason(tmp_path: Path) -> None:
    """K23: one entry a reason, with the number of rows and their lines, whatever values differ in them."""
    bad = [{"instruction": "Q", "output": number} for number in range(9)] + [{"instruction": "Q", "chosen": "A"}] * 2
    conversion, _ = convert(tmp_path, "alpaca", {"instruction": "Q", "output": "A"}, *bad)
    lines = conversion.lines(tmp_path / "new.jsonl")
    assert lines[1] == "11 rows could not be converted:"
    assert lines[2].startswith("source.jsonl:2: 'output' must be a string")
    assert "(9 rows, also source.jsonl:3, " in lines[2] and "and 3 more)" in lines[2]
    assert "(2 rows, also source.jsonl:12)" in lines[3]
    assert len(lines) == 4
    (tmp_path / "keys").mkdir()
    many = [{"instruction": "Q", "output": "A", f"key {number}": 1, "id": 1} for number in range(100)]
    lines = convert(tmp_path / "keys", "alpaca", *many)[0].lines(tmp_path / "new.jsonl")
    assert (lines[1], lines[-1]) == ("key 'id' has no meaning here: 100 rows", "... and 81 more remarks")


KINDS: tuple[Any, ...] = (None, True, False, 0, 1, 0.5, 10**30, "", "x", "<image>", "<img>a</img>", '{"a": 1}', [], {})
KEYS = (
    "messages",
    "conversations",
    "images",
    "videos",
    "tools",
    "label",
    "weight",
    "train_detail",
    "history",
    "objects",
)
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
        turns = [dict(random.choice((*USER_AND_REPLY, *TURNS))) for _ in range(random.randint(1, 3))]
        random.choice(turns)[random.choice(TURN_KEYS)] = anything(random)
        row = {"messages": turns} if number % 2 else {"instruction": "Q", "output": "A", "query": "Q", "response": "A"}
        rows.append(row | {random.choice(KEYS): anything(random) for _ in range(random.randint(0, 2))})
    good: dict[str, Any] = {"alpaca": {"instruction": "Q", "output": "A"}, "openai": {"messages": USER_AND_REPLY}}
    for form, row in (*good.items(), ("advertisegen", {"content": "Q", "summary": "A"})):
        (tmp_path / form).mkdir()
        conversion, written = convert(tmp_path / form, form, *rows, row)
        assert conversion.written + len(conversion.left_out) == len(rows) + 1
        for number, new in enumerate(written):
            read = parse_conversation(RawRow("new.jsonl", number, 1, new), frozenset(("tool", "observation")), 10**6)
            assert not read.ignored_keys
            assert any(message.supervised for message in read.messages)


@pytest.mark.parametrize("form", list(READERS))
def test_no_key_is_lost_without_a_word(tmp_path: Path, form: str) -> None:
    """K23: a value that stands under an unknown key of a row, a turn or a part is written, or its key is named."""
    part = {"type": "text", "text": "Q", "zz_part": "zz part value"}
    question = {"role": "user", "content": [part], "zz_turn": "zz turn value"}
    row: dict[str, Any] = {"messages": [question, {**USER_AND_REPLY[1], "zz_reply": {"a": ["zz reply value"]}}]}
    if form == "alpaca":
        row = {"instruction": "Q", "output": "A", "input": None, "system": "zz system value"}
    elif form == "advertisegen":
        row = {"content": "Q", "summary": "A"}
    conversion, _ = convert(tmp_path, form, row | {"zz_row": "zz row value"})
    text = (tmp_path / "out" / "new.jsonl").read_text(encoding="utf-8")
    named = "\n".join(conversion.lines(tmp_path / "new.jsonl"))
    for kind in ("row", *(("part", "turn", "reply") if "messages" in row else ())):
        assert (f"zz {kind} value" in text) != (f"'zz_{kind}'" in named), kind
