"""The scores of generated replies: equal to the libraries', whole on odd input, the same from any process count."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jieba
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from glm_edge_ft.training.metrics import (
    MAX_SCORED_CHARACTERS,
    METRIC_NAMES,
    PairScores,
    longest_common_subsequence,
    score_pair,
    summarize,
)

REPLY = "这款连衣裙采用优质棉料，穿着舒适。简约的版型很显瘦！你会喜欢吗？"
REFERENCE = "这件裙子采用柔软的棉料，舒适透气。版型简约，非常显瘦。"

# Pieces that bring rouge-chinese's sentence splitting, its blank-line rule and jieba's word rules into play.
WORDS = "今天 天气 很好 裙子 显瘦 的的 A4 cotton 3.5% 。 ！ ？ ? ” ’ …… ...... ， 😀 é 龘"
PIECES = [*WORDS.split(), "\n", "\n\n", "\r\n", " ", "  ", "\u3000", "\t", "\u2028", "\x1c", "\x00"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=25).map("".join) | st.text(max_size=25)


def library_rouge(prediction: str, reference: str) -> dict[str, float]:
    """Return the F-measures of rouge-chinese itself on jieba's words, 0 to 100."""
    joined = [" ".join(jieba.cut(text.strip())) for text in (prediction, reference)]
    return {name: 100 * values["f"] for name, values in Rouge().get_scores(*joined)[0].items()}


