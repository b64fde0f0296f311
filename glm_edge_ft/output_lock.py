"""One run at a time in an output folder.

The lock is the kernel's: it ends with the process that holds it, however that one ends, so a killed run can be resumed
at once. It holds between machines where their shared file system keeps such locks (NFS does).
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glm_edge_ft.console import is_main_process
from glm_edge_ft.errors import UserError

LOCK_FILE = ".lock"


@contextmanager
def hold_output_dir(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder for as long as the block lasts; process 0 does so for all of a run.

    Raises:
        UserError: another run is at work there; the message names it.
    """
    if not is_main_process() or sys.platform == "win32":
        yield
        return
    import fcntl

    path = folder / LOCK_FILE
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: loader processes inherit no part
        except (BlockingIOError, PermissionError):
            file.seek(0)
            what = f"{folder} is in use by another run: {file.read().strip() or 'it has just begun'}"
            fix = "name another folder, or wait until that run has ended"
            raise UserError.single("training_args.output_dir", what, fix) from None
        except OSError:  # a file system without locks
            pass
        else:
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on machine {socket.gethostname()}, since {since}\n")
            file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
