"""SIGKILL at any moment: the same command with `yes` ends as a run does that nobody killed, bit for bit.

`python -m pytest -m fault -s tests/test_kill.py` kills more than 200 times and prints what the kills hit; the default
run kills a few times. A run is started, killed, continued, killed again, until it reaches its end; then the next one
begins. Two rows of such runs go on side by side, each on a core of its own. The moments follow from a seed: some lie
anywhere in the life of a process, others wait for a checkpoint that is being written, for one that has just got its
name, for the final model, or for a line of the log. `KILLS=20` before the command sets another number for each kind.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from glm_edge_ft.training.checkpoints import FINAL_FOLDER, STAGING_FOLDER, find_checkpoints
from tests.conftest import TokenizerMaker
from tests.launch import Started, launch, start
from tests.model_folders import save_model_folder
from tests.runs import LORA, assert_same_bits, do_run, metrics, write_chat_data
from tests.vision_folders import save_vision_folder, write_vision_data

pytestmark = pytest.mark.fault(by_default=True)

SECONDS_BETWEEN_LOOKS = 0.002
CORES, SIDE_BY_SIDE_FROM = 2, 10  # so many kills are worth two runs at a time
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # two runs share two cores
TIMED = ("_per_second", "_runtime", "peak_memory_bytes")
EVERY_STEP: dict[str, Any] = {"max_steps": 6, "save_steps": 1}
BEST: dict[str, Any] = {
    "val": "dev.jsonl",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "save_total_limit": 2,
}


KILLS_ITSELF = """
import os, signal, sys

awaited, file = os.environ["KILL_BEFORE"], os.environ["KILL_AT"]

def kill_before(event, arguments):
    if event == awaited and file in map(str, arguments):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill_before)
