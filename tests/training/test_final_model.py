"""The final model in the root of the output folder: a reader finds the earlier one, none or the new one, whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glm_edge_ft.errors import RunStopped
from glm_edge_ft.training.checkpoints import FINAL_FOLDER, publish_final_model, staging_folder

pytestmark = pytest.mark.fault(by_default=True)

TOKENIZER = ("tokenizer.json", "chat_templates/tool_use.jinja")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER)
ONE_FILE = ("config.json", "model.safetensors", *TOKENIZER)
INDEX = "model.safetensors.index.json"
TWO, THREE = (
    ("config.json", INDEX, *(f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)))
    for count in (2, 3)
)
ENTRIES = {"adapter_config.json", "config.json"}
OF_THE_USER = "README.md"

KILLED_AT_EACH_EVENT = """
import os, shutil, signal, sys
from pathlib import Path
from glm_edge_ft.training.checkpoints import FINAL_FOLDER, publish_final_model, staging_folder

def publish_until(moment, root):
    def count(event, arguments):
        nonlocal moment
        if event in ("os.rename", "os.remove", "os.rmdir", "open"):
            moment -= 1
            if moment < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    publish_final_model(staging_folder(root) / FINAL_FOLDER, root)

begin = Path(sys.argv[1])
for moment in range(200):
    root = begin.with_name(f"killed-{moment}")
    shutil.copytree(begin, root)
    if not (process := os.fork()):
        publish_until(moment, root)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if ended == 0:
        break
    assert ended == -signal.SIGKILL, ended
print(moment)
"""


def write_model(folder: Path, names: tuple[str, ...], value: float) -> dict[str, bytes]:
    """Write a model whose files all hold `value`; return the bytes of each."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file({"weight": torch.full((3,), value)}, path)
        else:
            path.write_text(json.dumps({"value": value}), encoding="utf-8")
    return {name: (folder / name).read_bytes() for name in names}


def model_in(output: Path) -> dict[str, bytes] | None:
    """Return the files of the model in a root as a reader of `config.json` or `adapter_config.json` finds it."""
    files = {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in output.rglob("*")
        if path.is_file() and path.name != OF_THE_USER and staging_folder(output) not in path.parents
    }
    return files if ENTRIES & files.keys() else None


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Return an output folder in which the user keeps a file of their own."""
    folder = tmp_path / "output"
    folder.mkdir()
    (folder / OF_THE_USER).write_text("mine", encoding="utf-8")
    return folder


def stage(output: Path, names: tuple[str, ...]) -> tuple[Path, dict[str, bytes]]:
    """Write a model of twos where a run writes its own; return that folder and the files."""
    staged = staging_folder(output) / FINAL_FOLDER
    return staged, write_model(staged, names, 2.0)


CHANGES = [((), ADAPTER), (ADAPTER, ADAPTER), ((), TWO), (THREE, TWO), (ONE_FILE, (*TWO, *TOKENIZER))]


@pytest.mark.parametrize(("old", "new"), [*CHANGES, ((*TWO, *TOKENIZER), ONE_FILE)])
def test_the_root_holds_the_new_model_and_nothing_of_the_old_one(
    output: Path, old: tuple[str, ...], new: tuple[str, ...]
) -> None:
    """No shard that the new index does not name, and no `model.safetensors` that would be read in its place."""
    write_model(output, old, 1.0)
    staged, files = stage(output, new)
    publish_final_model(staged, output)
    assert model_in(output) == files
    assert (output / OF_THE_USER).read_text(encoding="utf-8") == "mine"
    assert not staging_folder(output).exists()


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_a_process_that_is_killed_on_the_way_leaves_no_torn_model(
    tmp_path: Path, output: Path, old: tuple[str, ...], new: tuple[str, ...]
) -> None:
    """R1: SIGKILL before each file that is opened, renamed or removed, in one process after the other up to the end."""
    before = write_model(output, old, 1.0) or None
    _, after = stage(output, new)
    program = [sys.executable, "-c", KILLED_AT_EACH_EVENT, str(output)]
    moments = int(subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True).stdout)
    found = [model_in(tmp_path / f"killed-{moment}") for moment in range(moments + 1)]
    assert [moment for moment, files in enumerate(found) if files not in (before, None, after)] == []
    seen = ["after" if files == after else "none" if files is None else "before" for files in found]
    assert seen == sorted(seen, key=("before", "none", "after").index)
    assert (seen[0], seen[-1]) == ("before" if old else "none", "after")
    assert seen.count("none") >= len(new) - 1


def test_a_model_that_is_not_what_was_written_leaves_the_root_as_it_was(output: Path) -> None:
    """R1: its weights were cut on the way to the disk."""
    before = write_model(output, ONE_FILE, 1.0)
    staged, files = stage(output, ONE_FILE)
    (staged / "model.safetensors").write_bytes(files["model.safetensors"][:-4])
    with pytest.raises(
        RunStopped, match=r"^the final model could not be written whole \(model\.safetensors is cut or damaged"
    ):
        publish_final_model(staged, output)
    assert model_in(output) == before


def test_a_model_without_its_config_is_not_published(output: Path) -> None:
    """R1: nobody could read it."""
    before = write_model(output, ADAPTER, 1.0)
    staged, _ = stage(output, ADAPTER[1:])
    with pytest.raises(
        RunStopped, match=r"\(there is neither adapter_config\.json nor config\.json\): is the disk full"
    ):
        publish_final_model(staged, output)
    assert model_in(output) == before
