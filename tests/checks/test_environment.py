"""What a run takes from its environment: one GPU, and no setting behind the config."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm_edge_ft.checks.environment import unset_overriding_variables, use_one_gpu
from glm_edge_ft.deploy.evaluate import evaluate
from glm_edge_ft.errors import UserError
from tests.launch import REPOSITORY
from tests.runs import write_config
from tests.test_distributed import OF_TORCHRUN, WHOLE, set_variables


def run_script(folder: Path, script: Path, arguments: list[str], variables: dict[str, str]) -> tuple[int, str]:
    """Run a script on a small model and return its exit code and what it printed on stderr."""
    config = write_config(folder / "output", max_steps=2)
    command = [sys.executable, str(script), str(folder / "data"), str(folder / "model"), str(config), *arguments]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=600)
    return done.returncode, done.stderr


def test_a_variable_without_the_others_ends_the_run_at_once(chat_folder: Path) -> None:
    """K4: with the other mistakes of the run, before anything heavy is imported."""
    arguments = ["--set", "training_args.learning_rate=fast"]
    code, said = run_script(chat_folder, REPOSITORY / "finetune.py", arguments, {"WORLD_SIZE": "4"})
    assert code == 2
    assert said.startswith("error: 2 problems in the input; nothing was trained\nWORLD_SIZE=4: ")
    assert "unset WORLD_SIZE" in said


# As on a machine with two GPUs; transformers then wants to share each batch between them.
TWO_GPUS = """
import runpy, sys, torch
torch.cuda.device_count = lambda: 2
class Forbidden(torch.nn.DataParallel):
    def __init__(self, *_):
        raise AssertionError("DataParallel")
torch.nn.DataParallel = Forbidden
sys.path.insert(0, REPOSITORY)
runpy.run_path(REPOSITORY + "/finetune.py", run_name="__main__")
"""

SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "FSDP_OFFLOAD_PARAMS": "true",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    "NVIDIA_TF32_OVERRIDE": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
}


def test_a_plain_start_uses_one_gpu_and_the_config_alone(chat_folder: Path) -> None:
    """K3: a notice names the line for all GPUs; variables that would change how the run computes are named as well."""
    script = chat_folder / "two_gpus.py"
    script.write_text(TWO_GPUS.replace("REPOSITORY", repr(str(REPOSITORY))), encoding="utf-8")
    code, said = run_script(chat_folder, script, ["--set", "training_args.use_cpu=false"], SETTINGS)
    assert code == 0, said
    assert f"torchrun --standalone --nnodes=1 --nproc_per_node=2 {REPOSITORY / 'finetune.py'} " in said
    assert all(f"{name}={value}" in said for name, value in SETTINGS.items())
    computed = json.loads((chat_folder / "output" / "run.json").read_text(encoding="utf-8"))["computed"]
    expected = {"precision": "fp32", "weights": ["float32"], "engine": "plain", "world_size": 1, "compile": "no"}
    assert computed.items() >= expected.items()


def test_an_evaluation_uses_one_gpu_too(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """K3: transformers would share its batches as well."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.nn.DataParallel, "__init__", lambda *_: pytest.fail("DataParallel"))
    data, settings = chat_folder / "data" / "test.jsonl", ("training_args.use_cpu=false",)
    evaluate(data, (str(chat_folder / "model"),), chat_folder / "out", overrides=settings)
    assert (chat_folder / "out" / "metrics.jsonl").is_file()


@pytest.mark.parametrize(
    ("variables", "count", "visible", "left"),
    [
        ({}, 2, None, "0"),
        ({}, 2, "3,1", "3"),
        ({}, 1, "3", "3"),
        ({}, 1, None, None),
        (WHOLE | OF_TORCHRUN, 2, "3,1", "3,1"),
        (WHOLE | OF_TORCHRUN, 1, "3", "3"),  # a launcher that shows each process its own GPU
    ],
)
def test_which_gpus_a_process_sees(
    variables: dict[str, str], count: int, visible: str | None, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K3: the first of those that the user names; what a launcher set up stays."""
    set_variables(monkeypatch, variables)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    use_one_gpu({})
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """K3: NCCL would refuse two processes on one GPU, after the weights were read; CPUs take any number."""
    set_variables(monkeypatch, WHOLE | {"LOCAL_WORLD_SIZE": "4"})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    use_one_gpu({"use_cpu": True})
    with pytest.raises(UserError, match="4 processes were started on a machine with 2 GPUs"):
        use_one_gpu({})


def test_variables_that_only_name_the_machine_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """K3: which GPU, how many threads, where caches are."""
    kept = {
        "CUDA_VISIBLE_DEVICES": "0",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in kept.items():
        monkeypatch.setenv(name, value)
    assert not set(kept) & {text.partition("=")[0] for text in unset_overriding_variables()}
