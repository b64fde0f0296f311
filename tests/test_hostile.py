"""What a stranger may have put into data, config, model or checkpoint: nothing of it is run, and nothing hangs."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import signal
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer

from glm_edge_ft import recipe
from glm_edge_ft.checks.pickles import check_pickles
from glm_edge_ft.data.images import find_bad_images, load_image
from glm_edge_ft.data.rows import iter_rows
from glm_edge_ft.deploy.source import find_source
from glm_edge_ft.errors import UserError
from glm_edge_ft.files import LFS_POINTER
from glm_edge_ft.run import RunRequest
from glm_edge_ft.training.checkpoints import MANIFEST
from tests.conftest import TEMPLATES, TokenizerMaker
from tests.launch import REPOSITORY, ZERO_2, launch, start_script
from tests.model_folders import save_model_folder
from tests.runs import do_run, read_json, update_json, write_chat_data, write_config, write_jsonl
from tests.vision_folders import image_part, save_vision_folder, text_part, turns

pytestmark = pytest.mark.fault(by_default=True)

SIDE = 60_000


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    """End a test that waits for a pipe without writer."""

    def give_up(*_: object) -> None:
        raise TimeoutError("waited for a file that never ends, or never begins")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Touch:
    """A pickle that makes a file when it is read in full."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


# ---- images ----


def claims(name: str) -> bytes:
    """Return a picture of one pixel whose header speaks of 60,000 x 60,000."""
    stream = io.BytesIO()
    Image.new("RGB", (1, 1)).save(stream, name)
    content = bytearray(stream.getvalue())
    if name == "PNG":
        header = b"IHDR" + struct.pack(">II", SIDE, SIDE) + content[24:29]
        content[12:33] = header + struct.pack(">I", zlib.crc32(header))
    elif name == "BMP":
        content[18:26] = struct.pack("<II", SIDE, SIDE)
    elif name == "GIF":
        content[6:10] = struct.pack("<HH", SIDE, SIDE)
        descriptor = content.index(b",", 13 + 3 * 2 ** ((content[10] & 7) + 1))
        content[descriptor + 5 : descriptor + 9] = struct.pack("<HH", SIDE, SIDE)
    elif name == "JPEG":
        frame = content.index(b"\xff\xc0") + 5
        content[frame : frame + 4] = struct.pack(">HH", SIDE, SIDE)
    elif name == "TGA":
        content[12:16] = struct.pack("<HH", SIDE, SIDE)
    elif name == "PPM":
        content[:] = content.replace(b"1 1\n", f"{SIDE} {SIDE}\n".encode(), 1)
    else:
        (directory,) = struct.unpack("<I", content[4:8])
        for entry in range(directory + 2, len(content) - 12, 12):
            if struct.unpack("<H", content[entry : entry + 2])[0] in (256, 257):  # ImageWidth, ImageLength
                content[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, SIDE)
    return bytes(content)


@pytest.mark.parametrize("name", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "TGA", "PPM"])
def test_a_small_file_that_claims_billions_of_pixels_is_refused(tmp_path: Path, name: str) -> None:
    """I3: by its header, before memory is asked for."""
    path = tmp_path / f"bomb.{name.lower()}"
    path.write_bytes(claims(name))
    assert path.stat().st_size < 2_000
    reason = find_bad_images([str(path)], progress=False)[str(path)]
    assert reason.startswith("the image has too many pixels: Image size (3600000000 pixels) exceeds limit")


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_a_pipe_or_a_device_is_no_picture(tmp_path: Path, kind: str) -> None:
    """I3: neither waits for a writer nor reads without end."""
    path = tmp_path / "image.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="this is a pipe or a device, not a file"):
        load_image(path)


