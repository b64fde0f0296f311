"""What GLM-Edge-V computes: against an independent implementation, in batches, and in generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GlmForCausalLM

from glm_edge_ft.model.adapters import generate
from glm_edge_ft.model.glm_edge_v import load_glm_edge_v
from tests.model.vision_fixtures import (
    SMALL_VOCABULARY,
    TINY_2B,
    TINY_5B,
    Shape,
    image_row,
    pad_left,
    random_images,
    random_weights,
    write_checkpoint,
)
from tests.model.vision_reference import adapter, merge, reference_logits, tower

SMALL = SMALL_VOCABULARY
ONE_IMAGE = image_row(SMALL, 5, 6, 7)
TWO_IMAGES = [*image_row(SMALL, 8, 9), SMALL.user, 10, *image_row(SMALL, 11)[1:]]  # words before the second image
TEXT = [SMALL.user, 20, 21, 22, 23, SMALL.assistant, 24, 25]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def logits(model: Any, *rows: list[int], images: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Return each row's logits, padding cut off, computed in one left-padded batch."""
    ids, mask = pad_left(SMALL, *rows)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, pixel_values=images).logits
    return [values[mask_row == 1] for values, mask_row in zip(output, mask, strict=True)]


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal within 1e-4 of the largest number."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("shape", [TINY_2B, TINY_5B], ids=["v-2b", "v-5b"])
def test_logits_equal_an_independent_implementation(tmp_path: Path, shape: Shape) -> None:
    """Vocabulary 59264, real special ids, true geometry; the image's own vectors are compared too."""
    weights = random_weights(shape)
    model = load_glm_edge_v(write_checkpoint(tmp_path, shape, weights), torch.float32).eval()
    row, images = image_row(shape, 5, 6, 7), random_images(1)
    with torch.no_grad():
        got = model(input_ids=torch.tensor([row]), pixel_values=images).logits[0]
        vectors = model.model.vision(images)[0]
    assert vectors.shape == (578, shape.hidden)
    assert_close(vectors, adapter(weights, tower(weights, images[0], shape), shape))
    assert_close(got, reference_logits(weights, row, images, shape))


def test_several_images_in_any_turn_equal_the_independent_implementation(model: Any) -> None:
    """I4: two images in one conversation, words before the second."""
    images = random_images(2)
    got = logits(model, TWO_IMAGES, images=images)[0]
    assert_close(got, reference_logits(random_weights(SMALL), TWO_IMAGES, images, SMALL))


def test_the_merge_equals_cutting_each_row_at_its_placeholders(model: Any) -> None:
    """Rows with two images, none and one in a batch; the third row's two images touch each other."""
    touching = [SMALL.user, *[SMALL.image] * 1156, 30]
    ids, _ = pad_left(SMALL, TWO_IMAGES, TEXT, touching, ONE_IMAGE)
    images = random_images(5)
    with torch.no_grad():
        got = model.model.merge_images(ids, images)
        vectors = list(model.model.vision(images))
    embeddings = random_weights(SMALL)["model.embed_tokens.weight"]
    of_rows = [vectors[:2], [], vectors[2:4], vectors[4:]]
    for row, values in enumerate(of_rows):
        row_ids = ids[row].tolist()
        assert torch.equal(got[row], merge(embeddings[row_ids], row_ids, values, SMALL.image))


def test_the_released_shape_of_pixels_is_taken_too(model: Any) -> None:
    """(samples, images, tiles, 3, 672, 672) as the image processor gives it."""
    images = random_images(2)
    rows = (ONE_IMAGE, image_row(SMALL, 8))
    flat = logits(model, *rows, images=images)
    released = logits(model, *rows, images=images.reshape(2, 1, 1, 3, 672, 672))
    assert all(torch.equal(*pair) for pair in zip(flat, released, strict=True))


def test_a_text_row_is_computed_as_by_the_language_model_alone(vision_folder: Path, model: Any) -> None:
    """I2: alone bit for bit, and beside an image row but for rounding."""
    text_model = GlmForCausalLM.from_pretrained(vision_folder, dtype=torch.float32, tie_word_embeddings=False).eval()
    wanted = text_model(input_ids=torch.tensor([TEXT])).logits[0].detach()
    assert torch.equal(logits(model, TEXT)[0], wanted)
    assert_close(logits(model, ONE_IMAGE, TEXT, images=random_images(1))[1], wanted)


def test_without_images_the_vision_part_is_not_run(model: Any) -> None:
    """I2: a batch of text rows costs what it costs a chat model."""
    calls: list[int] = []
    model.model.vision.register_forward_hook(lambda *_: calls.append(1))
    logits(model, TEXT, TEXT[:5])
    assert calls == []


def test_left_padding_changes_nothing(model: Any) -> None:
    """Each row of a padded batch, the image rows too, is what it is alone."""
    images = random_images(3)
    together = logits(model, ONE_IMAGE, TEXT, TWO_IMAGES, images=images)
    alone = [
        logits(model, ONE_IMAGE, images=images[:1]),
        logits(model, TEXT),
        logits(model, TWO_IMAGES, images=images[1:]),
    ]
    for got, wanted in zip(together, alone, strict=True):
        assert_close(got, wanted[0])


def recomputed(model: Any, ids: torch.Tensor, mask: torch.Tensor, images: torch.Tensor, count: int) -> torch.Tensor:
    """Generate greedily by a whole forward pass, images included, for each token."""
    length = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, pixel_values=images, use_cache=False, logits_to_keep=1)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
    return ids[:, length:]


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_whole_recomputation(model: Any, use_cache: bool) -> None:
    """Left-padded batch of an image row, a text row and a two-image row, with and without a cache."""
    ids, mask = pad_left(SMALL, ONE_IMAGE, TEXT, TWO_IMAGES)
    images = random_images(3)
    got = generate(model, ids, mask, pixel_values=images, use_cache=use_cache, **GREEDY)
    assert torch.equal(got, recomputed(model, ids, mask, images, 6))
    other = generate(model, ids, mask, pixel_values=images.flip(0), use_cache=use_cache, **GREEDY)
    assert not torch.equal(got, other)


