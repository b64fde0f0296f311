"""LoRA layers computed together: outputs and gradients are those that PEFT and autograd make one by one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from glm_edge_ft.model import joint_lora
from glm_edge_ft.model.adapters import apply_adapter
from glm_edge_ft.model.joint_lora import compute_lora_jointly
from glm_edge_ft.model.lora_inputs import skip_input_cast
from tests.closeness import assert_same_gradients
from tests.model_folders import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 0, 0, 0]])
ATTENTION = ["q_proj", "k_proj", "v_proj"]
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_dropout": 0.25, "init_lora_weights": False, "target_modules": ATTENTION}


def adapted(base_format: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Return a tiny model with LoRA matrices that are not 0, in training mode."""
    torch.manual_seed(1)
    base: Any = tiny_model()
    return apply_adapter(base.to(base_format), {**SETTINGS, **settings}).train()


def step(model: Any, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of all weights that are trained."""
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach(), **gradients}


@contextmanager
def calls_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Give a list that gets, at each call of the joint step, how many layers it computed."""
    calls: list[int] = []
    original = joint_lora._compute

    def count(layers: list[Any], x: torch.Tensor) -> Any:
        outputs = original(layers, x)
        calls.append(0 if outputs is None else len(outputs))
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(joint_lora, "_compute", count)
        yield calls


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({}, [3, 3]),
        ({"lora_dropout": 0.0}, [3, 3]),
        ({"target_modules": ["q_proj", "v_proj"]}, [2, 2]),
        ({"target_modules": [*ATTENTION, "o_proj", "gate_up_proj", "down_proj"]}, [3, 1, 1, 1, 3, 1, 1, 1]),
        ({"rank_pattern": {"k_proj": 2, "v_proj": 7}, "alpha_pattern": {"k_proj": 9}}, [3, 3]),
        ({"use_rslora": True}, [3, 3]),
        ({"init_lora_weights": True}, [3, 3]),
    ],
)
def test_a_step_is_that_of_peft(settings: dict[str, Any], groups: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient are those of PEFT's way: with dropout, without, some layers, other ranks and scales."""
    expected = step(adapted(**settings))
    model = adapted(**settings)
    compute_lora_jointly(model)
    with calls_counted(monkeypatch) as calls:
        found = step(model)
    assert calls == groups
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("base_format", [torch.float32, torch.bfloat16])
def test_a_step_under_autocast_is_that_of_peft(base_format: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bit within what 16 bit can tell; gradients come back in the format of the weights."""

    def build() -> Any:
        model = adapted(base_format)
        skip_input_cast(model)
        return model

    expected = step(build(), autocast=True)
    model = build()
    compute_lora_jointly(model)
    with calls_counted(monkeypatch) as calls:
        found = step(model, autocast=True)
    assert calls == [3, 3]
    assert_same_gradients(found, expected, 0.1)


def test_numbers_are_those_of_the_formula() -> None:
    """W x + b + s B A d and its gradients against autograd on the formula, biases and another input for the update."""
    torch.manual_seed(5)
    x, d = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    scalings = [2.0, 0.5]
    weights: list[torch.Tensor] = []
    for out, rank in ((6, 2), (4, 3)):
        weights += [torch.randn(out, 8), torch.randn(out)]
        weights += [torch.randn(rank, 8, requires_grad=True), torch.randn(out, rank, requires_grad=True)]
    trained = [weight for weight in weights if weight.requires_grad]
    expected = [
        x @ base.T + bias + scaling * (d @ narrow.T @ wide.T)
        for scaling, base, bias, narrow, wide in zip(scalings, *(weights[kind::4] for kind in range(4)), strict=True)
    ]
    found = joint_lora._JointLora.apply(x, d, scalings, *weights)
    ends = [torch.randn_like(output) for output in expected]
    wanted = torch.autograd.grad(expected, [x, d, *trained], ends)
    got = torch.autograd.grad(found, [x, d, *trained], ends)
    for one, other in zip([*found, *got], [*expected, *wanted], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_computed_together_again(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpointing loss and gradients are those without it, the dropout too.

    The reentrant kind first computes without gradients, PEFT's way, which gives other last bits.
    """
    plain, again = adapted(), adapted()
    for model in (plain, again):
        compute_lora_jointly(model)
    again.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    again.get_base_model().enable_input_require_grads()
    expected = step(plain)
    with calls_counted(monkeypatch) as calls:
        found = step(again)
    assert calls == [3, 3] if reentrant else [3, 3, 3, 3]
    assert_same_gradients(found, expected, 1e-4 if reentrant else 0.0)


def watched(model: Any) -> None:
    """Let something wait for calls of a base layer."""
    model.get_decoder().layers[0].self_attn.k_proj.base_layer.register_forward_hook(lambda *_: None)


def sharded(model: Any) -> None:
    """Mark a weight as ZeRO-3 marks those that it shards."""
    model.get_decoder().layers[0].self_attn.k_proj.base_layer.weight.ds_id = 1


def trained(model: Any) -> None:
    """Train a base layer as well."""
    model.get_decoder().layers[0].self_attn.k_proj.base_layer.weight.requires_grad_()


def of_another_kind(model: Any) -> None:
    """Put in a base layer that computes in its own way, as quantized ones do."""

    class Other(nn.Linear):
        pass

    model.get_decoder().layers[0].self_attn.k_proj.base_layer.__class__ = Other


def switched_off(model: Any) -> None:
    """Let one layer leave its adapter out."""
    model.get_decoder().layers[0].self_attn.k_proj.enable_adapters(False)


def merged(model: Any) -> None:
    """Let one layer have its update in its weight."""
    model.get_decoder().layers[0].self_attn.k_proj.merge()


def frozen(model: Any) -> None:
    """Train one of two matrices alone."""
    model.get_decoder().layers[0].self_attn.k_proj.lora_A["default"].weight.requires_grad_(False)


def in_other_format(model: Any) -> None:
    """Hold a layer's matrices in another format than its base, as without autocast no step can take them."""
    model.get_decoder().layers[0].self_attn.k_proj.lora_A["default"].to(torch.float64)
    model.get_decoder().layers[0].self_attn.k_proj.lora_B["default"].to(torch.float64)


@pytest.mark.parametrize(
    "change", [watched, sharded, trained, of_another_kind, switched_off, merged, frozen, in_other_format]
)
def test_what_is_not_plain_lora_goes_peft_s_way(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer whose k_proj is something else is computed by PEFT alone; the other one is not."""
    model, expected = adapted(), adapted()
    for one in (model, expected):
        change(one)
    wanted = step(expected)
    compute_lora_jointly(model)
    with calls_counted(monkeypatch) as calls:
        found = step(model)
    assert calls == [0, 0, 0, 3]
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_variants_go_peft_s_way(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA, and matrices with biases."""
    expected = step(adapted(**settings))
    model = adapted(**settings)
    compute_lora_jointly(model)
    with calls_counted(monkeypatch) as calls:
        found = step(model)
    assert calls == [0] * 6
    assert_same_gradients(found, expected)


def test_two_adapters_at_once_go_peft_s_way() -> None:
    """Both updates are in the output."""
    model = adapted(lora_dropout=0.0)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    expected = step(model)
    compute_lora_jointly(model)
    assert_same_gradients(step(model), expected, 0.0)


def test_evaluation_and_generation_are_peft_s() -> None:
    """Without gradients, and in evaluation mode, the same bits as before."""
    model = adapted()
    model.eval()
    expected = model(input_ids=IDS).logits
    replies = model.generate(input_ids=IDS[:1], max_new_tokens=8, do_sample=False)
    compute_lora_jointly(model)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert torch.equal(model.generate(input_ids=IDS[:1], max_new_tokens=8, do_sample=False), replies)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_each_layer_gets_its_own_output_in_any_order() -> None:
    """Called in another order, twice, and with another input in between, a layer gives W x + s B A x."""
    model = adapted(lora_dropout=0.0)
    compute_lora_jointly(model)
    attention = model.get_decoder().layers[0].self_attn
    first, second = torch.randn(3, 64), torch.randn(2, 64)
    for name, x in (("v_proj", first), ("k_proj", second), ("q_proj", first), ("q_proj", first), ("k_proj", second)):
        layer = getattr(attention, name)
        update = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
        expected = x @ layer.base_layer.weight.T + layer.scaling["default"] * update
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_nothing_of_a_pass_is_held_after_it() -> None:
    """Inputs and outputs live as long as the graph that needs them."""
    model = adapted()
    compute_lora_jointly(model)
    kept: list[weakref.ref[torch.Tensor]] = []
    for name in ATTENTION:
        layer = getattr(model.get_decoder().layers[0].self_attn, name)
        layer.register_forward_hook(
            lambda _module, inputs, output: kept.extend([weakref.ref(inputs[0]), weakref.ref(output)])
        )
    step(model)
    gc.collect()
    assert len(kept) == 6
    assert all(reference() is None for reference in kept)


def test_names_and_saved_weights_stay_as_they_are() -> None:
    """The state of the model has the same keys, and merging the adapter gives a plain model."""
    model = adapted(lora_dropout=0.0)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    logits = model(input_ids=IDS).logits
    compute_lora_jointly(model)
    assert model.state_dict().keys() == expected.keys()
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)
