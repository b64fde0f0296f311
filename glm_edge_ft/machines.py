"""What the processes of several machines tell one another outside of any collective, through their launcher's store.

torchrun ends the processes of its own machine when one of them fails; it knows nothing of the other machines. There
they would wait for the failed one in a collective until that gives up, half an hour later. So before training all meet
wherever work begins that needs them all: each waits for as long as the others prepare, and ends where one of them says
that it failed, or is heard of no more. On one machine nothing of this is done.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.environment import launch
from glm_edge_ft.errors import ProblemList, ProcessLost, UserError

if TYPE_CHECKING:
    from torch.distributed import Store

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_BEATS = 5.0
SECONDS_OF_SILENCE = 300.0
SECONDS_TO_BE_HEARD = 30.0
SECONDS_TO_SEE_A_FILE = 60.0
"""A network file system may show a new file to other machines that much later."""

FAILURE = "failure"
_over = threading.Event()


def are_several() -> bool:
    """Return whether torchrun started this run on more than one machine."""
    here = launch()
    return here.launcher == "torchrun" and here.world_size != here.local_world_size


def meet(place: str) -> None:
    """Wait until the processes of all machines have come to a place of the run, which each passes once.

    Raises:
        ProcessLost: one of them failed, or was not heard of for five minutes.
    """
    if not are_several():
        return
    with _reached() as store:
        store.set(f"{place}/{launch().rank}", "")
        missing, beats = list(range(launch().world_size)), _Beats()
        while missing := [rank for rank in missing if not store.check([f"{place}/{rank}"])]:
            _raise_if_one_failed(store)
            beats.raise_if_silent(store, missing)
            time.sleep(SECONDS_BETWEEN_LOOKS)


def end_meetings() -> None:
    """Say that this process waits for the others in collectives alone from now on."""
    _over.set()


def tell_failure(text: str) -> None:
    """Let the processes that wait at a meeting know that this one ends, and why. Raises nothing."""
    if not are_several() or _over.is_set():
        return
    told = json.dumps({"rank": launch().rank, "machine": socket.gethostname(), "text": text})
    try:
        with _reached() as store:
            is_first = store.compare_set(FAILURE, "", told).decode("utf-8") == told
            store.set(_heard(launch().machine), "")
            if is_first:  # stay until the other machines know: the store may be gone with this one's launcher
                machines = [_heard(number) for number in range(launch().machines)]
                end = time.monotonic() + SECONDS_TO_BE_HEARD
                while not store.check(machines) and time.monotonic() < end:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
    except ProcessLost:
        return


def check_shared_folder(folder: Path, resume: str | None, rows: Mapping[str, Sequence[int]]) -> None:
    """Make sure that an output folder is one and the same on all machines, and that all go on from one checkpoint.

    So with the data: processes that have other numbers of rows would wait for one another without end.

    Args:
        folder: the output folder; it is there.
        resume: name of the checkpoint that this process goes on from, or None.
        rows: number of rows of each split, and what else has to be the same of them.

    Raises:
        UserError: this machine has another folder of that name, found another checkpoint in it, or has other rows.
        ProcessLost: see `meet`.
    """
    if not are_several():
        return
    mark = folder / f".seen-by-all-{uuid.uuid4().hex}"
    try:
        with _reached() as store:
            if launch().rank == 0:
                mark.touch()
                told = {"machine": socket.gethostname(), "mark": mark.name, "resume": resume, "rows": rows}
                store.set("output folder of process 0", json.dumps(told))
            else:
                first = _wait_for(store, "output folder of process 0")
                _compare_folders(folder, resume, first)
                _compare_rows(rows, first)
        meet("the same output folder")
    finally:
        if launch().rank == 0:
            mark.unlink(missing_ok=True)


def _compare_folders(folder: Path, resume: str | None, first: dict[str, Any]) -> None:
    end = time.monotonic() + SECONDS_TO_SEE_A_FILE
    while first["mark"] not in os.listdir(folder):  # noqa: PTH208  # a listing asks the server anew
        if time.monotonic() > end:
            raise UserError.single(
                "training_args.output_dir",
                f"{folder} on machine {socket.gethostname()} is not the folder of that name on machine "
                f"{first['machine']}, where process 0 writes",
                "name a folder that all machines share: each process lays its part of a checkpoint there",
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if first["resume"] != resume:
        raise UserError.single(
            "RESUME",
            f"machine {socket.gethostname()} found {resume or 'no checkpoint'} in {folder}, machine "
            f"{first['machine']} {first['resume'] or 'no checkpoint'}",
            "start again with the same RESUME on all machines, when all of them see the same checkpoints",
        )


def _compare_rows(rows: Mapping[str, Sequence[int]], first: dict[str, Any]) -> None:
    problems = ProblemList()
    for split, mine in rows.items():
        if list(mine) != (theirs := first["rows"][split]):
            seen = f"{mine[0]:,} rows on machine {socket.gethostname()}, {theirs[0]:,} on machine {first['machine']}"
            problems.add(
                f"DATA_DIR: {split}", f"{seen}, or rows of other lengths", "copy the same files to all machines"
            )
    problems.raise_if_any()


def _wait_for(store: Store, key: str) -> dict[str, Any]:
    while not store.check([key]):
        _raise_if_one_failed(store)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    value: dict[str, Any] = json.loads(store.get(key))
    return value


def _raise_if_one_failed(store: Store) -> None:
    if store.check([FAILURE]):
        told = json.loads(store.get(FAILURE))
        store.set(_heard(launch().machine), "")
        raise ProcessLost(f"process {told['rank']}, on machine {told['machine']}, failed:\n{told['text']}")


class _Beats:
    """The signs of life of the others, as far as this process has seen them."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, float]] = {}  # rank → number of the last beat, and when it was seen first

    def raise_if_silent(self, store: Store, ranks: Sequence[int]) -> None:
        """Raise ProcessLost for a rank of which nothing was heard for too long."""
        now = time.monotonic()
        for rank in ranks:
            beat = store.add(f"beat/{rank}", 0)
            before = self.seen.setdefault(rank, (beat, now))
            if before[0] != beat:
                self.seen[rank] = (beat, now)
            elif now - before[1] > SECONDS_OF_SILENCE:
                raise ProcessLost(
                    f"process {rank} of {launch().world_size} was not heard of for {SECONDS_OF_SILENCE:.0f} seconds: "
                    "look at its machine; nothing was trained"
                )


