"""`python -m glm_edge_ft export-gguf`: a model as a file for llama.cpp and Ollama, on phones, laptops and in cars.

An adapter is merged on the way. Tokenizer, chat template and stop tokens are in the file; the vision part of a vision
model is a second one.
"""

from __future__ import annotations

import difflib
import importlib.util
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.environment import quiet_libraries
from glm_edge_ft.console import show, show_notice
from glm_edge_ft.deploy.merge import check_mergeable, check_unquantized, load_merged
from glm_edge_ft.deploy.source import Source, default_settings, find_source, open_checkpoint, run_settings
from glm_edge_ft.errors import ProblemList, UserError
from glm_edge_ft.files import atomic_path, can_be_made, format_bytes, free_bytes
from glm_edge_ft.training.deepspeed import skip_deepspeed_import

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from glm_edge_ft.model.checkpoint import Checkpoint

TYPES = ("f32", "f16", "bf16", "q8_0")
INSTALL = "pip install gguf==0.19.0"


def export_gguf(model: str, out: Path, base: str | None = None, kind: str = "f16") -> None:
    """Write the files, all of them whole or none; print how they are used.

    Each argument is that of the command line; `kind`, one of `TYPES`, is `--type`.

    Raises UserError when a file is there already or cannot be written, for an unknown type, a model or tokenizer that
    llama.cpp would not follow, an adapter that cannot be merged, and a missing package.
    """
    source = _check(model, out, base, kind)
    import torch
    from gguf import GGMLQuantizationType

    from glm_edge_ft.data.template import ChatTemplate
    from glm_edge_ft.deploy.gguf_weights import (
        check_computation,
        plan_language_tensors,
        plan_vision_tensors,
        write_file,
    )
    from glm_edge_ft.deploy.modelfile import build_modelfile, derive_prompt_format, unsupported_settings
    from glm_edge_ft.model.loading import build_meta_model, load_weights

    generation = (run_settings(source) or default_settings()).generation_config
    if unsupported := unsupported_settings(generation):
        show_notice(f"generation settings of the run that llama.cpp and Ollama do not have: {', '.join(unsupported)}")
    quiet_libraries()
    skip_deepspeed_import()
    checkpoint = open_checkpoint(source)
    config: Any = checkpoint.config
    check_unquantized(source, checkpoint)
    check_computation(f"MODEL {source.name}", config)
    prompt_format = derive_prompt_format(
        ChatTemplate(checkpoint.tokenizer, "parts" if checkpoint.is_vision else "string")
    )
    chat_template = checkpoint.tokenizer.get_chat_template()
    if prompt_format is None:
        show_notice("the chat template is more than text around contents: the Modelfile has none, and Ollama guesses")
    elif checkpoint.is_vision:
        chat_template = prompt_format.as_jinja_template()
    writers = _begin_files(source, checkpoint, chat_template, out, kind)
    plans = (plan_language_tensors, plan_vision_tensors)
    number_format, meta_model = GGMLQuantizationType[kind.upper()], build_meta_model(checkpoint)
    needed = sum(tensor.nbytes for plan in plans for tensor in plan(meta_model, number_format))
    if (free := free_bytes(out)) < needed:
        what = f"needs {format_bytes(needed)}, and {format_bytes(free)} are free there"
        raise UserError.single(f"OUT {out}", what, "make room, name another disk, or take a smaller --type")
    if source.adapter is not None:
        loaded = load_merged(source, checkpoint)
    else:  # in the least memory
        loaded = load_weights(checkpoint, config.dtype or torch.float32)
    stops = checkpoint.tokenizer.convert_ids_to_tokens(list(checkpoint.stop_ids))
    text = build_modelfile(list(writers), prompt_format, stops, config.max_position_embeddings, generation)
    try:
        with ExitStack() as stack:  # none of the files appears before all are whole
            for (path, writer), plan in zip(writers.items(), plans, strict=False):
                tensors = plan(loaded, number_format)
                write_file(writer, tensors, loaded.state_dict(), stack.enter_context(atomic_path(path)))
            stack.enter_context(atomic_path(modelfile_path(out))).write_text(text, encoding="utf-8")
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        raise UserError.single(f"OUT {out}", what, "make room, or name another disk") from error
    _show_files(list(writers), text, generation)


