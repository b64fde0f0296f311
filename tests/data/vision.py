"""Shared parts of the tests of images: templates as GLM-Edge-V has them, encoders with few placeholders, rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from glm_edge_ft.data.dataset import EncodedDataset, build_dataset
from glm_edge_ft.data.encoding import ConversationEncoder
from glm_edge_ft.data.placeholders import ImageSettings
from glm_edge_ft.model.checkpoint import ModelLocation
from glm_edge_ft.model.loading import load_image_processor

PLACEHOLDER = "<|begin_of_image|>"
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
COLORS = {"red.png": (255, 0, 0), "图 片/blue b.png": (0, 0, 255)}
IMAGE = {"type": "image", "image": "a.png"}
REPLY = {"role": "assistant", "content": "my friend"}


def text(content: str) -> dict[str, str]:
    """Return a text part."""
    return {"type": "text", "text": content}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    """Return a user message of parts."""
    return {"role": "user", "content": list(parts)}


def released_template(count: int = 578, newline: str = "\n", closing: str = "") -> str:
    """Return a template that renders as the released one: system turns left out, content as a list of parts.

    With real line breaks nothing follows a content; `literal_template` has a backslash and an n after each.
    """
    newline, closing = newline.replace("\\", "\\\\").replace("\n", "\\n"), closing.replace("\\", "\\\\")
    return (
        f'{{% set br = "{newline}" %}}{{% set closing = "{closing}" %}}'
        "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ br }}{% for part in m.content %}"
        "{% if part.type == 'image' %}{% for _ in range(" + str(count) + ") %}<|begin_of_image|>{% endfor %}"
        "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ closing }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ br }}{% endif %}"
    )


def literal_template(count: int = 578) -> str:
    """Return the variant with the two characters backslash and n."""
    return released_template(count, "\\n", "\\n")


def vision_tokenizer(backend: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=template
    )


def vision_encoder(
    backend: Tokenizer,
    template: str | None = None,
    *,
    count: int = 3,
    max_input_length: int = 4096,
    max_output_length: int = 4096,
    max_images: int = 1,
) -> ConversationEncoder:
    """Return an encoder for images of `count` placeholders each."""
    tokenizer = vision_tokenizer(backend, released_template(count) if template is None else template)
    stop_ids = [tokenizer.get_vocab()[token] for token in STOP_TOKENS]
    settings = ImageSettings(tokenizer.get_vocab()[PLACEHOLDER], count, max_images)
    return ConversationEncoder(tokenizer, stop_ids, max_input_length, max_output_length, settings)


PREPROCESSOR = {
    "image_processor_type": "MllamaImageProcessor",
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_tiles": 1,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 672, "width": 672},
}


def image_processor_of(folder: Path, **changes: Any) -> Any:
    """Return the released image processor, read from a folder as a checkpoint's is."""
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **changes}), encoding="utf-8")
    return load_image_processor(ModelLocation(str(folder), str(folder), is_local=True))


def image(path: str) -> dict[str, str]:
    """Return an image part."""
    return {"type": "image", "image": path}


def write_images(folder: Path) -> None:
    """Write a red and a blue picture of 8 x 8 pixels."""
    for name, color in COLORS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), color).save(folder / name)


def built(
    backend: Tokenizer, path: Path, *, num_proc: int = 1, cache_name: str = "cache", **settings: Any
) -> EncodedDataset:
    """Encode a data file with a template of 3 placeholders an image."""
    encoder = vision_encoder(backend, **settings)
    return build_dataset([path], encoder, num_proc, path.parent / cache_name, progress=False)[0]


def names(paths: Sequence[str], folder: Path) -> list[str]:
    """Return paths relative to a folder."""
    return [str(Path(path).relative_to(folder)) for path in paths]
