"""`convert` as a command: what it refuses, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm_edge_ft.data.convert import convert_file
from glm_edge_ft.errors import UserError
from tests.data.converting import convert, good


def test_broken_json_is_reported_and_the_rest_converted(tmp_path: Path) -> None:
    """D2: line 2 is broken."""
    source = tmp_path / "source.jsonl"
    row = json.dumps(good("advertisegen"))
    source.write_text(f"{row}\n{{bad\n{row}\n", encoding="utf-8")
    conversion = convert_file(source, tmp_path / "new.jsonl", "advertisegen")
    assert conversion.written == 2
    assert conversion.left_out[0].where == "source.jsonl:2:2"


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("new.jsonl", "alpaka", "known ones: alpaca, sharegpt, swift, advertisegen, llava, qwen-vl, openai"),
        ("there.jsonl", "alpaca", "is there already"),
        ("new.txt", "alpaca", "let the name end in .jsonl"),
        ("source.json/new.jsonl", "alpaca", "cannot be written: "),
        ("new.jsonl", "llava", "not one row could be read as llava"),
    ],
)
def test_what_is_wrong_with_the_command_is_refused(tmp_path: Path, name: str, form: str, reason: str) -> None:
    """Nothing is written, nothing written over, no half file is left."""
    (tmp_path / "there.jsonl").write_text("x", encoding="utf-8")
    source = tmp_path / "source.json"
    source.write_text(json.dumps([good("alpaca")]), encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        convert_file(source, tmp_path / name, form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.json", "there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text(encoding="utf-8") == "x"


def test_rows_that_are_left_out_are_counted_by_reason(tmp_path: Path) -> None:
    """K23: one entry a reason, with the number of rows and their lines, whatever values differ in them."""
    bad = [{"instruction": "Q", "output": number} for number in range(9)] + [{"instruction": "Q", "chosen": "A"}] * 2
    conversion, _ = convert(tmp_path, "alpaca", good("alpaca"), *bad)
    lines = conversion.lines(tmp_path / "new.jsonl")
    assert lines[1] == "11 rows could not be converted:"
    assert lines[2].startswith("source.jsonl:2: 'output' must be a string")
    assert "(9 rows, also source.jsonl:3, " in lines[2] and "and 3 more)" in lines[2]
    assert "(2 rows, also source.jsonl:12)" in lines[3]
    assert len(lines) == 4
    many = [{**good("alpaca"), f"key {number}": 1, "id": 1} for number in range(100)]
    lines = convert(tmp_path / "keys", "alpaca", *many)[0].lines(tmp_path / "new.jsonl")
    assert (lines[1], lines[-1]) == ("key 'id' has no meaning here: 100 rows", "... and 81 more remarks")
