"""How a run shares its work among processes, and how the one that wrote a checkpoint did.

DeepSpeed writes the optimizer in as many parts as there are processes, cut by its stage: only the same number and the
same cut can read them again. Without it every process holds the whole optimizer, and any number of them can go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROCESSES_FILE = "processes.json"
"""In each checkpoint: the fields of `Processes`."""


@dataclass(frozen=True)
class Processes:
    """What decides who holds which part of the optimizer.

    Attributes:
        world_size: number of processes; None where a checkpoint does not tell.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3; None without DeepSpeed.
        cut: further settings of DeepSpeed that shape the parts; None where a checkpoint does not tell.
    """

    world_size: int | None
    zero_stage: int | None
    cut: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        """Return how the work was shared, in words: `2 processes with ZeRO-3`."""
        count = "1 process" if self.world_size == 1 else f"{self.world_size or 'some'} processes"
        return f"{count} {self.engine()}"

    def engine(self) -> str:
        """Return what shares the optimizer, in words."""
        if self.zero_stage is None:
            return "without DeepSpeed"
        return f"with ZeRO-{self.zero_stage}" if self.zero_stage else "with DeepSpeed, ZeRO off"


ONE_PROCESS = Processes(1, None, {})
"""Of a run that nothing shares."""


def plan_processes(world_size: int, deepspeed: Mapping[str, Any] | None) -> Processes:
    """Return how a run with these DeepSpeed settings, or without any, shares its work."""
    if deepspeed is None:
        return Processes(world_size, None, {})
    zero = deepspeed.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    cut: dict[str, Any] = {"offload_optimizer": (zero.get("offload_optimizer") or {}).get("device", "none")}
    if stage in (1, 2):
        cut["round_robin_gradients"] = zero.get("round_robin_gradients", False)  # sorts the weights before the cut
    if stage == 3:
        cut["sub_group_size"] = zero.get("sub_group_size", 1_000_000_000)
    return Processes(world_size, stage, cut)


def write_processes(folder: Path, processes: Processes) -> None:
    """Lay the record into a checkpoint."""
    (folder / PROCESSES_FILE).write_text(json.dumps(asdict(processes)) + "\n", encoding="utf-8")


def read_processes(checkpoint: Path) -> Processes:
    """Return how the run that wrote `checkpoint` shared its work: by its record, else by the names of its files.

    Stages 1 and 2 write files of the same names; without a record both count as 2.
    """
    try:
        return Processes(**json.loads((checkpoint / PROCESSES_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass  # written before there were records, or broken: its files tell most of it
    random_states = len(list(checkpoint.glob("rng_state*.pth"))) or None
    if not any(checkpoint.glob("global_step*")):
        return Processes(random_states, None)
    optimizers = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    if optimizers == 0:
        return Processes(random_states, 0)
    is_sharded = any(checkpoint.glob("global_step*/*zero_pp_rank_*_model_states.pt"))
    return Processes(optimizers, 3 if is_sharded else 2)