@contextmanager
def _reached() -> Iterator[Store]:
    """Give the store; its loss is that of the process that keeps it."""
    try:
        yield _connect()
    except RuntimeError as error:  # torch's DistError among them
        first_line = str(error).partition("\n")[0]
        raise ProcessLost(
            f"the launcher that keeps the connection of all machines cannot be reached ({first_line}): look at what "
            "the other machines printed; nothing was trained"
        ) from error


@functools.cache
def _connect() -> Store:
    """Connect to the launcher's store; from now on the others hear from this process now and then."""
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    found, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=60)))
    store = PrefixStore(f"glm_edge_ft-{launch().attempt}", found)
    thread = threading.Thread(target=_beat, args=(store,), daemon=True)
    thread.start()
    atexit.register(_stop_beating, thread)  # a thread that the interpreter's end finds inside the store aborts it
    return store


def _beat(store: Store) -> None:
    try:
        while not _over.is_set():
            store.add(f"beat/{launch().rank}", 1)
            _over.wait(SECONDS_BETWEEN_BEATS)
    except RuntimeError:  # the store is gone, which the next meeting will tell
        return


def _stop_beating(thread: threading.Thread) -> None:
    _over.set()
    thread.join()


def _heard(machine: int) -> str:
    return f"heard of the failure/{machine}"
