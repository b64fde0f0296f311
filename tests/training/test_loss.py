"""The loss on supervised tokens only equals the ordinary loss on full logits, in value and in every gradient."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.trainer_pt_utils import LabelSmoother

from glm_edge_ft.model.adapters import apply_adapter
from glm_edge_ft.training import loss
from glm_edge_ft.training.loss import (
    install_supervised_loss,
    select_supervised_positions,
    supervised_cross_entropy,
)
from tests.closeness import assert_same_gradients
from tests.model_folders import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])
LABELS = torch.tensor([[-100, -100, 7, 8, -100, 10, 11, 12], [-100, -100, -100, 16, 17, -100, -100, -100]])
SUPERVISED = 7  # tokens of LABELS
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "init_lora_weights": False}


def step(
    install: bool = True,
    adapter: dict[str, Any] | None = None,
    gradients_in_forward: bool = True,
    mixed: bool = False,
    checkpointing: bool = False,
) -> tuple[dict[str, torch.Tensor], int, list[list[int]]]:
    """Do a pass forward and back; return loss and gradients, calls of the head, and tokens of each feed-forward."""
    base: Any = tiny_model().train()
    tokens: list[list[int]] = [[], []]
    for layer, seen in zip(base.model.layers, tokens, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].flatten(0, -2).shape[0]))
    if install:
        install_supervised_loss(base, gradients_in_forward=gradients_in_forward)
    torch.manual_seed(1)
    model: Any = apply_adapter(base, LORA | adapter).train() if adapter else base
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        value = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss * 2
    value.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": value.detach(), **gradients}, len(calls), tokens


@pytest.mark.parametrize("gradients_in_forward", [True, False])
@pytest.mark.parametrize("chunk", [512, 7, 3, 1])
def test_loss_and_gradients_equal_the_ordinary_ones(
    chunk: int, gradients_in_forward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, at the edge of a chunk, and in several chunks; the last layer sees 7 tokens of 16."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    found, _, tokens = step(gradients_in_forward=gradients_in_forward)
    assert_same_gradients(found, step(install=False)[0])
    assert tokens == [[16], [SUPERVISED]]


def test_layers_that_are_checkpointed_select_tokens_when_computed_again() -> None:
    """The last layer sees 7 tokens of 16 both times."""
    found, _, tokens = step(checkpointing=True)
    assert_same_gradients(found, step(install=False)[0])
    assert tokens == [[16, 16], [SUPERVISED, SUPERVISED]]


@pytest.mark.parametrize("chunk", [512, 3])
@pytest.mark.parametrize("head", ["trained", "frozen", "as under ZeRO-3"])
def test_smoothed_labels_equal_transformers_smoother(chunk: int, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """K12: value and gradients of labels smoothed on full logits; in evaluation nothing is smoothed."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    expected_model, model = tiny_model().train(), tiny_model().train()
    for each in (expected_model, model):
        each.lm_head.requires_grad_(head == "trained")
    logits = expected_model(input_ids=IDS, attention_mask=MASK).logits
    expected = LabelSmoother(0.3)({"logits": logits}, LABELS, shift_labels=True, num_items_in_batch=11)
    expected.backward()
    install_supervised_loss(model, gradients_in_forward=head != "as under ZeRO-3", label_smoothing=0.3)
    value = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, num_items_in_batch=11).loss
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted, got = dict(expected_model.named_parameters()), dict(model.named_parameters())
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name].grad, weight.grad, atol=1e-5, rtol=1e-4, msg=name)
    model.eval()
    value = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    plain = tiny_model()(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    assert value.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [512, 3, 1])
