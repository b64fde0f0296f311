"""What a process takes from its environment: its place among those of a launcher, and no setting of the run.

Here alone are the launcher's variables read. Variables by which a library would change precision, engine or compilation
behind the config are taken out.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import Literal

from glm_edge_ft.errors import Problem

NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed and accelerate read; every launcher sets them all."""
OF_TORCHRUN = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""The number of processes, from which accelerate would make a process group."""

# accelerate's families, and what its launcher sets; then torch's, cuBLAS's, oneDNN's and transformers' switches.
_SETTING = re.compile(
    r"(ACCELERATE|FSDP|FP8|MEGATRON_LM|PARALLELISM_CONFIG|XLA_USE|XLA_DOWNCAST)_.*|SM_(HP_MP|FRAMEWORK)_PARAM\w+"
    r"|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|NVIDIA_TF32_OVERRIDE|(ONEDNN|DNNL)_DEFAULT_FPMATH_MODE"
    r"|CUBLAS_EMULATION_STRATEGY|CUBLAS_EMULATE_\w+_PRECISION"
    r"|TORCHDYNAMO_DISABLE|TORCH_COMPILE_(DISABLE|BACKEND|OVERRIDE_BACKENDS)|TORCHINDUCTOR_EMULATE_PRECISION_CASTS"
    r"|TRANSFORMERS_SDPA_FORCE_GQA|KUBEFLOW_TRAINER_SERVER_URL"  # the latter switches reporting on
)


@dataclass(frozen=True)
class Launch:
    """Where this process stands among those that a launcher started; the defaults are those of one that none started.

    Attributes:
        rank, world_size: its number among all processes, and how many they are.
        local_rank, local_world_size: the same of this machine's.
        machine, machines: the number of this machine, and how many there are; known of torchrun alone.
        launcher: none, torchrun, or another one.
        attempt: how often torchrun has started all processes again.
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
    """Return what the launcher's variables say. What is no number, which `check_launcher` finds, is as if unset."""
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


def count_cores() -> int:
    """Return how many cores this process may use: `taskset`, a container's cpuset or a job scheduler may give fewer."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def launch_name() -> str:
    """Return what the processes of one launch have in common, and those of no other."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    return "-".join(os.environ.get(name, "") for name in names)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 10 else default


def check_launcher() -> list[Problem]:
    """Return what is wrong with the launcher's variables: with some of them, libraries wait for processes in vain."""
    found = {name: os.environ[name] for name in (*NEEDED, *OF_TORCHRUN) if name in os.environ}
    several = [f"{name}={os.environ[name]}" for name in OF_MPI if os.environ.get(name, "1") != "1"]
    said = ", ".join(f"{name}={value}" for name, value in found.items()) or ", ".join(several)
    alone = f"start with torchrun; for one process: unset {' '.join(found)}"
    if not found:
        what = "mpirun or srun started several processes, which know nothing of one another"
        fix = "start torchrun instead, once on each machine"
        return [Problem(said, what, fix)] if several else []
    if missing := [name for name in NEEDED if name not in found]:
        return [Problem(said, f"set in the environment, as by a launcher, but not {', '.join(missing)}", alone)]
    here, port = launch(), _number("MASTER_PORT", 0)
    is_right = {name: _number(name, -1) >= 0 for name in found} | {
        "MASTER_ADDR": bool(found["MASTER_ADDR"].strip()),
        "MASTER_PORT": 0 < port < 65536,
    }
    for name, number, count in (
        ("RANK", here.rank, here.world_size),
        ("LOCAL_RANK", here.local_rank, here.local_world_size),
        ("LOCAL_WORLD_SIZE", here.local_world_size - 1, here.world_size),
        ("GROUP_RANK", here.machine, here.machines),
    ):
        is_right[name] = is_right.get(name, True) and number < count
    if wrong := [name for name, right in is_right.items() if not right]:
        return [Problem(said, f"set in the environment, but {', '.join(wrong)} cannot be so", alone)]
    return []


def forget_launcher() -> None:
    """Take the launcher's variables out, for a command that is one process whatever they say."""
    for name in (*NEEDED, *OF_TORCHRUN, *OF_MPI, "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)


def drop_settings() -> list[str]:
    """Take out the variables that would change how the run computes, and return them, `NAME=value` each.

    They count where they are gone before the library that reads them is imported.
    """
    names = sorted(name for name in os.environ if _SETTING.fullmatch(name))
    return [f"{name}={os.environ.pop(name)}" for name in names]
