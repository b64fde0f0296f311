"""Other tools' data formats become this project's, and what cannot is named by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glm_edge_ft.data.convert import Conversion, convert_file
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
    assert (conversion.written, conversion.left_out, conversion.ignored_keys) == (1, (), {})


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
    assert (conversion.with_images, conversion.missing_images, conversion.ignored_keys) == (1, (), {"id": 1})


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
        ("swift", {"messages": USER_AND_REPLY, "images": [{"bytes": "x"}]}, "an image must be the path of a file"),
        (
            "swift",
            {"messages": USER_AND_REPLY, "images": ["http://x/a.png"]},
            "messages[0].content[0]: 'image' must be",
        ),
        (
            "llava",
            {"conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]},
            "1 <image> in the texts, and 0 images",
        ),
        (
            "llava",
            {"image": "a", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "<image>"}]},
            "<image> in a turn of the assistant",
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
        ("new.jsonl", "alpaka", "known ones: alpaca, sharegpt, swift, advertisegen, llava"),
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
