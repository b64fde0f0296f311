"""One run in a process of its own, forked from this one, and everything that can be observed of it.

What merely repeats the config (`run.json`, `adapter_config.json`) does not count, nor do times.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.utils.data
import transformers.utils.logging
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.debug_utils import DebugUnderflowOverflow
from transformers.generation.utils import GenerationMixin

from glm_edge_ft.errors import UserError
from tests.runs import do_run

_REPEATS_THE_CONFIG = ("run.json", "adapter_config.json", "README.md")
_SETTINGS = ("DataLoaderConfiguration", "GradientAccumulationPlugin", "ProjectConfiguration", "TorchDynamoPlugin")
_TIMES = re.compile(r"runtime|per_second|flos|tokens_per|memory")
Observation = dict[str, Any]


def observe(folder: Path, data: Path, model: str, ranks: int, settings: Mapping[str, Any]) -> Observation:
    """Do one run and return what was seen of it.

    Args:
        folder: an empty one for output and reports.
        data: DATA_DIR.
        model: MODEL.
        ranks: processes of the run.
        settings: those of `tests.runs.write_config`.

    Returns:
        `end`: done, refused or failed; `said`: notices, or what was refused or raised; `seen`: all else by its kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                _be_rank(rank, ranks, folder)
                _run(folder, rank, data, model, settings)
            finally:
                os._exit(1)  # never back into the tests
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    files = [folder / f"report-{rank}.json" for rank in range(ranks)]
    if not all(file.is_file() for file in files):
        return {"end": "failed", "said": [(folder / "err-0").read_text(encoding="utf-8", errors="replace")[-600:]]}
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if any(report["end"] != "done" for report in reports):
        return next(report for report in reports if report["end"] != "done")
    printed = (folder / "err-0").read_text(encoding="utf-8", errors="replace")
    notices = [line for line in printed.splitlines() if line.startswith("note: ") and "encoded data" not in line]
    outside = [line for line in printed.splitlines() if not line.startswith("note: ")]
    seen = {
        **{f"calls of rank {rank}": report["seen"] for rank, report in enumerate(reports)},
        "files": _files(folder),
        "printed": _without_numbers((folder / "out-0").read_text(encoding="utf-8") + "\n".join(outside), folder),
    }
    return {"end": "done", "said": notices, "seen": seen}


def _be_rank(rank: int, ranks: int, folder: Path) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", 1, closefd=False) for descriptor in (1, 2))
    os.chdir(folder)
    if ranks > 1:
        port = 20_000 + os.getppid() % 20_000
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in launch.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def _run(folder: Path, rank: int, data: Path, model: str, settings: Mapping[str, Any]) -> None:
    """Do the run with everything watched that it hands to the libraries, report it, and end this process."""
    calls: dict[str, list[Any]] = {}
    environment = dict(os.environ)
    report: Observation
    try:
        _watch(calls)
        do_run(folder / "output", data, model, **settings)
        changed = {name: value for name, value in os.environ.items() if environment.get(name) != value}
        state = {
            "environment": changed,
            "verbosity": transformers.utils.logging.get_verbosity(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
        report = {"end": "done", "said": [], "seen": {**calls, "state": state}}
    except UserError as error:
        report = {"end": "refused", "said": [str(error)], "fixes": [problem.fix for problem in error.problems]}
    except BaseException as error:
        report = {"end": "failed", "said": [f"{type(error).__name__}: {error}", traceback.format_exc()[-600:]]}
    sys.stdout.flush()
    sys.stderr.flush()
    text = json.dumps(report, default=str).replace(str(folder), "FOLDER")
    (folder / f"report-{rank}.json").write_text(text, encoding="utf-8")
    os._exit(0)


def _watch(calls: dict[str, list[Any]]) -> None:
    """Note the arguments of what the run builds, and of what it generates with."""
    watched: list[tuple[Any, str]] = [
        (torch.utils.data.DataLoader, "__init__"),
        (torch.optim.Optimizer, "__init__"),
        (torch.optim.Optimizer, "load_state_dict"),
        (torch.nn.parallel.DistributedDataParallel, "__init__"),
        (Accelerator, "__init__"),
        (PreTrainedModel, "activation_checkpointing_enable"),
        (torch.distributed, "init_process_group"),
        (torch, "compile"),
        (torch.cuda, "empty_cache"),
        (DebugUnderflowOverflow, "__init__"),
    ]
    for owner, name in watched:
        _note_calls(owner, name, calls)
    for name in ("_get_logits_processor", "_get_stopping_criteria"):
        _note_parts(name, calls)


def _note_calls(owner: Any, name: str, calls: dict[str, list[Any]]) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def noting(*args: Any, **kwargs: Any) -> Any:
        kind = f"{getattr(owner, '__name__', owner)}.{name}"
        which = type(args[0]).__name__ if args and name == "__init__" else ""
        calls.setdefault(kind, []).append([which, _plain([*args[1:]]), _plain(kwargs)])
        return original(*args, **kwargs)

    setattr(owner, name, noting)


def _note_parts(name: str, calls: dict[str, list[Any]]) -> None:
    original: Callable[..., Any] = getattr(GenerationMixin, name)

    @functools.wraps(original)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        parts = original(self, *args, **kwargs)
        noted = [[type(part).__name__, _plain(vars(part))] for part in parts]
        if noted not in calls.setdefault(name, []):
            calls[name].append(noted)
        return parts

    setattr(GenerationMixin, name, noting)


def _plain(value: Any, depth: int = 4) -> Any:
    """Return what can be compared between two processes: numbers, texts, and the kinds of all else."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, torch.Tensor):
        return value.tolist() if value.numel() < 100 else list(value.shape)
    if isinstance(value, Mapping) and depth:
        return {str(key): _plain(item, depth - 1) for key, item in value.items() if key != "params"}
    if isinstance(value, list | tuple | set) and depth:
        return [_plain(item, depth - 1) for item in list(value)[:50]]
    if type(value).__name__ in _SETTINGS and depth:
        return [type(value).__name__, _plain(vars(value), depth - 1)]
    return type(value).__name__


def _files(folder: Path) -> dict[str, Any]:
    """Return each file's name under `folder` with what is in it, times left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or "/" not in name or path.name in _REPEATS_THE_CONFIG:
            continue
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[name] = [{key: value for key, value in line.items() if not _TIMES.search(key)} for line in lines]
        elif path.suffix == ".safetensors":
            weights = load_file(path)
            told = "".join(f"{key} {list(w.shape)} {w.dtype} {_digest(w)}" for key, w in weights.items())
            found[name] = hashlib.sha256(told.encode()).hexdigest()[:16]
        elif path.suffix == ".jsonl":
            found[name] = path.read_text(encoding="utf-8")
        else:
            found[re.sub(r"\d{5,}.*", "N", name)] = "there"
    return found


def _digest(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _without_numbers(text: str, folder: Path) -> list[str]:
    text = text.replace(str(folder), "FOLDER")
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "\n")
    lines = {re.sub(r"[0-9][0-9.,:]*", "N", line).strip() for line in text.splitlines() if "encod" not in line}
    return sorted(lines - {""})