def test_a_program_that_draws_is_no_picture(tmp_path: Path) -> None:
    """I3: Pillow would hand PostScript to Ghostscript, which runs it."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "EPS")
    path = tmp_path / "image.png"
    path.write_bytes(stream.getvalue())
    with pytest.raises(UserError, match="a PostScript program, which would be run to see it: convert it to PNG"):
        load_image(path)


def test_a_path_out_of_the_data_folder_shows_nothing_of_the_file(
    tmp_path: Path, backend: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I3: a row may name any file; one that is no picture is refused, and none of its content is printed or kept."""
    monkeypatch.setenv("GLM_EDGE_FT_CACHE", str(tmp_path / "cache"))
    save_vision_folder(tmp_path / "model", backend)
    secret = tmp_path / "secret.txt"
    secret.write_text("password: swordfish", encoding="utf-8")
    (tmp_path / "data").mkdir()
    row = turns([image_part("../secret.txt"), text_part("hello")], "fine")
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        do_run(tmp_path / "output", tmp_path / "data", tmp_path / "model", takes_images=True)
    assert "this is no image of a known format" in str(caught.value)
    assert "swordfish" not in str(caught.value)
    assert not (tmp_path / "output").exists()


def test_what_is_no_picture_gives_a_short_line_a_row(tmp_path: Path, backend: Tokenizer) -> None:
    """K26, K27: content and URLs as paths, what is no picture, and numbers without a place in 8 bits, in one run."""
    save_vision_folder(tmp_path / "model", backend)
    data = tmp_path / "data"
    data.mkdir()
    content = base64.b64encode(os.urandom(300_000)).decode()
    write_jsonl(data / "train.jsonl", [turns([image_part(content), text_part("hello")], "fine")] * 25)
    (data / "pointer.png").write_text(f"{LFS_POINTER.decode()}.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (data / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    Image.fromarray(np.array([[0, 255]], dtype=np.int32)).save(data / "32.tiff")
    Image.fromarray(np.array([[0, 255]], dtype=np.float32)).save(data / "float.tiff")
    Image.fromarray(np.array([[0, 4095]], dtype=np.uint16)).save(data / "12.png")
    names = ["pointer.png", "photo.heic", "32.tiff", "float.tiff", "12.png", "/9j/4AAQSkZJRgABAQAAAQABAAD", "d/" * 2000]
    names += [f"data:image/png;base64,{content}", "s3://bucket/a.png", "https://example.org/a.png?" + "a" * 9999]
    rows: list[Any] = [turns([image_part(name), text_part("hello")], "fine") for name in names]
    rows.append({"messages": [{"role": content, "content": "hello"}, {"role": "assistant", "content": "fine"}]})
    write_jsonl(data / "dev.jsonl", rows)
    config = write_config(tmp_path / "output", val="dev.jsonl")
    arguments = [str(data), str(tmp_path / "model"), str(config), "--check"]
    variables = {"GLM_EDGE_FT_CACHE": str(tmp_path / "cache")}
    script = REPOSITORY / "finetune_vision.py"
    said = start_script(script, arguments, tmp_path / "log", processes=1, environment=variables).end(2)
    places = re.findall(r"^(\w+\.jsonl:\d+): ", said, re.MULTILINE)
    assert places == [
        f"{file}.jsonl:{line}" for file, count in (("train", 20), ("dev", 11)) for line in range(1, count + 1)
    ]
    assert "git lfs pull" in said
    assert max(map(len, said.splitlines())) < 700
    assert len(said) < 20_000


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "adapter_model.safetensors"])
def test_a_pointer_of_git_lfs_is_told_from_the_file(tmp_path: Path, name: str) -> None:
    """K27: weights, tokenizer, config, and an adapter: what it is, and what fetches the file."""
    config, weights = ("adapter_config.json", name) if "adapter" in name else ("config.json", "model.safetensors")
    for file in (config, weights, "tokenizer.json"):
        (tmp_path / file).write_text("{}", encoding="utf-8")
    (tmp_path / "pytorch_model.bin").write_bytes(LFS_POINTER)  # is not read, and need not be there
    (tmp_path / name).write_bytes(LFS_POINTER + b".github.com/spec/v1\n")
    with pytest.raises(UserError) as caught:
        find_source(str(tmp_path))
    (problem,) = caught.value.problems
    assert problem.what.endswith(f"in the place of {name}")
    assert "git lfs pull" in problem.fix


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_pointer_in_the_place_of_data(tmp_path: Path, suffix: str) -> None:
    """K27: told from a broken data file."""
    (tmp_path / f"train{suffix}").write_bytes(LFS_POINTER + b".github.com/spec/v1\n")
    (problem,) = iter_rows(tmp_path / f"train{suffix}")
    assert "git lfs pull" in str(problem)


