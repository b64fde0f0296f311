"""One rule for `~` in every argument, on the commands that users type; a user who is not there is no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import TokenizerMaker
from tests.launch import REPOSITORY
from tests.model_folders import save_model_folder
from tests.runs import write_chat_data, write_config
from tests.vision_folders import draw


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


def test_every_argument_of_a_run_may_begin_with_the_home_folder(tmp_path: Path, make_tokenizer: TokenizerMaker) -> None:
    """K24: DATA_DIR, MODEL, CONFIG, `--json`, `output_dir`, and a data file of the config."""
    save_model_folder(tmp_path / "model", make_tokenizer("glm"))
    data = write_chat_data(tmp_path / "data")
    (data / "dev.jsonl").rename(tmp_path / "dev.jsonl")
    config = write_config(tmp_path / "c", val="~/dev.jsonl", output_dir="~/output")
    script = str(REPOSITORY / "finetune.py")
    done = command(tmp_path, script, "~/data", "~/model", f"~/{config.name}", "--check", "--json", "~/report.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert not list((tmp_path / "elsewhere").iterdir())


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
