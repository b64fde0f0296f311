"""`python -m glm_edge_ft export-gguf`: a model as a file for llama.cpp and Ollama, on phones, laptops and in cars.

An adapter is merged on the way. Tokenizer, chat template and stop tokens are in the file; the vision part of a vision
model is a second one.
"""

from __future__ import annotations

import difflib
import importlib.util
import shlex
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.environment import quiet_libraries
from glm_edge_ft.console import show, show_notice
from glm_edge_ft.deploy.merging import check_adapter_kind, check_not_quantized, load_merged
from glm_edge_ft.deploy.opening import open_checkpoint
from glm_edge_ft.deploy.settings import default_settings, settings_of_run
from glm_edge_ft.deploy.source import Source, find_source, quantization_of_run
from glm_edge_ft.errors import ProblemList, UserError
from glm_edge_ft.files import atomic_path, can_be_made
from glm_edge_ft.training.deepspeed import skip_deepspeed_import

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from glm_edge_ft.deploy.gguf_parts import Part
    from glm_edge_ft.deploy.gguf_vocabulary import Vocabulary
    from glm_edge_ft.deploy.modelfile import Turns
    from glm_edge_ft.model.checkpoint import Checkpoint

TYPES = ("f32", "f16", "bf16", "q8_0")
INSTALL = "pip install gguf==0.19.0"
_OTHER_NAMES = {
    "fp32": "f32",
    "float32": "f32",
    "fp16": "f16",
    "float16": "f16",
    "half": "f16",
    "bfloat16": "bf16",
    "q8": "q8_0",
    "int8": "q8_0",
}
_SUFFIX = ".gguf"


@dataclass(frozen=True)
class ExportRequest:
    """One command line, as given."""

    model: str
    out: Path
    base: str | None = None
    type: str = "f16"


def export_gguf(request: ExportRequest) -> None:
    """Write the files, all of them whole or none; print how they are used.

    Raises UserError when one is there already or cannot be written, for an unknown type, a model or tokenizer that
    llama.cpp would not follow, an adapter that cannot be merged, and a missing package.
    """
    source = _check(request)
    generation = (settings_of_run(source) or default_settings()).generation_config
    _show_what_is_left(generation)
    quiet_libraries()
    skip_deepspeed_import()
    checkpoint = open_checkpoint(source)
    vocabulary = _check_model(source, checkpoint)
    parts = _parts(request, source, checkpoint, vocabulary)
    _check_space(request.out, parts, checkpoint)
    model = _load(source, checkpoint)
    text = _modelfile(parts, checkpoint, vocabulary, generation)
    writers: dict[Path, Callable[[Path], Any]] = {part.path: _bind(part, model) for part in parts}
    _write_whole({**writers, modelfile_path(request.out): lambda path: path.write_text(text, encoding="utf-8")})
    _show_files(request.out, parts, generation)


def _show_what_is_left(generation: Mapping[str, Any]) -> None:
    from glm_edge_ft.deploy.modelfile import without_counterpart

    left = without_counterpart(generation)
    if left:
        show_notice(f"generation settings of the run that llama.cpp and Ollama do not have: {', '.join(left)}")


def vision_path(out: Path) -> Path:
    """Return where the vision part goes: beside OUT, with the prefix that llama.cpp's users know."""
    return out.with_name(f"mmproj-{out.name}")


def modelfile_path(out: Path) -> Path:
    """Return where Ollama's Modelfile goes: beside OUT."""
    return out.with_suffix(".Modelfile")


def _check(request: ExportRequest) -> Source:
    """Check all that needs no model."""
    problems = ProblemList()
    if importlib.util.find_spec("gguf") is None:
        problems.add("export-gguf", "needs the package gguf, which is not installed", INSTALL)
    if request.type not in TYPES:
        problems.add(f"--type {request.type}", "there is no such type", _hint_for_type(request.type))
    _check_out(problems, request.out)
    try:
        source = find_source(request.model, request.base)
        check_adapter_kind(source)
    except UserError as error:
        problems.extend(error)
    problems.raise_if_any()
    return source


def _hint_for_type(name: str) -> str:
    lower = name.lower().replace("-", "_")
    close = _OTHER_NAMES.get(lower) or next(iter(difflib.get_close_matches(lower, TYPES, n=1, cutoff=0.75)), None)
    if close is not None:
        return f"did you mean {close}?"
    choices = f"choose from {', '.join(TYPES)}"
    is_smaller = lower.startswith(("q", "iq"))
    return f"{choices}; llama.cpp's llama-quantize makes smaller ones of an f16 file" if is_smaller else choices


