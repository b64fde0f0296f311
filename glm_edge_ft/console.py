"""How a run speaks to its user: results on stdout, notices and problems on stderr, once for all ranks."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Iterable
from typing import Any

from glm_edge_ft.distributed import claim_message, is_main_process, launch, report_failure
from glm_edge_ft.errors import Problem, elide

# a full or failing disk, a program behind a pipe that has ended, such as `| head`
_LOST_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)


class _LenientFile(io.FileIO):
    """Drops what the disk, or the program behind a pipe, does not take."""

    def write(self, data: Any) -> int:
        """Write as much as is taken; report all of it as written where nothing is."""
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in _LOST_OUTPUT:
                raise
            return len(data)


def prepare_streams() -> None:
    """Keep the run going whatever happens to stdout and stderr.

    Characters that a console's encoding lacks (a Chinese Windows console is GBK) are shown as escapes. Output that a
    full disk does not take, or that goes to a program that has ended, such as `head`, is dropped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if stream is not getattr(sys, f"__{name}__") or stream.isatty() or sys.platform == "win32":
            stream.reconfigure(errors="backslashreplace")
            continue
        stream.flush()
        file = io.BufferedWriter(_LenientFile(stream.fileno(), "w", closefd=False))
        lenient = io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, lenient)
        setattr(sys, f"__{name}__", lenient)  # flushed at the end, when a full disk would change the exit code


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogate; Python turns bytes that it cannot decode into those."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def show(text: str) -> None:
    """Print a result on stdout, on rank 0."""
    if is_main_process():
        print(text, flush=True)


def show_notice(text: str) -> None:
    """Print one line on stderr, on rank 0: something the user should know and need not change."""
    if is_main_process():
        print(f"note: {elide(text, 3000)}", file=sys.stderr, flush=True)


def show_notice_once(text: str) -> None:
    """Print one line on stderr that any process may have, a loader's too: once on each machine."""
    if claim_message(text):
        print(f"note: {text}", file=sys.stderr, flush=True)


def show_problems(problems: Iterable[Problem], outcome: str = "; nothing was trained") -> None:
    """Print every problem in the user's input as `show_failure` does; `outcome` ends the line that counts them."""
    texts = [str(problem) for problem in problems]
    count = "1 problem" if len(texts) == 1 else f"{len(texts)} problems"
    show_failure("\n".join([f"error: {count} in the input{outcome}", *texts]))


def show_failure(text: str, may_follow_another: bool = False) -> None:
    """Print on stderr why this process ends, once for all ranks of a machine that fail alike; tell other machines.

    Args:
        text: the message; a line with the rank follows, unless it is 0.
        may_follow_another: whether this may be the consequence of another rank's failure, such as a lost connection.
            It is then printed only where no other rank has failed before.
    """
    if claim_message(text, is_only_one=may_follow_another):
        rank = "" if is_main_process() else f"\n(rank {launch().rank} of {launch().world_size})"
        print(f"{text}{rank}", file=sys.stderr, flush=True)
    report_failure()