# ---- config and data ----


@pytest.mark.parametrize("what", ["config", "data", "deepspeed", "output"])
def test_a_pipe_in_the_place_of_a_file_is_refused(chat_folder: Path, what: str) -> None:
    """D2, C6: nothing waits for its writer."""
    pipe = chat_folder / "data" / "pipe.jsonl"
    os.mkfifo(pipe)
    settings: dict[str, Any] = {}
    if what == "data":
        settings["val"] = "pipe.jsonl"
    elif what == "deepspeed":
        settings["deepspeed"] = str(pipe)
    config = write_config(pipe if what == "output" else chat_folder / "output", **settings)
    with pytest.raises(UserError) as caught:
        recipe.run(RunRequest(chat_folder / "data", str(chat_folder / "model"), pipe if what == "config" else config))
    assert "pipe.jsonl" in str(caught.value)


@pytest.mark.parametrize("what", ["data", "model", "file"])
def test_a_text_in_the_place_of_a_path_is_refused(tmp_path: Path, what: str) -> None:
    """K27: DATA_DIR, MODEL or a data file of 20,000 characters: a short line, no traceback."""
    text = "iVBORw0KGgo" + "A" * 20_000
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "data_config": {"train_file": f"{text if what == 'file' else 'train'}.jsonl"},
                "training_args": {"output_dir": str(tmp_path / "output"), "max_steps": 1},
            }
        )
    )
    arguments = [text if what == "data" else str(REPOSITORY / "data/demo"), "glm-edge-nano", str(config)]
    arguments[1] = text if what == "model" else arguments[1]
    script = REPOSITORY / "finetune.py"
    said = start_script(script, arguments, tmp_path / "log", processes=1, environment={}).end(2)
    assert "iVBORw0KGgoAAA" in said
    assert "Traceback" not in said
    assert len(said) < 1_000


# ---- models ----


def test_code_in_a_model_folder_is_not_run(chat_folder: Path) -> None:
    """A config that names code of its own: the code stays unread, and there is no key that would allow it."""
    touched = chat_folder / "touched"
    (chat_folder / "model" / "evil.py").write_text(f"import os\nos.mkdir({str(touched)!r})\n", encoding="utf-8")
    path, folders = chat_folder / "model" / "config.json", (chat_folder / "data", chat_folder / "model")
    update_json(path, auto_map={"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"})
    do_run(chat_folder / "output", *folders, check=True)
    update_json(path, model_type="evil")
    with pytest.raises(UserError, match="needs Python code that comes with it, and this toolkit runs none"):
        do_run(chat_folder / "output", *folders, check=True)
    with pytest.raises(UserError, match="trust_remote_code"):
        do_run(chat_folder / "output", *folders, check=True, top={"trust_remote_code": True})
    assert not touched.exists()


def test_a_chat_template_reaches_nothing_but_the_conversation(tmp_path: Path, make_tokenizer: TokenizerMaker) -> None:
    """Templates are programs: they run in jinja's sandbox."""
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + TEMPLATES["glm"]
    save_model_folder(tmp_path / "model", make_tokenizer(template))
    write_chat_data(tmp_path / "data")
    with pytest.raises(UserError, match="access to attribute '__class__' of 'str' object is unsafe"):
        do_run(tmp_path / "output", tmp_path / "data", tmp_path / "model", check=True)


