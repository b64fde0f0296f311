"""A GLM-Edge-V of some ten thousand weights with its tokenizer and image processor, for tests that need a folder.

Its images are small, 112 pixels of 14 x 14 patches, so that a run takes a moment: 4 x 4 vectors, and boi and eoi, make
18 placeholders. The true geometry is in `tests/model/vision_fixtures.py` and in the embedded model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM
from glm_edge_ft.model.glm_edge_v_config import GlmEdgeVConfig
from tests.data.vision import PREPROCESSOR, literal_template, vision_tokenizer
from tests.model_folders import tiny_config
from tests.runs import write_jsonl

SIDE, PLACEHOLDERS = 112, 18
COLOURS = ("red", "green", "blue", "yellow")


def save_vision_folder(folder: Path, backend: Tokenizer, template: str | None = None) -> Path:
    """Save a freshly initialised tiny vision model; returns its folder."""
    tokenizer = vision_tokenizer(backend, literal_template(PLACEHOLDERS) if template is None else template)
    ids = tokenizer.get_vocab()
    stops = [ids[token] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    config = GlmEdgeVConfig(
        **{**tiny_config(len(tokenizer), stops[0], stops).to_diff_dict(), "architectures": None},
        vision_config={
            "hidden_size": 24,
            "image_size": SIDE,
            "intermediate_size": 40,
            "num_attention_heads": 2,
            "num_channels": 3,
            "num_hidden_layers": 2,
            "patch_size": 14,
        },
        boi_token_id=ids["<|begin_of_image|>"],
        eoi_token_id=ids["<|end_of_image|>"],
    )
    torch.manual_seed(0)
    GlmEdgeVForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {**PREPROCESSOR, "size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def image_part(path: str) -> dict[str, str]:
    """Return an image part."""
    return {"type": "image", "image": path}


def text_part(text: str) -> dict[str, str]:
    """Return a text part."""
    return {"type": "text", "text": text}


def turns(*contents: Sequence[Mapping[str, str]] | str) -> dict[str, Any]:
    """Return a row whose messages are, in turn, the user's and the assistant's."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]}


def draw(path: Path, number: int) -> Path:
    """Draw a picture of its own for each number, in a size of its own."""
    image = Image.new("RGB", (60 + 7 * (number % 5), 50 + 11 * (number % 3)), "white")
    colour = COLOURS[number % len(COLOURS)]
    ImageDraw.Draw(image).rectangle((5, 5 + number % 20, 30 + number % 20, 40), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_vision_data(folder: Path, train: int = 12, others: int = 4) -> Path:
    """Write train, dev and test rows in the guide's vision format, text rows and several turns among them."""
    for name, start, count in (("train", 0, train), ("dev", 100, others), ("test", 200, others)):
        rows = []
        for number in range(start, start + count):
            colour = COLOURS[number % len(COLOURS)]
            path = draw(folder / "images" / f"{number}.png", number).relative_to(folder)
            question, image = text_part("what is the colour?"), image_part(str(path))
            if number % 4 == 3:
                rows.append(turns("how are you?", "I am fine"))
            elif number % 4 == 2:
                rows.append(turns([image, question], [text_part(colour)], "are you fine?", "I am"))
            else:
                rows.append(turns([image, question] if number % 2 else [question, image], colour))
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder
