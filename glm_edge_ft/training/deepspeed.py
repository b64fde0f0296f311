"""DeepSpeed: what it refuses before the weights are read, how a run that uses it starts, and how others avoid it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_edge_ft.console import show_notice
from glm_edge_ft.distributed import has_several_machines, is_local_main_process

SECONDS_TO_COMPILE = 600.0
SECONDS_TO_SEE_A_LOCK = 30.0


def check_deepspeed_values(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what DeepSpeed itself refuses in completed settings, as pairs of a key and the reason.

    It would say so when it gets the model, after the weights were read. Batch sizes and "auto" are left to the YAML.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    written: dict[str, Any] = {**_without_auto(settings), "train_micro_batch_size_per_gpu": 1}
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        written.pop(key, None)
    try:
        DeepSpeedConfig(written)
    except ValidationError as error:
        sections = {"DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedFP16Config": "fp16"}
        section = [sections[error.title]] if error.title in sections else []
        return [
            (".".join(map(str, (*section, *found["loc"]))), f"is `{found['input']}`: {found['msg']}")
            for found in error.errors()
        ]
    except Exception as error:  # whatever its parser raises, the file is what the user can change
        return [("", f"DeepSpeed refuses these settings: {type(error).__name__}: {error}")]
    return _missing_tools(settings.get("zero_optimization", {}))


def _missing_tools(zero: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what this machine lacks for the operators that DeepSpeed compiles at first use."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    devices = {key: zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    missing = [
        (f"zero_optimization.{key}.device", "is `nvme`, for which DeepSpeed needs the library libaio (libaio-dev)")
        for key, device in devices.items()
        if device == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False)
    ]
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    needed = {"deepspeed_shm_comm": on_cpu, "cpu_adam": devices["offload_optimizer"] != "none"}
    compiles = [name for name, is_needed in needed.items() if is_needed and not installed_ops.get(name)]
    if compiles and not (shutil.which(get_cxx_compiler()) and is_ninja_available()):
        what = f"DeepSpeed compiles {' and '.join(compiles)} for this run: install ninja and a C++ compiler (g++)"
        missing.append(("", what))
    return missing


def _without_auto(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}


def init_deepspeed() -> None:
    """Let DeepSpeed join the process group, over which ZeRO-3 shards the weights while they are read.

    On GPUs accelerate has done so; on the CPU it starts the group without DeepSpeed, and for one process none.
    """
    import torch
    from deepspeed import comm

    if is_local_main_process():
        wait_for_compilations()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the others load an operator only after stale locks are removed
    if not comm.is_initialized():
        default = "nccl" if torch.cuda.is_available() else "gloo"
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else default
        with contextlib.redirect_stdout(io.StringIO()):  # each rank prints there that an operator was built
            comm.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def wait_for_compilations() -> None:
    """Wait while another process compiles DeepSpeed's operators; remove the locks that killed processes left.

    DeepSpeed compiles its operators at first use, within some minutes; torch waits for another's lock there without
    end and without a word. The process that compiles keeps its lock file open. One on another machine that shares the
    folder, or in another container, is not seen: a new lock is given some time.
    """
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    patience = SECONDS_TO_COMPILE if has_several_machines() else SECONDS_TO_SEE_A_LOCK
    for lock in [lock for lock in root.glob("**/lock") if lock.parent.name in installed_ops]:
        told = None
        while lock.exists():
            owner = _process_with(lock)
            with contextlib.suppress(FileNotFoundError):
                if owner is None and time.time() - lock.stat().st_mtime > patience:
                    lock.unlink()
                    show_notice(f"{lock}: removed; a run that was killed left it, and later runs would wait for it")
                    break
            whom = f"process {owner}" if owner else f"a process that is not seen here, at most {patience:.0f} s"
            if whom != told:
                show_notice(f"{lock}: waiting for {whom}, which compiles this operator of DeepSpeed")
            told = whom
            time.sleep(1)


def _process_with(file: Path) -> int | None:
    """Return the id of a process of this machine that has a file open."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(opened.path == str(file.resolve()) for opened in process.open_files()):
                return int(process.pid)
    return None


def skip_deepspeed_import() -> None:
    """Keep accelerate from importing DeepSpeed where a run does not use it.

    accelerate 1.15 imports it wherever it is installed, to ask whether a model is wrapped in its engine. That takes
    seconds, prints warnings, and fails on machines where DeepSpeed was built for other libraries.
    """
    import accelerate.utils.other

    accelerate.utils.other.is_deepspeed_available = lambda: False
