"""How a run speaks to its user: results on stdout, notices and mistakes on stderr, once for all ranks."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from glm_edge_ft.environment import drop_settings, launch
from glm_edge_ft.errors import Problem, elide
from glm_edge_ft.machines import tell_failure
from glm_edge_ft.node import is_first_to_say

# a full or failing disk, a program behind a pipe that has ended, such as `| head`
_LOST_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


class _KeepsGoing(io.RawIOBase):
    """Writes to a file descriptor, and drops what the disk or the program behind it does not take."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: Any) -> int:
        """Write, or say so where nobody takes it any more."""
        try:
            return os.write(self.descriptor, data)
        except OSError as error:
            if error.errno not in _LOST_OUTPUT:
                raise
            return len(data)


def prepare_streams() -> None:
    """Make stdout and stderr outlive what a run must not end of.

    What a console's encoding lacks (a Chinese Windows console is GBK) is shown as an escape. What a full disk does not
    take, where output is redirected to a file, is dropped, and so is what goes to a program that has ended, such as
    `head`: the run is worth more than its log.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if stream is not getattr(sys, f"__{name}__") or stream.isatty() or sys.platform == "win32":
            stream.reconfigure(errors="backslashreplace")
            continue
        stream.flush()
        buffer = io.BufferedWriter(_KeepsGoing(stream.fileno()))
        lasting = io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, lasting)
        setattr(sys, f"__{name}__", lasting)  # flushed at the end, when a full disk would change the exit code


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogate, as which Python hands on the bytes that it cannot decode."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_main_process() -> bool:
    """Return whether this process shows things: rank 0, or the only one."""
    return launch().rank == 0


def show(text: str) -> None:
    """Print a result on stdout, on rank 0."""
    if is_main_process():
        print(text, flush=True)


def show_notice(text: str) -> None:
    """Print one line on stderr, on rank 0: something the user should know and need not mend."""
    if is_main_process():
        print(f"note: {elide(text, 3000)}", file=sys.stderr, flush=True)


def show_notice_of_any(text: str) -> None:
    """Print one line on stderr that any process may have, a loader's too: once for all of a machine."""
    if is_first_to_say(text):
        print(f"note: {text}", file=sys.stderr, flush=True)


def show_problems(problems: Iterable[Problem], outcome: str = "; nothing was trained") -> None:
    """Print every mistake of the user's input on stderr, as `show_failure` does.

    Args:
        problems: the mistakes.
        outcome: ends the line that counts them.
    """
    texts = [str(problem) for problem in problems]
    count = "1 problem" if len(texts) == 1 else f"{len(texts)} problems"
    show_failure("\n".join([f"error: {count} in the input{outcome}", *texts]))


def show_failure(text: str, may_follow_another: bool = False) -> None:
    """Print on stderr why this process ends: once for all ranks of a machine that fail alike, by the first of them.

    Other machines that wait for this process hear of it as well.

    Args:
        text: what to print; a line with the number of the rank follows, unless it is 0.
        may_follow_another: whether the failure may be another rank's, seen from here, such as a lost connection.
            Nothing is printed then where another has failed before.
    """
    if is_first_to_say(text, of_all=may_follow_another):
        end = "" if is_main_process() else f"\n(rank {launch().rank} of {launch().world_size})"
        print(f"{text}{end}", file=sys.stderr, flush=True)
    tell_failure(text)


def quiet_libraries() -> None:
    """Silence the libraries' advice to developers and the environment's settings; warnings about the run stay."""
    if dropped := drop_settings():
        show_notice(f"not used, since the config alone decides how a run computes and reports: {', '.join(dropped)}")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advertises packages; PEFT imports it where it can
    import transformers.utils.logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
