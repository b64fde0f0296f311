"""The real script in a real process: exit codes, messages, RESUME, reports, and what it does not import."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glm_edge_ft.checks.preflight import check_inputs
from glm_edge_ft.errors import UserError
from glm_edge_ft.run import RunRequest
from tests.runs import metrics

REPOSITORY = Path(__file__).resolve().parents[1]
DEMO = ("data/demo", "glm-edge-nano", "configs/demo.yaml")
HEAVY = ("torch", "transformers", "peft", "accelerate", "deepspeed", "matplotlib", "tokenizers")


def finetune(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python finetune.py ARGUMENTS` from the repository, as a user does."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    if cache is not None:
        environment["GLM_EDGE_FT_CACHE"] = str(cache)
    command = [sys.executable, "finetune.py", *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def imported_by(*arguments: str) -> tuple[int, set[str]]:
    """Run the script and return its exit code and the heavy modules that it had loaded at the end."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['finetune.py', *{list(arguments)!r}]\n"
        "code = 0\n"
        "try:\n    runpy.run_path('finetune.py', run_name='__main__')\n"
        "except SystemExit as stop:\n    code = stop.code or 0\n"
        f"print('LOADED', code, *({set(HEAVY)!r} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=600
    )
    _, code, *loaded = done.stdout.splitlines()[-1].split()
    return int(code), set(loaded)


def test_help_explains_each_argument_with_an_example_and_imports_nothing_heavy() -> None:
    """It answers at once because there is nothing to wait for."""
    done = finetune("--help")
    assert done.returncode == 0
    for text in ("DATA_DIR", "MODEL", "CONFIG", "RESUME", "--set", "--check", "--preview", "--json"):
        assert text in done.stdout
    for example in ("data/demo", "glm-edge-nano", "configs/lora.yaml", "600", "training_args.max_steps=20"):
        assert example in done.stdout
    assert imported_by("--help") == (0, set())


def test_all_mistakes_of_a_command_line_are_listed_at_once_before_anything_heavy(tmp_path: Path) -> None:
    """Exit 2, one message: a wrong key, a wrong value, a model that is not there, no traceback, nothing imported."""
    arguments: tuple[str, ...] = ("data/demo", "./no-model", "configs/demo.yaml", "--set", "max_imput_length=3")
    arguments += ("--set", "training_args.learning_rate=fast", "--set", f"training_args.output_dir={tmp_path}/out")
    done = finetune(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "3 problems" in done.stderr
    assert "did you mean max_input_length" in done.stderr
    assert "training_args.learning_rate" in done.stderr
    assert "MODEL ./no-model: there is no such folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert imported_by(*arguments) == (2, set())


def test_data_files_and_resume_are_checked_with_the_rest(tmp_path: Path) -> None:
    """Exit 2: missing data files by name, and RESUME that names no checkpoint, in one message."""
    (tmp_path / "trian.jsonl").write_text("", encoding="utf-8")
    done = finetune(
        str(tmp_path), "glm-edge-nano", "configs/demo.yaml", "99", "--set", f"training_args.output_dir={tmp_path}/out"
    )
    assert done.returncode == 2
    assert "4 problems" in done.stderr
    assert "did you mean trian.jsonl" in done.stderr
    assert f"there is no checkpoint-99 in {tmp_path}/out" in done.stderr


def test_mistakes_in_the_config_do_not_hide_those_beside_it(tmp_path: Path) -> None:
    """A wrong key, a model, data files and a RESUME that are not there: all of them at once."""
    arguments = (str(tmp_path / "nowhere"), "./no-model", "configs/demo.yaml", "99", "--set", "training_args.foo=1")
    done = finetune(*arguments, "--set", f"training_args.output_dir={tmp_path}/out")
    assert done.returncode == 2
    assert "4 problems" in done.stderr
    for text in ("training_args.foo", "MODEL ./no-model", "no such data folder", "RESUME 99"):
        assert text in done.stderr


def test_json_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    """A folder, and two reports for one file."""
    for options in (("--check", "--json", str(tmp_path)), ("--check", "--preview", "1", "--json", str(tmp_path / "x"))):
        done = finetune(*DEMO, *options)
        assert done.returncode == 2
        assert "--json" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_console_without_chinese_shows_escapes(tmp_path: Path) -> None:
    """A redirected GBK or ASCII stream loses no run to a character that it lacks."""
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "GLM_EDGE_FT_CACHE": str(tmp_path)}
    command = [sys.executable, "finetune.py", *DEMO, "--preview", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, check=False, timeout=600)
    assert done.returncode == 0
    assert b"\\u" in done.stdout


