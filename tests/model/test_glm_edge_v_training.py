"""GLM-Edge-V in training: losses and gradients, a frozen vision part, and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from glm_edge_ft.errors import UserError
from glm_edge_ft.model.adapters import apply_adapter, freeze_vision, generate, wrap_meta_model
from glm_edge_ft.model.glm_edge_v import load_glm_edge_v
from glm_edge_ft.model.glm_edge_v_config import VISION_PREFIX
from glm_edge_ft.training.loss import install_supervised_loss
from tests.closeness import assert_same_gradients
from tests.model.vision_fixtures import (
    SMALL_VOCABULARY,
    image_row,
    pad_left,
    random_images,
)

SMALL = SMALL_VOCABULARY
ONE_IMAGE = image_row(SMALL, 5, 6, 7)
TEXT = [SMALL.user, 20, 21, 22, 23, SMALL.assistant, 24, 25]
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradient of each parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


LABELS_FROM = len(ONE_IMAGE) - 3


def training_batch() -> dict[str, torch.Tensor]:
    """Return an image row and a text row, right-padded, with the last tokens of each supervised."""
    length = len(ONE_IMAGE)
    rows = [ONE_IMAGE, TEXT + [SMALL.end_of_text] * (length - len(TEXT))]
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    mask[1, len(TEXT) :] = 0
    labels = torch.full_like(ids, -100)
    labels[0, LABELS_FROM:] = ids[0, LABELS_FROM:]
    labels[1, 5 : len(TEXT)] = ids[1, 5 : len(TEXT)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": random_images(1)}


def test_the_supervised_loss_equals_the_ordinary_one(vision_folder: Path, model: Any) -> None:
    """Value and every gradient, those of tower and adapter included, within 1e-5."""
    expected = model.train()(**training_batch()).loss
    expected.backward()
    patched = load_glm_edge_v(vision_folder, torch.float32).train()
    install_supervised_loss(patched)
    value = patched(**training_batch()).loss
    value.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-4)
    wanted, got = gradients(model), gradients(patched)
    assert set(got) == set(model.state_dict())
    assert_same_gradients(got, wanted)
    for name in ("vit.model.vision_model.embeddings.patch_embedding.weight", "adapter.boi", "adapter.eoi"):
        assert got[f"{VISION_PREFIX}{name}"].abs().max() > 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(vision_folder: Path, model: Any, reentrant: bool) -> None:
    """Tower, adapter and text, all trained."""
    model.train()(**training_batch()).loss.backward()
    checkpointed = load_glm_edge_v(vision_folder, torch.float32).train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    checkpointed(**training_batch()).loss.backward()
    assert_same_gradients(gradients(checkpointed), gradients(model))


def graph_of_layers(model: Any, batch: dict[str, torch.Tensor]) -> list[bool]:
    """Run a training step; return for each layer of the tower, then the adapter, whether it kept a graph."""
    kept: list[bool] = []
    layers = model.get_submodule("model.vision.vit.model.vision_model.encoder").layers
    for module in (*layers, model.get_submodule("model.vision.adapter")):
        module.register_forward_hook(lambda _module, _inputs, output: kept.append(output.grad_fn is not None))
    model(**batch).loss.backward()
    return kept


def test_a_frozen_vision_part_keeps_no_graph(model: Any) -> None:
    """I6: not even when the embeddings are made to require gradients, as gradient checkpointing has it."""
    freeze_vision(model.train())
    model.enable_input_require_grads()
    assert graph_of_layers(model, training_batch()) == [False, False, False]
    names = set(gradients(model))
    assert names == {name for name in model.state_dict() if not name.startswith(VISION_PREFIX)}


def test_the_adapter_may_be_trained_on_a_frozen_tower(model: Any) -> None:
    """I6: and a trained tower sends its gradients through a frozen adapter."""
    model.train().requires_grad_(False)
    model.model.vision.adapter.requires_grad_(True)
    assert graph_of_layers(model, training_batch()) == [False, False, True]
    assert set(gradients(model)) == {name for name in model.state_dict() if "vision.adapter" in name}
    model.zero_grad()
    model.requires_grad_(False)
    model.model.vision.vit.requires_grad_(True)
    assert graph_of_layers(model, training_batch())[-3:] == [True, True, True]
    assert set(gradients(model)) == {name for name in model.state_dict() if "vision.vit" in name}


def adapted_parts(wrapped: Any) -> set[str]:
    """Return the names of the modules that carry LoRA matrices."""
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    return {name.split(".lora_")[0].removeprefix("base_model.model.") for name in trained}


LORA: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2}
TEXT_PROJECTIONS = {
    f"model.layers.{layer}.{part}"
    for layer in range(2)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_up_proj")
}


@pytest.mark.parametrize("keep_vision", [True, False])
@pytest.mark.parametrize("names", [["q_proj", "v_proj", "gate_up_proj"], r".*\.(q_proj|v_proj|gate_up_proj)"])
def test_lora_adapts_the_language_model_only(model: Any, names: Any, keep_vision: bool) -> None:
    """I6: the tower has modules of the same names. Its frozen part keeps no graph, and the text part learns."""
    wrapped: Any = apply_adapter(model, {**LORA, "target_modules": names}, keep_vision)
    assert adapted_parts(wrapped) == TEXT_PROJECTIONS
    assert graph_of_layers(wrapped.train().get_base_model(), training_batch()) == [False, False, False]
    assert len(gradients(wrapped)) == 2 * len(TEXT_PROJECTIONS)


def test_names_and_layers_of_the_language_model_go_together(model: Any) -> None:
    """I6: `layers_to_transform` counts its layers, not those of the tower; the user's own exclusion still holds."""
    settings = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "exclude_modules": ["v_proj"]}
    assert adapted_parts(apply_adapter(model, {**LORA, **settings}, True)) == {"model.layers.1.self_attn.q_proj"}


