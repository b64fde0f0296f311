"""Work that the first process of a machine does for all of its ranks; the others wait outside of any collective.

Encoding a large file can take longer than a collective may (`ddp_timeout`). So the others look for its result on disk
now and then. Where the first process fails, torchrun ends them all.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from glm_edge_ft.environment import launch, launch_name
from glm_edge_ft.files import write_text_atomically

Result = TypeVar("Result")
SECONDS_BETWEEN_LOOKS = 0.5


def is_first_of_node() -> bool:
    """Return whether this process does what is done once a machine."""
    return launch().local_rank == 0


def wait_for(look: Callable[[], Result | None]) -> Result:
    """Return what `look` finds, as soon as it finds something."""
    while (found := look()) is None:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return found


def shared_on_node(name: str, folder: Path, work: Callable[[], Any]) -> Any:
    """Return the result of `work`, which the first process of the machine does and the others read.

    Args:
        name: tells results of one launch apart.
        folder: where the result is laid down; the same for all ranks of a machine.
        work: gives JSON-able data. What it raises is raised in the first process alone.
    """
    if launch().local_world_size == 1:
        return work()
    path = folder / f"{name}-{_launch_id(str(launch().machine))}.json"
    if not is_first_of_node():
        return wait_for(lambda: json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None)
    result = work()
    write_text_atomically(path, json.dumps(result))
    return result


def is_first_to_say(text: str, of_all: bool = False) -> bool:
    """Return whether this process is the first of its machine to say `text`, or anything at all; note that it did.

    Notes are empty files in the system's temporary folder.

    Args:
        text: what is to be said.
        of_all: whether anything that was said before counts.
    """
    if launch().local_world_size == 1:
        return True
    folder = Path(tempfile.gettempdir()) / f"glm_edge_ft-{_launch_id(str(os.getppid()))}"  # torchrun's number, too
    try:
        folder.mkdir(exist_ok=True)
        if of_all and any(folder.iterdir()):
            return False
        (folder / ("any" if of_all else uuid.uuid5(uuid.NAMESPACE_OID, text).hex)).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk: rather twice than never
        return True
    return True


def _launch_id(*more: str) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, "-".join([launch_name(), *more])).hex
