"""The keys for images: their defaults, what they take, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.files import load, refused


def test_a_config_that_is_silent_takes_one_image_and_stops_at_a_bad_one(tmp_path: Path) -> None:
    """I3, I4: what the released models take; and no row is lost unseen."""
    config = load(tmp_path)
    assert (config.max_images, config.on_bad_image, config.image_placeholder_tokens) == (1, "error", None)
    assert config.cache_image_features is True


def test_what_the_file_says_is_taken_and_recorded(tmp_path: Path) -> None:
    """The resolved config, which run.json holds, can be read as a config again."""
    config = load(
        tmp_path, rest="max_images: 3\non_bad_image: skip\nimage_placeholder_tokens: 18\ncache_image_features: false\n"
    )
    assert (config.max_images, config.on_bad_image, config.image_placeholder_tokens) == (3, "skip", 18)
    assert config.cache_image_features is False
    resolved = config.resolved()
    assert {key: resolved[key] for key in ("max_images", "on_bad_image", "image_placeholder_tokens")} == {
        "max_images": 3,
        "on_bad_image": "skip",
        "image_placeholder_tokens": 18,
    }


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("max_images: 0", "`0` is out of range"),
        ("image_placeholder_tokens: 0", "`0` is out of range"),
        ("on_bad_image: ignore", "`ignore` is not a value it takes"),
        ("max_image: 2", "unknown key `max_image`"),
    ],
)
def test_values_without_sense_are_refused(tmp_path: Path, line: str, what: str) -> None:
    """C4: each with its line."""
    (problem,) = refused(tmp_path, rest=line + "\n")
    assert what in problem.what
    assert problem.where.startswith(f"run.yaml:7: {line.split(':', maxsplit=1)[0]}")
