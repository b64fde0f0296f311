"""Fixtures of the tests of data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.vision import REPLY, image, text, user, write_images

WriteRows = Callable[..., Path]


@pytest.fixture
def path(write_rows: WriteRows, tmp_path: Path) -> Path:
    """Three rows: a red image, text alone, two turns of which the second has a blue image."""
    write_images(tmp_path)
    return write_rows(
        [
            [user(image("red.png"), text("hello")), REPLY],
            [user(text("hello")), REPLY],
            [user(text("hello")), REPLY, user(text("there"), image("图 片/blue b.png")), REPLY],
        ]
    )
