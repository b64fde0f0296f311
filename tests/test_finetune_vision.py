"""The real vision command, as a newcomer runs it: the demonstration, what it learns, and whether it looks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from glm_edge_ft.data.collator import PaddedCollator, PromptCollator, VisionCollator
from glm_edge_ft.data.dataset import load_prompts
from glm_edge_ft.data.encoding import ConversationEncoder
from glm_edge_ft.data.placeholders import IMAGE_TURN_TOKENS, ImageSettings
from glm_edge_ft.data.prompts import clean_prediction
from glm_edge_ft.model.adapters import generate
from glm_edge_ft.model.loading import load_image_processor, load_weights, locate_model, read_checkpoint
from tests.runs import metrics, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
DEMO = ("data/demo_vision", "glm-edge-v-nano", "configs/demo_vision.yaml")
CHANCE = 35.0  # what a wrong picture may score; guessing by the kind of question made 16


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run finetune_vision.py in the repository with a cache of its own."""
    environment = os.environ | {"GLM_EDGE_FT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)  # the tests' one thread; here all cores work
    command = [sys.executable, "finetune_vision.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the README's vision command once; return its output folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo-vision")
    done = run_script(folder, *DEMO, "--set", f"training_args.output_dir={folder / 'output'}")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "output", done.stdout


def evaluations(output: Path) -> list[dict[str, Any]]:
    """Return the evaluations of the development set, first one first."""
    return [event for event in metrics(output) if "eval_loss" in event]


def test_the_demo_learns(demo: tuple[Path, str]) -> None:
    """From next to no exact answer on unseen pictures to most; the loss falls; the table says the same."""
    output, printed = demo
    first, last = evaluations(output)[0], evaluations(output)[-1]
    assert first["step"] == 0
    assert first["eval_exact-match"] <= 5.0
    assert last["eval_exact-match"] >= 60.0  # 86 to 93 were seen, as the order of summing changed
    assert last["eval_loss"] < first["eval_loss"] / 3
    (row,) = (line for line in printed.splitlines() if line.startswith("exact-match"))
    assert row.split()[1:3] == [f"{first['eval_exact-match']:.2f}", f"{last['eval_exact-match']:.2f}"]
    (test,) = (demo[0] / "predictions").glob("test-*.jsonl")
    assert len(read_jsonl(test)) > 90


def test_with_the_pictures_of_other_rows_the_answers_fall_to_chance(demo: tuple[Path, str]) -> None:
    """The control: the same questions, each with the picture of another row. So the model does look."""
    output, _ = demo
    checkpoint = read_checkpoint(locate_model(DEMO[1]))
    config: Any = checkpoint.config
    images = ImageSettings(config.boi_token_id, config.tokens_per_image)
    encoder = ConversationEncoder(checkpoint.tokenizer, checkpoint.stop_ids, 768, 64, images)
    samples = [sample for sample in load_prompts([ROOT / DEMO[0] / "dev.jsonl"], encoder) if sample.images]
    model: Any = PeftModel.from_pretrained(load_weights(checkpoint, torch.float32), output).eval()
    padded = PaddedCollator(checkpoint.tokenizer.pad_token_id, "left")
    collate = PromptCollator(VisionCollator(padded, load_image_processor(checkpoint.location)))
    count = len(samples)
    right = dict.fromkeys((0, count // 4, count // 2), 0)  # by how many rows on the pictures are taken from
    for start in range(0, count, 8):
        batch = samples[start : start + 8]
        inputs = collate(batch)
        for shift in right:
            others = [samples[(start + number + shift) % count] for number in range(len(batch))]
            inputs["pixel_values"] = collate(others)["pixel_values"]
            with torch.no_grad():
                replies = generate(model, **inputs, max_new_tokens=16, do_sample=False)
            for sample, ids in zip(batch, replies.tolist(), strict=True):
                right[shift] += clean_prediction(encoder, ids) == sample.reference
    own, *of_others = right.values()
    other = sum(of_others) / len(of_others)
    print(f"right: {own} of {count} with their own pictures, {other} with those of other rows")
    assert 100 * other / count <= CHANCE
    assert own >= 2 * other


def test_one_image_turn_of_the_embedded_model_costs_what_the_guide_says(tmp_path: Path) -> None:
    """I5: below 584 tokens the command refuses with that number, in the released geometry and template."""
    limit = f"max_input_length={IMAGE_TURN_TOKENS - 1}"
    done = run_script(tmp_path, *DEMO, "--check", "--set", limit)
    assert done.returncode == 2
    assert f"{IMAGE_TURN_TOKENS - 1} tokens are too few" in done.stderr
    assert f"takes {IMAGE_TURN_TOKENS}" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_counts_images_apart(tmp_path: Path) -> None:
    """1,260 pictures of 578 tokens; no weights are read, nothing is trained."""
    path = tmp_path / "report.json"
    done = run_script(tmp_path, *DEMO, "--check", "--json", str(path))
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text(encoding="utf-8"))["data"]["train"]
    assert report["role_tokens"]["image"] == 1260 * 578
    assert any("system" in notice for notice in report["notices"])


def test_preview_shows_the_placeholders_of_an_image_as_one(tmp_path: Path) -> None:
    """578 times the same token would fill the screen."""
    done = run_script(tmp_path, *DEMO, "--preview", "1")
    assert done.returncode == 0, done.stderr
    assert "<|begin_of_image|> x 578" in done.stdout


def test_help_answers_without_heavy_imports() -> None:
    """Both scripts share one command."""
    done = run_script(ROOT, "--help")
    assert done.returncode == 0
    assert "finetune_vision.py data/demo_vision glm-edge-v-nano configs/demo_vision.yaml yes" in done.stdout


def test_a_chat_model_is_refused_plainly(tmp_path: Path) -> None:
    """Exit code 2, no traceback, and what to do."""
    done = run_script(tmp_path, DEMO[0], "glm-edge-nano", DEMO[2])
    assert done.returncode == 2
    assert "is a chat model" in done.stderr
    assert "use finetune.py" in done.stderr
    assert "Traceback" not in done.stderr