"""


@dataclass(frozen=True)
class Kind:
    """A kind of run: the settings of its config, its script and its number of processes."""

    settings: dict[str, Any] = field(default_factory=dict)
    script: str = "finetune.py"
    processes: int = 1


KINDS = {
    "lora": Kind({"peft": LORA, "test": "test.jsonl"}),
    "full": Kind({"peft": None, **BEST, "predict_with_generate": False}),
    "vision": Kind({"peft": LORA, "max_steps": 4, "dataloader_num_workers": 1}, "finetune_vision.py"),
    "two ranks": Kind({"peft": LORA, "max_steps": 4, "per_device_train_batch_size": 2}, processes=2),
}


@dataclass(frozen=True)
class Bench:
    """Where the runs of a test happen.

    Attributes:
        go: starts a run of the kind in an output folder, with or without RESUME.
        whole: the output folder of the run that nobody killed.
        seconds: how long that one took.
    """

    go: Callable[..., Started]
    whole: Path
    seconds: float


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path, backend: Tokenizer, make_tokenizer: TokenizerMaker) -> Bench:
    """Do a whole run of the kind that the test asks for."""
    kind = KINDS[request.getfixturevalue("kind")]
    model, data = tmp_path / "model", tmp_path / "data"
    if kind.script == "finetune.py":
        save_model_folder(model, make_tokenizer("glm"))
        write_chat_data(data)
    else:
        save_vision_folder(model, backend)
        write_vision_data(data)

    def go(output: Path, resume: str | None = None) -> Started:
        settings = EVERY_STEP | kind.settings
        how: dict[str, Any] = {"processes": kind.processes, "script": kind.script, "environment": ONE_THREAD}
        return start(output, data, model, resume=resume, **how, **settings)

    began = time.monotonic()
    go(tmp_path / "whole").end()
    return Bench(go, tmp_path / "whole", time.monotonic() - began)


def choose_moment(rng: Random, output: Path, seconds: float) -> Callable[[], bool]:
    """Return a function that tells whether the moment to kill has come."""
    began = time.monotonic()
    kind = rng.choice(("any", "any", "saving", "named", "logged", "final"))
    wanted = rng.choice((1, 1, 2, 3))
    if kind == "any":
        end = began + rng.uniform(0, seconds)
        return lambda: time.monotonic() > end
    before = len(list(output.glob("checkpoint-*")))
    size = log_size(output)
    delay = 0.0 if kind == "named" else rng.uniform(0, 0.01 if kind == "final" else 0.05)
    seen: list[float] = []

    def has_come() -> bool:
        named = len(list(output.glob("checkpoint-*"))) - before
        if kind == "saving":
            happened = named >= wanted - 1 and any(output.glob(f"{STAGING_FOLDER}/*"))
        elif kind == "named":
            happened = named >= wanted
        elif kind == "final":
            happened = any(output.glob(f"{STAGING_FOLDER}/{FINAL_FOLDER}/*"))
        else:
            happened = log_size(output) != size
        if happened and not seen:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() >= seen[0] + delay

    return has_come


def log_size(output: Path) -> int:
    """Return the bytes of metrics.jsonl."""
    path = output / "metrics.jsonl"
    return path.stat().st_size if path.is_file() else 0


def kill_at_random(bench: Bench, output: Path, rng: Random) -> str | None:
    """Start or continue the run and kill it; return what the kill hit, or None where the run ended before."""
    run = bench.go(output, "yes")
    has_come = choose_moment(rng, output, bench.seconds)
    while not has_come():
        if run.process.poll() is not None:
            run.end()
            return None
        time.sleep(SECONDS_BETWEEN_LOOKS)
    run.kill()
    if run.process.returncode == 0:
        return None
    broken = {found.path.name: found.defect for found in find_checkpoints(output) if found.defect}
    assert broken == {}, run.said()
    if is_readable(output):
        assert_same_bits(bench.whole, output)
    if any(output.glob(f"{STAGING_FOLDER}/{FINAL_FOLDER}/*")):
        return "the final model half written"
    if any(output.glob(f"{STAGING_FOLDER}/checkpoint-*/*")):
        return "a checkpoint half written"
    if not any(output.glob("checkpoint-*")):
        return "no checkpoint yet"
    return "training or later" if "memory: " in run.said() else "the start of a run that is continued"


def is_readable(output: Path) -> bool:
    """Return whether a reader takes what lies in the root of an output folder for a model."""
    return any((output / name).is_file() for name in ("adapter_config.json", "config.json"))


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("full", 3),
        *(pytest.param(*case, marks=pytest.mark.fault) for case in (("lora", 100), ("full", 100))),
        *(pytest.param(*case, marks=pytest.mark.fault) for case in (("vision", 20), ("two ranks", 12))),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_never_was(
    bench: Bench, tmp_path: Path, kind: str, kills: int
) -> None:
    """R1, R3: whole checkpoints alone are seen; weights, optimizer, random state and log are those of the whole run."""
    kills = int(os.environ.get("KILLS", kills))
    rows = 1 if kills < SIDE_BY_SIDE_FROM else CORES // KINDS[kind].processes
    shares = [kills // rows + (row < kills % rows) for row in range(rows)]
    with ThreadPoolExecutor(rows) as pool:
        done = [pool.submit(kill_many, bench, tmp_path, kind, count(row + 1, rows), shares[row]) for row in range(rows)]
        hits, runs = zip(*[future.result() for future in done], strict=True)
    hit = sum(hits, Counter[str]())
    assert hit.total() == kills
    print(f"\n{kind}: {hit.total()} kills in {sum(runs)} runs: {dict(hit)}")


def kill_many(bench: Bench, folder: Path, kind: str, seeds: Iterator[int], kills: int) -> tuple[Counter[str], int]:
    """Kill run after run until their number is reached, and compare each end; return what was hit, and the runs."""
    hit: Counter[str] = Counter()
    runs = 0
    while hit.total() < kills:
        seed = next(seeds)
        runs += 1
        rng = Random(f"{kind}-{seed}")
        output = folder / f"killed-{seed}"
        while hit.total() < kills and (what := kill_at_random(bench, output, rng)) is not None:
            hit[what] += 1
            print(end=".", flush=True)
        if hit.total() == kills:
            bench.go(output, "yes").end()  # where it had ended, nothing is trained
        assert_same_ends(bench.whole, output, f"{kind}, seed {seed}")
        shutil.rmtree(output)
        print(f"{kind}, seed {seed}: {dict(hit)}", flush=True)
    return hit, runs


def assert_same_ends(whole: Path, killed: Path, label: str) -> None:
    """Fail unless the killed run left what the whole one did, and nothing besides."""
    names = {path.name for path in killed.iterdir()} - {"earlier"}  # what a start before any checkpoint set aside
    assert names == {path.name for path in whole.iterdir()}, label
    assert_same_bits(whole, killed)
    assert untimed(metrics(killed)) == untimed(metrics(whole)), label
    for path in whole.glob("predictions/*"):
        assert (killed / "predictions" / path.name).read_bytes() == path.read_bytes(), label
    for checkpoint in find_checkpoints(whole):
        other = killed / checkpoint.path.name
        assert_same_bits(checkpoint.path, other)
        for path in sorted(checkpoint.path.glob("*.pt*")):
            expected, found = (
                torch.load(folder / path.name, weights_only=False) for folder in (checkpoint.path, other)
            )
            assert_equal(expected, found, f"{label}: {checkpoint.path.name}/{path.name}")
        state, expected = (
            json.loads((folder / "trainer_state.json").read_text()) for folder in (other, checkpoint.path)
        )
        assert untimed(state.pop("log_history")) == untimed(expected.pop("log_history")), label
        assert state.pop("best_model_checkpoint") == at(expected.pop("best_model_checkpoint"), whole, killed), label
        assert state == expected, label


def at(path: str | None, whole: Path, killed: Path) -> str | None:
    """Return a path of the whole run as the killed one has it."""
    return path and path.replace(str(whole), str(killed))


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the log without what depends on the clock, and without the summary of the last start."""
    return [
        {key: value for key, value in line.items() if not key.endswith(TIMED)}
        for line in lines
        if "train_runtime" not in line
    ]


