"""The steps between the matrix products of a GLM layer: outputs and gradients are those of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GlmConfig
from transformers.models.glm import modeling_glm

from glm_edge_ft.model.adapters import apply_adapter
from glm_edge_ft.model.fewer_copies import (
    _apply_rotary_pos_emb,
    norm_in_one_operation,
    rotate_queries_and_keys,
    use_fewer_copies,
)
from tests.closeness import assert_same_gradients
from tests.model_folders import tiny_config, tiny_model

LORA = {"peft_type": "LORA", "r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "gate_up_proj"]}


@pytest.fixture(autouse=True)
def restore_transformers() -> Iterator[None]:
    """Put transformers' function back, so that what is compared with it is really it."""
    modeling_glm.apply_rotary_pos_emb = _apply_rotary_pos_emb
    yield
    modeling_glm.apply_rotary_pos_emb = _apply_rotary_pos_emb


def same(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> bool:
    """Tell whether two tensors are the same but for the last bits; on x86 processors with AVX those are, too."""
    if ours is None or theirs is None:
        return ours is theirs
    return float((ours - theirs).abs().max()) <= 8 * torch.finfo(ours.dtype).eps * float(theirs.abs().max())


def angles(rows: int, tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines as the rotary embedding makes them, `(rows, tokens, size)`."""
    turns = torch.arange(rows * tokens, dtype=torch.float32).reshape(rows, tokens, 1) * 10000 ** -torch.linspace(
        0, 1, size // 2
    )
    both = torch.cat([turns, turns], dim=-1)
    return both.cos(), both.sin()


def heads(rows: int, count: int, tokens: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return states of heads as a projection's output has them in memory, `(rows, count, tokens, size)`."""
    return torch.randn(rows, tokens, count * size).to(dtype).view(rows, tokens, count, size).transpose(1, 2)


def with_gradients(
    rotate: Callable[..., tuple[torch.Tensor, ...]], q: torch.Tensor, k: torch.Tensor, *turn: torch.Tensor
) -> list[torch.Tensor | None]:
    """Return both outputs and the gradients of both inputs, for gradients of the outputs that are drawn."""
    inputs = [q.detach().requires_grad_(), k.detach().requires_grad_()]
    outputs = rotate(*inputs, *turn)
    torch.manual_seed(5)
    torch.autograd.backward(outputs, [torch.randn(output.shape).to(output.dtype) for output in outputs])
    return [*outputs, *(one.grad for one in inputs)]


@pytest.mark.parametrize("rows_of_angles", [1, 3])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (64, 32), (128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_turn_as_in_transformers(
    dtype: torch.dtype, head_dim: int, rotary_dim: int, rows_of_angles: int
) -> None:
    """Whole heads and halves of them, angles of all rows or of one, 16 bit too: outputs and gradients are the same."""
    torch.manual_seed(1)
    q, k = heads(3, 4, 7, head_dim, dtype), heads(3, 2, 7, head_dim, dtype)
    turn = tuple(part.to(dtype) for part in angles(rows_of_angles, 7, rotary_dim))
    ours = with_gradients(rotate_queries_and_keys, q, k, *turn)
    theirs = with_gradients(_apply_rotary_pos_emb, q, k, *turn)
    assert all(map(same, ours, theirs))


@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 3),
    pairs=st.integers(1, 9),
    rest=st.integers(0, 5),
    offset=st.integers(0, 3),
    is_turned=st.booleans(),
)
def test_any_shape_and_any_place_in_memory(
    sizes: tuple[int, int, int], pairs: int, rest: int, offset: int, is_turned: bool
) -> None:
    """Odd sizes, odd offsets and dimensions in another order give what transformers gives, but for last bits."""
    rows, count, tokens = sizes
    size = 2 * pairs + rest
    q = torch.randn(rows * count * tokens * size + offset)[offset:].view(rows, count, tokens, size)
    if is_turned:
        q = q.transpose(1, 3).contiguous().transpose(1, 3)
    turn = angles(rows, tokens, 2 * pairs)
    for one, other in zip(
        with_gradients(rotate_queries_and_keys, q, q, *turn),
        with_gradients(_apply_rotary_pos_emb, q, q, *turn),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def compute(model: Any, autocast: bool = False, ids: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Return the logits of some rows and the gradients of all weights that are trained."""
    torch.manual_seed(3)
    ids = torch.randint(3, 300, (3, 11)) if ids is None else ids
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids, use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"logits": logits.detach(), **gradients}


@pytest.mark.parametrize("way", ["all weights", "lora", "checkpointing", "autocast", "bfloat16"])
def test_a_model_learns_the_same(way: str) -> None:
    """Logits and every gradient: all weights trained, LoRA around the steps, layers computed twice, 16 bit."""

    def build() -> Any:
        torch.manual_seed(2)
        model: Any = tiny_model().train()
        if way == "lora":
            return apply_adapter(model, LORA).train()
        if way == "checkpointing":
            model.activation_checkpointing_enable()
        return model.to(torch.bfloat16) if way == "bfloat16" else model

    expected = compute(build(), way == "autocast")
    model = build()
    use_fewer_copies(model.get_base_model() if way == "lora" else model)
    found = compute(model, way == "autocast")
    assert_same_gradients(found, expected, 0.1 if way in ("autocast", "bfloat16") else 1e-4)
    nodes = {type(node).__name__ for node in _graph(model)}
    assert {"_GatedUpBackward", "_RmsNormBackward"} <= nodes


def _graph(model: Any) -> Iterator[Any]:
    """Yield the nodes of the graph that the model's logits hang on."""
    open_nodes, seen = [model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits.grad_fn], set()
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        open_nodes.extend(following for following, _ in node.next_functions)


def test_generation_is_the_same() -> None:
    """Greedy replies, token by token from a cache."""
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    model = tiny_model()
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    use_fewer_copies(model)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), expected)


def test_another_activation_is_left_alone() -> None:
    """A config with gelu computes gelu."""
    config: GlmConfig = tiny_config(300, 0, [1])
    config.hidden_act = "gelu"
    torch.manual_seed(0)
    model = modeling_glm.GlmForCausalLM(config)
    expected = compute(model)
    model.zero_grad()
    use_fewer_copies(model)
    found = compute(model)
    assert_same_gradients(found, expected)


def test_a_second_call_changes_nothing() -> None:
    """The function of transformers that is fallen back to stays the one of transformers."""
    model = tiny_model()
    use_fewer_copies(model)
    use_fewer_copies(model)
    q = heads(1, 2, 3, 16, torch.bfloat16)
    turn = tuple(part.to(torch.bfloat16) for part in angles(1, 3, 16))
    ours, theirs = modeling_glm.apply_rotary_pos_emb(q, q, *turn), _apply_rotary_pos_emb(q, q, *turn)
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("weight_format", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states_format", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_trained", [False, True])
def test_norms_give_the_same_bits_and_gradients_as_right_as_autograd_s(
    states_format: torch.dtype, weight_format: torch.dtype, is_trained: bool
) -> None:
    """Formats and outputs are those of transformers; gradients are no farther from those in float64 than its own."""
    torch.manual_seed(4)
    norm = modeling_glm.GlmRMSNorm(48, eps=1e-5).to(weight_format).requires_grad_(is_trained)
    norm.weight.data.normal_()
    states = (torch.randn(3, 5, 48) * 2).to(states_format)
    gradient = torch.randn(3, 5, 48)

    def step() -> list[torch.Tensor]:
        norm.weight.grad = None
        inputs = states.clone().requires_grad_()
        output = norm(inputs)
        output.backward(gradient.to(output.dtype))
        assert inputs.grad is not None
        return [output.detach(), inputs.grad, *([norm.weight.grad] if norm.weight.grad is not None else [])]

    theirs = step()
    _let_norm_compute(norm)
    ours = step()
    exact = states.double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    output = weight * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    wanted = torch.autograd.grad(output, [exact, weight], gradient.to(ours[0].dtype).double())
    assert torch.equal(ours[0], theirs[0])
    assert [one.dtype for one in ours] == [one.dtype for one in theirs]
    assert len(ours) == 2 + is_trained
    for one, other, right in zip(ours[1:], theirs[1:], wanted, strict=False):
        least = 1e-6 * float(right.abs().max())
        assert float((one - right).abs().max()) <= max(1.5 * float((other - right).abs().max()), least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_in_one_operation_is_as_right_as_transformers_s(dtype: torch.dtype) -> None:
    """The way that GPUs take: its format; output and gradients as near to those in float64."""
    torch.manual_seed(4)
    norm = modeling_glm.GlmRMSNorm(48, eps=1e-5)
    norm.weight.data.normal_()
    norm.to(dtype)
    states = (torch.randn(3, 5, 48) * 2).to(dtype)
    gradient = torch.randn(3, 5, 48).to(dtype)

    def step(compute: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        inputs = states.clone().requires_grad_()
        output = compute(inputs)
        return [output.detach(), *torch.autograd.grad(output, [inputs, norm.weight], gradient)]

    ours, theirs = step(lambda inputs: norm_in_one_operation(inputs, norm.weight, 1e-5)), step(norm)
    exact, weight = states.double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    output = weight * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    wanted = [output.detach(), *torch.autograd.grad(output, [exact, weight], gradient.double())]
    assert [one.dtype for one in ours] == [dtype] * 3
    for one, other, right in zip(ours, theirs, wanted, strict=True):
        least = 1e-6 * float(right.abs().max())
        assert float((one - right).abs().max()) <= max(1.5 * float((other - right).abs().max()), least)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a GPU alone a norm is one operation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_gpu_computes_what_it_does_in_transformers(dtype: torch.dtype) -> None:
    """Logits of a small model, but for rounding."""
    torch.manual_seed(2)
    model: Any = tiny_model()
    model.to("cuda", dtype).train()
    ids = torch.randint(3, 300, (3, 11), device="cuda")
    expected = compute(model, ids=ids)["logits"]
    use_fewer_copies(model)
    bound = 0.03 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(compute(model, ids=ids)["logits"], expected, rtol=0, atol=bound * float(expected.max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="autocast on a GPU alone knows this norm")
def test_a_norm_on_a_gpu_keeps_its_format_under_autocast() -> None:
    """Left to autocast, the states of all later layers would be float32."""
    norm = modeling_glm.GlmRMSNorm(48).to("cuda", torch.bfloat16)
    _let_norm_compute(norm)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert norm(torch.randn(2, 48, device="cuda", dtype=torch.bfloat16)).dtype == torch.bfloat16


def _let_norm_compute(norm: torch.nn.Module) -> None:
    use_fewer_copies(torch.nn.ModuleList([norm]))  # type: ignore[arg-type]


def test_norms_keep_16_bit_states_as_they_came() -> None:
    """For the backward pass: the states themselves and a number a token, no copy in float32."""
    norm = modeling_glm.GlmRMSNorm(48).to(torch.bfloat16).requires_grad_(False)
    _let_norm_compute(norm)
    states = torch.randn(2, 5, 48, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(states)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in kept] == [
        ((2, 5, 48), torch.bfloat16),
        ((48,), torch.bfloat16),
        ((2, 5, 1), torch.float32),
    ]
    assert kept[0].data_ptr() == states.data_ptr()