def test_all_linear_means_the_linear_layers_of_the_text_part(model: Any) -> None:
    """I6: without the head, as PEFT has it."""
    parts = adapted_parts(apply_adapter(model, {**LORA, "target_modules": "all-linear"}, True))
    assert len(parts) == 2 * 6
    assert not any("vision" in name or "lm_head" in name for name in parts)


@pytest.mark.parametrize("names", [["q_proj", "fc1", "out_proj"], r"model\.vision\..*q_proj"])
def test_lora_names_of_a_vision_part_that_stays_as_it_is_are_refused(model: Any, names: Any) -> None:
    """I6: those that mean the vision part alone, with the word that was written."""
    with pytest.raises(UserError) as caught:
        wrap_meta_model({**LORA, "target_modules": names}, model, keep_vision=True)
    shown = "'fc1', 'out_proj'" if isinstance(names, list) else repr(names)
    assert [problem.what for problem in caught.value.problems] == [
        f"{shown} would train the vision part, which freezeV: true keeps as it is"
    ]


def test_a_lora_pattern_is_judged_by_the_modules_that_it_matches(model: Any) -> None:
    """K13: one that speaks of the vision part to leave it out trains nothing of it, and is taken."""
    settings = {**LORA, "target_modules": r"(?!.*vision).*q_proj"}
    wrap_meta_model(settings, model, keep_vision=True)
    assert not [name for name in adapted_parts(apply_adapter(model, settings, True)) if "vision" in name]


def test_modules_saved_whole_do_not_thaw_a_vision_part_that_stays_as_it_is(model: Any) -> None:
    """I6: a name that tower and language model share would make a trained copy of the tower's modules."""
    settings = {**LORA, "target_modules": ["o_proj"], "modules_to_save": ["k_proj"]}
    with pytest.raises(UserError, match=r"peft_config\.modules_to_save: 4 weights of the vision part would be trained"):
        wrap_meta_model(settings, model, keep_vision=True)


def test_a_lora_pattern_that_is_none_is_refused(model: Any) -> None:
    """Not a traceback out of `re`."""
    with pytest.raises(UserError, match=r"is no regular expression: '\*\.q_proj' \(nothing to repeat"):
        wrap_meta_model({**LORA, "target_modules": "*.q_proj"}, model)


def test_lora_reaches_the_tower_where_the_config_names_it(model: Any) -> None:
    """I6: `freezeV: false` and a name that only the vision part has."""
    parts = adapted_parts(apply_adapter(model, {**LORA, "target_modules": ["o_proj", "fc1"]}))
    assert {name.rsplit(".", 1)[-1] for name in parts if name.startswith(VISION_PREFIX)} == {"fc1"}
    assert len(parts) == 2 + 2


def test_lora_on_the_tower_is_trained_where_it_is_asked_for(model: Any) -> None:
    """`freezeV: false` with names that reach the tower: frozen weights, trained matrices, so a graph is kept."""
    settings = {**LORA, "target_modules": r"model\.(vision|layers)\..*q_proj", "init_lora_weights": False}
    wrapped: Any = apply_adapter(model.train(), settings)
    assert graph_of_layers(wrapped.get_base_model(), training_batch()) == [True, True, True]
    moved = [name for name, gradient in gradients(wrapped).items() if "vision" in name and gradient.abs().max() > 0]
    assert len(moved) == 2 * 2


def test_generation_under_prefix_tuning_sees_prefix_and_image(model: Any) -> None:
    """T1: cached generation of a left-padded batch equals a whole forward pass for each token."""
    wrapped: Any = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    torch.manual_seed(3)
    torch.nn.init.normal_(wrapped.prompt_encoder["default"].embedding.weight, std=2.0)
    ids, mask = pad_left(SMALL, ONE_IMAGE, TEXT)
    images = random_images(1)
    got = generate(wrapped, ids, mask, pixel_values=images, **GREEDY)
    seen, wanted = torch.cat([torch.ones(2, 5, dtype=mask.dtype), mask], dim=1), ids
    for _ in range(6):
        with torch.no_grad():
            output = wrapped.get_base_model()(
                input_ids=wanted,
                attention_mask=seen,
                position_ids=(seen.cumsum(1) - 1)[:, 5:],
                pixel_values=images,
                cache=wrapped.get_prompt(2),
                logits_to_keep=1,
            )
        wanted = torch.cat([wanted, output.logits[:, -1:].argmax(-1)], dim=1)
        seen = torch.cat([seen, torch.ones(2, 1, dtype=seen.dtype)], dim=1)
    assert torch.equal(got, wanted[:, ids.shape[1] :])
    assert not torch.equal(got[:1], generate(wrapped, ids, mask, pixel_values=random_images(1, seed=1), **GREEDY)[:1])
    with wrapped.disable_adapter():
        base = generate(wrapped.get_base_model(), ids, mask, pixel_values=images, **GREEDY)
    assert not torch.equal(got, base)


def test_prefix_tuning_trains_with_an_image(model: Any) -> None:
    """T1: through PEFT's own forward, with the supervised loss."""
    install_supervised_loss(model)
    wrapped: Any = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).train()
    wrapped(**training_batch()).loss.backward()
    assert set(gradients(wrapped)) == {"prompt_encoder.default.embedding.weight"}
    assert gradients(wrapped)["prompt_encoder.default.embedding.weight"].abs().max() > 0
