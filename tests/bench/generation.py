"""Evaluation by generation against the same one in the order of the data, with batches of a fixed number of rows.

    python -m tests.bench.generation [--prompts 96] [--rounds 2] [--batch-size 8]

Prompts of 10 to 800 tokens, replies of 1 to 256: the model has random weights, so large that hardly any reply repeats
itself, and so many stop tokens that replies have 64 tokens on average. Both ways generate with the same model, write
the same texts and score them; the texts are compared.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import GenerationConfig

from glm_edge_ft.data.collator import PaddedCollator, PromptCollator
from glm_edge_ft.data.prompts import PromptSample
from glm_edge_ft.model.adapters import generate
from glm_edge_ft.model.decoding import start_continuous_batch
from glm_edge_ft.training.evaluation import RankWorkload, generate_and_score
from glm_edge_ft.training.metrics import summarize
from glm_edge_ft.training.predictions import score_batch
from glm_edge_ft.training.replies import GenerationContext
from tests.bench.measure import in_turn, median_ratio
from tests.bench.result import Ratio, Result, Table, keep
from tests.bench.workload import VOCABULARY, make_model, make_rows, make_tokenizer

SHORTEST, LONGEST, LONGEST_REPLY, MEAN_REPLY = 10, 800, 256, 64


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: how long it took, and the replies in the order of the data."""

    seconds: float
    replies: list[str]


def make_samples(count: int) -> list[PromptSample]:
    """Return prompts whose lengths are spread evenly on a logarithmic scale, in random order."""
    generator = random.Random(3)
    samples = []
    for number, row in enumerate(make_rows(count)):
        length = round(SHORTEST * (LONGEST / SHORTEST) ** generator.random())
        ids = [generator.randrange(300, VOCABULARY) for _ in range(length)]
        reply = row["messages"][1]["content"]
        samples.append(PromptSample(np.array(ids, dtype=np.int32), "", reply, "dev.jsonl", number + 1, 1, 0))
    return samples


def make_tools(tokenizer: Any, refills: bool) -> GenerationContext:
    """Return what a run evaluates with; stop tokens are spread over the vocabulary."""
    stops = list(range(0, VOCABULARY, MEAN_REPLY))
    config = GenerationConfig(do_sample=False, max_new_tokens=LONGEST_REPLY, eos_token_id=stops, pad_token_id=0)

    def text(ids: Sequence[int]) -> str:  # the ids themselves: bytes that are no text would all look alike
        ends = [place for place, token in enumerate(ids) if token in stops]
        return " ".join(str(token) for token in (ids[: ends[0]] if ends else ids))

    tools = GenerationContext(
        generate=generate,
        collate=PromptCollator(PaddedCollator(0, "left")),
        clean=text,
        decode=lambda ids: str(tokenizer.decode(ids)),
        warn=print,
        options={"generation_config": config},
        show_progress=False,
    )
    if not refills:
        return tools
    return GenerationContext(**{**vars(tools), "start_continuous_batch": start_continuous_batch})


def ours(model: Any, samples: list[PromptSample], tools: GenerationContext, batch_size: int) -> Evaluated:
    """Evaluate as a run does."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        generate_and_score(model, RankWorkload(samples, batch_size, torch.device("cpu")), tools, path)
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Evaluated(seconds, [line["prediction"] for line in lines])


def in_order(model: Any, samples: list[PromptSample], tools: GenerationContext, batch_size: int) -> Evaluated:
    """Evaluate in batches of neighbours, each until its longest reply ends."""
    start = time.perf_counter()
    replies: list[str] = []
    for first in range(0, len(samples), batch_size):
        inputs = tools.collate(list(samples[first : first + batch_size]))
        replies += [tools.clean(ids) for ids in tools.generate(model, **inputs, **tools.options).tolist()]
    summarize(score_batch([(reply, one.reference) for reply, one in zip(replies, samples, strict=True)]))
    return Evaluated(time.perf_counter() - start, replies)


def make_random_model(tokenizer: Any) -> Any:
    """Return the workload's model with larger weights: replies then hardly repeat, and end at random."""
    model = make_model(tokenizer).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 0.08, generator=generator)
    return model


def main(
    *,
    prompts: Annotated[int, typer.Option(help="Prompts to answer.")] = 96,
    rounds: Annotated[int, typer.Option(help="Evaluations of each kind, in turn.")] = 2,
    batch_size: Annotated[int, typer.Option(help="per_device_eval_batch_size.")] = 8,
) -> None:
    """Measure the ways in turn and keep the result."""
    samples = make_samples(prompts)
    tokenizer = make_tokenizer(make_rows(2000))
    model = make_random_model(tokenizer)
    refilling, plain = make_tools(tokenizer, refills=True), make_tools(tokenizer, refills=False)
    for warm_up in (ours, in_order):
        warm_up(model, samples[:2], refilling, 2)
    refilled, by_length, fixed = in_turn(
        rounds,
        lambda: ours(model, samples, refilling, batch_size),
        lambda: ours(model, samples, plain, batch_size),
        lambda: in_order(model, samples, plain, batch_size),
    )
    same = sum(one == other for one, other in zip(refilled[0].replies, fixed[0].replies, strict=True))
    seconds = [[run.seconds for run in runs] for runs in (refilled, by_length, fixed)]
    lengths = [len(reply.split()) for reply in fixed[0].replies]
    ways = ("ours: by length, finished rows replaced", "by length, whole batches", "in order, whole batches")
    keep(
        Result(
            name="generation",
            title="Evaluation by generation",
            command=f"python -m tests.bench.generation --prompts {prompts} --rounds {rounds} --batch-size {batch_size}",
            ratios=[
                Ratio(
                    "time in the order of the data with fixed batches / ours", median_ratio(seconds[2], seconds[0]), 2.0
                ),
                Ratio("replies that are the same, of 100", 100 * same / prompts, 99.0, unit="%"),
            ],
            tables=[
                Table(
                    ("way", "seconds"),
                    [(way, statistics.median(taken)) for way, taken in zip(ways, seconds, strict=True)],
                )
            ],
            notes=[
                f"{prompts} prompts of {SHORTEST} to {LONGEST} tokens, batch size {batch_size}, greedy, float32, the "
                f"workload's 32.5M model with random weights; replies of {min(lengths)} to {max(lengths)} tokens, "
                f"{statistics.mean(lengths):.0f} on average.",
                "Rows that are finished leave the batch and the next prompts join, as many as take no more memory than "
                "a batch of the longest prompts. A reply can differ where two tokens are equally likely within the "
                "rounding of float32, which depends on the shape of the batch.",
            ],
        )
    )


if __name__ == "__main__":
    typer.run(main)
