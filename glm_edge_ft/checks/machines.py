"""Whether several machines have the same output folder, checkpoint and data, once all of them are prepared."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glm_edge_ft.distributed import POLL_SECONDS, barrier, has_several_machines, launch, launch_id
from glm_edge_ft.errors import ProblemList

SECONDS_TO_SEE_A_FILE = 60.0
"""A network file system may show a new file to other machines that much later."""


@dataclass(frozen=True)
class MachineState:
    """What one process sees on its machine.

    Attributes:
        machine: its host name.
        resume: name of the checkpoint that it continues from, or None.
        rows: for each split its number of rows, then whatever else must be the same.
        sees_folder: whether its output folder is that of process 0.
    """

    machine: str
    resume: str | None
    rows: Mapping[str, list[int]]
    sees_folder: bool


def check_same_on_all_machines(output_dir: Path, resume: str | None, rows: Mapping[str, list[int]]) -> None:
    """Compare output folder (it exists), checkpoint and data of all machines, once the process group is there.

    With other rows processes would wait for one another without end. Raises the same UserError in all processes.
    """
    if not has_several_machines():
        return
    barrier()
    import torch

    mark = output_dir / f".seen-by-all-{launch_id()}"
    if launch().rank == 0:
        mark.touch()
    torch.distributed.barrier()
    mine = MachineState(socket.gethostname(), resume, rows, _appears(mark))
    everyone = [mine] * launch().world_size
    torch.distributed.all_gather_object(everyone, mine)
    if launch().rank == 0:
        mark.unlink(missing_ok=True)
    compare_machines(everyone, output_dir)


def _appears(file: Path) -> bool:
    end = time.monotonic() + SECONDS_TO_SEE_A_FILE
    while file.name not in os.listdir(file.parent):  # noqa: PTH208  # a listing asks the server anew
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def compare_machines(everyone: Sequence[MachineState], output_dir: Path) -> None:
    """Raise UserError with all that differs between process 0 and the first process that differs from it."""
    first, problems = everyone[0], ProblemList()
    for other in everyone:
        if not other.sees_folder:
            what = f"{output_dir} on machine {other.machine} is not the folder of that name on machine {first.machine}"
            fix = "name a folder that all machines share: each process writes its part of a checkpoint there"
            problems.add("training_args.output_dir", f"{what}, where process 0 writes", fix)
        if other.resume != first.resume:
            what = f"machine {other.machine} found {other.resume or 'no checkpoint'} in {output_dir}, machine "
            what += f"{first.machine} {first.resume or 'no checkpoint'}"
            problems.add("RESUME", what, "start again on all machines, when all of them see the same checkpoints")
        for split, rows in first.rows.items():
            if (found := other.rows[split]) != rows:
                what = f"{found[0]:,} rows on machine {other.machine}, {rows[0]:,} on machine {first.machine}"
                problems.add(f"DATA_DIR: {split}", f"{what}, or rows of other lengths", "copy the same files to all")
        problems.raise_if_any()
