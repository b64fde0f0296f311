"""Evaluation by generation: prompts in, replies, scores and a predictions file out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import StoppingCriteria

from glm_edge_ft.training.predictions import NullWriter, PredictionsWriter
from glm_edge_ft.training.replies import ContinuousDecoder, GenerationContext, Prompt
from glm_edge_ft.training.termination import Termination, leave_signals_to_parent

JOINS_OF_A_BATCH = 4
"""Where rows are refilled, a quarter of the batch size joins at once: each time the rows' cache is copied."""
MOST_ROWS = 4
"""Where rows are refilled, so many times the batch size go through the model at once when they are short."""


class BreakOff(StoppingCriteria):
    """Ends replies where they are when SIGTERM has come: a batch of long ones may outlast the 30 seconds of torchrun.

    What was generated then is of no use: the evaluation is to end as well.
    """

    def __init__(self, termination: Termination) -> None:
        self.termination = termination

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return for each row, (batch,), whether its reply ends here."""
        return torch.full((input_ids.shape[0],), self.termination.asked, device=input_ids.device)


def plan_batches(
    lengths: Sequence[int],
    batch_size: int,
    process_index: int,
    world_size: int,
    groups: Sequence[Hashable] | None = None,
) -> tuple[list[list[int]], int]:
    """Return this rank's batches of indices, longest first, and how many of them count.

    All ranks get the same number of batches, since under sharded weights each forward pass is a collective; the surplus
    repeats the last batch and is not counted.

    Args:
        lengths: tokens of each sample.
        batch_size: most samples of a batch.
        process_index, world_size: which rank this is, of how many.
        groups: what each sample shares with others of its group, such as an image; None: each stands alone. A group
            lies in one batch, or in as few as it fits.
    """
    members: dict[Hashable, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: -int(lengths[index])):
        members.setdefault(index if groups is None else groups[index], []).append(index)
    batches: list[list[int]] = []
    for group in members.values():
        parts = [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
        for part in parts:
            if not batches or len(batches[-1]) + len(part) > batch_size:
                batches.append([])
            batches[-1] += part
    mine = batches[process_index::world_size]
    rounds = -(-len(batches) // world_size)
    return mine + [batches[-1]] * (rounds - len(mine)), len(mine)


def prompt_batches(
    prompts: Sequence[Prompt], tools: GenerationContext, batch_size: int, process_index: int, world_size: int
) -> tuple[list[list[int]], int, DataLoader]:
    """Return this rank's batches of prompt numbers, how many of them count, and a loader of the batches themselves.

    Prompts with the same images, such as the turns of one conversation, share a batch, so that an image is decoded
    once. The loader's processes stay away from the random state of the training.
    """
    groups = [("image", *prompt.images) if prompt.images else index for index, prompt in enumerate(prompts)]
    lengths = [len(prompt.prompt_ids) for prompt in prompts]
    batches, counted = plan_batches(lengths, batch_size, process_index, world_size, groups)
    loader = DataLoader(
        _Prompts(prompts),
        batch_sampler=batches,
        collate_fn=tools.collate,
        num_workers=tools.loader_processes,
        worker_init_fn=functools.partial(start_loader_process, None),
        generator=torch.Generator(),
    )
    return batches, counted, loader


@dataclass(frozen=True)
class _Prompts(Dataset):
    prompts: Sequence[Prompt]

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def start_loader_process(then: Callable[[int], None] | None, worker: int) -> None:
    """Prepare a loader process, and do what else was to be done in it."""
    leave_signals_to_parent()
    if then is not None:
        then(worker)


def generate_and_score(
    *,
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    tools: GenerationContext,
    batch_size: int,
    predictions_file: Path,
    process_index: int,
    world_size: int,
    device: torch.device,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Generate a reply to every prompt, score it against its reference and write both to `predictions_file`.

    Replies are written as they come, so that a killed evaluation leaves what it had; at the end the file is replaced
    by one in the order of the data. Scoring runs in worker processes beside generation. On several ranks each
    generates its share; rank 0 alone scores and writes. `before_batch` is called before each batch, equally often on
    all ranks; what it raises ends the evaluation.

    Returns:
        The mean of each metric over all prompts, 0-100; on all ranks the same.
    """
    is_main = process_index == 0
    replies: dict[int, str] = {}
    share = RankWorkload(prompts, batch_size, process_index, world_size, device, before_batch)
    with PredictionsWriter(predictions_file, prompts, tools) if is_main else NullWriter() as writer:
        bar = tqdm(
            total=len(prompts), desc="replies", unit="reply", disable=not (is_main and tools.show_progress), leave=False
        )
        for new_ids in generate_replies(model, tools, share):
            texts = {index: tools.clean(ids) for index, ids in new_ids.items()}
            replies |= texts
            writer.add(texts)
            bar.update(len(texts) * world_size)
        bar.close()
        if world_size > 1:
            gathered = _gather(replies, world_size)
            writer.add({index: text for index, text in gathered.items() if index not in replies})
        scores = [writer.finish()]
        if world_size > 1:  # each rank decides by them which checkpoint is the best
            torch.distributed.broadcast_object_list(scores, src=0)
        return scores[0]


