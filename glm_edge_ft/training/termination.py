"""SIGTERM, by which a cluster takes its machine back: what a run still does before it ends.

Before training the run ends at once. From then on the signal is noted; at the end of a step, or at the next batch of an
evaluation, all processes agree that one of them was asked to stop, save a checkpoint together and end. torchrun kills
them 30 seconds after the signal. With transformers' `enable_jit_checkpoint` processes would not agree on the step.
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
    """SIGTERM ended the run; once training has begun all processes raise it at the same point."""


class Termination:
    """Whether the run was asked to end. As a context manager it handles SIGTERM; a second signal changes nothing."""

    def __init__(self) -> None:
        self.asked = False
        """Whether this process was asked; the others may not know yet."""
        self._is_deferred = False
        self._owner = os.getpid()
        self._before: Any = None
        self._device: torch.device | None = None
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers only there
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() != self._owner:  # a process that was forked from this one
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        elif self._is_deferred:
            self.asked = True
        else:
            self._is_deferred = True
            raise Terminated("by SIGTERM before training began; there was nothing to save")

    def defer(self, device: torch.device) -> None:
        """From now on note the signal, for `poll_stop` and `poll_stop_async`, whose collectives use `device`."""
        self._is_deferred = True
        self._device = device

    def poll_stop(self) -> bool:
        """Return whether any process was asked to end. All processes must call this at the same point of the run."""
        asked_before = self.poll_stop_async()  # which starts a new collective
        return asked_before | self._finish_pending()

    def poll_stop_async(self) -> bool:
        """Return the answer to the previous call, without waiting. All processes must call this equally often."""
        import torch

        if not torch.distributed.is_initialized():
            return self.asked
        answer = self._finish_pending()
        flag = torch.tensor([int(self.asked)], device=self._device)
        self._pending = flag, torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True)
        return answer

    def stop_evaluation(self) -> None:
        """Raise Terminated where `poll_stop_async` says so, between batches of an evaluation."""
        if self.poll_stop_async():
            raise Terminated("by SIGTERM in an evaluation")

    def _finish_pending(self) -> bool:
        if self._pending is None:
            return False
        (flag, work), self._pending = self._pending, None
        work.wait()
        return bool(flag.item())


def leave_signals_to_parent() -> None:
    """Let a loader process ignore Ctrl-C and SIGTERM, which reach all: its death would end the run at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_helper_processes() -> None:
    """Kill the loader processes of a run that broke off: they ignore SIGTERM, and Python would wait for them."""
    helpers = [child for child in multiprocessing.active_children() if child.daemon]
    if not helpers or sys.platform == "win32":
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes the end of a loader process for a failure
    for helper in helpers:
        helper.kill()
