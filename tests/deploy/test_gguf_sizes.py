"""The sizes of GGUF files in the table of glm_edge_ft/deploy/README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from glm_edge_ft.deploy.export_gguf import TYPES
from glm_edge_ft.deploy.gguf_weights import plan_language_tensors, plan_vision_tensors
from tests.bench.memory_table import build_released_model

FOLDER = Path(__file__).resolve().parents[2] / "glm_edge_ft" / "deploy"


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_sizes_are_those_that_are_written(name: str) -> None:
    """For the released geometry, from the tensors that an export would write."""
    lines = re.findall(r"^\| `(\w+)` \| (.* GB) \| \d+ \|$", (FOLDER / name).read_text(encoding="utf-8"), flags=re.M)
    assert [kind for kind, _ in lines] == list(TYPES)
    models = ("glm-edge-1.5b-chat", "glm-edge-4b-chat", "glm-edge-v-2b", "glm-edge-v-5b")
    for index, model in enumerate(map(build_released_model, models)):
        for kind, cells in lines:
            plans = [
                plan(model, GGMLQuantizationType[kind.upper()]) for plan in (plan_language_tensors, plan_vision_tensors)
            ]
            sizes = [sum(tensor.nbytes for tensor in planned) / 1e9 for planned in plans if planned]
            assert cells.split(" | ")[index] == f"{' + '.join(f'{size:.2f}' for size in sizes)} GB"
