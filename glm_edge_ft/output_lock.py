"""One run at a time in an output folder.

The lock is the kernel's: it ends with the process that holds it, however that one ends, so a killed run can be resumed
at once. It holds between machines where their shared file system keeps such locks (NFS does).
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from glm_edge_ft.distributed import is_main_process
from glm_edge_ft.errors import UserError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def hold_output_dir(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder for as long as the block lasts; process 0 does so for all of a run.

    Raises:
        UserError: another run is at work there; the message names it.
    """
    if not is_main_process() or sys.platform == "win32":
        yield
        return
    path = folder / LOCK_FILE
    try:
        lock = _lock(path)
    except BlockingIOError:
        holder = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        what = f"{folder} is in use by another run: {holder or 'it has just begun'}"
        fix = "name another folder, or wait until that run has ended"
        raise UserError.single("training_args.output_dir", what, fix) from None
    if lock is not None:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk; the lock holds without a name
            path.write_text(
                f"process {os.getpid()} on machine {socket.gethostname()}, since {since}\n", encoding="utf-8"
            )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a disk that can only be read by now
            path.unlink()
        if lock is not None:
            lock.close()


def _lock(path: Path) -> BinaryIO | None:
    """Lock a file, made where it is missing, and return it; None on a file system without locks.

    It is open for reading, so that its disk can still be mounted read-only; NFS locks what is open for writing.

    Raises BlockingIOError where another process holds the lock.
    """
    import fcntl

    for mode in (os.O_RDONLY, os.O_RDWR):
        try:
            file = os.fdopen(os.open(path, mode | os.O_CREAT, 0o644), "rb")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            continue
        os.register_at_fork(after_in_child=file.close)  # a loader process that outlives a killed run lets it go
        return file
    return None
