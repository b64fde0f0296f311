"""The last layer's feed-forward part is computed for supervised tokens alone, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm_edge_ft.model.adapters import apply_adapter
from glm_edge_ft.training.loss import install_supervised_loss, select_supervised_positions
from tests.closeness import assert_same_gradients
from tests.model_folders import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 0, 0, 0]])
LABELS = torch.tensor([[-100, -100, 7, 8, -100, 10, 11, 12], [-100, -100, -100, 16, 17, -100, -100, -100]])
USED = [1, 2, 4, 5, 6, 10, 11]  # the tokens before those of LABELS, of both rows one behind the other
LORA = {"peft_type": "LORA", "r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}


@given(used=st.lists(st.integers(0, 15), unique=True, max_size=16))
def test_hidden_states_are_those_of_the_whole_rows(used: list[int]) -> None:
    """Any tokens in any order, none of them too: `(1, used, hidden)`, as without the argument at these places."""
    decoder: Any = tiny_model().get_decoder()
    expected = decoder(input_ids=IDS).last_hidden_state.flatten(0, 1)[used]
    assert select_supervised_positions(decoder)
    places = torch.tensor(used, dtype=torch.long)
    found = decoder(input_ids=IDS, selected_positions=places).last_hidden_state
    assert found.shape == (1, len(used), 64)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(decoder(input_ids=IDS).last_hidden_state.flatten(0, 1)[used], expected)


def tokens_in_feed_forward(model: Any) -> list[list[int]]:
    """Return a list that gets, at each call, the number of tokens in the feed-forward part of both layers."""
    calls: list[list[int]] = [[], []]
    for layer, seen in zip(model.model.layers, calls, strict=True):
        layer.mlp.register_forward_pre_hook(
            lambda _module, inputs, seen=seen: seen.append(inputs[0].flatten(0, -2).shape[0])
        )
    return calls


@pytest.mark.parametrize("way", ["all weights", "lora", "checkpointing"])
def test_loss_and_gradients_are_the_ordinary_ones(way: str) -> None:
    """Against transformers' loss on full logits; the last layer sees 7 tokens of 16, when computed again too."""

    def step(supervised: bool) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
        base: Any = tiny_model().train()
        calls = tokens_in_feed_forward(base)
        if supervised:
            install_supervised_loss(base)
        torch.manual_seed(1)
        model: Any = apply_adapter(base, LORA).train() if way == "lora" else base
        if way == "checkpointing":
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=IDS, labels=LABELS).loss
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        return {"loss": loss.detach(), **gradients}, calls

    expected, _ = step(supervised=False)
    found, calls = step(supervised=True)
    times = 2 if way == "checkpointing" else 1
    assert calls == [[16] * times, [len(USED)] * times]
    assert_same_gradients(found, expected)


def test_rows_without_a_supervised_token_give_no_gradient() -> None:
    """Loss 0 and gradients of 0, so that other processes, who wait for them, get them."""
    model: Any = tiny_model().train()
    install_supervised_loss(model)
    loss = model(input_ids=IDS, labels=torch.full_like(IDS, -100)).loss
    loss.backward()
    assert loss.item() == 0.0
    gradients = [weight.grad for name, weight in model.named_parameters() if "lm_head" not in name]
    assert len(gradients) > 10
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_another_kind_of_layer_is_left_alone() -> None:
    """A decoder whose layers are not transformers' own GLM layers computes whole rows; its loss is right too."""
    model: Any = tiny_model().train()
    expected = model(input_ids=IDS, labels=LABELS).loss

    class Other(type(model.model.layers[0])):  # type: ignore[misc]
        pass

    model.model.layers[0].__class__ = Other
    calls = tokens_in_feed_forward(model)
    assert not select_supervised_positions(model.get_decoder())
    install_supervised_loss(model)
    torch.testing.assert_close(model(input_ids=IDS, labels=LABELS).loss, expected, rtol=1e-5, atol=1e-5)
    assert calls == [[16], [16]]
