"""Records of images on disk: whole or absent, shared among processes, found again by what determines them."""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

import pytest

from glm_edge_ft.data.cache import ABANDONED_AFTER_SECONDS
from glm_edge_ft.data.feature_store import RECORDS_FILE, FeatureStore, remove_abandoned, store_key

IMAGES = ["a.png", "b.png", "c.png"]


def test_a_record_is_there_once_it_was_written(tmp_path: Path) -> None:
    """In any order; others stay absent, and so does what has the number -1."""
    store = FeatureStore(tmp_path / "store", IMAGES, 4)
    store.write(2, b"cccc")
    store.write(-1, b"xxxx")
    assert [store.holds(number) for number in (-1, 0, 1, 2)] == [False, False, False, True]
    assert [store.read(number) for number in (-1, 0, 1, 2)] == [None, None, None, b"cccc"]
    assert store.numbers == {"a.png": 0, "b.png": 1, "c.png": 2}


def test_other_processes_see_what_one_wrote(tmp_path: Path) -> None:
    """A loader's process gets a pickled copy, which opens the files for itself."""
    store = FeatureStore(tmp_path / "store", IMAGES, 4)
    copy = pickle.loads(pickle.dumps(store))  # what was just written
    store.write(0, b"aaaa")
    assert copy.holds(0)
    assert copy.read(0) == b"aaaa"
    assert FeatureStore(tmp_path / "store", IMAGES, 4).read(0) == b"aaaa"


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_record_counts_as_absent(tmp_path: Path, damage: str) -> None:
    """A machine that lost power may have noted a record whose bytes never reached the disk."""
    store = FeatureStore(tmp_path / "store", IMAGES, 4)
    store.write(0, b"aaaa")
    store.write(1, b"bbbb")
    path = tmp_path / "store" / RECORDS_FILE
    path.write_bytes(b"aaaabxbb" if damage == "flipped" else b"aaaab")
    assert FeatureStore(tmp_path / "store", IMAGES, 4).read(0) == b"aaaa"
    assert FeatureStore(tmp_path / "store", IMAGES, 4).read(1) is None


def test_a_full_disk_is_said_once_and_loses_nothing(tmp_path: Path) -> None:
    """/dev/full takes no byte, as a full disk does."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / RECORDS_FILE).symlink_to("/dev/full")
    store = FeatureStore(tmp_path / "store", IMAGES, 4)
    with pytest.raises(OSError, match="No space left on device"):
        store.write(0, b"aaaa")
    store.write(1, b"bbbb")
    assert not store.holds(0)
    assert not store.holds(1)


def test_the_key_follows_the_files_and_the_facts(tmp_path: Path) -> None:
    """An image that was replaced, another list, other weights: each has a store of its own."""
    paths = [tmp_path / name for name in IMAGES]
    for path in paths:
        path.write_bytes(b"picture")
    names = list(map(str, paths))
    key = store_key(names, {"weights": "1"})
    assert store_key(names, {"weights": "1"}) == key
    assert store_key(names[:2], {"weights": "1"}) != key
    assert store_key(names, {"weights": "2"}) != key
    paths[1].write_bytes(b"another picture")
    assert store_key(names, {"weights": "1"}) != key


def test_stores_of_killed_runs_are_removed_after_two_days(tmp_path: Path) -> None:
    """One that is in use is younger."""
    for name in ("old", "new"):
        FeatureStore(tmp_path / name, IMAGES, 4).write(0, b"aaaa")
    long_ago = time.time() - ABANDONED_AFTER_SECONDS - 60
    os.utime(tmp_path / "old" / RECORDS_FILE, (long_ago, long_ago))
    remove_abandoned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    remove_abandoned(tmp_path / "nothing here")
