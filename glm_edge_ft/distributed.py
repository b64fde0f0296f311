"""The processes of a run: the launcher's variables, the process group, waiting for one another, the failure of a peer.

Rank and world size are read here alone. Torch is imported inside functions, since this module is used before the config
is checked.

torchrun ends the processes of its own machine when one of them fails; those of other machines would wait for it in a
collective until that times out. So on several machines all processes form a control group (gloo) at their first
`barrier`. Until training begins, a barrier waits however long a process prepares, and ends when one fails or dies.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

from glm_edge_ft.errors import Problem, ProcessLost
from glm_edge_ft.files import write_text_atomically

Result = TypeVar("Result")

REQUIRED_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed and accelerate read; every launcher sets them all."""
TORCHRUN_VARIABLES = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
MPI_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""The number of processes, from which accelerate would make a process group."""

POLL_SECONDS = 0.5
PREPARATION_LIMIT, REPORT_LIMIT = timedelta(days=1), timedelta(seconds=5)

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
    """Join the process group (gloo by default) on CPUs; transformers would do so without the config's `ddp_timeout`."""
    import torch

    if launch().world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend or "gloo", timeout=timedelta(seconds=timeout_seconds))


class _Control:
    """The control group of several machines; not used any more once training has begun or a process has failed."""

    group: Any = None  # torch.distributed.ProcessGroupGloo, whose type stub lacks the collectives
    is_closed = False


def barrier(connect_seconds: float = 60.0) -> None:
    """Wait until the processes of all machines are here, however long their preparations take; else ProcessLost.

    The first call waits `connect_seconds` for them. On one machine nothing is done: torchrun ends all its processes.
    """
    if has_several_machines():
        _exchange(has_failed=False, connect_seconds=connect_seconds, limit=PREPARATION_LIMIT)


def close_control_group() -> None:
    """From now on processes wait for one another in the collectives of training alone."""
    _Control.is_closed = True


def report_failure() -> None:
    """Let the processes that wait in a barrier know that this one failed. Raises nothing."""
    if has_several_machines() and not _Control.is_closed:
        with contextlib.suppress(ProcessLost):
            # the others may still import torch
            _exchange(has_failed=True, connect_seconds=60.0, limit=REPORT_LIMIT)


def _exchange(has_failed: bool, connect_seconds: float, limit: timedelta) -> None:
    """Tell all processes whether this one failed, and hear it from all of them."""
    import torch
    from torch.distributed import AllreduceOptions, PrefixStore, ProcessGroupGloo, ReduceOp
    from torch.distributed.rendezvous import rendezvous

    here = launch()
    hint = "; where all run, set GLOO_SOCKET_IFNAME to the network interface that connects the machines"
    with explain_peer_failure(lambda: f"nothing was trained{'' if _Control.group else hint}"):
        if _Control.group is None:
            timeout = timedelta(seconds=connect_seconds)
            store = PrefixStore(f"control-{here.attempt}", next(rendezvous("env://", timeout=timeout))[0])
            _Control.group = ProcessGroupGloo(store, here.rank, here.world_size, timeout)
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
    from torch.distributed import DistNetworkError, DistStoreError

    try:
        yield
    except RuntimeError as error:
        is_network = isinstance(error, DistNetworkError | DistStoreError)
        if not (is_network or any(sign in str(error) for sign in _LOST_CONNECTION)):
            raise
        close_control_group()
        first_line = str(error).strip().partition("\n")[0]
        reason = re.sub(r"^\[\S+\] ", "", first_line).partition(". ")[0]  # without the place in the library's source
        raise ProcessLost(
            f"another process of the run is gone, or does not answer ({reason}); its output, perhaps on another "
            f"machine, says why; {advice()}"
        ) from error


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
    """Return whether this process is the first on its machine to print `text`, and note so in the temporary folder.

    With `is_only_one` it must be the first to print anything.
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
