"""How a run speaks to its user: results on stdout, notices and mistakes on stderr, once for all ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from glm_edge_ft.errors import Problem


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
    """Print every mistake of the user's input on stderr, on rank 0; `outcome` ends the line that counts them."""
    if not is_main_process():
        return
    texts = [str(problem) for problem in problems]
    count = "1 problem" if len(texts) == 1 else f"{len(texts)} problems"
    print("\n".join([f"error: {count} in the input{outcome}", *texts]), file=sys.stderr, flush=True)