# ---- checkpoints ----


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_pickle_in_a_checkpoint_that_calls_something_is_refused(chat_folder: Path, name: str) -> None:
    """R1: whole by its manifest; found before the weights are read, and nothing of it is run."""
    output = do_run(chat_folder / "output", chat_folder / "data", chat_folder / "model", max_steps=2)
    checkpoint, touched = output / "checkpoint-2", chat_folder / "touched"
    torch.save({"state": Touch(touched)}, checkpoint / name)
    files = read_json(checkpoint / MANIFEST)["files"] | {name: (checkpoint / name).stat().st_size}
    update_json(checkpoint / MANIFEST, files=files)
    with pytest.raises(UserError) as caught:
        do_run(output, chat_folder / "data", chat_folder / "model", max_steps=4, resume="yes")
    assert f"{checkpoint / name}: is a pickle that would call posix.mkdir: nothing of it was read" in str(caught.value)
    assert not touched.exists()


def test_a_random_state_that_calls_something_is_passed_over(
    chat_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R6: read by torch's restricted reader alone; the run goes on and says so."""
    output = do_run(chat_folder / "output", chat_folder / "data", chat_folder / "model", max_steps=2)
    touched = chat_folder / "touched"
    torch.save(Touch(touched), output / "checkpoint-2" / "rng_state.pth")
    capsys.readouterr()
    do_run(output, chat_folder / "data", chat_folder / "model", max_steps=3, resume="yes")
    assert "cannot be read" in capsys.readouterr().err
    assert not touched.exists()


@pytest.mark.parametrize("content", ["zip", "old", "broken"])
def test_deepspeeds_pickles_are_looked_through_too(tmp_path: Path, content: str) -> None:
    """DeepSpeed reads them in full, so what is not known of DeepSpeed itself is refused, and so is what is not read."""
    path = tmp_path / "checkpoint-2" / "global_step2" / "mp_rank_00_model_states.pt"
    path.parent.mkdir(parents=True)
    touched = tmp_path / "touched"
    if content == "zip":
        torch.save({"module": Touch(touched)}, path)
    elif content == "old":
        path.write_bytes(pickle.dumps(Touch(touched)))
    else:
        path.write_bytes(b"PK\3\4" + b"\0" * 100)
    (problem,) = check_pickles(tmp_path / "checkpoint-2")
    assert problem.where == str(path)
    assert problem.what.startswith(
        "is a pickle that would call posix.mkdir" if content == "zip" else "cannot be read: "
    )
    assert not touched.exists()


@pytest.mark.parametrize(
    ("name", "is_known"),
    [
        ("deepspeed.runtime.zero.config\nsys.modules", False),
        ("deepspeed.runtime.zero.config\nsys", False),
        ("deepspeed.runtime.engine\nDeepSpeedEngine", False),
        ("deepspeed.runtime.zero.config\nZeroStageEnum", True),
    ],
)
def test_a_module_of_deepspeed_opens_no_way_to_what_it_imports(tmp_path: Path, name: str, is_known: bool) -> None:
    """R1: what its states hold is known name by name; from protocol 4 on, a dotted name reaches `os` by a module."""
    path = tmp_path / "checkpoint-2" / "global_step2" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.parent.mkdir(parents=True)
    torch.save({}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w") as changed:
        for entry in plain.namelist():
            program = f"c{name}\n.".encode() if entry.endswith("data.pkl") else b""
            changed.writestr(entry, b"\x80\x04" + program if program else plain.read(entry))
    found = [problem.what for problem in check_pickles(tmp_path / "checkpoint-2")]
    named = name.replace("\n", ".")
    assert found == ([] if is_known else [f"is a pickle that would call {named}: nothing of it was read"])


def test_checkpoints_of_this_toolkit_pass(chat_folder: Path) -> None:
    """R1: those of plain runs and, where DeepSpeed is there, its own."""
    plain = do_run(chat_folder / "plain", chat_folder / "data", chat_folder / "model", max_steps=2)
    assert check_pickles(plain / "checkpoint-2") == []
    pytest.importorskip("deepspeed", reason="DeepSpeed is there on Linux alone")
    shared = launch(chat_folder / "shared", chat_folder / "data", chat_folder / "model", max_steps=2, deepspeed=ZERO_2)
    assert list((shared / "checkpoint-2").glob("global_step2/*.pt"))
    assert check_pickles(shared / "checkpoint-2") == []
