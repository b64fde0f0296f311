"""SIGTERM, by which a cluster takes its machine back: what a run still does before it goes.

Before training there is nothing to save, and the run ends at once. From then on the signal is noted; at the next good
moment (the end of a step, the next batch of an evaluation, whose replies break off) all processes agree that one of
them was asked to go, save a whole checkpoint together and end. torchrun hands the signal on to its workers and kills
them 30 seconds later.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import RunStopped

if TYPE_CHECKING:
    import torch


class Terminated(RunStopped):
    """SIGTERM ended the run; raised in all processes alike once training has begun."""


class Termination:
    """Whether the run was asked to end; as a context it answers SIGTERM, of which a second one changes nothing."""

    def __init__(self) -> None:
        self._asked = False
        self._is_deferred = False
        self._owner = os.getpid()
        self._before: Any = None
        self._device: torch.device | None = None
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers there alone
            self._before = signal.signal(signal.SIGTERM, self._answer)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _answer(self, number: int, frame: object) -> None:
        if os.getpid() != self._owner:  # a process that was forked from this one
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._is_deferred:
            self._asked = True
        else:
            self._is_deferred = True
            raise Terminated("by SIGTERM before training began; there was nothing to save")

    def defer(self, device: torch.device) -> None:
        """From now on note the signal, for `agreed` and `agreed_before` to tell; they compute on `device`."""
        self._is_deferred = True
        self._device = device

    @property
    def asked(self) -> bool:
        """Whether this process was asked to end; the others may not know yet."""
        return self._asked

    def agreed(self) -> bool:
        """Return whether any process was asked to end. All processes must call this at the same point of the run."""
        asked_before = self.agreed_before()  # which begins a new question
        return asked_before | self._take_answer()

    def agreed_before(self) -> bool:
        """Return what `agreed` would have at the last call, so that no process waits for one that is behind.

        One process alone knows at once. All processes must call this as many times.
        """
        if not _is_shared():
            return self._asked
        import torch

        answer = self._take_answer()
        flag = torch.tensor([int(self._asked)], device=self._device)
        self._pending = flag, torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True)
        return answer

    def _take_answer(self) -> bool:
        if self._pending is None:
            return self._asked and not _is_shared()
        (flag, work), self._pending = self._pending, None
        work.wait()
        return bool(flag.item())


def _is_shared() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave_signals_to_parent() -> None:
    """Prepare a helper process: a terminal's Ctrl-C and a cluster's SIGTERM reach all, and the main one answers them.

    A loader process that died of it would end the run before its checkpoint is written.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_helper_processes() -> None:
    """End the loader processes that a run which broke off left behind; the interpreter would wait for them at its end.

    They do not hear the SIGTERM that it sends them (see `leave_signals_to_parent`). Called when all else is done.
    """
    helpers = [child for child in multiprocessing.active_children() if child.daemon]
    if not helpers or sys.platform == "win32":
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes the end of a loader process for a failure
    for helper in helpers:
        helper.kill()
