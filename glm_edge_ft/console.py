"""How a run speaks to its user: results on stdout, notices and mistakes on stderr, once for all ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from glm_edge_ft.errors import Problem
from glm_edge_ft.node import is_first_to_say


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
    """Print on stderr why this process ends: once for all ranks of a machine that fail alike, by the first of them.

    Args:
        text: what to print; a line with the number of the rank follows, unless it is 0.
        may_follow_another: whether the failure may be another rank's, seen from here, such as a lost connection.
            Nothing is printed then where another has failed before.
    """
    if is_first_to_say(text, of_all=may_follow_another):
        end = "" if is_main_process() else f"\n(rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE')})"
        print(f"{text}{end}", file=sys.stderr, flush=True)
