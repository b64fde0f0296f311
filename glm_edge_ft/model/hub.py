"""Files of a hub id: from the cache first, over the network for what is not there, with no retries into the void."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
_SECONDS_TO_ANSWER = 5.0


def read_cached_first(read: Callable[[bool], Result]) -> Result:
    """Return `read(True)`, which looks into the cache alone; where that fails and the hub answers, `read(False)`.

    The argument is `local_files_only` of transformers. Raises what the last call raised: OSError where nothing is
    cached and no hub can be reached.
    """
    try:
        return read(True)
    except (OSError, ValueError):
        if not is_hub_reachable():
            raise
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # it reports each of its retries
    return read(False)


@functools.cache
def is_hub_reachable() -> bool:
    """Return whether the hub answers one request, asked once per run.

    huggingface_hub itself tries each file six times with growing pauses: half a minute for each without a network.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS_TO_ANSWER)
    except Exception:  # whatever the HTTP library of this version raises: there is no answer
        return False
    return True
