"""Rows as other tools write them, through the two scripts: what is learned, what is named, what is refused at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.launch import REPOSITORY, start_script
from tests.runs import write_config, write_jsonl
from tests.vision_folders import draw

USER = {"role": "user", "content": "how are you"}
REPLY = {"role": "assistant", "content": "I am fine"}


def check(script: str, folder: Path, model: Path, code: int, **config: Any) -> str:
    """Start a script with `--check` on `folder`/data, expect its exit code, and return what was printed."""
    arguments = [str(folder / "data"), str(model), str(write_config(folder / "output", **config)), "--check"]
    arguments += ["--json", str(folder / "check.json")]
    environment = {"GLM_EDGE_FT_CACHE": str(folder / "cache")}
    log = folder / "check.log"
    return start_script(REPOSITORY / script, arguments, log, processes=1, environment=environment).end(code)


def test_json_lines_and_parquet_say_the_same(chat_folder: Path) -> None:
    """K20, K21: what is not learned, dropped, and named is the same in `.jsonl`, `.json` and `.parquet`."""
    rows: list[dict[str, Any]] = [
        {"messages": [USER, {**REPLY, "weight": 0}, {**USER, "name": "Bo"}, REPLY], "source": "web"},
        {"messages": [USER, {**REPLY, "weight": 0}]},
        {"messages": [USER, {**REPLY, "reasoning_content": "hm"}], "blob": "x"},
    ]
    write_jsonl(chat_folder / "data" / "train.jsonl", rows)
    (chat_folder / "data" / "dev.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    rows[2]["blob"] = b"x"
    table = pyarrow.Table.from_pylist([{"messages": [], "source": "", "blob": b""}, *rows])[1:]
    pyarrow.parquet.write_table(table, chat_folder / "data" / "test.parquet")
    said = check("finetune.py", chat_folder, chat_folder / "model", 0, val="dev.json", test="test.parquet")
    data = json.loads((chat_folder / "check.json").read_text(encoding="utf-8"))["data"]
    lines, array, parquet = (data[split] for split in ("train", "val", "test"))
    assert (lines["rows"], lines["dropped_rows"], lines["replies"]["replies"]) == (2, 1, 2)
    for key in ("rows", "tokens", "supervised_tokens", "dropped_rows", "lengths"):
        assert lines[key] == array[key] == parquet[key]
    assert lines["notices"] == array["notices"]
    for name in ("'source'", "'blob'", "'name' of user messages", "'reasoning_content' of assistant messages"):
        assert sum(name in notice for notice in lines["notices"]) == 1
        assert sum(name in notice for notice in parquet["notices"]) == 1
        assert said.count(name) >= 3


def test_bad_rows_and_bad_images_are_refused_in_one_go(tmp_path: Path, vision_model: Path) -> None:
    """K19, K20, K22: each with its line, in the order of the file; a row that is right is not among them."""
    draw(tmp_path / "data" / "a.png", 0)
    (tmp_path / "data" / "text.png").write_text("no picture", encoding="utf-8")
    images = {"messages": [{"role": "user", "content": "<image>what?"}, REPLY]}
    rows = [
        [{**USER, "image": "a.png"}, REPLY],
        [{**USER, "image": "gone.png"}, REPLY],
        {**images, "images": ["a.png", "a.png"]},
        {**images, "images": ["text.png"]},
        [USER, {**REPLY, "weight": 0.5}],
        {**images, "images": ["a.png"]},
        [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
        [USER, {**REPLY, "image": "a.png"}],
        {"messages": [USER, REPLY], "image": "gone.png"},
    ]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    write_jsonl(tmp_path / "data" / "dev.jsonl", [rows[1]])
    said = check("finetune_vision.py", tmp_path, vision_model, 2, val="dev.jsonl")
    assert re.findall(r"^(?:error: |- )?\s*((?:train|dev)\.jsonl:\d+)", said, re.MULTILINE) == [
        *(f"train.jsonl:{line}" for line in (2, 3, 4, 5, 7, 8, 9)),
        "dev.jsonl:1",
    ]
    assert "Traceback" not in said
