"""`export-gguf`: what is refused, what is left on disk, what is printed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from glm_edge_ft.deploy.export_gguf import INSTALL, export_gguf
from glm_edge_ft.errors import UserError
from tests.deploy.conftest import ROOT, command
from tests.deploy.gguf_files import refusal
from tests.runs import files_of_at_most


def test_a_prefix_cannot_be_in_a_file(runs: dict[str, Path], tmp_path: Path) -> None:
    """E5: with the reason that `merge` gives."""
    assert "changes no weights" in refusal(runs["prefix"], tmp_path / "model.gguf")


def test_all_mistakes_of_a_command_line_are_listed(tmp_path: Path) -> None:
    """Exit 2, before anything heavy, one line for each."""
    done = command("export-gguf", str(tmp_path / "none"), str(tmp_path), "--type", "fp16")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 3 problems in the input\n")
    assert "--type fp16: there is no such type\n    -> did you mean f16?" in done.stderr
    assert f"OUT {tmp_path}: is a folder\n    -> name a file in it: {tmp_path / 'model.gguf'}" in done.stderr


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("Q8_0", "did you mean q8_0?"),
        ("q8", "did you mean q8_0?"),
        ("bfloat16", "did you mean bf16?"),
        ("q4_k_m", "choose from f32, f16, bf16, q8_0; llama.cpp's llama-quantize makes smaller ones of an f16 file"),
        ("int", "choose from f32, f16, bf16, q8_0"),
    ],
)
def test_a_wrong_type_gets_a_hint(kind: str, hint: str, tmp_path: Path) -> None:
    """Other names of the same formats, and smaller ones that llama.cpp makes itself."""
    assert refusal("glm-edge-nano", tmp_path / "a.gguf", kind=kind).endswith(f"-> {hint}")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    """Neither the file nor what is written beside it; other places that cannot be are refused too."""
    for name in ("a.gguf", "b.Modelfile", "mmproj-c.gguf"):
        (tmp_path / name).write_text("", encoding="utf-8")
        out = tmp_path / f"{name[-6 if name.endswith('.gguf') else 0]}.gguf"
        assert "is there already, and nothing is written over" in refusal("glm-edge-nano", out)
    assert "does not end in .gguf\n    -> name it d.bin.gguf" in refusal("glm-edge-nano", tmp_path / "d.bin")
    with pytest.raises(UserError, match="cannot be written there"):
        export_gguf("glm-edge-nano", tmp_path / "a.gguf" / "below" / "e.gguf")


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is optional; the message says what to run, with the version that was tested."""
    required = (ROOT / "tests/requirements.txt").read_text(encoding="utf-8").split()
    assert INSTALL.removeprefix("pip install ") in required
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = refusal("glm-edge-nano", tmp_path / "a.gguf")
    assert message == f"export-gguf: needs the package gguf, which is not installed\n    -> {INSTALL}"


def test_a_disk_that_is_full_leaves_nothing_behind(model_folder: Path, tmp_path: Path) -> None:
    """K51: here files may not grow beyond 50 KB, half of what is needed."""
    with files_of_at_most(50_000):
        message = refusal(model_folder, tmp_path / "model.gguf", kind="f32")
    assert f"OUT {tmp_path / 'model.gguf'}: cannot be written: " in message
    assert "make room, or name another disk" in message


def test_what_was_written_and_how_it_is_run_are_printed(runs: dict[str, Path], tmp_path: Path) -> None:
    """R7, K31: the line for llama.cpp, and the Modelfile for Ollama beside the file, which answers greedily."""
    out = tmp_path / "made" / "模型 V2 (最终).gguf"
    done = command("export-gguf", str(runs["lora"]), str(out), "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    made = out.with_suffix(".Modelfile")
    lines = done.stdout.splitlines()
    assert lines[0] == f"GGUF file: {out} ({out.stat().st_size / 1e6:,.1f} MB)"
    assert lines[1] == f"llama.cpp: llama-cli -m '{out}' --jinja --temp 0"
    assert lines[2] == f"Ollama:    ollama create v2 -f '{made}' && ollama run v2"
    text = made.read_text(encoding="utf-8")
    assert "\n".join(lines[4:]) + "\n" == text
    assert text.startswith("FROM ./模型 V2 (最终).gguf\n")
    assert text.endswith("PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n")
    assert sorted(path.name for path in out.parent.iterdir()) == ["模型 V2 (最终).Modelfile", "模型 V2 (最终).gguf"]


def test_a_vision_model_is_run_with_both_files(vision_run: Path, tmp_path: Path) -> None:
    """The notice says where llama.cpp looks at pictures otherwise."""
    done = command("export-gguf", str(vision_run), str(tmp_path / "v.gguf"))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("llama.cpp:"))
    assert f"-m {tmp_path}/v.gguf --mmproj {tmp_path}/mmproj-v.gguf" in line
    assert (tmp_path / "v.Modelfile").read_text(encoding="utf-8").startswith("FROM ./v.gguf\nFROM ./mmproj-v.gguf\n")
    assert "an image that is not square" in done.stderr