def test_images_are_merged_once_in_generation(model: Any) -> None:
    """At the prefill: later tokens come from the cache."""
    calls: list[int] = []
    model.model.vision.register_forward_hook(lambda *_: calls.append(1))
    ids, mask = pad_left(SMALL, ONE_IMAGE)
    generate(model, ids, mask, pixel_values=random_images(1), **GREEDY)
    assert len(calls) == 1


def test_beams_keep_each_rows_images_together(model: Any) -> None:
    """Rows are repeated for beams, and the images of a row with them, in their order."""
    images = random_images(3)
    ids, mask = pad_left(SMALL, TWO_IMAGES, ONE_IMAGE)
    got = generate(model, ids, mask, pixel_values=images, num_beams=2, **GREEDY)
    for row, chosen in enumerate((images[:2], images[2:])):
        alone = generate(model, ids[row : row + 1], mask[row : row + 1], pixel_values=chosen, num_beams=2, **GREEDY)
        assert torch.equal(got[row : row + 1], alone)


def test_vectors_that_were_computed_before_stand_for_their_images(model: Any) -> None:
    """In the logits, in greedy generation with and without a cache, and in beams; the vision part is not run again."""
    ids, mask = pad_left(SMALL, TWO_IMAGES, TEXT, ONE_IMAGE)
    images = random_images(3)
    ways: tuple[dict[str, Any], ...] = ({}, {"use_cache": False}, {"num_beams": 2})
    with torch.no_grad():
        features = model.model.vision(images)
        wanted = model(input_ids=ids, attention_mask=mask, pixel_values=images).logits
        replies = [generate(model, ids, mask, pixel_values=images, **GREEDY, **options) for options in ways]
        model.model.vision.register_forward_hook(lambda *_: pytest.fail("the vision part was run"))
        got = model(input_ids=ids, attention_mask=mask, image_features=features).logits
    assert torch.equal(got, wanted)
    for options, reply in zip(ways, replies, strict=True):
        assert torch.equal(generate(model, ids, mask, image_features=features, **GREEDY, **options), reply)


def test_vectors_of_another_shape_are_refused(model: Any) -> None:
    """With both shapes."""
    ids, mask = pad_left(SMALL, ONE_IMAGE)
    with pytest.raises(
        ValueError, match=r"image_features must be \(images, \d+, \d+\), but have the shape \(1, 3, 4\)"
    ):
        model(input_ids=ids, attention_mask=mask, image_features=torch.zeros(1, 3, 4))


def test_placeholders_that_are_not_those_of_the_images_are_refused(model: Any) -> None:
    """Both numbers are named; I4: an image is never ignored."""
    cases = [
        ([TWO_IMAGES, ONE_IMAGE], 2, "has 1734 image placeholders (id 292), but 2 images give 1156 vectors, 578 each"),
        ([TEXT], 1, "has 0 image placeholders (id 292), but 1 images give 578 vectors, 578 each"),
        ([ONE_IMAGE], 0, "has 578 image placeholders (id 292), but 0 images give 0 vectors, 578 each"),
    ]
    for rows, count, message in cases:
        with pytest.raises(ValueError, match="the batch has") as caught:
            logits(model, *rows, images=random_images(count) if count else None)
        assert str(caught.value) == f"the batch {message}"


def test_a_row_with_part_of_an_image_is_refused(model: Any) -> None:
    """The sum of the batch is right, so one row would see the end of the other's image."""
    short, long = [SMALL.image] * 577, [SMALL.image] * 579
    with pytest.raises(ValueError, match=r"row 0 of the batch has 577 image placeholders \(id 292\)") as caught:
        logits(model, short, long, images=random_images(2))
    assert str(caught.value).endswith("which is no multiple of 578")


def test_pixels_of_another_size_are_refused(model: Any) -> None:
    """The learned positions are those of 672 x 672."""
    with pytest.raises(ValueError, match=r"must end in \(3, 672, 672\), but have the shape \(1, 3, 336, 336\)"):
        logits(model, ONE_IMAGE, images=torch.zeros(1, 3, 336, 336))
    with pytest.raises(ValueError, match="images need input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32), pixel_values=random_images(1))


def test_hidden_states_are_those_of_the_language_model(model: Any) -> None:
    """The tower's layers do not slip in between."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ONE_IMAGE]), pixel_values=random_images(1), output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, len(ONE_IMAGE), 32)] * 3


def test_bfloat16_is_finite_and_near_float32(vision_folder: Path, model: Any) -> None:
    """Pixels stay float32 outside and are cast to the tower's format."""
    images = random_images(1)
    got = logits(load_glm_edge_v(vision_folder, torch.bfloat16).eval(), ONE_IMAGE, images=images)[0]
    wanted = logits(model, ONE_IMAGE, images=images)[0]
    assert got.dtype == torch.bfloat16
    assert torch.isfinite(got).all()
    assert (got.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_mixed_precision_merges_what_the_vision_part_gives(model: Any) -> None:
    """Under autocast the vectors are bfloat16 and the embeddings float32."""
    images = random_images(1)
    wanted = logits(model, ONE_IMAGE, images=images)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, ONE_IMAGE, images=images)[0]
        assert model.model.vision(images).dtype == torch.bfloat16
    assert (got.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
