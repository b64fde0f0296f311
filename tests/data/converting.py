"""Shared parts of the tests of `convert`: rows of other formats, and their conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glm_edge_ft.data.convert import Conversion, convert_file

PART = {"type": "image", "image": "/p.png"}
GOOD: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Q", "output": "A"},
    "advertisegen": {"content": "Q", "summary": "A"},
}


def messages(question: Any = "Q", reply: Any = "A", /, **keys: Any) -> list[dict[str, Any]]:
    """Return an exchange by role and content; `keys` go into the question."""
    return [{"role": "user", "content": question, **keys}, {"role": "assistant", "content": reply}]


def turns(question: Any = "Q", reply: Any = "A") -> list[dict[str, Any]]:
    """Return an exchange by from and value."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]


def good(form: str) -> dict[str, Any]:
    """Return a row of a format that becomes `messages()`."""
    return GOOD.get(form, {"messages": messages()})


def convert(folder: Path, form: str, *rows: Any, images: Path | None = None) -> tuple[Conversion, list[Any]]:
    """Convert rows; return the report and the new file's rows."""
    folder.mkdir(exist_ok=True)
    source, target = folder / "source.jsonl", folder / "out" / "new.jsonl"
    target.parent.mkdir()
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    conversion = convert_file(source, target, form, images)
    return conversion, [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
