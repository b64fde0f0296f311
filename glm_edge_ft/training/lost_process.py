"""A process of the run that is gone, as those that wait for it see it: a broken connection."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glm_edge_ft.errors import ProcessLost
from glm_edge_ft.training.checkpoints import how_to_go_on

# What the errors of gloo, and of NCCL where it finds the other end closed, have in common: torch gives them no class.
_SIGNS = ("gloo/transport/", "ncclRemoteError", "remote process exited")


@contextmanager
def explain_lost_process(output_dir: Path) -> Iterator[None]:
    """Turn a connection that another process closed into ProcessLost, which says how the run goes on."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise ProcessLost(
            f"another process of the run is gone, or does not answer ({_reason(error)}); why, its own output says, "
            f"perhaps on another machine; {how_to_go_on(output_dir, on_all_machines=True)}"
        ) from error


def is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a collective failed since another process is no more."""
    import torch

    return isinstance(error, torch.distributed.DistNetworkError) or any(sign in str(error) for sign in _SIGNS)


def _reason(error: RuntimeError) -> str:
    """Return the first sentence of the error, without the place in the library's source."""
    first_line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[\S+\] ", "", first_line).partition(". ")[0]
