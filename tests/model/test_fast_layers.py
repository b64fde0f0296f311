"""Fast layers: LoRA's dropout drawn once for the layers that read the same input, and norms in one operation."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.glm.modeling_glm import GlmRMSNorm

from glm_edge_ft.model.adapters import apply_adapter
from glm_edge_ft.model.fast_layers import SharedDropout, fuse_norms, share_dropout, skip_input_cast
from tests.model_folders import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_dropout": 0.25, "init_lora_weights": False}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapted(**settings: Any) -> Any:
    """Return a tiny model with LoRA matrices that are not 0, in training mode."""
    torch.manual_seed(1)
    return apply_adapter(tiny_model(), {**SETTINGS, "target_modules": PROJECTIONS, **settings}).train()


def dropout_of(model: Any, name: str) -> Any:
    """Return the dropout of a projection of the first layer."""
    return getattr(model.get_decoder().layers[0].self_attn, name).lora_dropout["default"]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_of_zeros_and_the_scale_are_those_of_the_rate(rate: float) -> None:
    """Elements are 0, or the input over 1 - rate, the rate as a multiple of 1 / 65,536; neighbours are independent."""
    torch.manual_seed(0)
    model = adapted(lora_dropout=rate)
    dropped = dropout_of(model, "o_proj")(torch.full((1000, 1001), 3.0))
    rounded = round(rate * 65536) / 65536
    assert sorted(set(dropped.flatten().tolist())) == [0.0, pytest.approx(3 / (1 - rounded), rel=1e-6)]
    # 0.003 is six standard deviations of a million draws.
    assert float((dropped == 0).float().mean()) == pytest.approx(rate, abs=0.003)
    assert float((dropped[:, 1:] == 0).logical_and(dropped[:, :-1] == 0).float().mean()) == pytest.approx(
        rate**2, abs=0.003
    )


def test_the_gradient_passes_where_the_input_did() -> None:
    """The gradient of what was kept is the scale, elsewhere 0."""
    model = adapted()
    inputs = torch.randn(7, 9, requires_grad=True)
    dropped = dropout_of(model, "o_proj")(inputs)
    dropped.sum().backward()
    assert inputs.grad is not None
    assert torch.equal(inputs.grad != 0, dropped != 0)
    assert sorted(set(inputs.grad.flatten().tolist())) == [0.0, pytest.approx(4 / 3)]


def test_queries_keys_and_values_share_what_was_dropped() -> None:
    """The same tensor three times; the next pass, and another input, are drawn anew."""
    model = adapted()
    inputs = torch.randn(3, 64)
    query, key, value = (dropout_of(model, name)(inputs) for name in PROJECTIONS[:3])
    assert query is key is value
    assert dropout_of(model, "o_proj")(inputs) is not query
    again = dropout_of(model, "q_proj")(inputs)
    assert again is not query
    assert not torch.equal(again, query)
    assert dropout_of(model, "k_proj")(torch.randn(3, 64)) is not again


def test_another_rate_is_another_dropout() -> None:
    """Layers whose rates differ share nothing."""
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS[:3]))
    for name, rate in zip(PROJECTIONS[:3], (0.1, 0.2, 0.1), strict=True):
        for layer in model.get_decoder().layers:
            getattr(layer.self_attn, name).lora_dropout["default"] = torch.nn.Dropout(rate)
    share_dropout(model)
    inputs = torch.randn(3, 64)
    query, key, value = (dropout_of(model, name)(inputs) for name in PROJECTIONS[:3])
    assert query is value
    assert key is not query


def test_nothing_of_a_pass_is_held_after_it() -> None:
    """What was dropped lives as long as the graph that needs it."""
    model = adapted()
    kept: list[weakref.ref[torch.Tensor]] = []
    for name in PROJECTIONS[:3]:
        dropout_of(model, name).register_forward_hook(lambda _module, _inputs, output: kept.append(weakref.ref(output)))
    model(input_ids=IDS).logits.sum().backward()
    gc.collect()
    assert len(kept) == 3
    assert all(reference() is None for reference in kept)


def test_values_and_gradients_are_those_of_lora_with_this_mask() -> None:
    """Against the formula, W x + (alpha / r) B A (mask * x / (1 - p)), for the queries of the first layer."""
    model = adapted()
    layer = model.get_decoder().layers[0].self_attn.q_proj
    inputs = torch.randn(2, 5, 64, requires_grad=True)
    torch.manual_seed(5)
    output = layer(inputs)
    output.square().sum().backward()
    torch.manual_seed(5)
    mask = dropout_of(model, "q_proj").drop(torch.ones(2, 5, 64))
    matrix_a, matrix_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    plain = inputs.detach().requires_grad_()
    expected = plain @ layer.base_layer.weight.T + (plain * mask) @ matrix_a.T @ matrix_b.T * (8 / 4)
    wanted = torch.autograd.grad(expected.square().sum(), [plain, matrix_a, matrix_b])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    for got, gradient in zip((inputs.grad, matrix_a.grad, matrix_b.grad), wanted, strict=True):
        torch.testing.assert_close(got, gradient, atol=1e-4, rtol=1e-4)


def test_layers_that_are_computed_again_get_the_same_mask() -> None:
    """With gradient checkpointing, loss and gradients are those without it, bit for bit."""

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = adapted()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) > 8
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_evaluation_drops_nothing_and_a_seed_repeats_a_mask() -> None:
    """In evaluation the input comes back itself; the generator of PyTorch decides."""
    model = adapted()
    dropout = dropout_of(model, "q_proj")
    assert isinstance(dropout, SharedDropout)
    inputs = torch.randn(3, 64)
    torch.manual_seed(9)
    first = dropout.drop(inputs)
    torch.manual_seed(9)
    assert torch.equal(dropout.drop(inputs), first)
    assert dropout.eval()(inputs) is inputs


@pytest.mark.parametrize("base_format", [torch.float32, torch.bfloat16])
def test_inputs_left_in_16_bit_give_the_same_bits_and_no_copy(base_format: torch.dtype) -> None:
    """Under autocast: loss and gradients equal those with PEFT's copies in float32, bit for bit."""

    def step(leave: bool) -> tuple[list[torch.Tensor], set[torch.dtype]]:
        torch.manual_seed(1)
        settings = {**SETTINGS, "target_modules": ["q_proj", "o_proj", "down_proj"]}  # each reads an input of its own
        base: Any = tiny_model()
        model = apply_adapter(base.to(base_format), settings).train()
        if leave:
            skip_input_cast(model)
        seen: set[torch.dtype] = set()
        dropout_of(model, "o_proj").register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)], seen

    (plain, copied), (left, kept) = step(leave=False), step(leave=True)
    assert copied == {torch.float32}
    assert kept == {torch.bfloat16}
    assert len(plain) == len(left) > 10
    assert all(torch.equal(one, other) for one, other in zip(plain, left, strict=True))


