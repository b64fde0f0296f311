"""What other tools need in a folder that was saved, beside what transformers and PEFT write there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm_edge_ft.model.checkpoint import Checkpoint

IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def complete_saved_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """Add to a folder that holds a trained model or adapter what it needs to be used by itself, as released tools do.

    A vision model gets the checkpoint's image processor, as it is written there. A whole model also gets the fields of
    its release in `config.json`, and the Python files that its `auto_map` names, where they lie in the model's folder:
    this toolkit runs none of them, but older tools do.
    """
    add_fields_of_the_release(folder)
    if checkpoint.is_vision:
        for name in IMAGE_PROCESSOR_FILES:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, folder / name)
    if checkpoint.location.is_local and (folder / "config.json").is_file() and _auto_map(folder / "config.json"):
        for path in sorted(checkpoint.folder.glob("*.py")):
            shutil.copyfile(path, folder / path.name)


def _auto_map(path: Path) -> dict[str, str]:
    return json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}


def add_fields_of_the_release(folder: Path) -> None:
    """Write the fields of 2024 into a saved `config.json` beside today's, where the folder holds one of a GLM.

    transformers 5 keeps rotary settings in `rope_parameters` and the format in `dtype` alone. Tools of the time of the
    release read `rope_theta`, `partial_rotary_factor` and `torch_dtype`; without the second they rotate half of each
    head, without a word. Where both are written, transformers 5 takes its own.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if config.get("model_type") != "glm" or not isinstance(rope, dict):
        return
    old_names = {"rope_theta": rope.get("rope_theta"), "partial_rotary_factor": rope.get("partial_rotary_factor")}
    old_names["torch_dtype"] = config.get("dtype")
    config |= {name: value for name, value in old_names.items() if value is not None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