def table_lcs(first: list[str], second: list[str]) -> int:
    """Return the length of the longest common subsequence by the textbook table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for row, left in enumerate(first, 1):
        for column, right in enumerate(second, 1):
            longer = max(table[row - 1][column], table[row][column - 1])
            table[row][column] = table[row - 1][column - 1] + 1 if left == right else longer
    return table[-1][-1]


def test_the_metric_names_are_the_documented_ones() -> None:
    """The names that configs and metrics.jsonl use."""
    assert METRIC_NAMES == ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "exact-match")
    assert list(score_pair("a", "b").as_dict()) == list(METRIC_NAMES)


def test_scores_of_a_pair_worked_out_by_hand() -> None:
    """我|喜欢|苹果 against 我|喜欢|香蕉.

    2 of 3 words, 1 of 2 bigrams; none of 1 trigram, which smoothing makes 1/2, and of no 4-gram, which it makes 1/4.
    """
    scores = score_pair("我喜欢苹果", "我喜欢香蕉")
    assert scores.rouge_1 == pytest.approx(100 * 2 / 3, abs=1e-5)
    assert scores.rouge_2 == pytest.approx(100 * 1 / 2, abs=1e-5)
    assert scores.rouge_l == pytest.approx(100 * 2 / 3, abs=1e-5)
    assert scores.bleu_4 == pytest.approx(100 * (2 / 3 * 1 / 2 * 1 / 2 * 1 / 4) ** (1 / 4), abs=1e-9)
    assert scores.exact_match == 0.0
    assert scores.was_cut is False


def test_a_perfect_reply_scores_100_in_everything() -> None:
    """The upper end of the scale."""
    scores = score_pair(REFERENCE, REFERENCE)
    assert [round(value, 4) for value in scores.as_dict().values()] == [100.0, 100.0, 100.0, 100.0, 100.0]


@settings(max_examples=400, deadline=None)
@given(TEXTS, TEXTS)
@example(REPLY, REFERENCE)
def test_rouge_equals_rouge_chinese_wherever_it_has_a_value(prediction: str, reference: str) -> None:
    """Every text that is not empty: blank lines, quotation marks, ellipses, odd whitespace."""
    assume(prediction.strip() and reference.strip())
    scores, expected = score_pair(prediction, reference), library_rouge(prediction, reference)
    assert {name: scores.as_dict()[name] for name in expected} == pytest.approx(expected, abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_bleu_equals_nltk_on_jieba_words(prediction: str, reference: str) -> None:
    """BLEU-4 of the GLM-4 demo: jieba words, smoothing method 3."""
    words, wanted = (" ".join(jieba.cut(text.strip())).split() for text in (prediction, reference))
    if not words or not wanted:
        return
    expected = sentence_bleu([wanted], words, smoothing_function=SmoothingFunction().method3)
    assert score_pair(prediction, reference).bleu_4 == pytest.approx(100 * expected, abs=1e-9)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=90), st.lists(st.sampled_from("abcde"), max_size=90))
def test_the_longest_common_subsequence_equals_the_textbook_table(first: list[str], second: list[str]) -> None:
    """Few different words and more than 64 positions: many ties, carries across machine words."""
    assert longest_common_subsequence(first, second) == table_lcs(first, second)


NOTHING = PairScores(0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *itertools.product(("", " ", "\n\n", "\u3000\t "), (REFERENCE, "。", "😀")),
        *((odd, "今天天气很好") for odd in ("。", "😀", "👩‍👩‍👧", "?", "……", "\ud83d", "\x00")),
    ],
)
def test_a_side_that_is_empty_or_shares_nothing_scores_0(one: str, other: str) -> None:
    """E1: an empty prediction or reference, a lone full stop, half a surrogate pair: scored 0, not raised."""
    assert score_pair(one, other) == NOTHING
    assert score_pair(other, one) == NOTHING


def test_two_empty_sides_score_0_but_match() -> None:
    """E1: no word to find in either, and yet the same text."""
    assert score_pair("", "") == score_pair(" \n", "\t") == replace(NOTHING, exact_match=100.0)


def test_one_word_that_is_right_has_no_bigram_to_score() -> None:
    """E1: the reply "。" to the reference "。" matches as a word; pairs of words do not exist in it."""
    scores = score_pair("。", "。")
    assert (round(scores.rouge_1, 4), scores.rouge_2, round(scores.rouge_l, 4)) == (100.0, 0.0, 100.0)
    assert scores.exact_match == 100.0


def test_whitespace_around_a_reply_changes_no_score() -> None:
    """The newline that a chat template puts before a reply is not part of it."""
    assert score_pair(f"\n {REPLY}\n\n", f" {REFERENCE}\n") == score_pair(REPLY, REFERENCE)


def test_exact_match_sees_whitespace_within() -> None:
    """Only the ends are stripped."""
    assert score_pair(" 42\n", "42").exact_match == 100.0
    assert score_pair("4 2", "42").exact_match == 0.0


def test_a_side_beyond_the_limit_is_cut_and_says_so() -> None:
    """A reply of 200,000 characters scores as its first part does; exact match looks at all of it."""
    endless = "的" + "哈哈 " * 66_666
    scores = score_pair(endless, REFERENCE)
    kept = score_pair(endless[:MAX_SCORED_CHARACTERS], REFERENCE)
    assert scores.was_cut is True
    assert kept.was_cut is False
    assert scores.as_dict() == kept.as_dict()
    same_start = "x " * (MAX_SCORED_CHARACTERS // 2)
    assert score_pair(same_start + "a", same_start + "b").exact_match == 0.0
    assert score_pair(same_start + "a", same_start + "b").bleu_4 == pytest.approx(100.0, abs=1e-9)


def test_a_text_of_3000_words_is_scored_whole() -> None:
    """Long replies are not cut: every one of the 3,000 words counts, in order."""
    words = [f"word{number}" for number in range(3000)]
    reversed_halves = words[1500:] + words[:1500]
    scores = score_pair(" ".join(words), " ".join(reversed_halves))
    assert scores.was_cut is False
    assert scores.rouge_1 == pytest.approx(100.0, abs=1e-5)
    # jieba keeps each space as a word of its own, which the joining and splitting drops again: 1,500 of 3,000 words.
    assert scores.rouge_l == pytest.approx(50.0, abs=1e-5)


def test_the_summary_is_the_mean_over_all_pairs() -> None:
    """E1: a pair with an empty side counts as 0 in the mean, and values carry 4 decimals."""
    scores = [
        PairScores(100.0, 50.0, 100.0, 10.0, 100.0),
        PairScores(0.0, 0.0, 0.0, 0.0, 0.0),
        PairScores(100.0, 50.0, 0.0, 10.00003, 0.0),
    ]
    expected = {"rouge-1": 66.6667, "rouge-2": 33.3333, "rouge-l": 33.3333, "bleu-4": 6.6667, "exact-match": 33.3333}
    assert summarize([]) == {}
    assert summarize(scores) == expected
    assert list(summarize(scores)) == list(METRIC_NAMES)


def test_scoring_prints_nothing_leaves_no_file_and_needs_no_torch(tmp_path: Path) -> None:
    """A worker's view: jieba announces nothing, writes no cache into the common temporary folder, torch stays out."""
    program = (
        "import sys; from glm_edge_ft.training.metrics import score_pair; "
        f"scores = score_pair({REPLY!r}, {REFERENCE!r}); "
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy or not scores.rouge_l else 0)"
    )
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(tmp_path))
    command = [sys.executable, "-W", "always", "-c", program]
    done = subprocess.run(command, env=os.environ | temporary, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
