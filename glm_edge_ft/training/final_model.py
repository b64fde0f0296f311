"""The final model in the output folder's root: this run's, an earlier one's or none, and never a torn one.

It is written under `.saving/`, flushed to disk and looked through as a checkpoint is, and then moved into the root,
where other files lie already, so that no single rename can do it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from glm_edge_ft.errors import RunStopped
from glm_edge_ft.files import flush_to_disk, flush_tree, sizes_of_files
from glm_edge_ft.training.checkpoints import FINAL_MODEL_FILES, find_cut_file

FINAL_FOLDER = "final-model"
_ENTRIES = ("adapter_config.json", "config.json")


def publish_final_model(staged: Path, output_dir: Path) -> None:
    """Move the final model from `staged` into the root of `output_dir`, so that no reader takes a torn one for whole.

    Every reader begins with `config.json`, or with `adapter_config.json`, and takes nothing from a folder that lacks
    it. So the one of an earlier model goes first and the new one comes last. In between weights, index and tokenizer
    change file by file, and shards of the earlier model that the new one has no use for go: a `model.safetensors`
    would be read in place of an index. Each of these three parts lies on the disk before the next one begins. A process
    that is killed on the way leaves the earlier model, none, or the new one.

    Raises:
        RunStopped: a file is not what was written, as some full or failing disks leave it without an error; the root
            is then as it was.
    """
    sizes = sizes_of_files(staged)
    flush_tree(staged)
    if defect := find_cut_file(staged, sizes) or _lack_of_entry(sizes):
        raise RunStopped(f"the final model could not be written whole ({defect}): is the disk full, or failing?")
    entries = [name for name in sizes if name in _ENTRIES]
    others = [name for name in sizes if name not in _ENTRIES]
    for name in entries:
        (output_dir / name).unlink(missing_ok=True)
    flush_to_disk(output_dir)
    for name in others:
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).replace(output_dir / name)
    for path in _shards_in(output_dir):
        if path.name not in sizes:
            path.unlink()
    flush_to_disk(output_dir)
    for name in entries:
        (staged / name).replace(output_dir / name)
    flush_to_disk(output_dir)
    shutil.rmtree(staged.parent, ignore_errors=True)


def _lack_of_entry(names: dict[str, int]) -> str:
    return "" if any(name in names for name in _ENTRIES) else f"there is neither {' nor '.join(_ENTRIES)}"


def _shards_in(folder: Path) -> list[Path]:
    patterns = [pattern for pattern in FINAL_MODEL_FILES if pattern.startswith("model")]
    return [path for pattern in patterns for path in folder.glob(pattern)]
