"""How a run shares its work among processes, and how the run that wrote a checkpoint did.

DeepSpeed writes the optimizer in one part for each process, divided by its stage: only the same number of processes and
the same stage can read it again. Without DeepSpeed every process has the whole optimizer, and any number can continue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROCESSES_FILE = "processes.json"  # in each checkpoint: the fields of `Processes`


@dataclass(frozen=True)
class Processes:
    """What decides which process holds which part of the optimizer.

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
    """Write the record into a checkpoint."""
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


def note_processes(before: Processes, now: Processes, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a notice of what another number of processes does to the steps of a run without DeepSpeed.

    `old` and `new` are the `training_args` of the checkpoint's run and of this one.
    """
    if now.zero_stage is not None or now.world_size is None or before.world_size in (None, now.world_size):
        return []
    assert before.world_size is not None

    def rows_per_step(settings: Mapping[str, Any], world_size: int) -> int:
        batch = int(settings.get("per_device_train_batch_size") or 8)  # transformers' default
        return batch * int(settings.get("gradient_accumulation_steps") or 1) * world_size

    then, today = rows_per_step(old, before.world_size), rows_per_step(new, now.world_size)
    text = f"the checkpoint was written by {before.world_size} processes, this run has {now.world_size}: a step takes "
    if then == today:
        return [f"{text}{today} conversations as before; dropout draws other numbers"]
    text += f"{today} conversations instead of {then}, and the position in the data is counted in today's"
    per_process = today // int(new.get("gradient_accumulation_steps") or 1)
    if then % per_process == 0:
        return [f"{text}; training_args.gradient_accumulation_steps {then // per_process} keeps {then}"]
    return [f"{text}; change batch size and accumulation to keep {then}"]
