"""Reading the config file itself: what is not YAML, not text or not a file is refused plainly (case C4)."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_edge_ft.config.yaml_source import read_yaml
from glm_edge_ft.errors import Problem, UserError


def refusal(path: Path) -> Problem:
    """Return the one problem of a file, its place without the folder."""
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    (problem,) = caught.value.problems
    return Problem(problem.where.replace(f"{path.parent}/", ""), problem.what, problem.fix)


def problem_of(folder: Path, content: bytes) -> Problem:
    """Return the one problem of a file with this content."""
    (folder / "run.yaml").write_bytes(content)
    return refusal(folder / "run.yaml")


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        (b"", "run.yaml", "the config file is empty"),
        (b"# only a comment\n", "run.yaml", "the config file is empty"),
        (b"- a\n- b\n", "run.yaml:1", "a list where keys are expected"),
        (b"\nhello\n", "run.yaml:2", "a single value where keys are expected"),
        (b"a: 1\nb: [1, 2\nc: 3\n", "run.yaml:3:2", "not valid YAML: while parsing a flow sequence"),
        (b"a: 1\n\tb: 2\n", "run.yaml:2:1", "not valid YAML: while scanning for the next token, found character"),
        (b"a: b: c\n", "run.yaml:1:5", "not valid YAML: mapping values are not allowed here"),
        (b"a: 1\n---\nb: 2\n", "run.yaml:2:1", "not valid YAML: expected a single document"),
        (b"a: 1\nb: caf\xe9\n", "run.yaml:2", "byte 0xe9 is not UTF-8"),
        (b"a: 1\nb: \x01\n", "run.yaml:2", "not valid YAML: the control character U+0001"),
        (b"\x7fELF\0\0", "run.yaml", "this is not a text file"),
        (b"[" * 5000, "run.yaml", "nested more than 40 levels deep"),
        (b"a: &a [*a]\n", "run.yaml:1: a[0]", "nested too deeply, or made far too large by aliases"),
    ],
)
def test_unreadable_file_is_refused_with_its_place(tmp_path: Path, content: bytes, where: str, what: str) -> None:
    """C4: `file:line:column: reason` for what is not YAML, a plain refusal for what is no config at all."""
    problem = problem_of(tmp_path, content)
    assert problem.where == where
    assert problem.what.startswith(what)


@pytest.mark.fault(by_default=True)
def test_aliases_cannot_blow_the_file_up(tmp_path: Path) -> None:
    """C4: ten levels of ten aliases are ten billion values; they are refused instead of built."""
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 10)]
    problem = problem_of(tmp_path, "\n".join(lines).encode())
    assert problem.what == "nested too deeply, or made far too large by aliases"


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    """C6, K32: a config that is not there."""
    (tmp_path / "lora.yaml").touch()
    problem = refusal(tmp_path / "loar.yaml")
    assert (problem.where, problem.what) == ("loar.yaml", "no such config file")
    assert problem.fix == f"did you mean {tmp_path / 'lora.yaml'}? config files there: lora.yaml"


def test_folder_is_refused(tmp_path: Path) -> None:
    """C6: a folder in place of the config."""
    (tmp_path / "configs").mkdir()
    assert refusal(tmp_path / "configs").what == "this is a folder, not a config file"


@pytest.mark.fault(by_default=True)
def test_tag_is_never_executed(tmp_path: Path) -> None:
    """C4: a Python tag is refused by line and nothing of it runs."""
    path = tmp_path / "run.yaml"
    path.write_text(f"a: !!python/object/apply:pathlib.Path.touch [{tmp_path}/touched]\nb: !env HOME\n")
    _, problems = read_yaml(path)
    assert [problem.what for _, problem in problems] == [
        "the tag `!!python/object/apply:pathlib.Path.touch` is not allowed here",
        "the tag `!env` is not allowed here",
    ]
    assert problems[1][1].where == f"{path}:2: b"
    assert not (tmp_path / "touched").exists()


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    """C4: a file that an editor saved with a BOM."""
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: \xe4\xbd\xa0\r\n")
    assert read_yaml(tmp_path / "run.yaml")[0] == {"a": "1", "b": "你"}


def test_merge_key_fills_in_what_is_not_written(tmp_path: Path) -> None:
    """C4: anchors and `<<` work, and a merged key is no duplicate."""
    (tmp_path / "run.yaml").write_text("a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\n")
    values, problems = read_yaml(tmp_path / "run.yaml")
    assert values["b"] == {"x": "1", "y": "3"}
    assert problems == []


def test_keys_are_texts_as_written(tmp_path: Path) -> None:
    """C4: `no:` and `1:` as keys keep their spelling."""
    (tmp_path / "run.yaml").write_text("no: 1\n2: on\n'3': x\n")
    assert read_yaml(tmp_path / "run.yaml")[0] == {"no": "1", "2": "on", "3": "x"}
