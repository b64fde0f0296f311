"""llama.cpp loads both files of a vision model: the same vectors of a picture, and the same answers about it.

As in `test_gguf_runtime.py`, the runtime has to be there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from glm_edge_ft.data.images import preprocess
from glm_edge_ft.model.checkpoint import EMBEDDED_MODELS
from glm_edge_ft.model.glm_edge_v import load_glm_edge_v
from tests.deploy.conftest import ROOT
from tests.deploy.test_gguf_runtime import export, load, runtime

pytestmark = pytest.mark.slow
__all__ = ["runtime"]  # a fixture

PICTURES = [f"data/demo_vision/images/test_000{number}.png" for number in range(4)]  # all are square
QUESTIONS = ("图中有什么？", "What colour is the shape in the middle?")
TEXT, IMAGE = 0, 1
LENGTH = 24


@dataclass(frozen=True)
class Both:
    """The embedded vision model on both sides."""

    llama: Any
    vision: Any
    model: Any
    tokenizer: Any
    image_processor: Any


@pytest.fixture(scope="module")
def both(runtime: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """Return the two files as the runtime has loaded them, and the model that they were written from."""
    from llama_cpp import mtmd_cpp

    folder = EMBEDDED_MODELS["glm-edge-v-nano"]
    assert folder is not None
    out = export(folder, tmp_path_factory.mktemp("vision") / "a.gguf")
    llama = load(runtime, out)
    settings = mtmd_cpp.mtmd_context_params_default()
    settings.use_gpu, settings.n_threads, settings.warmup = False, 1, False
    vision = mtmd_cpp.mtmd_init_from_file(str(out.with_name(f"mmproj-{out.name}")).encode(), llama.model, settings)
    assert vision is not None and mtmd_cpp.mtmd_support_vision(vision)
    yield Both(
        llama,
        vision,
        load_glm_edge_v(folder, torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    mtmd_cpp.mtmd_free(vision)


def open_picture(path: str) -> Image.Image:
    """Return a picture in RGB."""
    return Image.open(ROOT / path).convert("RGB")


def chunks_of(both: Both, picture: Image.Image, question: str) -> list[Any]:
    """Return the runtime's chunks of a question about a picture: text, the picture, text."""
    from llama_cpp import mtmd_cpp

    data = np.asarray(picture, dtype=np.uint8).copy()
    bitmap = mtmd_cpp.mtmd_bitmap_init(*picture.size, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    marker = (mtmd_cpp.mtmd_get_marker(both.vision) or b"").decode()
    messages = [{"role": "user", "content": [{"type": "text", "text": marker + question}]}]
    prompt = both.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).encode()
    text = mtmd_cpp.mtmd_input_text(text=prompt, text_len=len(prompt), add_special=False, parse_special=True)
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd_cpp.mtmd_tokenize(both.vision, chunks, ctypes.byref(text), bitmaps, 1) == 0
    return [mtmd_cpp.mtmd_input_chunks_get(chunks, index) for index in range(mtmd_cpp.mtmd_input_chunks_size(chunks))]


def vectors(both: Both, picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors of a picture that the runtime computes, and those of the model: `(578, hidden)` each."""
    from llama_cpp import mtmd_cpp

    _, image, _ = chunks_of(both, picture, QUESTIONS[0])
    assert mtmd_cpp.mtmd_input_chunk_get_type(image) == IMAGE
    assert mtmd_cpp.mtmd_encode_chunk(both.vision, image) == 0
    shape = (mtmd_cpp.mtmd_input_chunk_get_n_tokens(image), both.llama.n_embd())
    embeddings: Any = mtmd_cpp.mtmd_get_output_embd(both.vision)
    found = torch.from_numpy(np.ctypeslib.as_array(embeddings, shape=shape).copy())
    pixels = torch.from_numpy(preprocess(picture, both.image_processor))
    with torch.no_grad():
        expected = both.model.model.vision(pixels.reshape(-1, *pixels.shape[-3:]))[0]
    return found, expected


@pytest.mark.parametrize("path", PICTURES)
def test_a_square_picture_becomes_the_same_vectors(path: str, both: Both) -> None:
    """R7: 578 of them, resized from 128, 160 or 192 pixels too; zeros where the file is wider than the model."""
    found, expected = vectors(both, open_picture(path))
    width = expected.shape[1]
    assert found.shape[0] == expected.shape[0] == 578
    torch.testing.assert_close(found[:, :width], expected, rtol=0, atol=1e-3)
    assert not found[:, width:].any()


def test_other_pictures_are_the_same_once_they_are_padded(both: Both) -> None:
    """What the notice of the command says: the runtime centres a picture; black below or to its right mends that."""
    wide = open_picture(PICTURES[0]).crop((0, 0, 128, 84))
    found, expected = vectors(both, wide)
    assert (found[:, : expected.shape[1]] - expected).abs().max() > 0.1
    square = Image.new("RGB", (128, 128))
    square.paste(wide, (0, 0))
    found, _ = vectors(both, square)
    difference = (found[:, : expected.shape[1]] - expected).abs()  # at the edge, which resizing blurs into the black
    assert difference.max() < 0.05
    assert difference.mean() < 1e-3


def runtime_reply(runtime: Any, both: Both, picture: Image.Image, question: str) -> list[int]:
    """Return the runtime's likeliest ids after a question about a picture."""
    from llama_cpp import mtmd_cpp

    llama = both.llama
    llama.reset()
    runtime.llama_memory_clear(runtime.llama_get_memory(llama.ctx), True)
    for chunk in chunks_of(both, picture, question):
        count = ctypes.c_size_t()
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == TEXT:
            tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
            llama.eval([tokens[index] for index in range(count.value)])
        else:
            past = runtime.llama_pos(0)
            arguments = (both.vision, llama.ctx, chunk, llama.n_tokens, 0, llama.n_batch, False, ctypes.byref(past))
            assert mtmd_cpp.mtmd_helper_eval_chunk_single(*arguments) == 0
            llama.n_tokens = past.value
    reply: list[int] = []
    while len(reply) < LENGTH:
        token = int(llama.scores[llama.n_tokens - 1].argmax())
        if runtime.llama_vocab_is_eog(runtime.llama_model_get_vocab(llama.model), token):
            break
        reply.append(token)
        llama.eval([token])
    return reply


@pytest.mark.parametrize("question", QUESTIONS, ids=["chinese", "english"])
def test_answers_about_pictures_are_the_same(question: str, runtime: Any, both: Both) -> None:
    """R7: greedy ids, from the template in the file to the last token."""
    stops = set(both.model.generation_config.eos_token_id)
    for path in PICTURES:
        picture = open_picture(path)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        inputs = both.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        pixels = torch.from_numpy(preprocess(picture, both.image_processor)).unsqueeze(0)
        new = both.model.generate(**inputs, pixel_values=pixels, max_new_tokens=LENGTH, do_sample=False)
        expected = [token for token in new[0, inputs["input_ids"].shape[1] :].tolist() if token not in stops]
        assert len(expected) > 2
        found = runtime_reply(runtime, both, picture, question)
        assert found == expected, both.tokenizer.decode(found)
