"""The whole way on the tokenizer that ships with the project, and its demo data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.embedded.layout import STOP_TOKENS
from glm_edge_ft.data.dataset import build_dataset, load_prompts
from glm_edge_ft.data.encoding import ConversationEncoder
from glm_edge_ft.data.prompts import clean_prediction
from glm_edge_ft.data.rows import RawRow, iter_rows
from glm_edge_ft.model.checkpoint import EMBEDDED_MODELS

DEMO = Path(__file__).resolve().parents[2] / "data" / "demo"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The embedded model's tokenizer, as a run loads it."""
    loaded = AutoTokenizer.from_pretrained(EMBEDDED_MODELS["glm-edge-nano"])
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> ConversationEncoder:
    """Its encoder, with the demo's budgets."""
    return ConversationEncoder(tokenizer, [tokenizer.get_vocab()[token] for token in STOP_TOKENS], 256, 256)


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_demo_rows_are_the_template_applied_to_the_whole(
    encoder: ConversationEncoder, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    """M1: every demo row whole, its replies and their stop tokens supervised and nothing else."""
    path = DEMO / f"{name}.jsonl"
    dataset, _ = build_dataset([path], encoder, 1, tmp_path, progress=False)
    rows = [row.value["messages"] for row in iter_rows(path) if isinstance(row, RawRow)]
    assert len(dataset) == len(rows)
    for sample, messages in zip((dataset[index] for index in range(len(dataset))), rows, strict=True):
        whole: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert sample["input_ids"].tolist() == [*whole, tokenizer.get_vocab()["<|user|>"]]
        supervised = sample["input_ids"][sample["labels"] != -100]
        replies = [message["content"] for message in messages if message["role"] == "assistant"]
        assert tokenizer.decode(supervised) == "".join(f"\n{reply}<|user|>" for reply in replies)
    assert dataset.report.dropped_rows == dataset.report.control_text_rows == 0
    assert set(dataset.report.cut_rows.values()) == {0}


def test_demo_references_survive_the_way_through_ids(
    encoder: ConversationEncoder, tokenizer: PreTrainedTokenizerFast
) -> None:
    """E2: what a perfect model generates scores as the reference itself."""
    for sample in load_prompts([DEMO / "dev.jsonl"], encoder):
        ids = tokenizer(f"\n{sample.reference}<|user|>", add_special_tokens=False)["input_ids"]
        assert clean_prediction(encoder, ids) == sample.reference
        assert tokenizer.decode(sample.prompt_ids.tolist()) == sample.prompt
        assert sample.prompt.endswith("<|assistant|>")
