"""Fixtures of the model tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM, load_glm_edge_v
from tests.model.vision_fixtures import SMALL_VOCABULARY, write_checkpoint


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a vision checkpoint with a vocabulary of 300."""
    return write_checkpoint(tmp_path_factory.mktemp("small"), SMALL_VOCABULARY)


@pytest.fixture
def model(vision_folder: Path) -> GlmEdgeVForCausalLM:
    """Return a vision model of its own for each test."""
    return load_glm_edge_v(vision_folder, torch.float32).eval()
