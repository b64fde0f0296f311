"""Scores of replies: our BLEU and ROUGE against rouge-chinese and nltk as the original demonstration calls them.

python -m tests.bench.metrics
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from tests.bench.measure import in_turn, median_ratio
from tests.bench.result import Ratio, Result, Table, installed, keep
from tests.bench.workload import SEED, make_row

Pair = tuple[str, str]
TOLERANCE = 1e-9
NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


def make_text(generator: random.Random, characters: int) -> str:
    """Return a text of so many characters, made of advertisements."""
    text = ""
    while len(text) < characters:
        text += make_row(generator)["messages"][1]["content"]
    return text[:characters]


def make_pairs(count: int, characters: int) -> list[Pair]:
    """Return predictions and references of so many characters each."""
    generator = random.Random(SEED)
    return [(make_text(generator, characters), make_text(generator, characters)) for _ in range(count)]


def make_long_pair(words: int) -> Pair:
    """Return a prediction and a reference of so many jieba words each."""
    import jieba

    generator = random.Random(SEED + 1)
    found = [list(jieba.cut(make_text(generator, 4 * words)))[:words] for _ in range(2)]
    prediction, reference = ("".join(part) for part in found)
    return prediction, reference


def score_ours(pairs: Sequence[Pair]) -> list[list[float]]:
    """Return the scores of each pair as a run computes them, with two processes where there is enough to do."""
    from glm_edge_ft.training.predictions import PredictionsWriter

    context: Any = SimpleNamespace(scoring_processes=2, warn=sys.exit, decode=str)
    place = {"file": "dev.jsonl", "line": 1, "turn": 1, "images": (), "prompt_ids": ()}
    prompts: Any = [SimpleNamespace(**place, reference=reference) for _, reference in pairs]
    replies = {index: prediction for index, (prediction, _) in enumerate(pairs)}
    with TemporaryDirectory() as folder, PredictionsWriter(Path(folder) / "eval-1.jsonl", prompts, context) as writer:
        for batch in (range(start, min(start + 16, len(pairs))) for start in range(0, len(pairs), 16)):
            writer.add({index: replies[index] for index in batch})
        writer.finish()
    scores = [writer.scores[index].as_dict() for index in range(len(pairs))]
    return [[score[name] for name in NAMES] for score in scores]


def score_peer(pairs: Sequence[Pair]) -> list[list[float]]:
    """Return the scores of each pair as `compute_metrics` of the original GLM-4 demonstration finds them."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    found = []
    for prediction, reference in pairs:
        words, wanted = list(jieba.cut(prediction)), list(jieba.cut(reference))
        rouge = Rouge().get_scores(" ".join(words), " ".join(wanted))[0]
        bleu = sentence_bleu([wanted], words, smoothing_function=SmoothingFunction().method3)
        found.append([*(100 * rouge[name]["f"] for name in NAMES[:3]), 100 * bleu])
    return found


def timed(
    score: Callable[[Sequence[Pair]], list[list[float]]], pairs: Sequence[Pair]
) -> tuple[float, list[list[float]]]:
    """Return the seconds that scoring takes, and the scores."""
    start = time.perf_counter()
    scores = score(pairs)
    return time.perf_counter() - start, scores


def check_same(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Return the largest difference of two lists of scores. Ends the program where it is more than `TOLERANCE`."""
    difference = max(
        abs(a - b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)
    )
    if difference > TOLERANCE:
        sys.exit(f"scores differ by {difference}")
    return difference


def main(
    *,
    pairs: Annotated[int, typer.Option(help="Pairs of the first case.")] = 1000,
    characters: Annotated[int, typer.Option(help="Characters of each of their texts.")] = 500,
    words: Annotated[int, typer.Option(help="Words of each text of the long pair.")] = 3000,
    peer_pairs: Annotated[int, typer.Option(help="Most pairs that the peer scores; its seconds are scaled.")] = 100,
    rounds: Annotated[int, typer.Option(help="How often each is measured.")] = 3,
) -> None:
    """Measure, compare the scores and keep the result."""
    warnings.simplefilter("ignore")  # the peers' own code, when it is first compiled
    many, long = make_pairs(pairs, characters), [make_long_pair(words)]
    score_ours(long[:0] + many[:1])  # dictionaries are loaded before the clock starts, for both
    score_peer(many[:1])
    ratios, largest = [], 0.0
    rows: list[list[str | float]] = []
    cases = (
        (f"BLEU and ROUGE of {pairs:,} pairs of {characters} characters", many, 10.0),
        (f"BLEU and ROUGE of one pair of {words:,} words", long, 1.0),
    )
    for name, case, target in cases:
        some = case[:peer_pairs]
        ours, theirs = in_turn(rounds, partial(timed, score_ours, case), partial(timed, score_peer, some))
        largest = max(largest, *(check_same(a[1][: len(some)], b[1]) for a, b in zip(ours, theirs, strict=True)))
        seconds = [one[0] for one in ours]
        peer_seconds = [one[0] * len(case) / len(some) for one in theirs]
        middle, peer_middle = sorted(seconds)[rounds // 2], sorted(peer_seconds)[rounds // 2]
        ratios.append(Ratio(name, middle, target, at_least=False, unit="s"))
        ratios.append(Ratio(f"{name}: the original demo's seconds / ours", median_ratio(peer_seconds, seconds)))
        rows.append([name, middle, peer_middle])
    keep(
        Result(
            name="metrics",
            title="Scores of replies",
            command="python -m tests.bench.metrics",
            ratios=ratios,
            tables=[Table(("case", "ours (s)", "rouge-chinese and nltk (s)"), rows)],
            notes=[
                "Ours as an evaluation runs it: batches of 16 pairs, in two processes where there are more than "
                "400,000 characters (the seconds include their start), else in this one. The peer scores pair by pair "
                "in one process, as the original demonstration does. Dictionaries of this process are loaded before.",
                f"The peer scores {peer_pairs} pairs at most, and its seconds are scaled to all. All its scores "
                f"were compared with ours: the largest difference is {largest:.1e} of 100.",
            ],
            versions=installed("jieba", "nltk", "rouge-chinese"),
        )
    )


if __name__ == "__main__":
    typer.run(main)