def test_a_missing_argument_exits_with_2_and_the_usage() -> None:
    """The command line itself is wrong."""
    done = finetune("data/demo")
    assert done.returncode == 2
    assert "Usage:" in done.stderr
    assert "Traceback" not in done.stderr


def test_bad_rows_of_all_files_are_listed_and_nothing_is_trained(tmp_path: Path) -> None:
    """D2: `file:line:column: reason` for each bad row of each file."""
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    (tmp_path / "train.jsonl").write_text(f"{good}\n{{bad\n{good}\n", encoding="utf-8")
    (tmp_path / "dev.jsonl").write_text(good.replace("messages", "message") + "\n", encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("\n\n", encoding="utf-8")
    output = tmp_path / "out"
    done = finetune(str(tmp_path), *DEMO[1:], "--set", f"training_args.output_dir={output}", cache=tmp_path / "cache")
    assert done.returncode == 2
    assert "train.jsonl:2:2: " in done.stderr
    assert "dev.jsonl:1: key 'messages' is missing; the keys are: 'message'" in done.stderr
    assert "test.jsonl: 0 conversations" in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_a_hub_id_without_network_gets_one_clear_message(tmp_path: Path) -> None:
    """Works with no network: what cannot be had is said once, with what to do."""
    done = finetune("data/demo", "THUDM/no-such-model", "configs/demo.yaml", cache=tmp_path)
    assert done.returncode == 2
    assert "1 problem" in done.stderr
    assert (
        "MODEL THUDM/no-such-model: is neither a folder, nor cached on this machine, nor reachable on the hub"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_deepspeed_that_is_not_installed_is_named_with_the_line_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """T8: the config asks for DeepSpeed on a machine without it."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else real(name))
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}), encoding="utf-8")
    overrides = (f"training_args.deepspeed={tmp_path / 'ds.json'}",)
    with pytest.raises(UserError) as caught:
        check_inputs(RunRequest(Path("data/demo"), "glm-edge-nano", Path("configs/demo.yaml"), overrides=overrides))
    (problem,) = caught.value.problems
    assert problem.where == "training_args.deepspeed"
    assert problem.what == "is set, but DeepSpeed is not installed"
    assert problem.fix.startswith("pip install deepspeed==")


def test_a_run_without_deepspeed_in_its_config_never_imports_it(tmp_path: Path) -> None:
    """Also where it is installed, since its import alone prints warnings and takes seconds."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed, so nothing could import it")
    overrides: tuple[str, ...] = (
        "training_args.max_steps=1",
        "training_args.eval_strategy=no",
        "training_args.eval_on_start=false",
    )
    overrides += ("data_config.test_file=null", f"training_args.output_dir={tmp_path}/out")
    code, loaded = imported_by(*DEMO, *(part for override in overrides for part in ("--set", override)))
    assert code == 0
    assert {"torch", "transformers", "peft"} <= loaded
    assert "deepspeed" not in loaded


def test_check_reports_data_and_memory_and_trains_nothing(tmp_path: Path) -> None:
    """`--check`, alone and as JSON: counts that can be recomputed from the files."""
    report = tmp_path / "report.json"
    output = f"training_args.output_dir={tmp_path / 'out'}"
    done = finetune(*DEMO, "--check", "--json", str(report), "--set", output, cache=tmp_path / "cache")
    assert done.returncode == 0
    assert "check passed" in done.stdout
    assert "memory:" in done.stdout
    content = json.loads(report.read_text(encoding="utf-8"))
    rows = {
        split: len((REPOSITORY / f"data/demo/{split}.jsonl").read_text("utf-8").splitlines())
        for split in ("train", "dev")
    }
    assert content["data"]["train"]["rows"] == rows["train"]
    assert content["data"]["val"]["rows"] == rows["dev"]
    assert content["data"]["train"]["supervised_tokens"] > 0
    assert content["model"]["trainable_parameters"] < content["model"]["parameters"]
    assert not (tmp_path / "out").exists()


def test_preview_shows_rows_token_by_token(tmp_path: Path) -> None:
    """`--preview 2 --json`: ids, labels and tokens of the first rows; what is supervised is the reply and its stop."""
    target = tmp_path / "preview.json"
    done = finetune(*DEMO, "--preview", "2", "--json", str(target), cache=tmp_path / "cache")
    assert done.returncode == 0
    rows = json.loads(target.read_text(encoding="utf-8"))
    assert [(row["file"], row["line"]) for row in rows] == [("train.jsonl", 1), ("train.jsonl", 2)]
    lines = (REPOSITORY / "data/demo/train.jsonl").read_text(encoding="utf-8").splitlines()
    for row, line in zip(rows, lines, strict=False):
        supervised = [token for token, label in zip(row["tokens"], row["labels"], strict=True) if label != -100]
        replies = [message["content"] for message in json.loads(line)["messages"] if message["role"] == "assistant"]
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["tokens"])
        assert supervised.count("<|user|>") == len(replies)
        assert [label for label in row["labels"] if label != -100] == [
            token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100
        ]
    assert "train.jsonl:1" in done.stdout


