"""The processes of a run: the launcher's variables, the process group, waiting for one another, the failure of a peer.

Rank and world size are read here alone. Torch is imported where it is needed: this module is used before the config is
checked.

torchrun ends the processes of its own machine when one of them fails. Processes on other machines would wait for it in
a collective until that times out. Therefore the processes of several machines form a control group (gloo) as soon as
their command lines are checked. Its barriers, which end when training begins, have no time limit that encoding a large
file could exceed, and end at once where a process fails or is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import shlex
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from glm_edge_ft.errors import Problem, ProcessLost, UserError
from glm_edge_ft.files import write_text_atomically

Result = TypeVar("Result")

REQUIRED_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed and accelerate read; every launcher sets them all."""
TORCHRUN_VARIABLES = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
MPI_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""The number of processes, from which accelerate would make a process group."""

# accelerate's families, and what its launcher sets; then torch's, cuBLAS's, oneDNN's and transformers' switches.
_OVERRIDING_VARIABLE = re.compile(
    r"(ACCELERATE|FSDP|FP8|MEGATRON_LM|PARALLELISM_CONFIG|XLA_USE|XLA_DOWNCAST)_.*|SM_(HP_MP|FRAMEWORK)_PARAM\w+"
    r"|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|NVIDIA_TF32_OVERRIDE|(ONEDNN|DNNL)_DEFAULT_FPMATH_MODE"
    r"|CUBLAS_EMULATION_STRATEGY|CUBLAS_EMULATE_\w+_PRECISION"
    r"|TORCHDYNAMO_DISABLE|TORCH_COMPILE_(DISABLE|BACKEND|OVERRIDE_BACKENDS)|TORCHINDUCTOR_EMULATE_PRECISION_CASTS"
    r"|TRANSFORMERS_SDPA_FORCE_GQA|KUBEFLOW_TRAINER_SERVER_URL"  # the latter switches reporting on
)

POLL_SECONDS = 0.5
PREPARATION_LIMIT = timedelta(days=1)
REPORT_LIMIT = timedelta(seconds=5)
CONNECT_LIMIT = timedelta(seconds=60)
"""How long a process that failed waits for those of other machines, which may still import torch."""

# What the errors of gloo, and of NCCL where it finds the other end closed, have in common: torch gives them no class.
_LOST_CONNECTION = ("gloo/transport/", "ncclRemoteError", "remote process exited")


# ---- the launcher ----


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that a launcher started; the defaults are those of a plain start.

    Attributes:
        rank, world_size: its number among all processes, and their number.
        local_rank, local_world_size: the same on this machine.
        machine, machines: the number of this machine, and of all of them; only torchrun tells.
        launcher: none, torchrun, or another one.
        attempt: how often torchrun has restarted the processes.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    machine: int = 0
    machines: int = 1
    launcher: Literal["none", "torchrun", "other"] = "none"
    attempt: int = 0


def launch() -> Launch:
    """Return what the launcher's variables say. A value that is no number, see `check_launcher`, counts as unset."""
    world_size, machine = _number("WORLD_SIZE", 1), _number("GROUP_RANK", 0)
    return Launch(
        _number("RANK", 0),
        world_size,
        _number("LOCAL_RANK", 0),
        _number("LOCAL_WORLD_SIZE", world_size),
        machine,
        _number("GROUP_WORLD_SIZE", machine + 1),
        "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "other" if "RANK" in os.environ else "none",
        _number("TORCHELASTIC_RESTART_COUNT", 0),
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 10 else default


def is_main_process() -> bool:
    """Return whether this is rank 0, which prints and writes for all."""
    return launch().rank == 0


def is_local_main_process() -> bool:
    """Return whether this process does what is done once on each machine."""
    return launch().local_rank == 0


def has_several_machines() -> bool:
    """Return whether torchrun started this run on more than one machine."""
    here = launch()
    return here.launcher == "torchrun" and here.world_size != here.local_world_size


def launch_id(*more: str) -> str:
    """Return a name that all processes of this launch, and no others, have in common."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    return uuid.uuid5(uuid.NAMESPACE_OID, "-".join([*(os.environ.get(name, "") for name in names), *more])).hex


def count_cores() -> int:
    """Return how many cores this process may use: `taskset`, a container's cpuset or a job scheduler may give fewer."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def check_launcher() -> list[Problem]:
    """Return what is wrong with the launcher's variables: libraries would wait for processes that do not exist."""
    found = {name: os.environ[name] for name in (*REQUIRED_VARIABLES, *TORCHRUN_VARIABLES) if name in os.environ}
    if not found:
        several = [f"{name}={os.environ[name]}" for name in MPI_VARIABLES if os.environ.get(name, "1") != "1"]
        what = "mpirun or srun started several processes without the variables of torch.distributed"
        return [Problem(", ".join(several), what, "start torchrun instead, once on each machine")] if several else []
    where = ", ".join(f"{name}={value}" for name, value in found.items())
    fix = f"start with torchrun; for one process: unset {' '.join(found)}"
    if missing := [name for name in REQUIRED_VARIABLES if name not in found]:
        return [Problem(where, f"set in the environment, but {', '.join(missing)} is not", fix)]
    here, most = launch(), 10**9
    limits = {
        "RANK": (0, here.world_size - 1),
        "LOCAL_RANK": (0, here.local_world_size - 1),
        "WORLD_SIZE": (1, most),
        "LOCAL_WORLD_SIZE": (1, here.world_size),
        "GROUP_RANK": (0, here.machines - 1),
        "GROUP_WORLD_SIZE": (1, most),
        "MASTER_PORT": (1, 65535),
    }
    wrong = [name for name, (low, high) in limits.items() if name in found and not low <= _number(name, -1) <= high]
    wrong += [] if found["MASTER_ADDR"].strip() else ["MASTER_ADDR"]
    return [Problem(where, f"set in the environment, but {', '.join(wrong)} cannot be so", fix)] if wrong else []


def unset_launcher_variables() -> None:
    """Remove the launcher's variables, for a command that is always one process."""
    for name in (*REQUIRED_VARIABLES, *TORCHRUN_VARIABLES, *MPI_VARIABLES, "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)


def unset_overriding_variables() -> list[str]:
    """Remove variables by which libraries change precision, engine or compilation; return each as `NAME=value`.

    This has an effect only before the library that reads them is imported.
    """
    names = sorted(name for name in os.environ if _OVERRIDING_VARIABLE.fullmatch(name))
    return [f"{name}={os.environ.pop(name)}" for name in names]


def use_one_gpu(training_args: Mapping[str, Any]) -> str:
    """Restrict a process that no launcher started to its first GPU; return a notice where there are more.

    transformers would share each batch among all of them by `nn.DataParallel`, whose copies of the model are bound to
    the first GPU's weights. Raises UserError where a launcher started more processes than there are GPUs.
    """
    import torch

    count, here, visible = torch.cuda.device_count(), launch(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if count == 0 or training_args.get("use_cpu"):
        return ""
    if here.launcher != "none":
        shows_all = count > 1 or visible is None  # some launchers show each process only its own GPU
        if here.local_world_size > count and shows_all and not training_args.get("ddp_backend"):
            what = f"{here.local_world_size} processes were started on a machine with {count} GPU" + "s" * (count > 1)
            raise UserError.single("--nproc_per_node", what, f"write --nproc_per_node={count}")
        return ""
    if count == 1:
        return ""
    os.environ["CUDA_VISIBLE_DEVICES"] = (visible or "0").partition(",")[0]  # read at the first use of a GPU
    line = f"torchrun --standalone --nnodes=1 --nproc_per_node={count} {shlex.join(sys.argv)}"
    return f"one of {count} GPUs is used; to use all: {line}"


# ---- the process group ----


def set_single_process_env() -> None:
    """Set the variables of a launcher where there is none; without them DeepSpeed would look for MPI."""
    if launch().launcher == "none":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        values = ("0", "0", "1", "127.0.0.1", str(port))
        os.environ.update(zip(REQUIRED_VARIABLES, values, strict=True))


def init_cpu_process_group(backend: str | None, timeout_seconds: float) -> None:
    """Join the process group on CPUs; transformers would do so without the config's `ddp_timeout`.

    Args:
        backend: of the collectives; gloo by default.
        timeout_seconds: how long a collective waits for a process that does not answer.
    """
    import torch

    if launch().world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend or "gloo", timeout=timedelta(seconds=timeout_seconds))


class _Control:
    """The control group of several machines; not used any more once training has begun or a process has failed."""

    group: Any = None  # torch.distributed.ProcessGroupGloo, whose type stub lacks the collectives
    is_closed = False


def connect_machines(timeout_seconds: float) -> None:
    """Form the control group of several machines. Raises ProcessLost, see `barrier`, after `timeout_seconds`."""
    if has_several_machines():
        _exchange(has_failed=False, connect_limit=timedelta(seconds=timeout_seconds), limit=PREPARATION_LIMIT)


def barrier() -> None:
    """Wait until the processes of all machines are here, however long their preparations take.

    Raises ProcessLost where one of them failed or is gone. On one machine this does nothing: torchrun ends all its
    processes.
    """
    if has_several_machines():
        _exchange(has_failed=False, connect_limit=CONNECT_LIMIT, limit=PREPARATION_LIMIT)


def close_control_group() -> None:
    """From now on processes wait for one another in the collectives of training alone."""
    _Control.is_closed = True


def report_failure() -> None:
    """Let the processes that wait in a barrier know that this one failed. Raises nothing."""
    if has_several_machines() and not _Control.is_closed:
        with contextlib.suppress(ProcessLost):
            _exchange(has_failed=True, connect_limit=CONNECT_LIMIT, limit=REPORT_LIMIT)


def _exchange(has_failed: bool, connect_limit: timedelta, limit: timedelta) -> None:
    """Tell all processes whether this one failed, and hear it from all of them."""
    import torch
    from torch.distributed import AllreduceOptions, PrefixStore, ProcessGroupGloo, ReduceOp
    from torch.distributed.rendezvous import rendezvous

    here = launch()
    with explain_peer_failure(lambda: "nothing was trained"):
        if _Control.group is None:
            store = PrefixStore(f"control-{here.attempt}", next(rendezvous("env://", timeout=connect_limit))[0])
            _Control.group = ProcessGroupGloo(store, here.rank, here.world_size, connect_limit)
            atexit.register(setattr, _Control, "group", None)  # its threads, left to the interpreter's end, abort it
        options = AllreduceOptions()
        options.reduceOp = ReduceOp(ReduceOp.MAX)
        options.timeout = limit
        failed = torch.tensor([here.rank if has_failed else -1])
        _Control.group.allreduce([failed], options).wait()
    if failed >= 0:
        close_control_group()
        raise ProcessLost(
            f"process {int(failed)} of {here.world_size} failed; its output, perhaps on another machine, says why; "
            "nothing was trained"
        )


@contextmanager
def explain_peer_failure(advice: Callable[[], str]) -> Iterator[None]:
    """Turn the loss of the connection to another process into ProcessLost, whose message ends with `advice()`."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        close_control_group()
        first_line = str(error).strip().partition("\n")[0]
        reason = re.sub(r"^\[\S+\] ", "", first_line).partition(". ")[0]  # without the place in the library's source
        raise ProcessLost(
            f"another process of the run is gone, or does not answer ({reason}); its output, perhaps on another "
            f"machine, says why; {advice()}"
        ) from error


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed since another process is gone or silent."""
    from torch.distributed import DistNetworkError, DistStoreError

    is_network = isinstance(error, DistNetworkError | DistStoreError)
    return is_network or any(sign in str(error) for sign in _LOST_CONNECTION)


# ---- one machine ----


def poll(look: Callable[[], Result | None]) -> Result:
    """Return what `look` finds, as soon as it finds something; there is no time limit."""
    while (found := look()) is None:
        time.sleep(POLL_SECONDS)
    return found


def compute_on_local_main(name: str, folder: Path, compute: Callable[[], Any]) -> Any:
    """Return what `compute` returns in the machine's first process; the others read it from a file.

    They poll for it, since it may take longer than a collective may (`ddp_timeout`).

    Args:
        name: tells the results of one launch apart.
        folder: where the file is written.
        compute: returns JSON-able data. Its exceptions are raised in the first process only: torchrun ends the others.
    """
    if launch().local_world_size == 1:
        return compute()
    path = folder / f"{name}-{launch_id(str(launch().machine))}.json"
    if not is_local_main_process():
        return poll(lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)
    result = compute()
    write_text_atomically(path, json.dumps(result))
    return result


def claim_message(text: str, is_only_one: bool = False) -> bool:
    """Return whether this process is the first on its machine to print `text`, and note that it does.

    Notes are empty files in the system's temporary folder.

    Args:
        text: the message.
        is_only_one: whether it is printed only where no message was claimed before.
    """
    if launch().local_world_size == 1:
        return True
    folder = Path(tempfile.gettempdir()) / f"glm_edge_ft-{launch_id(str(os.getppid()))}"  # torchrun's id as well
    try:
        folder.mkdir(exist_ok=True)
        if is_only_one and any(folder.iterdir()):
            return False
        (folder / ("any" if is_only_one else uuid.uuid5(uuid.NAMESPACE_OID, text).hex)).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk: rather twice than never
        return True
    return True