def assert_equal(first: Any, second: Any, place: str) -> None:
    """Fail unless two states are the same, tensors bit for bit."""
    assert type(first) is type(second), place
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key, value in first.items():
            assert_equal(value, second[key], f"{place}: {key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), place
        for number, value in enumerate(first):
            assert_equal(value, second[number], f"{place}: {number}")
    else:
        assert bool((first == second) if not hasattr(first, "shape") else (first == second).all()), place


@pytest.mark.parametrize(
    ("processes", "event", "file"),
    [
        (1, "os.rename", "adapter_config.json"),
        pytest.param(1, "open", f"{STAGING_FOLDER}/{FINAL_FOLDER}/adapter_config.json", marks=pytest.mark.fault),
        pytest.param(2, "os.rename", "adapter_config.json", marks=pytest.mark.fault),
    ],
)
def test_a_run_that_is_killed_while_it_puts_its_final_model_in_place(
    chat_folder: Path, capsys: pytest.CaptureFixture[str], processes: int, event: str, file: str
) -> None:
    """R1: before the last file, with all others in place, and before the model is written; `yes` puts it there."""
    output, data, model = chat_folder / "output", chat_folder / "data", chat_folder / "model"
    settings: dict[str, Any] = {"save_steps": 6, "per_device_train_batch_size": 4 // processes}
    (chat_folder / "sitecustomize.py").write_text(KILLS_ITSELF, encoding="utf-8")
    aim = {"PYTHONPATH": str(chat_folder), "KILL_BEFORE": event, "KILL_AT": str(output / file)}
    start(output, data, model, processes=processes, environment=aim, **settings).end(None)
    assert any(output.glob(f"{STAGING_FOLDER}/{FINAL_FOLDER}/*"))
    assert (output / "adapter_model.safetensors").is_file() == (event == "os.rename")
    assert not is_readable(output)
    capsys.readouterr()
    do_run(output, data, model, resume="yes", **settings)
    assert f"{output / 'checkpoint-6'} has all steps behind it: nothing is trained" in capsys.readouterr().err
    whole = chat_folder / "whole"
    if processes == 1:
        do_run(whole, data, model, **settings)
    else:
        launch(whole, data, model, processes=processes, **settings)
    assert_same_bits(whole, output)
    assert {path.name for path in output.iterdir()} == {path.name for path in whole.iterdir()}
    assert is_readable(output)
