"""The process group on CPUs; DeepSpeed: joined where a run uses it, kept out where it does not."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from glm_edge_ft.console import show_notice
from glm_edge_ft.environment import launch
from glm_edge_ft.errors import UserError
from glm_edge_ft.machines import are_several
from glm_edge_ft.node import is_first_of_node

SECONDS_TO_COMPILE = 600.0
SECONDS_TO_SEE_A_LOCK = 30.0


def be_group_of_one() -> None:
    """Say to DeepSpeed what torchrun would have said, where it did not start this process.

    Without it DeepSpeed looks for an MPI launcher, and ends the run where there is none.
    """
    if launch().launcher != "none":
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)


def settle_gpus(training_args: Mapping[str, Any]) -> None:
    """Keep a process that no launcher started to its first GPU, with a notice where there are more.

    transformers would share each batch among all of them by `nn.DataParallel`, whose copies of the model are bound to
    the first GPU's weights.

    Raises UserError where a launcher started more processes than there are GPUs.
    """
    import torch

    count, here, visible = torch.cuda.device_count(), launch(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if count == 0 or training_args.get("use_cpu"):
        return
    if here.launcher != "none":
        shows_all = count > 1 or visible is None  # some launchers show each process its own GPU alone
        if here.local_world_size > count and shows_all and not training_args.get("ddp_backend"):
            what = f"{here.local_world_size} processes were started on a machine with {count} GPU" + "s" * (count > 1)
            raise UserError.single("--nproc_per_node", what, f"write --nproc_per_node={count}")
    elif count > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = (visible or "0").partition(",")[0]  # read at the first use of a GPU
        line = f"torchrun --standalone --nnodes=1 --nproc_per_node={count} {shlex.join(sys.argv)}"
        show_notice(f"one of {count} GPUs is used; to use all: {line}")


def join_group_on_cpu(backend: str | None, timeout_seconds: float) -> None:
    """Join the group of torchrun's processes on CPUs, where transformers would do so without the config's time limit.

    Args:
        backend: of the collectives; gloo by default.
        timeout_seconds: how long a collective waits for a process that does not answer.
    """
    import torch

    if launch().world_size > 1 and not torch.distributed.is_initialized():
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


def start_deepspeed() -> None:
    """Let DeepSpeed join the process group, over which ZeRO-3 shares the weights while they are read.

    On GPUs accelerate has done so; on the CPU it starts the group and leaves DeepSpeed out of it, and for one process
    it starts none.
    """
    import torch

    if is_first_of_node():
        wait_for_compilations()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the others load an operator only where its lock says the truth
    from deepspeed import comm

    if not comm.is_initialized():
        of_machine = "nccl" if torch.cuda.is_available() else "gloo"
        backend = torch.distributed.get_backend() if torch.distributed.is_initialized() else of_machine
        with contextlib.redirect_stdout(io.StringIO()):  # each rank prints there that an operator was built
            comm.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def wait_for_compilations() -> None:
    """Wait while another process compiles DeepSpeed's operators, and remove the locks of those that were killed.

    DeepSpeed compiles its small operators at first use, into torch's folder of extensions, within some minutes; torch
    waits for a lock there without end and without a word. The process that compiles keeps its lock open. One on
    another machine that shares the folder, or in another container, is not seen: so a new lock is given some time.
    """
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    patience = SECONDS_TO_COMPILE if are_several() else SECONDS_TO_SEE_A_LOCK
    for lock in [lock for lock in root.glob("**/lock") if lock.parent.name in installed_ops]:
        said = None
        while (age := _age(lock)) is not None:
            owner = _process_with(lock)
            if owner is None and age > patience:
                lock.unlink(missing_ok=True)
                show_notice(f"{lock}: removed, a run that was killed had left it and every later one would wait for it")
            elif said is None or said != owner:
                whom = f"process {owner}" if owner else f"a process that is not seen here, for at most {patience:.0f} s"
                show_notice(f"{lock}: waiting for {whom}, which compiles this operator of DeepSpeed")
                said = owner
            else:
                time.sleep(1)


def _age(lock: Path) -> float | None:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - lock.stat().st_mtime
    return None


def _process_with(file: Path) -> int | None:
    """Return the number of a process of this machine that has a file open."""
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(opened.path == str(file.resolve()) for opened in process.open_files()):
                return int(process.pid)
    return None


def keep_deepspeed_out() -> None:
    """Keep accelerate from importing DeepSpeed where a run does not use it.

    accelerate 1.15 imports it wherever it is installed, to ask whether a model is wrapped in its engine. That takes
    seconds, prints warnings, and fails on machines where DeepSpeed was built for other libraries.
    """
    import accelerate.utils.other

    accelerate.utils.other.is_deepspeed_available = lambda: False