def test_json_without_check_or_preview_is_refused() -> None:
    """There would be nothing to write."""
    done = finetune(*DEMO, "--json", "x.json")
    assert done.returncode == 2
    assert "--json: goes with either --check or --preview" in done.stderr


def test_resume_behaves_as_the_guide_says(tmp_path: Path) -> None:
    """R1, R2, R4: 6 steps with saves at 2, 4 and 6; then `99`, `yes` when finished, a broken newest, `2`."""
    output = tmp_path / "out"
    settings = [
        "max_steps=6",
        "save_steps=2",
        "logging_steps=1",
        f"output_dir={output}",
        "generation_config.max_new_tokens=4",
    ]
    options = [part for setting in settings for part in ("--set", f"training_args.{setting}")]

    def start(*resume: str) -> subprocess.CompletedProcess[str]:
        return finetune(*DEMO, *resume, *options, cache=tmp_path / "cache")

    def steps() -> list[int]:
        return [line["step"] for line in metrics(output) if "loss" in line]

    first = start("yes")  # before any checkpoint
    assert first.returncode == 0, first.stderr
    assert f"there is no checkpoint in {output} yet: starting from the beginning" in first.stderr
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert first.stdout.rstrip().splitlines()[-5].startswith("final model:")

    refused = start("99")
    assert refused.returncode == 2
    assert f"RESUME 99: there is no checkpoint-99 in {output}" in refused.stderr
    assert "whole checkpoints: 2, 4, 6" in refused.stderr

    finished = start("yes")
    assert finished.returncode == 0, finished.stderr
    assert "has all steps behind it" in finished.stderr
    assert steps() == [1, 2, 3, 4, 5, 6]

    (output / "checkpoint-6" / "optimizer.pt").unlink()  # as a kill in the middle of another tool's saving leaves it
    named = start("6")
    assert named.returncode == 2
    assert "is not whole: optimizer.pt is missing" in named.stderr
    passed_over = start("yes")
    assert passed_over.returncode == 0, passed_over.stderr
    assert (
        f"continuing from {output / 'checkpoint-4'}; passed over checkpoint-6 (optimizer.pt is missing)"
        in passed_over.stderr
    )
    assert steps() == [1, 2, 3, 4, 5, 6]

    from_two = start("2")
    assert from_two.returncode == 0, from_two.stderr
    assert steps() == [1, 2, 3, 4, 5, 6]
    for done in (first, finished, passed_over, from_two):
        assert "Traceback" not in done.stderr