def _check_out(problems: ProblemList, out: Path) -> None:
    where = f"OUT {out}"
    if out.is_dir():
        problems.add(where, "is a folder", f"name a file in it: {out / 'model.gguf'}")
        return
    if out.suffix != _SUFFIX:
        problems.add(where, f"does not end in {_SUFFIX}", f"name it {out.name}{_SUFFIX}")
        return
    if not out.name.isprintable():
        problems.add(where, f"{out.name!r} has characters that a Modelfile cannot name", "leave them out")
    there = [path for path in (out, modelfile_path(out), vision_path(out)) if path.exists()]
    for path in there:
        problems.add(where, f"{path} is there already, and nothing is written over", "name another, or remove that one")
    if not there and not can_be_made(out):
        problems.add(where, "cannot be written there", "name a file in a folder of yours")


def _check_model(source: Source, checkpoint: Checkpoint) -> Vocabulary:
    from glm_edge_ft.deploy.gguf_vocabulary import read_vocabulary
    from glm_edge_ft.deploy.gguf_weights import check_computation

    check_not_quantized(source, checkpoint)
    check_computation(f"MODEL {source.name}", checkpoint.config)
    vocabulary = read_vocabulary(checkpoint)
    if vocabulary.unstopped:
        show_notice(f"llama.cpp will not stop at {', '.join(vocabulary.unstopped)}: a GGUF file has three stop tokens")
    turns = _read_turns(checkpoint)
    if turns is None:
        show_notice("the chat template is more than text around contents: the Modelfile has none, and Ollama guesses")
    elif checkpoint.is_vision:
        vocabulary = replace(vocabulary, chat_template=turns.as_jinja_template())
    return vocabulary


def _read_turns(checkpoint: Checkpoint) -> Turns | None:
    from glm_edge_ft.data.template import ChatTemplate
    from glm_edge_ft.deploy.modelfile import read_turns

    return read_turns(ChatTemplate(checkpoint.tokenizer, "parts" if checkpoint.is_vision else "string"))


def _parts(request: ExportRequest, source: Source, checkpoint: Checkpoint, vocabulary: Vocabulary) -> list[Part]:
    from glm_edge_ft.deploy.gguf_parts import language_part, vision_part

    name = Path(source.name).name or Path(source.name).absolute().name  # of "." too
    parts = [language_part(request.out, name, checkpoint, vocabulary, request.type)]
    if checkpoint.is_vision:
        parts.append(vision_part(vision_path(request.out), name, checkpoint, request.type))
    return parts


def _check_space(out: Path, parts: list[Part], checkpoint: Checkpoint) -> None:
    from glm_edge_ft.model.loading import build_meta_model

    model = build_meta_model(checkpoint)
    needed = sum(part.size(model) for part in parts)
    folder = next(path for path in out.absolute().parents if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there"
        raise UserError.single(f"OUT {out}", what, "make room, name another disk, or take a smaller --type")


def _load(source: Source, checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the weights: an adapter's merged in float32, a whole model's as stored, in the least memory."""
    import torch

    from glm_edge_ft.model.loading import load_weights

    if checkpoint.location.adapter is not None:
        return load_merged(checkpoint, quantization_of_run(source))
    stored = getattr(checkpoint.config, "dtype", None)
    return load_weights(checkpoint, stored if isinstance(stored, torch.dtype) else torch.float32)


def _bind(part: Part, model: PreTrainedModel) -> Callable[[Path], None]:
    return lambda path: part.write(model, path)


def _write_whole(writers: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Write the files; none of them appears before all are whole.

    Raises UserError for a disk that refuses.
    """
    try:
        with ExitStack() as stack:
            for path, write in writers.items():
                write(stack.enter_context(atomic_path(path)))
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise UserError.single(f"OUT {next(iter(writers))}", what, "make room, or name another disk") from error


def _modelfile(parts: list[Part], checkpoint: Checkpoint, vocabulary: Vocabulary, generation: Mapping[str, Any]) -> str:
    from glm_edge_ft.deploy.modelfile import for_ollama, modelfile, sampling

    config: Any = checkpoint.config
    stops = [vocabulary.tokens[token_id] for token_id in checkpoint.stop_ids]
    settings = {"num_ctx": config.max_position_embeddings, **for_ollama(sampling(generation))}
    return modelfile([part.path for part in parts], _read_turns(checkpoint), stops, settings)


def _show_files(out: Path, parts: list[Part], generation: Mapping[str, Any]) -> None:
    from glm_edge_ft.deploy.modelfile import llama_command, ollama_name, sampling

    for part in parts:
        show(f"GGUF file: {part.path} ({part.path.stat().st_size / 1e6:,.1f} MB)")
    vision = [part.path for part in parts[1:]]
    if vision:
        show_notice("llama.cpp puts a picture that is not square in the middle, training puts it top left: see README")
    show(f"llama.cpp: {llama_command(out, vision[0] if vision else None, sampling(generation))}")
    name = ollama_name(out.stem)
    create = shlex.join(["ollama", "create", name, "-f", str(modelfile_path(out))])
    show(f"Ollama:    {create} && {shlex.join(['ollama', 'run', name])}")
    show(f"{modelfile_path(out)}:")
    show(modelfile_path(out).read_text(encoding="utf-8").rstrip("\n"))
