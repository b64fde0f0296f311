"""The loss on supervised tokens only equals the ordinary loss on full logits, in value and in every gradient."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GlmForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from glm_edge_ft.training import loss
from glm_edge_ft.training.loss import install_supervised_loss, supervised_cross_entropy
from tests.closeness import assert_same_gradients
from tests.model_folders import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])
LABELS = torch.tensor(
    [[-100, -100, 7, 8, -100, 10, 11, 12], [-100, -100, -100, 16, 17, -100, -100, -100]]
)  # 7 supervised tokens


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradient of each trainable parameter."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ordinary_loss(model: GlmForCausalLM) -> torch.Tensor:
    """Return transformers' own loss on full logits."""
    return model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss


@pytest.mark.parametrize("chunk", [512, 7, 3, 1])
def test_loss_and_gradients_equal_the_ordinary_ones(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, at the edge of a chunk, and in several chunks: value and gradients within 1e-5."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    expected_model, model = tiny_model().train(), tiny_model().train()
    expected = ordinary_loss(expected_model)
    expected.backward()
    install_supervised_loss(model)
    value = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same_gradients(gradients(model), gradients(expected_model))


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
    install_supervised_loss(model, ahead=head != "as under ZeRO-3", label_smoothing=0.3)
    value = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, num_items_in_batch=11).loss
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted, got = gradients(expected_model), gradients(model)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    model.eval()
    value = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
    assert value.item() == pytest.approx(ordinary_loss(tiny_model()).item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [512, 3, 1])
def test_a_head_that_is_not_trained_is_passed_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With LoRA below it: value and gradients are the ordinary ones, and no chunk's logits are made twice."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)

    def step(supervised: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        base = tiny_model()
        calls: list[int] = []
        base.lm_head.register_forward_hook(lambda _module, inputs, _output: calls.append(inputs[0].shape[0]))
        if supervised:
            install_supervised_loss(base)
        torch.manual_seed(1)
        model = get_peft_model(base, settings)
        value = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss * 2
        value.backward()
        return value.detach(), gradients(model), len(calls)

    expected, wanted, _ = step(supervised=False)
    value, got, calls = step(supervised=True)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    assert calls == -(-7 // chunk)
    assert_same_gradients(got, wanted)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_head_that_is_saved_with_an_adapter_is_passed_once(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`modules_to_save`: all of the head is trained; in float32, and under autocast within what 16 bit can tell."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 3)
    settings = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )

    def step(ahead: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        if not ahead:
            monkeypatch.setattr(loss, "_may_be_ahead", lambda hidden_states, lm_head: False)
        base = tiny_model()
        install_supervised_loss(base)
        torch.manual_seed(1)
        model = get_peft_model(base, settings)
        calls: list[int] = []
        model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            value = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss * 2
        value.backward()
        return value.detach(), gradients(model), len(calls)

    value, got, calls = step(ahead=True)
    expected, wanted, twice = step(ahead=False)
    bound = 0.1 if mixed else 1e-4
    assert (calls, twice) == (3, 6)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    assert any("lm_head" in name for name in got)
    assert_same_gradients(got, wanted, bound)


def test_the_gradient_of_fp16_is_scaled_before_it_is_made() -> None:
    """A gradient of fp16 must see its scale: without it, small ones would be 0."""
    head = torch.nn.Linear(64, 300, bias=False, dtype=torch.float16).requires_grad_(False)
    hidden = (torch.randn(1, 3, 64) * 0.01).half().requires_grad_()
    value = supervised_cross_entropy(hidden[0, :2], torch.tensor([3, 4]), head, 10_000_000)
    (value * 2.0**24).backward()
    assert hidden.grad is not None
    assert bool((hidden.grad[0, :2] != 0).any())


def test_the_sum_is_divided_by_the_items_of_the_whole_step() -> None:
    """Gradient accumulation hands in the number of supervised tokens of all its batches."""
    model = tiny_model()
    mean = ordinary_loss(model)
    install_supervised_loss(model)
    value = model(input_ids=IDS, attention_mask=MASK, labels=LABELS, num_items_in_batch=torch.tensor(28)).loss
    assert value.item() == pytest.approx(mean.item() * 7 / 28, rel=1e-5)


def test_a_batch_without_supervised_tokens_has_loss_0_and_zero_gradients() -> None:
    """Nothing is taught, nothing breaks, and every rank still has a graph to run backward through."""
    model = tiny_model().train()
    install_supervised_loss(model)
    value = model(input_ids=IDS, labels=torch.full_like(LABELS, -100)).loss
    value.backward()
    assert value.item() == 0.0
    assert all(gradient.abs().sum() == 0 for gradient in gradients(model).values())


def test_an_adapter_on_the_head_takes_part() -> None:
    """LoRA on `lm_head`: the module is called, not its weight."""

    def wrapped(supervised: bool) -> tuple[float, dict[str, torch.Tensor]]:
        base = tiny_model()
        if supervised:
            install_supervised_loss(base)
        torch.manual_seed(1)
        model = get_peft_model(
            base, LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
        )
        value = model(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss
        value.backward()
        return value.item(), gradients(model)

    expected, wanted = wrapped(supervised=False)
    value, got = wrapped(supervised=True)
    assert value == pytest.approx(expected, rel=1e-5)
    assert len(got) == 2
    assert_same_gradients(got, wanted)


def test_no_logits_are_made_for_positions_that_teach_nothing() -> None:
    """The head sees exactly the 7 hidden states that precede a supervised token."""
    model = tiny_model()
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(tuple(inputs[0].shape)))
    install_supervised_loss(model)
    outputs = model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    assert seen == [(7, 64)]
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


def test_the_result_is_float32_for_bfloat16_weights() -> None:
    """The logits are raised to float32 before the logarithm."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 4, 64, dtype=torch.bfloat16)
    head = torch.nn.Linear(64, 300, bias=False, dtype=torch.bfloat16)
    value = supervised_cross_entropy(hidden[0, :3], torch.tensor([3, 4, 5]), head)
    expected = torch.nn.functional.cross_entropy(head(hidden[0, :3]).float(), torch.tensor([3, 4, 5]))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


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
    value = loss._turn_into_gradient(gradient, targets, divisor)
    assert torch.equal(value, expected.detach())
    assert torch.equal(gradient, wanted)
