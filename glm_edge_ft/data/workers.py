"""Rows to encoded chunks, in worker processes or in this one, in the order of the files."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_edge_ft.data.cache import ROW_RECORD
from glm_edge_ft.data.conversation import Conversation
from glm_edge_ft.data.encoding import ConversationEncoder, DroppedRow, EncodedRow
from glm_edge_ft.data.parts import image_paths_in
from glm_edge_ft.data.rows import RawRow
from glm_edge_ft.distributed import count_cores
from glm_edge_ft.errors import Problem, RunStopped, UserError, elide

CHUNK_ROWS = 256
COLLECT_AFTER = 200_000  # new objects until Python looks for cycles, which rows do not make
BYTES_PER_PROCESS = 1 << 20  # a process takes about two seconds to start, in which one core encodes this much


@dataclass
class EncodedChunk:
    """Encoded rows on their way from a worker process, and what was noted about them.

    Attributes:
        rows: how many rows went in.
        ids: (tokens,) ids of all encoded rows.
        mask: (tokens,) their loss masks.
        records: (encoded rows,) of `ROW_RECORD`; `start` and `file` are not filled in yet.
        images: (encoded rows,) paths of each row's images as written.
        problems: rows that are wrong.
        claimed: place and path of pictures in them.
        dropped: rows left out, `file:line: reason`.
        control_text: rows whose text holds control tokens, `file:line`.
        notes: remarks, and how many rows each concerns.
    """

    rows: int
    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    records: NDArray[Any]
    images: list[tuple[str, ...]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    claimed: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    control_text: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def clamp_processes(num_proc: int, size: int) -> tuple[int, str | None]:
    """Return how many processes are worth starting for `size` bytes of data, and a notice where `num_proc` is more."""
    cores = count_cores()
    processes = max(1, min(num_proc, cores, size // BYTES_PER_PROCESS))
    if processes >= num_proc:
        return num_proc, None
    return processes, f"num_proc {num_proc} -> {processes}: {size / 1e6:.1f} MB of data, {cores} cores"


def chunks_of(rows: Iterator[RawRow | Problem]) -> Iterator[list[RawRow | Problem]]:
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk


_worker_encoder: ConversationEncoder | None = None  # one a process, set when it starts


def _start_worker(encoder: ConversationEncoder) -> None:
    global _worker_encoder  # noqa: PLW0603  # a pool's initializer has no other place to leave its result
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle, which then ends the workers
    _worker_encoder = encoder
    gc.collect()
    gc.freeze()  # modules and encoder stay: no collection needs to walk them
    gc.set_threshold(COLLECT_AFTER)


def _work(rows: list[RawRow | Problem]) -> EncodedChunk:
    assert _worker_encoder is not None
    return encode_chunk(rows, _worker_encoder)


def encode_in_order(
    jobs: Iterator[tuple[int, list[RawRow | Problem]]], encoder: ConversationEncoder, processes: int
) -> Iterator[tuple[int, EncodedChunk]]:
    """Encode chunks of rows, in this process or in several, and yield them in their order.

    Args:
        jobs: number of the file, and rows of it or what is wrong with them.
        encoder: encodes a conversation; each process gets a copy.
        processes: how many encode; 1 is this one alone.
    """
    with _rare_collections():
        if processes == 1:
            for file, rows in jobs:
                yield file, encode_chunk(rows, encoder)
        else:
            yield from _encode_in_pool(jobs, encoder, processes)


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _encode_in_pool(
    jobs: Iterator[tuple[int, list[RawRow | Problem]]], encoder: ConversationEncoder, processes: int
) -> Iterator[tuple[int, EncodedChunk]]:
    # Spawned, not forked: the tokenizer's threads and a process group do not survive a fork.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (encoder,))
    waiting: deque[tuple[int, Future[EncodedChunk]]] = deque()
    try:
        for file, rows in jobs:
            waiting.append((file, pool.submit(_work, rows)))
            if len(waiting) > 3 * processes:  # keeps the files from being read faster than they are encoded
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise RunStopped(
            "an encoding process ended by itself, perhaps for lack of memory; start again with a smaller num_proc"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def encode_chunk(rows: Sequence[RawRow | Problem], encoder: ConversationEncoder) -> EncodedChunk:
    """Check and encode rows; what is wrong with one of them is noted, and the others go on."""
    problems: list[tuple[int, Problem]] = []  # with the number of the row
    claimed: list[tuple[str, str]] = []
    numbers: list[int] = []
    conversations: list[Conversation] = []
    for number, row in enumerate(rows):
        if isinstance(row, Problem):
            problems.append((number, row))
            continue
        try:
            conversations.append(encoder.parse(row))
            numbers.append(number)
        except UserError as error:
            problems += [(number, problem) for problem in error.problems]
            claimed += [(row.place, path) for path in image_paths_in(row.value) if encoder.takes_images]
    results = encoder.encode_batch(conversations)
    for number, conversation, result in zip(numbers, conversations, results, strict=True):
        if isinstance(result, Problem):
            problems.append((number, result))
            claimed += [(conversation.place, path) for path in conversation.images]
    encoded = [result for result in results if isinstance(result, EncodedRow)]
    return EncodedChunk(
        rows=len(rows),
        ids=_joined([row.input_ids for row in encoded], np.int32),
        mask=_joined([row.loss_mask for row in encoded], np.bool_),
        records=np.array([_record(row) for row in encoded], dtype=ROW_RECORD),
        images=[row.images for row in encoded],
        claimed=claimed,
        problems=[problem for _, problem in sorted(problems, key=lambda pair: pair[0])],
        dropped=[f"{row.file}:{row.line}: {row.reason}" for row in results if isinstance(row, DroppedRow)],
        control_text=[f"{row.file}:{row.line}" for row in encoded if row.has_control_text],
        notes=_notes(conversations, encoder) + Counter(note for row in encoded for note in row.notes),
    )


def _joined(arrays: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)


def _record(row: EncodedRow) -> tuple[int, ...]:
    cuts = (row.prompt_tokens_cut, row.reply_tokens_cut, row.tail_tokens_cut)
    return (0, row.line, 0, len(row.input_ids), row.supervised, *cuts, *row.roles)


def _notes(conversations: Iterable[Conversation], encoder: ConversationEncoder) -> Counter[str]:
    notes: Counter[str] = Counter()
    for conversation in conversations:
        for key in conversation.ignored_keys:
            notes[f"key {elide(key, 80)!r} has no meaning here and is ignored"] += 1
        notes.update(conversation.notes)
        roles = {message.role for message in conversation.messages}
        for role in roles - encoder.reply_format.rendered_roles:
            notes[f"the model's chat template leaves {role} messages out"] += 1
    return notes
