"""A run that breaks off: what happened, what to change, and how to continue.

What a user can change becomes one line; any other failure keeps its traceback, with a note on how to continue.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from glm_edge_ft.checks.memory import NOTHING_TO_LOWER, largest_batch, ways_to_save_memory
from glm_edge_ft.errors import ProcessLost, RunStopped, UserError, first_line
from glm_edge_ft.files import format_bytes
from glm_edge_ft.training.checkpoints import how_to_go_on
from glm_edge_ft.training.termination import Terminated

if TYPE_CHECKING:
    from glm_edge_ft.run import Prepared

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "your quota of the disk is used up",
    errno.EFBIG: "a file may not become so large (ulimit -f)",
    errno.EROFS: "the disk can only be read",
    errno.EIO: "the disk fails",
}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # so safetensors and tokenizers end their messages
_TORCH_SAVE = ("inline_container", "PytorchStreamWriter", "iostream")  # it tells neither the file nor the reason
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "failed to map segment")
_LOADER_DIED = "DataLoader worker (pid"
_FROM_LOADER = re.compile(r"\ACaught RunStopped in DataLoader .*\bRunStopped: (.*)\Z", re.DOTALL)


@contextmanager
def explain_failures(prepared: Prepared) -> Iterator[None]:
    """Turn a failure inside into one line that says what to do, where that is known.

    Raises:
        RunStopped: for a full or read-only disk, a lack of memory, a loader process that died, and what the run itself
            stopped for; with the checkpoint from which it continues.
    """
    try:
        yield
    except (Terminated, ProcessLost, UserError):
        raise
    except Exception as error:
        what, how = what_happened(error, prepared), how_to_go_on(prepared.plan.output_dir)
        if what is None:
            error.add_note(how)
            raise
        raise RunStopped(f"{what}; {how}") from error


def what_happened(error: Exception, prepared: Prepared) -> str | None:
    """Return what stopped the run, and what to change; None where nothing is known of it."""
    if isinstance(error, RunStopped):
        return _FROM_LOADER.sub(r"\1", str(error)).strip()
    if trouble := disk_trouble(error, prepared.plan.output_dir):
        return trouble
    if is_lack_of_memory(error):
        return _memory_trouble(error, prepared)
    if isinstance(error, RuntimeError) and _LOADER_DIED in str(error):
        count = prepared.training_arguments.dataloader_num_workers
        return (
            f"a process that loads data ended by itself ({first_line(error).rstrip('.')}), perhaps for lack of memory: "
            f"lower training_args.dataloader_num_workers, now {count}; with 0 there is no such process"
        )
    return None


def disk_trouble(error: BaseException, folder: Path) -> str | None:
    """Return what is wrong with the disk of `folder`, and what to do, where that is why `error` was raised."""
    number = _disk_error(error)
    if number is None and any(sign in str(error) for sign in _TORCH_SAVE):
        number = _try_to_write(folder) or 0
    if number is None:
        return None
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({format_bytes(shutil.disk_usage(folder).free)} free)"
    way = "mount it for writing" if number == errno.EROFS else "make room, or lower training_args.save_total_limit"
    return f"{folder}: {_DISK_ERRORS.get(number, 'a file could not be written')}{free}: {way}"


def _disk_error(error: BaseException | None) -> int | None:
    """Return the error number of the disk in an exception, or in what it was raised from."""
    while error is not None:
        match = _RUST_ERROR.search(str(error))
        number = error.errno if isinstance(error, OSError) and error.errno else int(match[1]) if match else None
        if number in _DISK_ERRORS:
            return number
        error = error.__cause__ or error.__context__
    return None


def _try_to_write(folder: Path) -> int | None:
    """Return the error number of an attempt to write a megabyte, or None where it succeeds."""
    probe = folder / ".probe"
    try:
        probe.write_bytes(b"\0" * 1_000_000)
    except OSError as error:
        return error.errno
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return None


def is_lack_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the GPU or of the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError | ImportError) and any(sign in str(error) for sign in _NO_MEMORY)


def _memory_trouble(error: Exception, prepared: Prepared) -> str:
    args = prepared.training_arguments
    if {frame.name for frame in traceback.extract_tb(error.__traceback__)} & {"evaluation_loop", "generate_and_score"}:
        size = args.per_device_eval_batch_size
        where = f"in an evaluation with batches of {size} rows"
        ways = ["training_args.generation_config.max_new_tokens, and a smaller max_input_length"]
        if size > 1:
            ways = [f"training_args.per_device_eval_batch_size {size} -> {max(1, size // 4)}"]
    else:
        batch = largest_batch(prepared)
        where = f"in a step of up to {batch.rows} x {batch.length:,} tokens"
        ways = ways_to_save_memory(prepared, batch, not args.use_cpu, prepared.memory.host.total > 0) or [
            NOTHING_TO_LOWER
        ]
    return f"out of memory {where} ({first_line(error).rstrip('.')}). Lower, in this order: {'; '.join(ways)}"
