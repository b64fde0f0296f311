"""Scores of generated replies against their references: ROUGE and BLEU-4 on jieba words, exact match.

The numbers are those of rouge-chinese and nltk. Only ROUGE-L is computed here: rouge-chinese fills an n x m table in
Python (14 s for one pair of 3,000 words), a bit-parallel longest common subsequence takes a fraction of a second.

Scoring workers import this module, so nothing here may import torch.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

METRIC_NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "exact-match")
"""The order in which tables and files show the scores."""

MAX_SCORED_CHARACTERS = 32_000
"""Characters of one side that ROUGE and BLEU see. jieba's time grows with the square of a run of Chinese characters
that is no dictionary word, which a model caught in a loop does write: 32,000 of them take 3 s, 200,000 minutes."""


@dataclass(frozen=True)
class PairScores:
    """The scores of one prediction against its reference, each from 0 to 100.

    `was_cut`: a side was longer than `MAX_SCORED_CHARACTERS`; the rest of it counts in `exact_match` alone.
    """

    rouge_1: float
    rouge_2: float
    rouge_l: float
    bleu_4: float
    exact_match: float
    was_cut: bool = False

    def as_dict(self) -> dict[str, float]:
        """Return the scores by name, in the order of `METRIC_NAMES`."""
        return dict(zip(METRIC_NAMES, astuple(self), strict=False))


def score_pair(prediction: str, reference: str) -> PairScores:
    """Score a generated reply against its reference, both without the whitespace around them.

    An empty side scores 0 in ROUGE and BLEU; `exact_match` of two empty sides is 100. Texts of any content are scored;
    nothing is raised and nothing printed.

    Returns:
        ROUGE as `rouge_chinese.Rouge().get_scores` (F-measure) on jieba's words joined by spaces; BLEU-4 as
        `nltk.translate.bleu_score.sentence_bleu` on the same words without whitespace, with
        `SmoothingFunction().method3`, the choice of the original GLM-4 demo.
    """
    prediction, reference = prediction.strip(), reference.strip()
    exact_match = 100.0 if prediction == reference else 0.0
    if not prediction or not reference:
        return PairScores(0.0, 0.0, 0.0, 0.0, exact_match)
    was_cut = max(len(prediction), len(reference)) > MAX_SCORED_CHARACTERS
    segment, rouge, sentence_bleu = _load_libraries()
    # Cutting may leave whitespace at the new end, which the scores must not see either.
    texts = [" ".join(segment(text[:MAX_SCORED_CHARACTERS].rstrip())) for text in (prediction, reference)]
    counted = rouge.get_scores(*texts)[0]
    predicted, wanted = (_rouge_words(rouge, text) for text in texts)
    common = longest_common_subsequence(predicted, wanted)
    precision, recall = common / len(predicted), common / len(wanted)
    return PairScores(
        rouge_1=100 * counted["rouge-1"]["f"],
        rouge_2=100 * counted["rouge-2"]["f"],
        rouge_l=100 * (2.0 * (precision * recall / (precision + recall + 1e-8))),  # rouge-chinese's small term
        bleu_4=float(100 * sentence_bleu([texts[1].split()], texts[0].split())),  # an int where nothing matches
        exact_match=exact_match,
        was_cut=was_cut,
    )


def _rouge_words(rouge: Any, text: str) -> list[str]:
    """Return the words that rouge-chinese counts: a line of nothing but spaces is one empty word to it."""
    sentences = (" ".join(sentence.split()) for sentence in rouge.cut_sent(text) if sentence)
    return [word for sentence in sentences for word in sentence.split(" ")]


@functools.cache
def _load_libraries() -> tuple[Any, Any, Any]:
    """Return jieba's segmentation, rouge-chinese's counter and nltk's sentence BLEU, loaded once in each process.

    jieba's dictionary is not loaded by `jieba.initialize`, which announces it on stderr and keeps a cache in the shared
    temporary folder, where users and processes meet; without the cache loading is 0.1 s slower.
    """
    with warnings.catch_warnings():  # jieba, pkg_resources and rouge-chinese warn about their own code once compiled
        warnings.simplefilter("ignore")
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    bleu = functools.partial(sentence_bleu, smoothing_function=SmoothingFunction().method3)
    return tokenizer.cut, Rouge(metrics=["rouge-1", "rouge-2"], stats=["f"]), bleu


def summarize(scores: Sequence[PairScores]) -> dict[str, float]:
    """Return the mean of each metric over all pairs, 0 to 100, rounded to 4 decimals; no pairs give no metrics."""
    by_name = [score.as_dict() for score in scores]
    names = METRIC_NAMES if by_name else ()
    return {name: round(math.fsum(values[name] for values in by_name) / len(by_name), 4) for name in names}


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two word sequences.

    Bit-parallel: one integer holds a row of the dynamic-programming table. Source: H. Hyyrö, "Bit-parallel LCS-length
    computation revisited", AWOCA 2004.
    """
    shorter, longer = sorted((first, second), key=len)
    positions: defaultdict[str, int] = defaultdict(int)
    for index, word in enumerate(longer):
        positions[word] |= 1 << index
    all_bits = (1 << len(longer)) - 1
    row = all_bits  # a cleared bit marks a position where the length grows by one
    for word in shorter:
        if word in positions:
            matches = row & positions[word]
            row = ((row + matches) | (row - matches)) & all_bits
    return len(longer) - row.bit_count()
