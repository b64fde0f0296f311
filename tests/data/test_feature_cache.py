"""Vectors of a frozen vision part that are kept: the same training, and the vision part sees each image once."""

from __future__ import annotations

import os
import pickle
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_edge_ft.data import collator, feature_cache
from glm_edge_ft.data.cache import ABANDONED_AFTER_SECONDS
from glm_edge_ft.data.feature_cache import FeatureStore, ImageFeatures
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
    """The features stay where they are until a run has ended, and train bit for bit the same."""
    monkeypatch.setattr(feature_cache, "_boot_time", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFeatures, "remove", lambda _: None)
        first = run("first")
    assert len(computed) == IMAGES_OF_TRAIN
    second = run("second")
    assert len(computed) == IMAGES_OF_TRAIN
    assert_same_bits(first, second)
    assert folders(second) == []


def test_after_a_restart_of_the_machine_all_is_computed_anew(
    run: Run, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that lost power may have noted features whose bytes never reached the disk."""
    with monkeypatch.context() as patch:
        patch.setattr(ImageFeatures, "remove", lambda _: None)
        patch.setattr(feature_cache, "_boot_time", lambda: 1)
        run("first")
    run("second")
    assert len(computed) == 2 * IMAGES_OF_TRAIN


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
    assert "features of images are not kept: they need" in printed.err + printed.out
    assert "GLM_EDGE_FT_CACHE" in printed.err + printed.out


def store_of(path: Path) -> FeatureStore:
    """Return a store of three images whose features have four bytes."""
    return FeatureStore(path, ["a.png", "b.png", "c.png"], 4)


def test_features_are_there_once_they_were_written(tmp_path: Path) -> None:
    """In any order, and for other processes; others stay absent, and so does what has the number -1."""
    store = store_of(tmp_path / "new" / "store")
    copy = pickle.loads(pickle.dumps(store))  # as a loader's process gets it
    store.write(2, b"cccc")
    store.write(-1, b"xxxx")
    assert store.numbers == {"a.png": 0, "b.png": 1, "c.png": 2}
    for other in (store, copy, store_of(store.path)):
        assert [other.holds(number) for number in (-1, 0, 1, 2)] == [False, False, False, True]
        assert other.read(2) == b"cccc"


def test_a_full_disk_is_said_once_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full takes no byte, as a full disk does."""
    (tmp_path / "store").symlink_to("/dev/full")
    store = store_of(tmp_path / "store")
    features = ImageFeatures(store, lambda pixels: pixels, torch.float32, (1, 1), torch.device("cpu"))
    batch = {"image_records": torch.tensor([0, 1]), "image_pixels": torch.tensor([0, 1])}
    pixels = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    completed = features.add_image_features({**batch, "pixel_values": pixels})
    assert completed["image_features"].tolist() == pixels.tolist()
    assert features.is_full
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_files_of_killed_runs_are_removed_after_two_days(tmp_path: Path) -> None:
    """One that is in use is younger."""
    for name in ("old", "new"):
        store_of(tmp_path / name).write(0, b"aaaa")
    long_ago = time.time() - ABANDONED_AFTER_SECONDS - 60
    os.utime(tmp_path / "old", (long_ago, long_ago))
    feature_cache._remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    feature_cache._remove_abandoned(tmp_path / "nothing here")
