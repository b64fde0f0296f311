"""Adapters: what is trained, what is refused, and that generation sees the prefix of PREFIX_TUNING."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import GlmConfig, GlmForCausalLM

from glm_edge_ft.errors import UserError
from glm_edge_ft.model.adapters import apply_adapter, build_peft_config, generate, wrap_meta_model
from tests.model_folders import tiny_model

HAS_SCIPY = importlib.util.find_spec("scipy") is not None
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4}
PREFIX = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return (trainable, all) parameter counts."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in model.parameters())


def meta_model() -> GlmForCausalLM:
    """Return a model on the meta device."""
    with torch.device("meta"):
        return GlmForCausalLM(GlmConfig(**tiny_model().config.to_diff_dict()))


def trained_names(model: torch.nn.Module) -> set[str]:
    """Return the names of the trainable parameters, without their numbers of layers."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_without_targets_gets_the_attention_projections() -> None:
    """PEFT knows no default for `glm`."""
    config: Any = build_peft_config(LORA, tiny_model())
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_lora_trains_its_matrices_and_nothing_else() -> None:
    """Two matrices for each target module of both layers."""
    model = apply_adapter(tiny_model(), {**LORA, "target_modules": ["q_proj", "v_proj"]})
    names = trained_names(model)
    assert len(names) == 2 * 2 * 2
    assert all("lora_" in name for name in names)


def test_full_fine_tuning_trains_every_weight() -> None:
    """No `peft_config`: nothing is wrapped, nothing frozen."""
    base = tiny_model()
    model = apply_adapter(base, None)
    assert model is base
    trainable, total = count_parameters(model)
    assert trainable == total


def test_adapter_weights_are_float32_on_a_16_bit_base() -> None:
    """C7: a frozen bfloat16 base, adapters that can be updated by small steps."""
    base: Any = tiny_model()
    model: Any = apply_adapter(base.to(torch.bfloat16), LORA)
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert kinds == {torch.float32}
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16


def test_module_names_that_do_not_exist_are_refused_with_the_real_ones() -> None:
    """Every wrong name of every list, at once."""
    settings = {**LORA, "target_modules": ["query_key_value", "q_proj"], "modules_to_save": ["head"]}
    with pytest.raises(UserError) as caught:
        wrap_meta_model(settings, meta_model())
    problems = caught.value.problems
    assert [problem.where for problem in problems] == ["peft_config.target_modules", "peft_config.modules_to_save"]
    assert problems[0].what == "the model has no module named 'query_key_value'"
    names = "down_proj, embed_tokens, gate_up_proj, k_proj, lm_head, o_proj, q_proj, v_proj"
    assert problems[0].fix == f"it has: {names}"


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    """`target_modules` as a regular expression."""
    with pytest.raises(UserError, match="does not fit the model"):
        wrap_meta_model({**LORA, "target_modules": "visual.*query"}, meta_model())


def test_settings_that_peft_refuses_are_the_users_problem() -> None:
    """Not a traceback out of PEFT."""
    with pytest.raises(UserError, match="PEFT refuses these settings"):
        wrap_meta_model({**LORA, "target_modules": "all-linear", "layers_to_transform": [0]}, meta_model())


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"init_lora_weights": "loftq"}, marks=pytest.mark.skipif(HAS_SCIPY, reason="loftq can be used")),
        {"megatron_config": {"hidden_size": 64}},
        {"runtime_config": {"nothing": 1}},
    ],
)
def test_what_peft_cannot_use_here_is_no_traceback(settings: dict[str, Any]) -> None:
    """Packages that are not installed, a key that it does not know."""
    with pytest.raises(UserError, match=r"^peft_config: (PEFT refuses these settings|this adapter does not fit)"):
        wrap_meta_model({**LORA, **settings}, meta_model())


def test_a_runtime_config_is_given_as_a_mapping() -> None:
    """YAML has no other way."""
    config: Any = build_peft_config({**LORA, "runtime_config": {"ephemeral_gpu_offload": True}}, tiny_model())
    assert config.runtime_config.ephemeral_gpu_offload is True


def test_eva_is_refused_for_its_pass_over_the_data() -> None:
    """Without the pass the matrices would keep meaningless values."""
    with pytest.raises(UserError, match="is eva, which needs a pass over the data before training"):
        wrap_meta_model({**LORA, "init_lora_weights": "eva"}, meta_model())