@dataclass(frozen=True)
class RankWorkload:
    """What this process has to generate, and how; see `generate_and_score`."""

    prompts: Sequence[Prompt]
    batch_size: int
    process_index: int
    world_size: int
    device: torch.device
    before_batch: Callable[[], None]

    def batches(
        self, tools: GenerationContext, batch_size: int
    ) -> Iterator[tuple[list[int], dict[str, torch.Tensor], bool]]:
        """Yield prompt numbers, what `collate` makes of them, and whether they count."""
        batches, counted, loader = prompt_batches(self.prompts, tools, batch_size, self.process_index, self.world_size)
        for number, (batch, inputs) in enumerate(zip(batches, loader, strict=True)):
            yield batch, inputs, number < counted

    def on_device(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: values.to(self.device) for name, values in inputs.items()}


def generate_replies(
    model: torch.nn.Module, tools: GenerationContext, share: RankWorkload
) -> Iterator[dict[int, list[int]]]:
    """Yield the new ids of each reply of this process's share by the number of its prompt, as they are finished."""
    rows = tools.start_continuous_batch(model, tools.options)
    if rows is not None:
        yield from _refilled(rows, tools, share)
        return
    for batch, inputs, counts in share.batches(tools, share.batch_size):
        share.before_batch()
        new_ids = tools.generate(model, **share.on_device(inputs), **tools.options).tolist()
        if counts:
            yield dict(zip(batch, new_ids, strict=True))


def _refilled(rows: ContinuousDecoder, tools: GenerationContext, share: RankWorkload) -> Iterator[dict[int, list[int]]]:
    """Let prompts join in small batches, longest first, as soon as there is room for them.

    There is as much room as `batch_size` rows with the longest prompt would take: as many tokens, padding included. So
    short prompts are more at once, up to `MOST_ROWS` times `batch_size`.
    """
    lengths = [len(prompt.prompt_ids) for prompt in share.prompts]
    room = share.batch_size * (max(lengths) + rows.max_new_tokens)
    joins_at_once = max(1, share.batch_size // JOINS_OF_A_BATCH)
    joined: dict[int, int] = {}  # the prompts under way: number → tokens
    for batch, inputs, counts in share.batches(tools, joins_at_once):
        joining = {index: lengths[index] for index in batch}
        while joined and not _fits({**joined, **joining}, share.batch_size, room, rows.max_new_tokens):
            finished = rows.step()
            joined = {index: length for index, length in joined.items() if index not in finished}
            if finished:
                yield finished
        share.before_batch()
        if counts:
            finished = rows.add(batch, **tools.add_image_features(share.on_device(inputs)))
            joined = {index: length for index, length in {**joined, **joining}.items() if index not in finished}
            yield finished
    while len(rows):
        if finished := rows.step():
            yield finished


def _fits(joined: Mapping[int, int], batch_size: int, room: int, reply_length: int) -> bool:
    tokens = len(joined) * (max(joined.values()) + reply_length)
    return len(joined) <= batch_size or (len(joined) <= MOST_ROWS * batch_size and tokens <= room)


def _gather(replies: dict[int, str], world_size: int) -> dict[int, str]:
    gathered: list[dict[int, str]] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(gathered, replies)
    return {index: text for part in gathered for index, text in part.items()}
