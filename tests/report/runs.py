"""Output folders as runs leave them, small, and the page read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "link", "img", "br", "input", "hr"}
SCRIPT = "<script>alert(1)</script>"
DATA_REPORT = {
    "rows": 8,
    "tokens": 400,
    "supervised_tokens": 100,
    "role_tokens": {"user": 290, "assistant": 100, "template": 10},
    "cut_rows": {"prompt_tokens_cut": 2},
    "dropped_rows": 1,
    "dropped": ["train.jsonl:3: the picture cat.png cannot be read"],
    "lengths": {"p50": 50, "max": 71},
}
LOG: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 5.25, "eval_rouge-l": 1.5, "eval_exact-match": 0.0},
    {"step": 10, "loss": 4.5, "learning_rate": 0.001, "grad_norm": 2.5, "tokens_per_second": 200.0},
    {"step": 20, "loss": 3.25, "learning_rate": 0.0005, "grad_norm": 1.5, "tokens_per_second": 300.0},
    {"step": 20, "eval_loss": 3.5, "eval_rouge-l": 42.125, "eval_exact-match": 50.0},
    {"step": 20, "train_runtime": 61.0, "train_loss": 3.875},
    {"step": 20, "test_loss": 3.75, "test_rouge-l": 40.5},
]


def prediction(line: int, text: str, score: float, **more: Any) -> dict[str, Any]:
    """Return a line of a predictions file whose every score is `score`."""
    scores = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l", "bleu-4", "exact-match"), score)
    place = {"file": "dev.jsonl", "line": line, "turn": 1}
    return {
        **place,
        "prompt": f"<|user|>\n问题{line}<|assistant|>",
        "reference": "今天天气很好",
        "prediction": text,
        **scores,
        **more,
    }


def lines(records: Iterable[Any]) -> str:
    """Return records as JSONL."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_run(
    folder: Path,
    predictions: Mapping[str, Sequence[dict[str, Any]]],
    log: Sequence[dict[str, Any]] = LOG,
    **training_args: Any,
) -> Path:
    """Write the output folder of a run and return it."""
    (folder / "predictions").mkdir(parents=True)
    config = {
        "max_input_length": 256,
        "training_args": {"max_steps": 20, **training_args},
        "peft_config": {"peft_type": "LORA"},
    }
    facts = {"parameters": 1000, "trainable_parameters": 100, "memory_bytes": {"total": 5_000_000}}
    data = {"train": {"file": "train.jsonl", "fingerprint": "f00", "report": DATA_REPORT}}
    record = {"model": "glm-edge-nano", "config": config, "facts": facts, "data": data, "versions": {"torch": "2.13.0"}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "metrics.jsonl").write_text(lines(log), encoding="utf-8")
    for name, rows in predictions.items():
        (folder / "predictions" / f"{name}.jsonl").write_text(lines(rows), encoding="utf-8")
    return folder


class PageReader(HTMLParser):
    """Reads a page: whether its elements close one another in turn, its attributes, and its JSON block."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open_elements: list[str] = []
        self.elements: list[str] = []
        self.values: list[str] = []
        self.json = ""
        self._is_json = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element, and that it is open."""
        self.elements.append(tag)
        self.values += [value for name, value in attrs if value and name in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open_elements.append(tag)
        self._is_json = ("id", "data") in attrs

    def handle_endtag(self, tag: str) -> None:
        """Close the element that is open."""
        assert self.open_elements.pop() == tag
        self._is_json = False

    def handle_data(self, data: str) -> None:
        """Keep the JSON block."""
        if self._is_json:
            self.json += data


def read_page(path: Path) -> tuple[PageReader, dict[str, Any]]:
    """Return a page's structure and its data."""
    reader = PageReader(path.read_text(encoding="utf-8"))
    return reader, json.loads(reader.json)
