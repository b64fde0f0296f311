"""`glm-edge-v-nano` as shipped: the released layout and geometry, and replies that depend on the picture."""

from __future__ import annotations

import itertools
import json
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase

from data.embedded.layout import STOP_TOKENS, token_id
from data.embedded.picture_exchanges import picture_exchanges
from data.embedded.pictures import CELL_CLASSES, COLOURS, Item, Picture, draw, label_cells, random_scene
from data.embedded.train_vision import (
    computed_views,
    embed,
    greedy_reply,
    seed_attention,
    start_model,
    supervised_loss,
)
from data.embedded.vision_rows import (
    IGNORED,
    Row,
    collages,
    collate,
    encode_picture,
    encode_turns,
    generate_rows,
    random_views,
)
from data.embedded.vision_tower import outlines, picture_pixels, random_picture, word_tables
from glm_edge_ft.model.checkpoint import EMBEDDED_MODELS
from glm_edge_ft.model.glm_edge_v import GlmEdgeVForCausalLM, load_glm_edge_v
from tests.model.vision_fixtures import Shape, released_config, released_shapes

FOLDER = EMBEDDED_MODELS["glm-edge-v-nano"]
NEWLINE = "\\n"  # two characters, as the released template has it
IMAGE = "<|begin_of_image|>" * 578
RED_CIRCLE = Picture((Item("circle", "red", 1 / 6, 1 / 6, 0.13),), background=(255, 255, 255))
BLUE_SQUARE = Picture((Item("square", "blue", 5 / 6, 5 / 6, 0.13),), background=(255, 255, 255))


