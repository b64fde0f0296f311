"""DeepSpeed: how a run that uses it starts, and how others avoid it."""

from __future__ import annotations

import contextlib
import io
import os
import time
from pathlib import Path

from glm_edge_ft.console import show_notice
from glm_edge_ft.distributed import has_several_machines, is_local_main_process

SECONDS_TO_COMPILE = 600.0
SECONDS_TO_SEE_A_LOCK = 30.0


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
