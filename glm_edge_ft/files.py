"""Files and folders: written whole or not at all, where they can be made, and which one a wrong path means."""

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
LFS_POINTER = b"version https://git-lfs"
"""The first bytes of a pointer that Git LFS left in place of a file."""


def expand_home(path: str | Path) -> Path:
    """Return a path with `~` or `~user` at its start replaced as a shell does; an unknown user leaves it unchanged."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  (`Path.expanduser` raises for an unknown user)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` for a file or folder, which is flushed to disk and renamed when the block ends.

    After an exception it is removed and `path` is unchanged. A killed process leaves it, for the next one to overwrite:
    only one process at a time may write a given `path`. Raises OSError.
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
    """Append to a text file all of a text or, where the disk is full (OSError), nothing."""
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


def _nearest_folder(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    absolute = path.absolute()
    return next(candidate for candidate in (absolute, *absolute.parents) if candidate.exists())


def can_be_made(path: Path) -> bool:
    """Return whether a file or folder can be made at `path`; not below `~name`, the home of an unknown user."""
    nearest = _nearest_folder(path)
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
    return shutil.disk_usage(_nearest_folder(folder)).free


def format_bytes(size: int) -> str:
    """Return a size in GB, small ones in MB; both decimal."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def did_you_mean(path: Path, start: Path = Path()) -> str:
    """Return "did you mean ...? " with the existing path closest to `start / path`, which does not exist, or ""."""
    found = Path((start / path).anchor)
    for part in (start / path).parts[bool(found.anchor) :]:
        try:
            if not (found / part).exists():
                names = [entry.name for entry in itertools.islice(found.iterdir(), 10_000)]
                part = next(iter(difflib.get_close_matches(part, names, n=1, cutoff=0.7)))  # noqa: PLW2901
        except (
            OSError,
            ValueError,
            StopIteration,
        ):  # an impossible name, an unreadable folder, no match
            return ""
        found /= part
    return f"did you mean {found if path.is_absolute() else os.path.relpath(found, start)}? "


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Wait until a file, or a folder with everything in it, is on the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):  # content before its folder
        flush_to_disk(path)
    flush_to_disk(folder)


def sizes_of_files(folder: Path) -> dict[str, int]:
    """Return the bytes of each file in a folder and its subfolders, by its path within the folder."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
