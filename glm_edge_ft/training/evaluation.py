"""Evaluation by generation: prompts in, replies, scores and a predictions file out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import StoppingCriteria

from glm_edge_ft.training.predictions import PredictionsWriter
from glm_edge_ft.training.replies import ContinuousDecoder, GenerationContext, Prompt
from glm_edge_ft.training.sampling import plan_batches
from glm_edge_ft.training.termination import Termination, leave_signals_to_parent

CONTINUOUS_JOIN_SHARE = 4
"""Continuous decoding: 1/4 of the batch size joins at once, since the cache is copied each time."""
CONTINUOUS_BATCH_FACTOR = 4
"""Continuous decoding: up to 4 times the batch size are generated at once when the prompts are short."""


class StopOnTermination(StoppingCriteria):
    """Ends replies early after SIGTERM: a batch of long ones may outlast the 30 seconds that torchrun gives.

    The replies are of no use then; the evaluation has to end as well.
    """

    def __init__(self, termination: Termination) -> None:
        self.termination = termination

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return for each row, `(batch,)`, whether its reply ends here."""
        return torch.full((input_ids.shape[0],), self.termination.asked, device=input_ids.device)


def start_loader_process(then: Callable[[int], None] | None, worker: int) -> None:
    """Initialize a DataLoader worker; `then` is its own `worker_init_fn`."""
    leave_signals_to_parent()
    if then is not None:
        then(worker)


@dataclass(frozen=True)
class RankWorkload:
    """The prompts of an evaluation and this rank's place among those that share them.

    `before_batch` is called before each batch, equally often on all ranks; what it raises ends the evaluation.
    """

    prompts: Sequence[Prompt]
    batch_size: int
    device: torch.device
    process_index: int = 0
    world_size: int = 1
    before_batch: Callable[[], None] = lambda: None

    def batches(
        self, context: GenerationContext, batch_size: int
    ) -> Iterator[tuple[list[int], dict[str, torch.Tensor], bool]]:
        """Yield prompt numbers, their collated inputs on the device, and whether they count (see `plan_batches`).

        Prompts with the same images, such as the turns of one conversation, share a batch, so that an image is decoded
        once. The loader has its own random state, so that an evaluation leaves the training's alone.
        """
        groups = [("image", *prompt.images) if prompt.images else index for index, prompt in enumerate(self.prompts)]
        lengths = [len(prompt.prompt_ids) for prompt in self.prompts]
        batches, counted = plan_batches(lengths, batch_size, self.process_index, self.world_size, groups)
        prompts: Any = self.prompts  # the loader needs no more of a dataset than an index
        loader = DataLoader(
            prompts,
            batch_sampler=batches,
            collate_fn=context.collate,
            num_workers=context.loader_processes,
            worker_init_fn=functools.partial(start_loader_process, None),
            generator=torch.Generator(),
        )
        for number, (batch, inputs) in enumerate(zip(batches, loader, strict=True)):
            yield batch, {name: values.to(self.device) for name, values in inputs.items()}, number < counted


def generate_and_score(
    model: torch.nn.Module, workload: RankWorkload, context: GenerationContext, predictions_file: Path
) -> dict[str, float]:
    """Generate a reply to every prompt, score it against its reference and write both to `predictions_file`.

    Replies are written as they come, so that a killed evaluation leaves what it had; at the end the file is put into
    the order of the data. Each rank generates its share; rank 0 scores, in worker processes beside generation, and
    writes. Returns the mean of each metric over all prompts, 0-100, on all ranks.
    """
    prompts, world_size, is_main = workload.prompts, workload.world_size, workload.process_index == 0
    shows_bar = is_main and context.show_progress
    replies: dict[int, str] = {}
    with (
        PredictionsWriter(predictions_file, prompts, context) if is_main else contextlib.nullcontext() as writer,
        tqdm(total=len(prompts), desc="replies", unit="reply", disable=not shows_bar, leave=False) as bar,
    ):
        for new_ids in generate_replies(model, context, workload):
            texts = {index: context.clean(ids) for index, ids in new_ids.items()}
            replies |= texts
            if writer is not None:
                writer.add(texts)
            bar.update(len(texts) * world_size)
        if world_size > 1:
            gathered: list[dict[int, str]] = [{} for _ in range(world_size)]
            torch.distributed.all_gather_object(gathered, replies)
            if writer is not None:
                writer.add({index: text for part in gathered[1:] for index, text in part.items()})
        scores = [writer.finish() if writer is not None else {}]
        if world_size > 1:  # every rank decides by them which checkpoint is the best
            torch.distributed.broadcast_object_list(scores, src=0)
        return scores[0]


def generate_replies(
    model: torch.nn.Module, context: GenerationContext, workload: RankWorkload
) -> Iterator[dict[int, list[int]]]:
    """Yield the new ids of this rank's replies by the number of their prompt, as they are finished."""
    decoder = context.start_continuous_batch(model, context.options)
    if decoder is not None:
        yield from _decode_continuously(decoder, context, workload)
        return
    for batch, inputs, counts in workload.batches(context, workload.batch_size):
        workload.before_batch()
        new_ids = context.generate(model, **inputs, **context.options).tolist()
        if counts:
            yield dict(zip(batch, new_ids, strict=True))


def _decode_continuously(
    decoder: ContinuousDecoder, context: GenerationContext, workload: RankWorkload
) -> Iterator[dict[int, list[int]]]:
    """Let prompts join in small batches, longest first, as soon as there is room for them.

    The room is what `batch_size` rows with the longest prompt take: as many tokens, padding included. So more short
    prompts than that go at once, up to `CONTINUOUS_BATCH_FACTOR` times as many.
    """
    lengths = [len(prompt.prompt_ids) for prompt in workload.prompts]
    batch_size, reply_length = workload.batch_size, decoder.max_new_tokens
    room = batch_size * (max(lengths) + reply_length)

    def has_room(rows: Mapping[int, int]) -> bool:
        tokens = len(rows) * (max(rows.values()) + reply_length)
        return len(rows) <= batch_size or (len(rows) <= CONTINUOUS_BATCH_FACTOR * batch_size and tokens <= room)

    active: dict[int, int] = {}  # prompt number → tokens
    for batch, inputs, counts in workload.batches(context, max(1, batch_size // CONTINUOUS_JOIN_SHARE)):
        joining = {index: lengths[index] for index in batch}
        while active and not has_room(active | joining):
            finished = decoder.step()
            active = {index: length for index, length in active.items() if index not in finished}
            if finished:
                yield finished
        workload.before_batch()
        if counts:
            finished = decoder.add(batch, **context.add_image_features(inputs))
            active = {index: length for index, length in (active | joining).items() if index not in finished}
            yield finished
    while len(decoder):
        if finished := decoder.step():
            yield finished
