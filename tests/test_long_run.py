"""A long run does not grow: memory, open files, threads and temporary files stay as they were (`-m fault`)."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import TokenizerMaker
from tests.launch import start
from tests.model_folders import save_model_folder
from tests.runs import LORA, write_chat_data

STEPS = 2_000
MOST_GROWTH = 0.03  # of the resident memory, from the second quarter of the run to the last one


@dataclass(frozen=True)
class Sample:
    """What a run held at a moment."""

    step: int
    resident: int
    open_files: int
    threads: int
    children: int
    files: int


def last_step(output: Path) -> int:
    """Return the step of the last line of metrics.jsonl, 0 before there is one."""
    path = output / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


@pytest.mark.fault
def test_two_thousand_steps_leave_no_trace(tmp_path: Path, make_tokenizer: TokenizerMaker) -> None:
    """With evaluation, replies, saving and loader processes: each quarter of the run holds what the second one held."""
    save_model_folder(tmp_path / "model", make_tokenizer("glm"))
    write_chat_data(tmp_path / "data")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    settings: dict[str, Any] = {
        "peft": LORA,
        "val": "dev.jsonl",
        "max_steps": STEPS,
        "logging_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 100,
        "save_steps": 50,
        "save_total_limit": 2,
    }
    output = tmp_path / "output"
    environment = {"TMPDIR": str(temporary)}
    run = start(output, tmp_path / "data", tmp_path / "model", environment=environment, **settings)
    process = psutil.Process(run.process.pid)
    samples: list[Sample] = []
    while run.process.poll() is None:
        time.sleep(0.5)
        try:
            names = [path for path in output.rglob("*") if "predictions" not in path.parts] if output.is_dir() else []
            samples.append(
                Sample(
                    last_step(output),
                    process.memory_info().rss,
                    process.num_fds(),
                    process.num_threads(),
                    len(process.children(recursive=True)),
                    len(names) + len(list(temporary.rglob("*"))),
                )
            )
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue
    run.end()
    quarters = [
        [sample for sample in samples if STEPS * quarter / 4 <= sample.step < STEPS * (quarter + 1) / 4]
        for quarter in range(4)
    ]
    assert min(len(quarter) for quarter in quarters[1:]) >= 5
    resident = [statistics.median(sample.resident for sample in quarter) for quarter in quarters[1:]]
    print(f"\nresident memory in MB, quarters 2 to 4: {[round(value / 1e6, 1) for value in resident]}")
    for name in ("open_files", "threads", "children", "files"):
        most = [max(getattr(sample, name) for sample in quarter) for quarter in quarters[1:]]
        print(f"{name}, quarters 2 to 4: {most}")
        assert most[2] <= most[0], name
    assert resident[2] <= resident[0] * (1 + MOST_GROWTH)
    assert list(temporary.iterdir()) == []
