"""Vectors of a frozen vision part that are kept: the same training, and the vision part sees each image once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_edge_ft.data import collator, feature_cache
from glm_edge_ft.data.feature_cache import ImageFeatures
from glm_edge_ft.data.feature_store import RECORDS_FILE, FeatureStore
from tests.runs import LORA, assert_close, assert_same_bits, do_run, metrics

Run = Callable[..., Path]
EVALUATED = {"val": "dev.jsonl", "eval_strategy": "steps", "eval_steps": 3}
IMAGES_OF_TRAIN, IMAGES_OF_DEV = 9, 3


@pytest.fixture
def run(tmp_path: Path, vision_model: Path, vision_data: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that does one vision run of six steps, two epochs, with a frozen vision part."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))

    def start(output: str = "output", **options: Any) -> Path:
        top = {"freezeV": True, **options.pop("top", {})}
        return do_run(tmp_path / output, vision_data, vision_model, takes_images=True, top=top, **options)

    return start


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the images that go through the vision part for the sake of being kept."""
    counted: list[int] = []
    compute = ImageFeatures._compute

    def counting(self: ImageFeatures, pixels: torch.Tensor) -> torch.Tensor:
        counted.append(1)
        return compute(self, pixels)

    monkeypatch.setattr(ImageFeatures, "_compute", counting)
    return counted


def folders(run_folder: Path) -> list[Path]:
    """Return the stores that are left beside a run's folder."""
    return list((run_folder.parent / "cache" / "features").glob("*"))


def test_kept_vectors_train_as_computed_ones_do(run: Run) -> None:
    """Losses, weights and replies of two epochs, against the vision part at work in every batch."""
    kept = run("kept", **EVALUATED)
    anew = run("anew", top={"cache_image_features": False}, **EVALUATED)
    assert_close(anew, kept)
    replies = [(folder / "predictions" / "eval-6.jsonl").read_text(encoding="utf-8") for folder in (kept, anew)]
    assert replies[0] == replies[1]


def test_each_image_is_decoded_and_computed_once_in_a_whole_run(
    run: Run, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs and two evaluations by loss and replies. The check opens the images once more, before training."""
    decoded: Counter[str] = Counter()
    load_image = collator.load_image

    def counting(path: str) -> Any:
        decoded[Path(path).name] += 1
        return load_image(path)

    monkeypatch.setattr(collator, "load_image", counting)
    output = run(**EVALUATED)
    assert len([line for line in metrics(output) if "eval_loss" in line]) == 2
    assert set(decoded.values()) == {1}
    assert len(decoded) == len(computed) == IMAGES_OF_TRAIN + IMAGES_OF_DEV
    assert folders(output) == []


def test_without_freezev_lora_leaves_the_vision_part_as_it_is_all_the_same(run: Run, computed: list[int]) -> None:
    """LoRA adapts the language model alone, unless its names reach the tower."""
    run(top={"freezeV": False})
    assert len(computed) == IMAGES_OF_TRAIN
    computed.clear()
    run("tower", top={"freezeV": False}, peft=LORA | {"target_modules": ["q_proj", "out_proj"]})
    assert computed == []


def test_loader_processes_change_nothing(run: Run) -> None:
    """They decode what is not kept yet."""
    assert_same_bits(run("here"), run("there", dataloader_num_workers=2))


def test_a_run_goes_on_with_what_a_killed_one_left(
    run: Run, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors stay where they are until a run has ended; a damaged one is made anew, bit for bit the same."""
    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "remove", lambda _: None)
        first = run("first")
    assert len(computed) == IMAGES_OF_TRAIN
    (store,) = folders(first)
    records = bytearray((store / RECORDS_FILE).read_bytes())
    records[5] ^= 1
    (store / RECORDS_FILE).write_bytes(records)
    second = run("second")
    assert len(computed) == IMAGES_OF_TRAIN + 1
    assert_same_bits(first, second)
    assert folders(second) == []


@pytest.mark.parametrize(
    "options",
    [{"peft": None, "top": {"freezeV": False}}, {"top": {"cache_image_features": False}}, {"max_steps": 3}],
    ids=["trained", "switched off", "one epoch"],
)
def test_nothing_is_kept_where_it_would_not_help(run: Run, computed: list[int], options: dict[str, Any]) -> None:
    """A vision part that is trained changes its vectors; one epoch without evaluation needs each once."""
    output = run(**options)
    assert computed == []
    assert folders(output) == []


def test_too_little_room_is_said_and_the_run_goes_on(
    run: Run, computed: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the size, the free space, and where to put them instead."""
    monkeypatch.setattr(feature_cache, "MOST_OF_FREE_SPACE", 0.0)
    run()
    assert computed == []
    printed = capsys.readouterr()
    assert "vectors of images are not kept: they need" in printed.err + printed.out
    assert "GLM_EDGE_FT_CACHE" in printed.err + printed.out
