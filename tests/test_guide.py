"""The files and launch lines of the fine-tuning guide, run as they stand (K32).

`tests/guide` has its flat YAML and its three samples of data: their layout, with texts of our own. A launch line runs
in a folder that looks as the guide's does, with an embedded model in place of the released one.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glm_edge_ft.training.checkpoints import find_checkpoints
from tests.launch import REPOSITORY, SECONDS
from tests.runs import metrics, predictions
from tests.vision_folders import draw

GUIDE = Path(__file__).parent / "guide"
MODELS = {"THUDM/glm-edge-4b-chat": "glm-edge-nano", "THUDM/glm-edge-v-5b": "glm-edge-v-nano"}
CHAT = "python finetune.py  data/AdvertiseGen/  THUDM/glm-edge-4b-chat  configs/lora.yaml # For Chat Fine-tune"
VISION = "python finetune_vision.py  data/CogVLM-311K/  THUDM/glm-edge-v-5b configs/lora.yaml # For VQA Fine-tune"
TORCHRUN = "OMP_NUM_THREADS=1 torchrun --standalone --nnodes=1 --nproc_per_node=8"
CHAT_ON_EIGHT = f"{TORCHRUN}  finetune.py  data/AdvertiseGen/  THUDM/glm-edge-4b-chat  configs/lora.yaml"
VISION_ON_EIGHT = f"{TORCHRUN}  finetune_vision.py  data/CogVLM-311K/  THUDM/glm-edge-v-5b  configs/lora.yaml"
CHAT_AGAIN = "python finetune.py data/AdvertiseGen/ THUDM/glm-edge-4b-chat configs/lora.yaml yes"


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    """Return a folder as the guide's: the two scripts, its data, and `configs` with its YAML."""
    (tmp_path / "configs").mkdir()
    shutil.copy(GUIDE / "lora.yaml", tmp_path / "configs")
    for name in ("finetune.py", "finetune_vision.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for name in ("ds_zero_2.json", "ds_zero_3.json"):
        shutil.copy(REPOSITORY / "configs" / name, tmp_path / "configs")
    chat, vision = tmp_path / "data" / "AdvertiseGen", tmp_path / "data" / "CogVLM-311K"
    for folder, samples in ((chat, ("turns", "single", "turns")), (vision, ("vision",) * 3)):
        folder.mkdir(parents=True)
        for name, sample in zip(("train", "dev", "test"), samples, strict=True):
            shutil.copy(GUIDE / f"{sample}.json", folder / f"{name}.json")
    draw(tmp_path / "a.png", 1).rename(tmp_path / "picture")
    (vision / "path" / "to").mkdir(parents=True)
    (tmp_path / "picture").rename(vision / "path" / "to" / "image")
    return tmp_path


def launch(folder: Path, line: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a launch line in the folder: two processes for eight, an embedded model for the released one."""
    words = [MODELS.get(word, word) for word in shlex.split(line, comments=True)]
    variables = {"GLM_EDGE_FT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    words = ["--nproc_per_node=2" if word.startswith("--nproc_per_node") else word for word in words]
    launchers = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return subprocess.run(
        [*launchers[words[0]], *words[1:], *more],
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )


def test_the_chat_line(guide: Path) -> None:
    """K32: the flat YAML and the sample with comments and trailing commas, each with a notice."""
    done = launch(guide, CHAT)
    assert done.returncode == 0, done.stderr
    notices = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert any("configs/lora.yaml:1" in line and "read as keys of data_config" in line for line in notices)
    assert any("train.json:6: " in line and "read all the same" in line for line in notices)
    assert [checkpoint.step for checkpoint in find_checkpoints(guide / "output")] == [2, 4]
    assert [line["reference"] for line in predictions(guide / "output", "test-4")] == ["<assistant response text>"] * 2
    assert {"eval_loss", "eval_exact-match"} <= {key for line in metrics(guide / "output") for key in line}


def test_the_vision_line(guide: Path) -> None:
    """K32: the sample with a picture and two turns."""
    done = launch(guide, VISION)
    assert done.returncode == 0, done.stderr
    rows = predictions(guide / "output", "test-4")
    assert [row["reference"] for row in rows] == ["白色背景上有一个方块。", "方块是绿色的。"]


@pytest.mark.slow
@pytest.mark.parametrize("line", [CHAT_ON_EIGHT, VISION_ON_EIGHT])
def test_the_torchrun_lines(guide: Path, line: str) -> None:
    """K32: with DeepSpeed, as the guide has it; then from a saved point, `yes` and a number."""
    stage_2 = ("--set", "training_args.deepspeed=ds_zero_2.json")
    done = launch(guide, line, *stage_2)
    assert done.returncode == 0, done.stderr
    for resume, text in (("yes", "checkpoint-4 has all steps behind it"), ("2", "")):
        again = launch(guide, f"{line} {resume}", *stage_2)
        assert again.returncode == 0, again.stderr
        assert text in again.stderr
        assert [checkpoint.step for checkpoint in find_checkpoints(guide / "output")] == [2, 4]


@pytest.mark.slow
def test_the_line_that_goes_on(guide: Path) -> None:
    """K32: `yes` before there is anything, then from the newest checkpoint."""
    first = launch(guide, CHAT_AGAIN, "--set", "training_args.max_steps=2")
    assert first.returncode == 0, first.stderr
    assert "note: " in first.stderr
    second = launch(guide, CHAT_AGAIN)
    assert second.returncode == 0, second.stderr
    assert [line["step"] for line in metrics(guide / "output") if "loss" in line] == [2, 4]


def test_misspelt_names_get_the_right_one_suggested(guide: Path) -> None:
    """K32: data folder, model folder, config, DeepSpeed file and data files, all that can be told in one go."""
    (guide / "models" / "mine").mkdir(parents=True)
    line = "python finetune.py data/AdvertiseGenn ./models/mien configs/lora.yaml"
    done = launch(guide, line, "--set", "training_args.deepspeed=ds_zereo_2.json")
    assert done.returncode == 2
    for name in ("data/AdvertiseGen", "models/mine", "ds_zero_2.json"):
        assert f"did you mean {name}?" in done.stderr
    line = "python finetune.py data/AdvertiseGen glm-edge-nano config/lora.yaml"
    done = launch(guide, line, "--set", "train_file=path/x.json")
    assert done.returncode == 2
    assert "did you mean configs/lora.yaml?" in done.stderr
    (guide / "data" / "AdvertiseGen" / "more").mkdir()
    (guide / "data" / "AdvertiseGen" / "more" / "first.jsonl").touch()
    names = {"train_file": "trian.json", "val_file": "moer/frist.jsonl", "test_file": "test.jsom"}
    sets = [word for key, name in names.items() for word in ("--set", f"{key}={name}")]
    done = launch(guide, "python finetune.py data/AdvertiseGen glm-edge-nano configs/lora.yaml", *sets)
    assert done.returncode == 2
    for name in ("train.json", "more/first.jsonl", "test.json"):
        assert f"did you mean {name}?" in done.stderr
