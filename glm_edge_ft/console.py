"""How a run speaks to its user: results on stdout, notices and mistakes on stderr, once for all ranks."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable

from glm_edge_ft.errors import Problem

SECONDS_FOR_TORCHRUN = 2.0
"""In which torchrun, which looks at its processes ten times a second, sees that one has ended and ends the others."""
SECONDS_FOR_RANK_0 = 10.0
"""In which rank 0 fails as the others did, where the reason is common to all."""


def is_main_process() -> bool:
    """Return whether this process shows things: rank 0, or the only one (torchrun sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def show(text: str) -> None:
    """Print a result on stdout, on rank 0."""
    if is_main_process():
        print(text, flush=True)


def show_notice(text: str) -> None:
    """Print one line on stderr, on rank 0: something the user should know and need not mend."""
    if is_main_process():
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
    """Print on stderr why this process ends, once for all ranks that fail alike, and also where one fails alone.

    Rank 0 speaks for all. Another rank waits first: where rank 0 fails as well, torchrun ends the others meanwhile; one
    that is still there stands alone, and says so with its number.

    Args:
        text: what to print.
        may_follow_another: whether the failure may be another rank's, seen from here, such as a lost connection. Rank 0
            then waits too, a shorter time, in which torchrun ends it.
    """
    rank = os.environ.get("RANK", "0")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        time.sleep(SECONDS_FOR_RANK_0 if rank != "0" else SECONDS_FOR_TORCHRUN if may_follow_another else 0)
    print(text if rank == "0" else f"rank {rank}: {text}", file=sys.stderr, flush=True)