def test_a_module_that_cannot_be_adapted_is_refused_with_the_layers_inside() -> None:
    """A whole attention block as target."""
    with pytest.raises(UserError) as caught:
        wrap_meta_model({**LORA, "target_modules": ["self_attn", "q_proj"]}, meta_model())
    assert str(caught.value) == (
        "peft_config.target_modules: 'self_attn' is no layer that LoRA can adapt\n"
        "    -> name the layers themselves: k_proj, o_proj, q_proj, v_proj"
    )


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [("num_layers", 3, 2), ("num_transformer_submodules", 2, 1), ("token_dim", 32, 64), ("num_attention_heads", 8, 4)],
)
def test_sizes_of_a_prefix_that_contradict_the_model_are_refused(key: str, wrong: int, right: int) -> None:
    """PEFT takes them from the model; what the model says too is let through."""
    with pytest.raises(UserError) as caught:
        wrap_meta_model({**PREFIX, key: wrong}, meta_model())
    assert str(caught.value).startswith(f"peft_config.{key}: is {wrong}, the model has {right}\n")
    sizes = [count_parameters(wrap_meta_model(one, meta_model())) for one in (PREFIX, {**PREFIX, key: right})]
    assert sizes[0] == sizes[1]


def test_the_width_of_a_projection_needs_the_projection() -> None:
    """It has no effect otherwise."""
    with pytest.raises(UserError, match="is 32, but only a prefix projection has it"):
        wrap_meta_model({**PREFIX, "encoder_hidden_size": 32}, meta_model())
    wrap_meta_model({**PREFIX, "encoder_hidden_size": 32, "prefix_projection": True}, meta_model())


def test_a_prefix_leaves_positions_for_text() -> None:
    """The tiny model has 8192."""
    with pytest.raises(UserError, match="is 8192, but the model has only 8192 positions"):
        wrap_meta_model({**PREFIX, "num_virtual_tokens": 8192}, meta_model())


@pytest.mark.parametrize("settings", [LORA, PREFIX])
def test_the_meta_twin_counts_what_the_real_model_trains(settings: dict[str, Any]) -> None:
    """The count that `--check` shows is the one that training has."""
    assert count_parameters(wrap_meta_model(settings, meta_model())) == count_parameters(
        apply_adapter(tiny_model(), settings)
    )


def prefix_model() -> Any:
    """Return a model under PREFIX_TUNING whose prefix changes what is generated."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model: Any = get_peft_model(tiny_model(), config).eval()
    torch.manual_seed(3)
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=2.0)
    return model


def recomputed(model: Any, input_ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Generate greedily by a whole forward pass, prefix included, for each token."""
    length = input_ids.shape[1]
    for _ in range(count):
        seen = torch.cat([torch.ones(len(mask), 5, dtype=mask.dtype), mask], dim=1)
        with torch.no_grad():
            logits = model.get_base_model()(
                input_ids=input_ids,
                attention_mask=seen,
                position_ids=(seen.cumsum(1) - 1)[:, 5:],
                cache=model.get_prompt(len(input_ids)),
            ).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
    return input_ids[:, length:]


IDS = torch.tensor([[0, 0, 0, 21, 22, 23, 24], [31, 32, 33, 34, 35, 36, 37]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
OPTIONS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def test_generation_sees_the_prefix() -> None:
    """T1: cached generation equals a whole forward pass for each token, left padding included."""
    model = prefix_model()
    got = generate(model, IDS, MASK, **OPTIONS)
    assert torch.equal(got, recomputed(model, IDS, MASK, 8))
    with model.disable_adapter():
        base = model.get_base_model().generate(input_ids=IDS, attention_mask=MASK, **OPTIONS)[:, 7:]
    assert not torch.equal(got, base)


def test_beams_see_the_prefix_too() -> None:
    """T1: two identical rows of a beam search are what one row gives."""
    model = prefix_model()
    one = generate(model, IDS[1:], MASK[1:], num_beams=2, **OPTIONS)
    both = generate(model, IDS[[1, 1]], MASK[[1, 1]], num_beams=2, **OPTIONS)
    assert torch.equal(both, one.expand(2, -1))
    assert torch.equal(generate(model, IDS, MASK, num_beams=1, **OPTIONS), recomputed(model, IDS, MASK, 8))


def test_generation_without_an_adapter_returns_the_new_tokens_alone() -> None:
    """The prompt is cut off, whatever the model is wrapped in."""
    model = tiny_model()
    expected = model.generate(input_ids=IDS, attention_mask=MASK, **OPTIONS)[:, 7:]
    assert torch.equal(generate(model, IDS, MASK, **OPTIONS), expected)