def test_dora_keeps_its_own_way() -> None:
    """A variant of LoRA mixes its inputs with float32 weights outside of autocast's operators."""
    model = adapted(use_dora=True)
    skip_input_cast(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.get_decoder().layers[0].self_attn.q_proj.cast_input_dtype_enabled


def test_norms_on_a_cpu_stay_those_of_transformers() -> None:
    """The same bits, with gradients and without; nothing outside of the model is changed; a model may have none."""
    model, expected = tiny_model(), tiny_model()
    original = GlmRMSNorm.forward
    assert fuse_norms(model)
    assert GlmRMSNorm.forward is original
    loss, wanted = (one(input_ids=IDS, labels=IDS).loss for one in (model, expected))
    assert torch.equal(loss, wanted)
    assert not fuse_norms(torch.nn.ModuleList([torch.nn.RMSNorm(8)]))  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a norm is one operation only on a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_gpu_computes_what_it_does_in_transformers(dtype: torch.dtype) -> None:
    """Logits of a small model, but for rounding; a norm keeps its format under autocast."""
    model: Any = tiny_model()
    model.to("cuda", dtype).train()
    ids = IDS.to("cuda")
    expected = model(input_ids=ids).logits
    fuse_norms(model)
    bound = 0.03 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=bound * float(expected.max()))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert model.model.norm(torch.randn(2, 64, device="cuda", dtype=dtype)).dtype == dtype
