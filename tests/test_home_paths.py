"""One rule for `~` in every argument, on the commands that users type; a user who is not there is no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer

from tests.launch import REPOSITORY
from tests.runs import write_config, write_jsonl
from tests.vision_folders import draw, save_vision_folder


def command(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run python with arguments that the shell has not expanded, from a folder of its own below HOME."""
    (home / "elsewhere").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=home / "elsewhere",
        env=os.environ | {"HOME": str(home), "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_a_user_who_is_not_there_is_named_in_every_argument(tmp_path: Path) -> None:
    """K24: all of them at once, exit code 2, no traceback, and no folder of that name is made."""
    unknown = "~nosuchuser/x"
    config = write_config(tmp_path / "c", output_dir=unknown)
    script, package = str(REPOSITORY / "finetune.py"), ("-m", "glm_edge_ft")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Q", "output": "A"}\n', encoding="utf-8")
    for arguments, count in (
        ((script, unknown, unknown, str(config), "--check", "--json", f"{unknown}/a.json"), 4),
        ((script, unknown, unknown, unknown), 3),
        ((*package, "evaluate", unknown, unknown, "--out", unknown, "--config", unknown), 4),
        ((*package, "merge", unknown, unknown), 2),
        ((*package, "export-gguf", unknown, f"{unknown}.gguf"), 2),
        ((*package, "report", unknown, "--out", f"{unknown}.html"), 2),
        ((*package, "chat", unknown), 1),
        ((*package, "convert", "~/rows.jsonl", f"{unknown}.jsonl", "--from", "alpaca", "--images", unknown), 2),
    ):
        done = command(tmp_path, *arguments)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith(f"error: {count} problem"), done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())


def test_converted_images_open_from_a_folder_behind_a_link(tmp_path: Path) -> None:
    """K24: INPUT, OUT and `--images` from `~`; both folders are reached through links of another depth."""
    picture = draw(tmp_path / "disk" / "a" / "b" / "pictures" / "deep" / "1.png", 1)
    (tmp_path / "disk" / "data").mkdir()
    (tmp_path / "pictures").symlink_to(tmp_path / "disk" / "a" / "b" / "pictures")
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "data")
    row = {"conversations": [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]}
    images = ("deep/1.png", "deep/../deep/1.png", "~/pictures/deep/1.png")
    rows = "".join(json.dumps({**row, "image": image}) + "\n" for image in images)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    done = command(
        tmp_path,
        *("-m", "glm_edge_ft", "convert", "~/rows.jsonl", "~/data/new.jsonl", "--from", "llava"),
        *("--images", "~/pictures"),
    )
    assert done.returncode == 0, done.stderr
    assert "is not there" not in done.stdout
    new = tmp_path / "data" / "new.jsonl"
    for line in new.read_text(encoding="utf-8").splitlines():
        path = json.loads(line)["messages"][0]["content"][0]["image"]
        assert (new.parent / path).samefile(picture)


def test_what_a_row_of_another_tool_means_reaches_the_run(tmp_path: Path, backend: Tokenizer) -> None:
    """K20, K23, K24: `weight: 0` and pictures, behind a link, and `~` in every argument, in the config and in a row."""
    save_vision_folder(tmp_path / "model", backend)
    draw(tmp_path / "disk" / "pictures" / "1.png", 1)
    (tmp_path / "disk" / "data").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "disk" / "data")
    turns = [
        {"role": "user", "content": "Picture 1: <img>1.png</img>\nhello"},
        {"role": "assistant", "content": "I am fine"},
    ]
    rows = [
        {"messages": [turns[0], {**turns[1], "weight": 0}, {"role": "user", "content": "hello"}, turns[1]]},
        {"messages": turns, "label": False},
        {"messages": turns},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    convert = ("-m", "glm_edge_ft", "convert", "~/rows.jsonl", "~/linked/train.jsonl", "--from", "qwen-vl")
    done = command(tmp_path, *convert, "--images", "~/disk/pictures")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "linked" / "train.jsonl").open("a", encoding="utf-8") as file:
        parts = [{"type": "image", "image": "~/disk/pictures/1.png"}, {"type": "text", "text": "hello"}]
        file.write(json.dumps({"messages": [{"role": "user", "content": parts}, turns[1]]}) + "\n")
    (tmp_path / "dev.jsonl").write_text(json.dumps({"messages": turns[1:]}) + "\n", encoding="utf-8")
    write_config(tmp_path / "c", output_dir="~/output", val="~/dev.jsonl")
    script = str(REPOSITORY / "finetune_vision.py")
    done = command(tmp_path, script, "~/linked", "~/model", "~/c.yaml", "--preview", "3", "--json", "~/preview.json")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())
    shown = json.loads((tmp_path / "preview.json").read_text(encoding="utf-8"))
    assert [row["line"] for row in shown] == [1, 2, 3]
    learned = [
        "".join(text for text, label in zip(row["tokens"], row["labels"], strict=True) if label != -100)
        for row in shown
    ]
    assert [text.count("I am fine") for text in learned] == [1, 1, 1]
