"""Mutated configs and data files: each is refused in words or accepted, and what is plainly wrong is never accepted.

`python -m pytest -m fault tests/test_fuzz.py` tries 5,000 inputs; the default run tries the seeds in KEPT_SEEDS, which
once ended in a traceback or were accepted, and a few more. An input follows from its seed alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from glm_edge_ft import recipe
from glm_edge_ft.errors import UserError
from glm_edge_ft.run import RunRequest
from tests.conftest import TokenizerMaker
from tests.model_folders import save_model_folder

pytestmark = pytest.mark.fault(by_default=True)

KEPT_SEEDS: tuple[int, ...] = (2426, 3122)
ALWAYS_TRIED = 60
ALL = 5_000
CONFIG: dict[str, Any] = {
    "data_config": {"train_file": "train.jsonl", "val_file": "train.jsonl", "test_file": None, "num_proc": 1},
    "max_input_length": 256,
    "max_output_length": 64,
    "freezeV": True,
    "training_args": {
        "output_dir": "output",
        "max_steps": 6,
        "learning_rate": 5e-4,
        "per_device_train_batch_size": 4,
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "save_strategy": "steps",
        "save_steps": 2,
        "log_level": "info",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "predict_with_generate": True,
        "generation_config": {"max_new_tokens": 8},
        "deepspeed": None,
    },
    "peft_config": {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "lora_dropout": 0.1},
}
ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "fine"}]},
    {
        "messages": [
            {"role": "system", "content": "你好"},
            {"role": "user", "content": [{"type": "text", "text": "today"}]},
            {"role": "assistant", "content": "天气很好", "loss": False},
            {"role": "user", "content": "and now?"},
            {"role": "assistant", "content": "the time is now"},
        ],
        "tools": [{"name": "clock", "parameters": {"zone": {"type": "string", "default": None}}}],
    },
    {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a friend 🙂"}]},
]
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**63, -(2**70), 1e400, float("nan"), -0.5, 1e-300, 10**400),
    *("", " ", "no", "yes", "5e-5", "\u0000", "\ud7ff", "🙂", "x" * 5000, "../..", "/", "~", "%s{}", "-", "null"),
    *([], {}, [[]], [None], {"": 1}, {"a": {"b": []}}, [1, "2", {}], {"role": "user"}),
)
PIECES = (
    b'"',
    b"{",
    b"]",
    b":",
    b"\t",
    b"\x00",
    b"\xff",
    b"!!python/object:os.system ",
    b"&a *a",
    b"\xe2\x80\xa8",
    b"  ",
)


@dataclass(frozen=True)
class Mutant:
    """An input that was made from a good one.

    Attributes:
        config, data: the bytes of the two files.
        wrong: whether it must be refused; where False, both ends are right.
    """

    config: bytes
    data: bytes
    wrong: bool


def mutate_bytes(text: bytes, rng: Random) -> bytes:
    """Return text with one to four bytes flipped, pieces cut, doubled or moved, or lines dropped or swapped."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) + 1)
        end = min(len(text), place + rng.choice((1, 2, 7, 40)))
        lines = text.splitlines(keepends=True) or [b""]
        first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(7):
            case 0 if text:
                place = min(place, len(text) - 1)
                text = text[:place] + bytes([text[place] ^ (1 << rng.randrange(8))]) + text[place + 1 :]
            case 1:
                text = text[:place] + text[end:]
            case 2:
                text = text[:place] + text[place:end] * 2 + text[end:]
            case 3:
                text = text[:place]
            case 4:
                text = (
                    text[:place]
                    + rng.choice((b'"', b"{", b"]", b":", b"\t", b"\x00", b"\xff", b"!", b"&a *a"))
                    + text[place:]
                )
            case 5:
                text = b"".join(lines[:first] + lines[first + 1 :])
            case _:
                lines[first], lines[second] = lines[second], lines[first]
                text = b"".join(lines)
    return text


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a tree."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in inside for found in ((*path, key), *places(child, (*path, key)))]


