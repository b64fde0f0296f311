"""Evaluation by generation: prompts in, replies, scores and a predictions file out."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import StoppingCriteria

from glm_edge_ft.training.metrics import MAX_SCORED_CHARACTERS, PairScores, summarize
from glm_edge_ft.training.scoring import Pairs, PairScorer
from glm_edge_ft.training.termination import Termination, leave_signals_to_parent


class Prompt(Protocol):
    """One reply to be generated: the true history up to the assistant marker, and what the data says there."""

    @property
    def prompt_ids(self) -> Any: ...  # a sequence or array of ids
    @property
    def reference(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def line(self) -> int: ...
    @property
    def turn(self) -> int: ...
    @property
    def images(self) -> Sequence[str]: ...  # where its images are


@dataclass(frozen=True)
class EvaluationData(Dataset):
    """Rows for the loss and, made from the same file, prompts for generation.

    Attributes:
        rows: encoded rows, each a dict of `input_ids` and `labels`.
        lengths: number of tokens of each row.
        prompts: one for each assistant turn.
    """

    rows: Any
    lengths: Sequence[int]
    prompts: Sequence[Prompt]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@dataclass(frozen=True)
class ReplyTools:
    """What generation needs from the other rooms.

    Attributes:
        generate: `(model, **batch, **options)` → new tokens `(batch, new_length)`.
        collate: prompts → `input_ids` and `attention_mask`, `(batch, length)`, left-padded, and `pixel_values` where
            the prompts have images.
        clean: new token ids → the reply's text, up to its stop token.
        decode: token ids → text with its special tokens, for the predictions file.
        options: passed to `generate`, among them `generation_config`.
        scoring_processes: worker processes for BLEU and ROUGE.
        loader_processes: processes that call `collate`; 0: this one. Decoding images is worth some.
        warn: shows one line to the user.
        show_progress: whether to draw a bar.
    """

    generate: Callable[..., torch.Tensor]
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    clean: Callable[[Sequence[int]], str]
    decode: Callable[[Sequence[int]], str]
    warn: Callable[[str], None]
    options: Mapping[str, Any] = field(default_factory=dict)
    scoring_processes: int = 1
    loader_processes: int = 0
    show_progress: bool = True


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
    prompts: Sequence[Prompt], tools: ReplyTools, batch_size: int, process_index: int, world_size: int
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
    tools: ReplyTools,
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
        The mean of each metric over all prompts, 0-100; on ranks other than 0 an empty dict.
    """
    batches, counted, loader = prompt_batches(prompts, tools, batch_size, process_index, world_size)
    is_main = process_index == 0
    replies: dict[int, str] = {}
    with _PredictionsWriter(predictions_file, prompts, tools) if is_main else _NoWriter() as writer:
        bar = tqdm(
            total=len(prompts), desc="replies", unit="reply", disable=not (is_main and tools.show_progress), leave=False
        )
        for number, (batch, inputs) in enumerate(zip(batches, loader, strict=True)):
            before_batch()
            new_tokens = tools.generate(
                model, **{name: values.to(device) for name, values in inputs.items()}, **tools.options
            )
            if number < counted:
                texts = {index: tools.clean(ids) for index, ids in zip(batch, new_tokens.tolist(), strict=True)}
                replies |= texts
                writer.add(texts)
            bar.update(len(batch) * world_size)
        bar.close()
        if world_size > 1:
            gathered = _gather(replies, world_size)
            writer.add({index: text for index, text in gathered.items() if index not in replies})
        return writer.finish()


def _gather(replies: dict[int, str], world_size: int) -> dict[int, str]:
    gathered: list[dict[int, str]] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(gathered, replies)
    return {index: text for part in gathered for index, text in part.items()}


class _NoWriter:
    """What the ranks other than 0 hold."""

    def __enter__(self) -> _NoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def add(self, texts: Mapping[int, str]) -> None:
        """Leave it to rank 0."""

    def finish(self) -> dict[str, float]:
        """Return no metrics."""
        return {}


class _PredictionsWriter:
    """Scores replies in worker processes and writes a line for each: as they come, and at the end in order."""

    def __init__(self, path: Path, prompts: Sequence[Prompt], tools: ReplyTools) -> None:
        self.path, self.prompts, self.tools = path, prompts, tools
        self.replies: dict[int, str] = {}
        self.scores: dict[int, PairScores] = {}
        self.waiting: list[tuple[list[int], Pairs, Future[list[PairScores]]]] = []

    def __enter__(self) -> _PredictionsWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", encoding="utf-8")
        expected_characters = 2 * sum(len(prompt.reference) for prompt in self.prompts)
        self.scorer = PairScorer(self.tools.scoring_processes, expected_characters, self.tools.warn)
        self.scorer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.scorer.__exit__(*error)
        self.file.close()

    def add(self, texts: Mapping[int, str]) -> None:
        """Hand replies, by the number of their prompt, to the scorer; write those whose scores are there."""
        if not texts:
            return
        self.replies |= texts
        pairs = [(text, self.prompts[index].reference) for index, text in texts.items()]
        self.waiting.append((list(texts), pairs, self.scorer.submit(pairs)))
        while self.waiting and self.waiting[0][-1].done():
            self._take(*self.waiting.pop(0))

    def finish(self) -> dict[str, float]:
        """Wait for all scores, put the file into the data's order and return the means."""
        while self.waiting:
            self._take(*self.waiting.pop(0))
        self.file.close()
        ordered = self.path.with_suffix(".ordered")
        ordered.write_text("".join(self._line(index) for index in sorted(self.scores)), encoding="utf-8")
        ordered.replace(self.path)
        cut = sum(scores.was_cut for scores in self.scores.values())
        if cut:
            self.tools.warn(
                f"{cut} of {len(self.scores)} pairs have a side of more than {MAX_SCORED_CHARACTERS:,} characters; "
                "ROUGE and BLEU saw its beginning only"
            )
        return summarize([self.scores[index] for index in sorted(self.scores)])

    def _take(self, indices: list[int], pairs: Pairs, future: Future[list[PairScores]]) -> None:
        for index, scores in zip(indices, self.scorer.result(future, pairs), strict=True):
            self.scores[index] = scores
            self.file.write(self._line(index))
        self.file.flush()

    def _line(self, index: int) -> str:
        prompt = self.prompts[index]
        record = {
            "file": str(prompt.file),
            "line": prompt.line,
            "turn": prompt.turn,
            **({"images": list(prompt.images)} if prompt.images else {}),
            "prompt": self.tools.decode(prompt.prompt_ids),
            "reference": prompt.reference,
            "prediction": self.replies[index],
            **self.scores[index].as_dict(),
        }
        return json.dumps(record, ensure_ascii=False) + "\n"
