"""Files and folders: written so that a crash leaves the old content or the new one, and where they can be made."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from glm_edge_ft.errors import UserError

DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
"""The kinds of data files."""

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS left in the place of the real one."""


def expand_home(path: str | Path) -> Path:
    """Return a path that a user wrote, with `~` or `~user` at its start replaced as a shell does.

    A user that is not known here leaves the path as it is, so that a folder of that very name can be meant.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111  (`Path.expanduser` raises for an unknown user)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or folder to; it is flushed to disk and renamed when the block ends.

    After an exception it is removed, and what `path` had before stays. The path is always the same, so that what a
    killed process leaves is written over; only one process at a time may write a given `path`. Raises OSError.
    """
    staged = path.absolute().with_name(f".{path.absolute().name}.unfinished")
    _remove(staged)
    try:
        staged.parent.mkdir(parents=True, exist_ok=True)
        yield staged
        flush_tree(staged)
        if staged.is_dir() and path.is_dir():
            path.rmdir()  # an empty folder may be replaced; Windows does not rename over one
        staged.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(staged)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 text file, so that a crash leaves the old content or the new one. Raises OSError."""
    with atomic_path(path) as staged:
        staged.write_text(text, encoding="utf-8", newline="")


def append_text(path: Path, text: str) -> None:
    """Append to a text file, and take back what was written where the disk does not hold all of it (OSError)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


@contextmanager
def lock_folder(folder: Path, where: str) -> Iterator[None]:
    """Keep other runs out of an output folder while the block runs.

    The lock is the kernel's: it ends with the process that holds it, so that a killed run can be resumed at once. It
    holds between machines whose shared file system keeps such locks, as NFS does. There is none on Windows.

    Raises:
        UserError: another run, which the message names, works there; `where` is the key that names the folder.
    """
    path = folder / ".lock"
    try:
        lock = _flock(path)
    except BlockingIOError:
        holder = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        what = f"{folder} is in use by another run: {holder or 'it has just begun'}"
        raise UserError.single(where, what, "name another folder, or wait until that run has ended") from None
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


def _flock(path: Path) -> BinaryIO | None:
    """Lock a file, made where it is missing; None where there are no locks. Raises BlockingIOError where it is locked.

    It is open for reading, so that its disk can still be mounted read-only; NFS locks only what is open for writing.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    for mode in (os.O_RDONLY, os.O_RDWR):
        try:
            while True:
                file = os.fdopen(os.open(path, mode | os.O_CREAT, 0o644), "rb")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):  # the run that held this file may have just removed it
                    if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                        os.register_at_fork(after_in_child=file.close)  # loader processes can outlive a killed run
                        return file
        except BlockingIOError:
            raise
        except OSError:
            continue
    return None


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest above it that exists."""
    absolute = path.absolute()
    return next(candidate for candidate in (absolute, *absolute.parents) if candidate.exists())


def can_be_made(path: Path) -> bool:
    """Return whether a file or folder can be made at `path`: the nearest folder that exists can be written to.

    `~name` is not made as a new folder: it is the home of a user that this machine does not know.
    """
    nearest = nearest_folder(path)
    new = path.absolute().parts[len(nearest.parts) :]
    return nearest.is_dir() and os.access(nearest, os.W_OK) and not (new and new[0].startswith("~"))


def make_folder(folder: Path, where: str) -> None:
    """Make a folder for output. Raises UserError for the key or option `where` when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError.single(where, f"{folder} cannot be made: {error.strerror}", "name a folder of yours") from error


def free_bytes(folder: Path) -> int:
    """Return the free space of a folder, or of the nearest one above it that exists."""
    return shutil.disk_usage(nearest_folder(folder)).free


def format_bytes(size: int) -> str:
    """Return a size in GB, small ones in MB; both decimal."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def nearest_path(path: Path) -> Path | None:
    """Return the existing path that one which is not there most likely means: part by part, the closest name."""
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        try:
            is_there = (found / part).exists()
            names = [] if is_there else [entry.name for entry in itertools.islice(found.iterdir(), 10_000)]
        except (OSError, ValueError):  # a name that no file can have, a folder that cannot be read
            return None
        close = [part] if is_there else difflib.get_close_matches(part, names, n=1, cutoff=0.7)
        if not close:
            return None
        found /= close[0]
    return found


def did_you_mean(path: Path, start: Path = Path()) -> str:
    """Return a question for a message about `start / path`, which is not there, with a space behind; "" knows none."""
    near = nearest_path(start / path)
    shown = near if near is None or path.is_absolute() else os.path.relpath(near, start)
    return "" if shown is None else f"did you mean {shown}? "


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, lies on the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # there a folder cannot be opened, and needs no flush
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Wait until all that a folder holds lies on the disk; the folder's own list of names comes last."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds before the folder
        flush_to_disk(path)
    flush_to_disk(folder)


def sizes_of_files(folder: Path) -> dict[str, int]:
    """Return the bytes of each file in a folder and its subfolders, by its path within the folder."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