def mutate_tree(tree: Any, rng: Random) -> tuple[Any, str, tuple[Any, ...]]:
    """Return a tree with one value replaced, removed, renamed or doubled; what was done, and where."""
    tree = copy.deepcopy(tree)
    path = rng.choice(places(tree))
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    what = rng.choice(("replace", "replace", "remove", "rename", "wrap"))
    if what == "replace":
        parent[key] = copy.deepcopy(rng.choice(JUNK))
    elif what == "remove":
        del parent[key]
    elif what == "rename" and isinstance(parent, dict):
        name = str(key)
        cut = rng.randrange(len(name) + 1)
        parent[rng.choice((name[:cut] + "x" + name[cut:], name.upper() + "_", "", " " + name))] = parent.pop(key)
    else:
        what = "wrap"
        parent[key] = [parent[key]]
    return tree, what, path


def is_json(text: bytes) -> bool:
    """Return whether text is JSON values one after another, or one array, as the standard parser sees it."""
    try:
        rest = text.decode("utf-8").lstrip("\ufeff").strip()
        while rest:
            _, end = json.JSONDecoder().raw_decode(rest)
            rest = rest[end:].lstrip(" \t\r\n,")
    except (ValueError, RecursionError):
        return False
    return True


def is_yaml(text: bytes) -> bool:
    """Return whether text is a YAML mapping."""
    try:
        return isinstance(yaml.safe_load(text), dict)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False


def to_jsonl(rows: list[Any]) -> bytes:
    """Return rows as the lines of a file; a value that is no JSON is written as Python writes it."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def mutant(seed: int) -> Mutant:
    """Return the input that follows from a seed."""
    rng = Random(seed)
    config, data = yaml.safe_dump(CONFIG, allow_unicode=True, sort_keys=False).encode(), to_jsonl(ROWS)
    match seed % 4:
        case 0:
            config = mutate_bytes(config, rng)
            return Mutant(config, data, wrong=not is_yaml(config))
        case 1:
            data = mutate_bytes(data, rng)
            return Mutant(config, data, wrong=not is_json(data))
        case 2:
            tree, what, path = mutate_tree(CONFIG, rng)
            return Mutant(
                yaml.safe_dump(tree, allow_unicode=True).encode(), data, wrong=what == "rename" and path[-1] != ""
            )
        case _:
            tree, what, path = mutate_tree(ROWS, rng)
            inside_tools = "tools" in path
            wrong = what in ("rename", "wrap") and not inside_tools and path[-1] not in ("tools", "loss", "content")
            return Mutant(config, to_jsonl(tree), wrong=wrong and len(path) > 1 and not isinstance(path[-1], int))


Try = Callable[[int], str]


@pytest.fixture
def attempt(tmp_path: Path, make_tokenizer: TokenizerMaker, monkeypatch: pytest.MonkeyPatch) -> Try:
    """Return a function that checks the input of a seed: how it ended, or why that is a defect."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    model = save_model_folder(tmp_path / "model", make_tokenizer("glm"))
    data = tmp_path / "data"
    data.mkdir()
    config = tmp_path / "run.yaml"

    def check(seed: int) -> str:
        made = mutant(seed)
        config.write_bytes(made.config)
        (data / "train.jsonl").write_bytes(made.data)
        try:
            recipe.run(RunRequest(data, str(model), config, None, check=True, takes_images=False))
        except UserError as error:
            assert error.problems, f"seed {seed}: refused without a word"
            return "refused"
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        assert not made.wrong, f"seed {seed} is wrong and was accepted"
        return "accepted"

    return check


@pytest.mark.parametrize("seed", [*KEPT_SEEDS, *range(ALWAYS_TRIED)])
def test_a_mutant_is_refused_or_accepted_in_words(attempt: Try, seed: int) -> None:
    """C4, D2 and their kinds: no traceback, and what is plainly wrong is refused."""
    assert attempt(seed) in {"refused", "accepted"}


@pytest.mark.fault
def test_thousands_of_mutants(attempt: Try) -> None:
    """The same for all seeds; both ends occur often, so the mutants are neither all harmless nor all hopeless."""
    defects, ends = [], []
    for seed in range(ALWAYS_TRIED, ALL):
        try:
            ends.append(attempt(seed))
        except AssertionError as defect:
            defects.append(str(defect))
    assert defects == []
    assert min(ends.count("refused"), ends.count("accepted")) > ALL / 10
