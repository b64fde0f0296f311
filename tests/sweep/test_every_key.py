"""No key that a config may have is without effect and without a word: each is tried, in a run of three steps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot
import pytest

import glm_edge_ft.training.trainer  # noqa: F401  # before the processes are forked
from glm_edge_ft.config.keys import library_keys
from glm_edge_ft.training.metrics import score_pair
from tests.runs import LORA as LORA_SETTINGS
from tests.runs import PREFIX as PREFIX_SETTINGS
from tests.runs import do_run, write_chat_data
from tests.sweep import keys
from tests.sweep.keys import Try
from tests.sweep.observe import Observation, observe

MODEL = "glm-edge-nano"
RUN: dict[str, Any] = {"max_steps": 3, "save_steps": 3, "per_device_train_batch_size": 2}
EVALUATED: dict[str, Any] = {
    "val": "dev.jsonl",
    "eval_strategy": "steps",
    "eval_steps": 3,
    "generation_config": {"max_new_tokens": 8},
}
_OF_EVALUATIONS = re.compile("eval|best|better|generat|predict|metric|log_level")
SECTIONS: Mapping[str, Mapping[str, Try]] = {
    "training": keys.TRAINING,
    "generation": keys.GENERATION,
    "lora": keys.LORA,
    "prefix": keys.PREFIX,
}
CASES = [(section, key) for section, tries in SECTIONS.items() for key in tries]


def test_every_field_of_the_installed_classes_is_tried() -> None:
    """K13: a new version's new field is found here, and one that is gone."""
    assert keys.TRAINING.keys() == library_keys("training_args").keys()
    assert keys.GENERATION.keys() == library_keys("generation_config").keys()
    assert keys.LORA.keys() == library_keys("LORA").keys()
    assert keys.PREFIX.keys() == library_keys("PREFIX_TUNING").keys()
    assert all(
        bool(one.why) == (one.comes_of_it == "elsewhere") for tries in SECTIONS.values() for one in tries.values()
    )


def settings_of(section: str, key: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run to try a key in, with further keys in its section."""
    if section == "generation":
        return {**RUN, **EVALUATED, "generation_config": {**EVALUATED["generation_config"], **extra}}
    if section == "training":
        return {**RUN, **(EVALUATED if _OF_EVALUATIONS.search(key) else {}), **extra}
    return {**RUN, "peft": {**(LORA_SETTINGS if section == "lora" else PREFIX_SETTINGS), **extra}}


def load_libraries(data: Path, folder: Path) -> None:
    """Load here what each forked process would load anew; no gradient, which torch allows on one side of a fork."""
    score_pair("今天", "今天天气")
    figure, axes = matplotlib.pyplot.subplots()
    axes.plot([1, 2])
    figure.savefig(data / "warm.png")
    matplotlib.pyplot.close(figure)
    do_run(folder / "checked", data, MODEL, check=True, **RUN, **EVALUATED)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six training rows and five to evaluate on."""
    folder = tmp_path_factory.mktemp("sweep")
    data = write_chat_data(folder / "data", train=6)
    load_libraries(data, folder)
    return data


@pytest.fixture(scope="module")
def plain_runs() -> dict[str, Observation]:
    """Runs without any of the keys, by their settings; each is done once."""
    return {}


def classify(found: Observation, plain: Observation, key: str) -> str:
    """Return what came of a key; `silent` where nothing did."""
    if found["end"] != "done":
        return str(found["end"])
    differs = {kind for kind in found["seen"] if found["seen"][kind] != plain["seen"].get(kind)}
    new = [line for line in found["said"] if line not in plain["said"]]
    if differs - {"printed"}:
        return "effect"
    if any(key in line for line in new):
        return "notice"
    return "effect" if differs else "silent"


def run(folder: Path, data: Path, section: str, key: str, with_key: bool) -> Observation:
    """Do one run with or without a key, after one of a single step where it is to be resumed."""
    one = SECTIONS[section][key]
    settings = settings_of(section, key, {**one.beside, **({key: one.value} if with_key else {})})
    if one.resumed:
        begun = {**settings_of(section, key, one.beside), "max_steps": 1, "save_steps": 1}
        observe(folder / "run", data, MODEL, 1, begun)
        return observe(folder / "run", data, MODEL, one.ranks, {**settings, "resume": "yes"})
    return observe(folder / "run", data, MODEL, one.ranks, settings)


@pytest.mark.slow
@pytest.mark.parametrize(("section", "key"), CASES)
def test_a_key_has_an_effect_or_a_word(
    tmp_path: Path, data: Path, plain_runs: dict[str, Observation], section: str, key: str
) -> None:
    """K13: what a key does is what the table says, and what is refused comes with what to write instead."""
    one = SECTIONS[section][key]
    found = run(tmp_path, data, section, key, with_key=True)
    plain = found
    if found["end"] == "done":
        name = f"{settings_of(section, key, one.beside)} {one.ranks} {one.resumed}"
        if name not in plain_runs:
            plain_runs[name] = run(tmp_path / "plain", data, section, key, with_key=False)
        plain = plain_runs[name]
        assert plain["end"] == "done", plain["said"]
    came = classify(found, plain, key)
    expected = "silent" if one.comes_of_it == "elsewhere" else one.comes_of_it
    assert came == expected, found["said"]
    assert came != "refused" or all(found["fixes"])
