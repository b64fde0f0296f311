"""The process group on CPUs; DeepSpeed: joined where a run uses it, kept out where it does not."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from glm_edge_ft.console import show_notice
from glm_edge_ft.node import is_first_of_node

SECONDS_TO_COMPILE = 600


def be_group_of_one() -> None:
    """Say to DeepSpeed what torchrun would have said, where it did not start this process.

    Without it DeepSpeed looks for an MPI launcher, and ends the run where there is none.
    """
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)


def join_group_on_cpu(backend: str | None, timeout_seconds: float) -> None:
    """Join the group of torchrun's processes on CPUs, where transformers would do so without the config's time limit.

    Args:
        backend: of the collectives; gloo by default.
        timeout_seconds: how long a collective waits for a process that does not answer.
    """
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend or "gloo", timeout=timedelta(seconds=timeout_seconds))


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
        section = {"DeepSpeedZeroConfig": ("zero_optimization",)}.get(error.title, ())
        return [
            (".".join(map(str, (*section, *found["loc"]))), f"is `{found['input']}`: {found['msg']}")
            for found in error.errors()
        ]
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        return [("", f"DeepSpeed refuses these settings: {error}")]
    return []


def _without_auto(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}


def start_deepspeed() -> None:
    """Let DeepSpeed join the process group, over which ZeRO-3 shares the weights while they are read.

    On GPUs accelerate has done so; on the CPU it starts the group and leaves DeepSpeed out of it, and for one process
    it starts none.
    """
    import torch

    remove_stale_locks()
    from deepspeed import comm

    if not comm.is_initialized():
        of_machine = "nccl" if torch.cuda.is_available() else "gloo"
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else of_machine
        with contextlib.redirect_stdout(io.StringIO()):  # each rank prints there that an operator was built
            comm.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def remove_stale_locks() -> None:
    """Remove the locks of compilations that were killed: torch waits for such a lock without end and without a word.

    DeepSpeed compiles its small operators at first use, into torch's folder of extensions, within a minute or two.
    """
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/lock") if is_first_of_node() else ():
        if lock.parent.name in installed_ops and time.time() - lock.stat().st_mtime > SECONDS_TO_COMPILE:
            lock.unlink(missing_ok=True)
            show_notice(f"{lock}: removed, a run that was killed had left it and every later one would wait for it")


def keep_deepspeed_out() -> None:
    """Keep accelerate from importing DeepSpeed where a run does not use it.

    accelerate 1.15 imports it wherever it is installed, to ask whether a model is wrapped in its engine. That takes
    seconds, prints warnings, and fails on machines where DeepSpeed was built for other libraries.
    """
    import accelerate.utils.other

    accelerate.utils.other.is_deepspeed_available = lambda: False