def vision_path(out: Path) -> Path:
    """Return where the vision part goes: beside OUT, with the prefix that llama.cpp's users know."""
    return out.with_name(f"mmproj-{out.name}")


def modelfile_path(out: Path) -> Path:
    """Return where Ollama's Modelfile goes: beside OUT."""
    return out.with_suffix(".Modelfile")


def _check(model: str, out: Path, base: str | None, kind: str) -> Source:
    """Check all that needs no model."""
    problems = ProblemList()
    if importlib.util.find_spec("gguf") is None:
        problems.add("export-gguf", "needs the package gguf, which is not installed", INSTALL)
    if kind not in TYPES:
        problems.add(f"--type {kind}", "there is no such type", _hint_for_type(kind.lower()))
    _check_out(problems, out)
    with problems.collect():
        source = find_source(model, base)
        check_mergeable(source)
    problems.raise_if_any()
    return source


def _hint_for_type(name: str) -> str:
    plain = name.replace("float", "f").replace("fp", "f")  # bfloat16, fp16
    for close in difflib.get_close_matches(plain, TYPES, n=1, cutoff=0.65):
        return f"did you mean {close}?"
    choices = f"choose from {', '.join(TYPES)}"
    is_smaller = name.startswith(("q", "iq"))
    return f"{choices}; llama.cpp's llama-quantize makes smaller ones of an f16 file" if is_smaller else choices


def _check_out(problems: ProblemList, out: Path) -> None:
    where = f"OUT {out}"
    if out.is_dir():
        problems.add(where, "is a folder", f"name a file in it: {out / 'model.gguf'}")
        return
    if out.suffix != ".gguf":
        problems.add(where, "does not end in .gguf", f"name it {out.name}.gguf")
        return
    if not out.name.isprintable():
        problems.add(where, f"{out.name!r} has characters that a Modelfile cannot name", "leave them out")
    there = [path for path in (out, modelfile_path(out), vision_path(out)) if path.exists()]
    for path in there:
        problems.add(where, f"{path} is there already, and nothing is written over", "name another, or remove that one")
    if not there and not can_be_made(out):
        problems.add(where, "cannot be written there", "name a file in a folder of yours")


def _begin_files(
    source: Source, checkpoint: Checkpoint, chat_template: str, out: Path, kind: str
) -> dict[Path, GGUFWriter]:
    """Return a writer with all its keys for each file: the language part, and the vision part of a vision model.

    Raises UserError for a tokenizer or an image processor that cannot be written.
    """
    import gguf

    from glm_edge_ft.deploy.gguf_vocabulary import add_vocabulary
    from glm_edge_ft.deploy.gguf_weights import add_language_keys, add_vision_keys
    from glm_edge_ft.model.loading import load_image_processor

    def begin(architecture: str, file_type: str) -> GGUFWriter:
        writer = gguf.GGUFWriter(None, architecture)
        writer.add_type(file_type)
        writer.add_name(Path(source.name).name or Path(source.name).absolute().name)  # of "." too
        writer.add_file_type(int(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        return writer

    language = begin("chatglm", gguf.GGUFType.MODEL)
    add_language_keys(language, checkpoint.config)
    add_vocabulary(language, checkpoint, chat_template)
    if not checkpoint.is_vision:
        return {out: language}
    vision = begin("clip", gguf.GGUFType.MMPROJ)
    add_vision_keys(vision, checkpoint.config, load_image_processor(checkpoint.location))
    return {out: language, vision_path(out): vision}


def _show_files(paths: list[Path], text: str, generation: Mapping[str, Any]) -> None:
    from glm_edge_ft.deploy.modelfile import llama_cpp_command, ollama_name

    out, *vision = paths
    for path in paths:
        show(f"GGUF file: {path} ({path.stat().st_size / 1e6:,.1f} MB)")
    if vision:
        show_notice("llama.cpp puts an image that is not square in the middle, training puts it top left: see README")
    show(f"llama.cpp: {llama_cpp_command(paths, generation)}")
    name = ollama_name(out.stem)
    create = shlex.join(["ollama", "create", name, "-f", str(modelfile_path(out))])
    show(f"Ollama:    {create} && {shlex.join(['ollama', 'run', name])}")
    show(f"{modelfile_path(out)}:\n{text.rstrip()}")
