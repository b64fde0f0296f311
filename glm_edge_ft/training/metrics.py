"""Scores of generated replies against their references: ROUGE and BLEU-4 on jieba words, exact match.

The numbers are those of rouge-chinese and nltk. Only ROUGE-L is computed here: rouge-chinese fills an n x m table in
Python (14 s for one pair of 3,000 words); a bit-parallel longest common subsequence gives the same count in a fraction
of a second.

Scoring worker processes import this module: jieba, nltk and rouge-chinese are imported where they are first used, and
nothing here may import torch.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

METRIC_NAMES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "exact-match")
"""Every score of a pair, in the order in which tables and files show them."""

MAX_SCORED_CHARACTERS = 32_000
"""Characters of one side that ROUGE and BLEU look at. jieba's time grows with the square of a run of Chinese characters
that forms no dictionary word, which a model caught in a loop does write: 32,000 of them take 3 s, 200,000 minutes."""


@dataclass(frozen=True)
class PairScores:
    """The scores of one prediction against its reference, each from 0 to 100.

    Attributes:
        rouge_1: F-measure of the distinct words that both sides share.
        rouge_2: F-measure of the distinct pairs of neighbouring words that both sides share.
        rouge_l: F-measure of the longest common subsequence of words.
        bleu_4: BLEU of word n-grams up to 4, smoothed by the NIST sequence.
        exact_match: 100 where both sides are the same text, else 0.
        was_cut: a side was longer than `MAX_SCORED_CHARACTERS`; the rest of it counts in `exact_match` alone.
    """

    rouge_1: float
    rouge_2: float
    rouge_l: float
    bleu_4: float
    exact_match: float
    was_cut: bool = False

    def as_dict(self) -> dict[str, float]:
        """Return the scores by name, in the order of `METRIC_NAMES`."""
        return {name: getattr(self, name.replace("-", "_")) for name in METRIC_NAMES}


def score_pair(prediction: str, reference: str) -> PairScores:
    """Score one generated reply against the reply that was wanted.

    Whitespace around either side is no part of the text. A side with nothing else in it scores 0 in ROUGE and BLEU,
    also where both are empty (there is no word to find); `exact_match` of two empty sides is 100: they are the same.

    Args:
        prediction: the generated text.
        reference: the text of the data file.

    Returns:
        The scores, 0 to 100. ROUGE as `rouge_chinese.Rouge().get_scores` on the words that jieba finds, joined by
        spaces (F-measure); BLEU-4 as `nltk.translate.bleu_score.sentence_bleu([reference], prediction)` on the same
        words, whitespace left out, with `SmoothingFunction().method3` (the original GLM-4 demo's choice). Texts of
        any content are scored; nothing is raised and nothing printed.
    """
    prediction, reference = prediction.strip(), reference.strip()
    exact_match = 100.0 if prediction == reference else 0.0
    if not prediction or not reference:
        return PairScores(0.0, 0.0, 0.0, 0.0, exact_match)
    was_cut = max(len(prediction), len(reference)) > MAX_SCORED_CHARACTERS
    # Cutting may leave whitespace at the new end, which the scores below must not see either.
    prediction, reference = (text[:MAX_SCORED_CHARACTERS].rstrip() for text in (prediction, reference))
    prediction, reference = _segment(prediction), _segment(reference)
    rouge_1, rouge_2, rouge_l = _rouge(prediction, reference)
    return PairScores(rouge_1, rouge_2, rouge_l, _bleu(prediction.split(), reference.split()), exact_match, was_cut)


def summarize(scores: Sequence[PairScores]) -> dict[str, float]:
    """Return the mean of each metric over all pairs, 0 to 100, rounded to 4 decimals, in the order of `METRIC_NAMES`.

    Pairs with an empty side count like any other. No pairs give an empty dictionary.
    """
    if not scores:
        return {}
    by_name = [score.as_dict() for score in scores]
    return {name: round(math.fsum(values[name] for values in by_name) / len(by_name), 4) for name in METRIC_NAMES}


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two word sequences.

    Bit-parallel: one Python integer holds a row of the dynamic-programming table, a word of the other sequence costs
    a few operations on it. Source: H. Hyyrö, "Bit-parallel LCS-length computation revisited", AWOCA 2004.
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


def _segment(text: str) -> str:
    """Return the words of `text` as jieba finds them, joined by spaces."""
    return " ".join(_segmenter()(text))


def _rouge(prediction: str, reference: str) -> tuple[float, float, float]:
    """Return rouge-1, rouge-2 and rouge-l (F-measures, 0 to 100) of two texts of space-separated words."""
    rouge = _rouge_chinese()
    counted = rouge.get_scores(prediction, reference)[0]
    prediction_words, reference_words = _rouge_words(prediction), _rouge_words(reference)
    common = longest_common_subsequence(prediction_words, reference_words)
    rouge_l = _f_measure(common / len(prediction_words), common / len(reference_words))
    return 100 * counted["rouge-1"]["f"], 100 * counted["rouge-2"]["f"], 100 * rouge_l


def _rouge_words(text: str) -> list[str]:
    """Return the words that rouge-chinese counts: a line of nothing but spaces is one empty word to it."""
    sentences = (" ".join(sentence.split()) for sentence in _rouge_chinese().cut_sent(text) if sentence)
    return [word for sentence in sentences for word in sentence.split(" ")]


def _f_measure(precision: float, recall: float) -> float:
    """Return the F-measure of two fractions with the small term that rouge-chinese adds to its denominator."""
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def _bleu(prediction: list[str], reference: list[str]) -> float:
    """Return smoothed BLEU-4 (0 to 100) of two sequences of words."""
    return float(100 * _sentence_bleu()([reference], prediction))  # nltk gives an int where nothing matches


@functools.cache
def _segmenter() -> Callable[[str], Iterable[str]]:
    """Return jieba's segmentation of a text into words, with its own dictionary loaded once for each process.

    The dictionary is read here rather than by `jieba.initialize`, which announces it on stderr and keeps a cache in the
    common temporary folder, where users and processes meet; without the cache loading is 0.1 s slower.
    """
    with warnings.catch_warnings():  # jieba and pkg_resources warn about their own code when they are first compiled
        warnings.simplefilter("ignore")
        import jieba
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    segment: Callable[[str], Iterable[str]] = tokenizer.cut
    return segment


@functools.cache
def _rouge_chinese() -> Any:
    """Return rouge-chinese's counter of rouge-1 and rouge-2."""
    with warnings.catch_warnings():  # invalid escape sequences in its source, said when it is first compiled
        warnings.simplefilter("ignore")
        from rouge_chinese import Rouge
    return Rouge(metrics=["rouge-1", "rouge-2"], stats=["f"])


@functools.cache
def _sentence_bleu() -> Callable[[list[list[str]], list[str]], float]:
    """Return nltk's sentence BLEU with the smoothing of the ChatGLM demos."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    return functools.partial(sentence_bleu, smoothing_function=SmoothingFunction().method3)