@pytest.fixture(scope="module")
def model() -> GlmEdgeVForCausalLM:
    """Return the embedded model, loaded as the toolkit loads any vision checkpoint."""
    return load_glm_edge_v(FOLDER, torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the embedded tokenizer, loaded as anyone would load it."""
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """Return the fields of config.json."""
    fields: dict[str, Any] = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    return fields


def test_geometry_is_the_released_one(model: GlmEdgeVForCausalLM) -> None:
    """672 pixels, 2304 positions, a convolution of stride 2, 578 vectors."""
    vision = model.model.vision
    assert model.config.tokens_per_image == 578
    assert vision.vit.model.vision_model.get_parameter("embeddings.position_embedding.weight").shape == (2304, 64)
    assert vision.adapter.conv.stride == (2, 2)
    with torch.no_grad():
        assert vision(torch.zeros(1, 3, 672, 672)).shape == (1, 578, model.config.hidden_size)


def test_it_has_about_five_million_parameters(model: GlmEdgeVForCausalLM) -> None:
    """Small enough for two CPU cores."""
    assert 4_500_000 < model.num_parameters() < 5_500_000


def test_stored_keys_and_shapes_are_the_released_ones(config: dict[str, Any]) -> None:
    """Every key of a released file but the unused pooling head, in bfloat16."""
    tower = config["vision_config"]
    shape = Shape(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        key_value_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocabulary=config["vocab_size"],
        tower_hidden=tower["hidden_size"],
        tower_intermediate=tower["intermediate_size"],
        tower_layers=tower["num_hidden_layers"],
        tower_heads=tower["num_attention_heads"],
    )
    expected = {name: size for name, size in released_shapes(shape).items() if ".vision_model.head." not in name}
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert {name: tuple(values.shape) for name, values in stored.items()} == expected
    assert {values.dtype for values in stored.values()} == {torch.bfloat16}


def test_config_has_the_released_fields(config: dict[str, Any]) -> None:
    """All of them but auto_map, which would point to remote code that is not there."""
    released = released_config(Shape(hidden=8, intermediate=8, layers=1, heads=1, key_value_heads=1, head_dim=8))
    assert set(released) - set(config) == {"auto_map"}
    assert (config["model_type"], config["architectures"]) == ("glm", ["GlmForCausalLM"])
    assert set(released["vision_config"]) <= set(config["vision_config"])
    assert config["partial_rotary_factor"] == 1.0


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_stop_ids_are_the_stop_tokens(tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    """M3: the saved folder carries the stop ids, found by string."""
    values = json.loads((FOLDER / file).read_text(encoding="utf-8"))
    assert values["eos_token_id"] == [tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS]
    assert values["pad_token_id"] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_image_ids_are_found_by_string(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> None:
    """boi is the placeholder that the template renders, eoi its neighbour."""
    assert config["boi_token_id"] == tokenizer.convert_tokens_to_ids("<|begin_of_image|>")
    assert config["eoi_token_id"] == tokenizer.convert_tokens_to_ids("<|end_of_image|>")


def test_tokenizer_is_that_of_the_chat_model() -> None:
    """The released models share one too."""
    chat = EMBEDDED_MODELS["glm-edge-nano"]
    assert (FOLDER / "tokenizer.json").read_bytes() == (chat / "tokenizer.json").read_bytes()


def test_template_renders_as_the_released_one(tokenizer: PreTrainedTokenizerBase) -> None:
    """System turns are left out, an image is 578 placeholders, line breaks are backslash and n."""
    messages: list[Any] = [
        {"role": "system", "content": [{"type": "text", "text": "S"}]},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "U1"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A1"}]},
        {"role": "user", "content": [{"type": "text", "text": "U2"}]},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        f"<|user|>{NEWLINE}{IMAGE}U1{NEWLINE}<|assistant|>{NEWLINE}A1{NEWLINE}<|user|>{NEWLINE}U2{NEWLINE}"
        f"<|assistant|>{NEWLINE}"
    )


def test_template_drops_a_plain_string(tokenizer: PreTrainedTokenizerBase) -> None:
    """D4: content must be a list of parts, which the toolkit makes of a string; the template itself loses it."""
    messages = [{"role": "user", "content": "U1"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"<|user|>{NEWLINE}{NEWLINE}"


def test_image_processor_is_the_released_one() -> None:
    """One tile of 672 pixels, -1 to 1, as the training made its pixels."""
    processor: Any = AutoImageProcessor.from_pretrained(FOLDER, backend="pil")
    pixels = np.asarray(processor(images=draw(RED_CIRCLE, 168), return_tensors="np")["pixel_values"])
    assert pixels.shape == (1, 1, 1, 3, 672, 672)
    assert np.abs(pixels[0, 0, 0] - picture_pixels(RED_CIRCLE, 168).numpy()).max() < 1e-5


def test_folder_is_small() -> None:
    """The whole folder stays well below 15 MB."""
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 12_000_000


def test_description_depends_on_the_picture(model: GlmEdgeVForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """The base model sees: it names colour, shape and place of two pictures, and stops by itself."""
    first, second = (greedy_reply(model, tokenizer, picture, "请描述这张图。") for picture in (RED_CIRCLE, BLUE_SQUARE))
    assert first == f"图里有一个图形：左上是红色的圆形。{NEWLINE}<|user|>"
    assert second == f"图里有一个图形：右下是蓝色的正方形。{NEWLINE}<|user|>"


def test_a_reply_to_text_alone_stops_by_itself(model: GlmEdgeVForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """M3: it ends with the stop token; what it says of general things is not what this model was trained for."""
    reply = greedy_reply(model, tokenizer, None, "What is the opposite of big?")
    assert reply.endswith("<|user|>")
    assert reply.removesuffix("<|user|>").strip()


# ---- what it is trained on ----


def test_cells_say_what_is_where() -> None:
    """The cells around an item's centre are labelled with class, colour and zone, the others as empty."""
    cells = label_cells(BLUE_SQUARE).reshape(24, 24, 4)
    assert cells[20, 20].tolist() == [CELL_CLASSES.index("square"), tuple(COLOURS).index("blue"), 8, 1]
    assert cells[0, 0].tolist() == [CELL_CLASSES.index("plain"), -100, -100, 0]
    assert (cells[:, :, 1] >= 0).sum() == 4


def test_outlines_tell_an_edge_from_a_full_patch() -> None:
    """A patch inside an item has a mean alone, one at its edge has waves too."""
    patches = outlines(Picture((Item("square", "red", 0.5, 0.5, 0.14),), background=(255, 255, 255)))
    assert patches.shape == (48, 48, 9)
    assert np.allclose(patches[24, 24], [4, 0, 0, 0, 0, 0, 0, 0, 0], atol=1e-5)
    assert np.allclose(patches[0, 0], 0)
    edges = [np.abs(patches[24, column, 1:]).max() for column in range(48)]
    assert sum(edge > 0.5 for edge in edges) in {1, 2}


def test_a_window_shows_that_part_of_the_picture() -> None:
    """Windows, on which the tower learns first, hold the pixels of the whole image."""
    picture = random_scene(Random(3))
    whole, part = picture_pixels(picture, 168), picture_pixels(picture, 168, (4, 10, 8))
    assert torch.equal(part, whole[:, 4 * 28 : 12 * 28, 10 * 28 : 18 * 28])


def test_prompt_and_reply_are_tokenized_as_in_generation(tokenizer: PreTrainedTokenizerBase) -> None:
    """Replies and their stops are learned alone; the prompt's ids are those of generation."""
    ids, labels = encode_turns(tokenizer, [("Q", "no"), ("R", "yes")])
    prompt = tokenizer.encode(f"<|user|>{NEWLINE}Q{NEWLINE}<|assistant|>{NEWLINE}", add_special_tokens=False)
    assert ids[: len(prompt)] == prompt
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    assert learned == f"no{NEWLINE}<|user|>yes{NEWLINE}<|user|>"
    assert ids.count(token_id(tokenizer, "<|user|>")) == 3


def test_training_rows_follow_from_their_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    """The same seed gives the same rows; one of eight is text alone."""

    def rows() -> list[Row]:
        rng = Random(5)
        return list(itertools.islice(generate_rows(tokenizer, random_views(rng), rng, 4), 24))

    first, again = rows(), rows()
    assert first == again
    assert sum(row.view is None for row in first) == 3


def test_a_picture_opens_each_of_its_exchanges(tokenizer: PreTrainedTokenizerBase) -> None:
    """Opening and exchange together are the ids of a conversation that begins with the picture."""
    (view,) = itertools.islice(random_views(Random(5)), 1)
    row = encode_picture(tokenizer, [[("Q", "no")], [("R", "yes"), ("S", "so")]], view)
    texts = (f"Q{NEWLINE}<|assistant|>{NEWLINE}", f"R{NEWLINE}<|assistant|>{NEWLINE}")
    for text, exchange in zip(texts, row.exchanges, strict=True):
        prompt = tokenizer.encode(f"<|user|>{NEWLINE}{IMAGE}{text}", add_special_tokens=False)
        assert [*row.opening, *exchange.ids][: len(prompt)] == prompt


@torch.no_grad()
def test_exchanges_about_a_picture_do_not_see_one_another(
    model: GlmEdgeVForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The loss of a row with three exchanges is that of three rows with one each."""
    views = computed_views(model, random_views(Random(5)), 2)
    turns = [[("Q", "no")], [("R", "yes"), ("S", "so")], [("请描述这张图。", "图里有一个图形。")]]
    rows = [encode_picture(tokenizer, turns, view) for view in views]
    apart = [Row(row.opening, [exchange], row.view) for row in rows for exchange in row.exchanges]
    first, second = collate(rows, 1.0), collate(apart, 1.0)
    loss, expected = (
        supervised_loss(model, embed(model, of_batch, batch), batch)
        for of_batch, batch in ((rows, first), (apart, second))
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    assert first.ids.shape[1] < 578 + 80


def test_a_collage_shows_what_its_description_says(model: GlmEdgeVForCausalLM) -> None:
    """The cells of its items hold the vectors that items of the same kind, colour and place had; no other cell does."""
    views = [view for view in computed_views(model, random_views(Random(5)), 12) if not view.picture.time]
    known = {
        item: view.vectors[1 : 1 + 576][label_cells(Picture((item,), view.picture.background))[:, 1] >= 0]
        for view in views
        if view.vectors is not None
        for item in view.picture.items
    }
    for made in itertools.islice(collages(Random(6), views, 4), 20):
        assert made.vectors is not None
        assert 1 <= len(made.picture.items) <= 4
        assert len({item.zone for item in made.picture.items}) == len(made.picture.items)
        cells = label_cells(made.picture)[:, 1] >= 0
        assert cells.sum() == sum(len(known[item]) for item in made.picture.items)
        for item in made.picture.items:
            own = label_cells(Picture((item,), made.picture.background))[:, 1] >= 0
            assert torch.equal(made.vectors[1:577][own], known[item])


@torch.no_grad()
def test_seeded_attention_matches_each_word_with_itself(tokenizer: PreTrainedTokenizerBase) -> None:
    """Before anything is learned, a query made of a name fits the key made of that name better than any other key."""
    seeded = start_model(tokenizer)
    seed_attention(seeded, tokenizer)
    attention: Any = seeded.model.layers[1].self_attn
    classes, colours, zones = word_tables(seeded, tokenizer)
    for key_head, table in enumerate((torch.cat([classes[4:], colours]), zones)):
        queries = attention.q_proj(table).unflatten(1, (4, 64))[:, 2 * key_head]
        keys = attention.k_proj(table).unflatten(1, (2, 64))[:, key_head]
        assert (queries @ keys.T).argmax(1).tolist() == list(range(len(table)))


@pytest.mark.parametrize("language", ["zh", "en"])
def test_training_holds_none_of_the_demos_questions(language: str) -> None:
    """The demonstration teaches its own form: its wordings of questions and its short answers are new to the model."""
    rng = Random(11)
    marks = (
        "什么颜色",
        "什么形状",
        "几个",
        "几棵",
        "在哪",
        "白天还是",
        "What color",
        "What shape",
        "How many",
        "Where",
    )
    for _ in range(500):
        for question, reply in picture_exchanges(random_picture(rng), rng, 6, language):
            assert not any(mark in question for mark in marks)
            assert len(reply) > 7