def test_a_head_that_is_not_trained_is_passed_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With LoRA below it: value and gradients are the ordinary ones, and no chunk's logits are made twice."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    adapter = {"target_modules": ["q_proj", "down_proj"]}
    found, calls, tokens = step(adapter=adapter)
    assert_same_gradients(found, step(install=False, adapter=adapter)[0])
    assert calls == -(-SUPERVISED // chunk)
    assert tokens == [[16], [SUPERVISED]]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_head_that_is_saved_with_an_adapter_is_passed_once(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`modules_to_save`: all of the head is trained; in float32, and under autocast within what 16 bit can tell."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 3)
    adapter = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    found, calls, _ = step(adapter=adapter, mixed=mixed)
    expected, twice, _ = step(adapter=adapter, mixed=mixed, gradients_in_forward=False)
    assert (calls, twice) == (3, 6)
    torch.testing.assert_close(found["loss"], expected["loss"], atol=1e-5, rtol=1e-5)
    assert any("lm_head" in name for name in found)
    assert_same_gradients(found, expected, 0.1 if mixed else 1e-4)


def test_an_adapter_on_the_head_takes_part() -> None:
    """LoRA on `lm_head`: the module is called, not its weight."""
    adapter = {"target_modules": ["lm_head"]}
    found = step(adapter=adapter)[0]
    assert len(found) == 3
    assert_same_gradients(found, step(install=False, adapter=adapter)[0])


def test_the_gradient_of_fp16_is_scaled_before_it_is_made() -> None:
    """A gradient of fp16 must see its scale: without it, small ones would be 0."""
    head = torch.nn.Linear(64, 300, bias=False, dtype=torch.float16).requires_grad_(False)
    hidden = (torch.randn(2, 64) * 0.01).half().requires_grad_()
    value = supervised_cross_entropy(hidden, torch.tensor([3, 4]), head, 10_000_000)
    (value * 2.0**24).backward()
    assert hidden.grad is not None
    assert bool((hidden.grad != 0).any())


def test_the_result_is_float32_for_bfloat16_weights() -> None:
    """The logits are raised to float32 before the logarithm."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 64, dtype=torch.bfloat16)
    head = torch.nn.Linear(64, 300, bias=False, dtype=torch.bfloat16)
    value = supervised_cross_entropy(hidden, torch.tensor([3, 4, 5]), head)
    expected = torch.nn.functional.cross_entropy(head(hidden).float(), torch.tensor([3, 4, 5]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_sum_is_divided_by_the_items_of_the_whole_step() -> None:
    """Gradient accumulation hands in the number of supervised tokens of all its batches."""
    model = tiny_model()
    mean = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    install_supervised_loss(model)
    value = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, num_items_in_batch=torch.tensor(28)).loss
    assert value.item() == pytest.approx(mean.item() * SUPERVISED / 28, rel=1e-5)


def test_a_batch_without_supervised_tokens_has_loss_0_and_zero_gradients() -> None:
    """Nothing breaks, and every weight has a gradient, for which other processes wait."""
    model = tiny_model().train()
    install_supervised_loss(model)
    value = model(input_ids=IDS, labels=torch.full_like(LABELS, -100)).loss
    value.backward()
    assert value.item() == 0.0
    gradients = [weight.grad for weight in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_no_logits_are_made_for_positions_that_are_not_supervised() -> None:
    """The head sees exactly the 7 hidden states that precede a supervised token."""
    model = tiny_model()
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(tuple(inputs[0].shape)))
    install_supervised_loss(model)
    outputs = model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    assert seen == [(SUPERVISED, 64)]
    assert outputs.logits is None


def test_calls_without_labels_are_left_as_they_were() -> None:
    """`generate` and plain calls give the same logits and tokens, and the signature stays readable."""
    plain, patched = tiny_model(), tiny_model()
    install_supervised_loss(patched)
    assert inspect.signature(patched.forward) == inspect.signature(plain.forward)
    with torch.no_grad():
        assert torch.equal(patched(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(patched.generate(IDS, **options), plain.generate(IDS, **options))


@given(positions=st.lists(st.integers(0, 15), unique=True, max_size=16))
def test_hidden_states_are_those_of_the_whole_rows(positions: list[int]) -> None:
    """Any positions in any order, none of them too: `(1, selected, hidden)`, as without the argument."""
    decoder: Any = tiny_model().get_decoder()
    expected = decoder(input_ids=IDS).last_hidden_state.flatten(0, 1)[positions]
    assert select_supervised_positions(decoder)
    selected = torch.tensor(positions, dtype=torch.long)
    found = decoder(input_ids=IDS, selected_positions=selected).last_hidden_state
    assert found.shape == (1, len(positions), 64)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(decoder(input_ids=IDS).last_hidden_state.flatten(0, 1)[positions], expected)


def test_another_kind_of_layer_is_left_alone() -> None:
    """A decoder whose layers are not transformers' own GLM layers computes whole rows; its loss is right too."""
    model: Any = tiny_model().train()
    expected = model(input_ids=IDS, labels=LABELS).loss

    class Other(type(model.model.layers[0])):  # type: ignore[misc]
        pass

    model.model.layers[0].__class__ = Other
    assert not select_supervised_positions(model.get_decoder())
    install_supervised_loss(model)
    torch.testing.assert_close(model(input_ids=IDS, labels=LABELS).loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divisor", [7, torch.tensor(1234)])
@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_a_gradient_in_the_place_of_logits_is_autograds(
    tokens: int, divisor: torch.Tensor | int, dtype: torch.dtype
) -> None:
    """Loss and gradient of a frozen head's logits are bit for bit those of `cross_entropy` on all rows at once."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(tokens, 1003, generator=generator) * 3).to(dtype).requires_grad_()
    targets = torch.randint(0, 1003, (tokens,), generator=generator)
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / divisor
    (wanted,) = torch.autograd.grad(expected, logits)
    gradient = logits.detach().clone()
    value = loss._replace_by_gradient(gradient, targets, divisor)
    assert torch.equal(value, expected.detach())
    assert torch.equal(gradient, wanted)
