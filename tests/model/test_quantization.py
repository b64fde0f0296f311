"""A model in 4 bits: which layers, what their numbers are, and that it computes as its own numbers do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from glm_edge_ft.config import load_config
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.adapters import apply_adapter, wrap_meta_model
from glm_edge_ft.model.checkpoint import Checkpoint
from glm_edge_ft.model.loading import build_meta_model, load_weights, locate_model, read_checkpoint
from glm_edge_ft.model.memory import estimate_memory, measure_size
from glm_edge_ft.model.meta_model import quantize_meta_model
from glm_edge_ft.model.quantization import check_quantized_checkpoint, find_quantizable_layers
from glm_edge_ft.training.loss import install_supervised_loss
from tests.bench.memory_table import build_released_model
from tests.closeness import assert_same_gradients
from tests.conftest import TokenizerMaker
from tests.model_folders import save_model_folder
from tests.vision_folders import save_vision_folder

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
# The 16 values of NF4 from appendix E of the QLoRA paper.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
LAYERS = 2
ROOT = Path(__file__).resolve().parents[2]
IN_4_BITS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_up_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_tokenizer: TokenizerMaker) -> Path:
    """Return a tiny model, the rows of whose `down_proj` (96 numbers) are no whole blocks."""
    return save_model_folder(tmp_path_factory.mktemp("model"), make_tokenizer("glm"))


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    """Return it without its weights."""
    return read_checkpoint(locate_model(str(folder)))


def four_bit_layers(model: Any) -> dict[str, Any]:
    """Return bitsandbytes' layers by name."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def plain_copy(checkpoint: Checkpoint, model: Any) -> Any:
    """Return the plain model whose weights are the numbers that bitsandbytes makes of the 4 bits, in float32."""
    from bitsandbytes.functional import dequantize_4bit

    plain: Any = load_weights(checkpoint, torch.float32)
    for name, layer in four_bit_layers(model).items():
        numbers = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain.get_submodule(name).weight.data = numbers.float()
    return plain


def with_adapter(model: Any, settings: dict[str, Any]) -> Any:
    """Return a model with an adapter that has moved from its beginning, the same for the same settings."""
    install_supervised_loss(model)
    torch.manual_seed(0)
    wrapped = apply_adapter(model, settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return wrapped


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of one batch, and the gradient of every trained weight."""
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, num_items_in_batch=46).loss
    loss.backward()
    return loss.detach(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad
    }


def test_linear_layers_of_whole_blocks_are_in_4_bits_and_nothing_else(checkpoint: Checkpoint) -> None:
    """Embeddings, head and norms keep their format, and so does `down_proj`, whose rows have 96 numbers here."""
    model: Any = load_weights(checkpoint, torch.float32, "nf4")
    expected = {f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in IN_4_BITS}
    assert four_bit_layers(model).keys() == expected == set(find_quantizable_layers(build_meta_model(checkpoint)))
    bytes_of = {
        name.removesuffix(".weight") for name, values in model.named_parameters() if values.dtype == torch.uint8
    }
    assert bytes_of == expected
    others = [values.dtype for name, values in model.named_parameters() if name.removesuffix(".weight") not in expected]
    assert set(others) == {torch.float32}
    assert getattr(checkpoint.config, "quantization_config", None) is None


def test_the_vision_part_stays_as_it_is(tmp_path: Path, backend: Tokenizer) -> None:
    """A GLM-Edge-V: the language part as of a chat model, tower and adapter bit for bit as stored."""
    vision = read_checkpoint(locate_model(str(save_vision_folder(tmp_path / "model", backend))))
    plain: Any = load_weights(vision, torch.float32)
    model: Any = load_weights(vision, torch.float32, "nf4")
    layers = four_bit_layers(model)
    assert layers
    assert not any("vision" in name for name in layers)
    for name, values in plain.model.vision.named_parameters():
        assert torch.equal(values, dict(model.model.vision.named_parameters())[name]), name


def test_the_numbers_are_those_of_the_paper(checkpoint: Checkpoint) -> None:
    """Each number is the nearest of the 16 values times its block's largest, whose byte rounds it."""
    from bitsandbytes.functional import dequantize_4bit

    plain: Any = load_weights(checkpoint, torch.float32)
    table = torch.tensor(NF4)
    for name, layer in four_bit_layers(load_weights(checkpoint, torch.float32, "nf4")).items():
        blocks = plain.get_submodule(name).weight.detach().reshape(-1, 64)
        scales = blocks.abs().amax(dim=1, keepdim=True)
        nearest = table[(blocks / scales).unsqueeze(-1).sub(table).abs().argmin(dim=-1)]
        numbers = dequantize_4bit(layer.weight.data, layer.weight.quant_state).reshape(-1, 64)
        step = (scales - scales.mean()).abs().max() * 0.02  # of a byte of bitsandbytes' own table
        torch.testing.assert_close(numbers, nearest * scales, rtol=0, atol=float(step))


@pytest.mark.parametrize("settings", [LORA, LORA | {"use_dora": True}], ids=["lora", "dora"])
def test_loss_and_gradients_are_those_of_its_own_numbers(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """Against the plain model with the same numbers: the 4 bits are computed with, not around."""
    model: Any = load_weights(checkpoint, torch.float32, "nf4")
    plain = plain_copy(checkpoint, model)
    loss, gradients = loss_and_gradients(with_adapter(model, settings))
    expected, expected_gradients = loss_and_gradients(with_adapter(plain, settings))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert_same_gradients(gradients, expected_gradients)


def test_a_file_of_4_bits_made_in_16_bit_is_computed_with_as_exactly(folder: Path, tmp_path: Path) -> None:
    """The weights as plain numbers are in the format of the run, forwards and backwards, not in that of the file."""
    shutil.copytree(folder, tmp_path / "plain")
    half: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "plain")
    stored = save_quantized(tmp_path / "stored", tmp_path / "plain", ("down_proj",))
    model: Any = load_weights(stored, torch.float32)
    plain = plain_copy(read_checkpoint(locate_model(str(tmp_path / "plain"))), model)
    numbers = plain.model.layers[0].self_attn.q_proj.weight
    assert torch.count_nonzero(numbers - numbers.bfloat16().float())
    loss, gradients = loss_and_gradients(with_adapter(model, LORA))
    expected, expected_gradients = loss_and_gradients(with_adapter(plain, LORA))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients, expected_gradients)


def test_an_evaluation_in_between_changes_no_bit_and_no_gradient(checkpoint: Checkpoint) -> None:
    """On CPUs with bfloat16 instructions bitsandbytes would turn the weights over to a form without gradients."""
    model = with_adapter(load_weights(checkpoint, torch.float32, "nf4"), LORA).train()
    before, gradients = loss_and_gradients(model)
    codes = {name: layer.weight.data.clone() for name, layer in four_bit_layers(model).items()}
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(3, 20).unsqueeze(0))
    assert all(torch.equal(codes[name], layer.weight.data) for name, layer in four_bit_layers(model).items())
    after, again = loss_and_gradients(model.train())
    assert torch.equal(before, after)
    assert [name for name, gradient in gradients.items() if not torch.equal(gradient, again[name])] == []


def storage_bytes(model: Any) -> int:
    """Return the bytes of all weights, scales and tables, each storage once."""
    tensors = list(model.parameters())
    for layer in four_bit_layers(model).values():
        state = layer.weight.quant_state
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum({kept.data_ptr(): kept.nbytes() for kept in (tensor.untyped_storage() for tensor in tensors)}.values())


@pytest.mark.parametrize("name", ["glm-edge-nano", "glm-edge-v-nano"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_knows_every_byte_of_the_weights(name: str, dtype: torch.dtype) -> None:
    """The twin without weights against the storages of the real model, adapter included."""
    checkpoint = read_checkpoint(locate_model(name))
    settings = {**LORA, "target_modules": ["q_proj", "down_proj"]}
    twin: Any = build_meta_model(checkpoint)
    quantize_meta_model(twin, "nf4")
    size = measure_size(wrap_meta_model(settings, twin))
    model = apply_adapter(load_weights(checkpoint, dtype, "nf4"), settings)
    assert size.quantized == sum(layer.weight.quant_state.shape.numel() for layer in four_bit_layers(model).values())
    assert estimate_memory(size, str(dtype).removeprefix("torch.")).weights == storage_bytes(model)


@pytest.mark.parametrize("name", ["glm-edge-4b-chat", "glm-edge-1.5b-chat"])
def test_the_readmes_tell_the_estimate_of_the_released_models(name: str) -> None:
    """GB of weights in 4 bits and in 16, with the adapter of the shipped config."""
    settings = load_config(ROOT / "configs" / "lora.yaml").peft_config
    told = []
    for quantization in ("nf4", None):
        twin = build_released_model(name)
        quantize_meta_model(twin, quantization)
        estimate = estimate_memory(measure_size(wrap_meta_model(settings, twin)), "bfloat16")
        told.append(f"{estimate.weights / 1e9:.1f}")
    for readme, words in (
        ("configs/README.md", "{} GB instead of {}"),
        ("configs/README_zh.md", "占 {} GB，而不是 {} GB"),
    ):
        assert words.format(*told) in (ROOT / readme).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        ({"modules_to_save": ["o_proj"]}, "peft_config.modules_to_save", "would train layers that are kept in 4 bits"),
        (
            {"target_parameters": ["q_proj.weight"]},
            "peft_config.target_parameters",
            "'q_proj.weight' is kept in 4 bits",
        ),
    ],
)
def test_what_would_train_the_4_bits_themselves_is_refused(
    checkpoint: Checkpoint, settings: dict[str, Any], where: str, what: str
) -> None:
    """Before the weights are read; the same settings stand beside plain numbers."""
    twin = build_meta_model(checkpoint)
    quantize_meta_model(twin, "nf4")
    with pytest.raises(UserError) as caught:
        wrap_meta_model({**LORA, "target_modules": ["v_proj"], **settings}, twin)
    (problem,) = caught.value.problems
    assert (problem.where, what in problem.what) == (where, True)
    assert "leave quantization out" in problem.fix
    wrap_meta_model({**LORA, "target_modules": ["v_proj"], **settings}, build_meta_model(checkpoint))


def test_whole_modules_that_stay_plain_are_trained_beside_4_bits(checkpoint: Checkpoint) -> None:
    """`embed_tokens`, `lm_head`, and the layer that is not in 4 bits."""
    settings = {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "down_proj"]}
    twin = build_meta_model(checkpoint)
    quantize_meta_model(twin, "nf4")
    size = measure_size(wrap_meta_model(settings, twin))
    model = with_adapter(load_weights(checkpoint, torch.float32, "nf4"), settings)
    _, gradients = loss_and_gradients(model)
    assert sum(gradient.numel() for gradient in gradients.values()) == size.trained
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


# ---- checkpoints that are stored in 4 bits ----


def save_quantized(folder: Path, base: Path, plain: tuple[str, ...], **settings: Any) -> Checkpoint:
    """Save a copy of a model's folder whose files hold 4-bit (or 8-bit) numbers; `plain` names layers that do not."""
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    quantization = BitsAndBytesConfig(**(settings or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    quantization.llm_int8_skip_modules = ["lm_head", *plain]
    model: Any = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization)
    model.save_pretrained(folder)
    return read_checkpoint(locate_model(str(folder)))


@pytest.mark.parametrize("double", [False, True])
def test_a_base_that_is_stored_in_4_bits_computes_as_its_own_numbers(
    folder: Path, checkpoint: Checkpoint, tmp_path: Path, double: bool
) -> None:
    """And its twin counts as many weights, by what its config says."""
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    stored = save_quantized(tmp_path / "model", folder, ("down_proj",), **settings)
    check_quantized_checkpoint(stored, "nf4", trains_weights=False)
    check_quantized_checkpoint(stored, None, trains_weights=False)
    for quantization in (None, "nf4"):
        model: Any = load_weights(stored, torch.float32, quantization)
        assert len(four_bit_layers(model)) == LAYERS * len(IN_4_BITS)
    plain = plain_copy(checkpoint, model)
    loss, gradients = loss_and_gradients(with_adapter(model, LORA))
    expected, expected_gradients = loss_and_gradients(with_adapter(plain, LORA))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients, expected_gradients)
    twin = build_meta_model(stored)
    quantize_meta_model(twin, None)
    size = measure_size(twin)
    assert size.quantized == sum(layer.weight.quant_state.shape.numel() for layer in four_bit_layers(model).values())


def test_stored_rows_that_are_no_whole_blocks_are_refused_on_a_cpu(folder: Path, tmp_path: Path) -> None:
    """bitsandbytes takes wrong scales for them, without a word."""
    stored = save_quantized(tmp_path / "model", folder, ())
    with pytest.raises(UserError, match=r"2 of its 4-bit layers have rows that are no whole blocks: .*down_proj"):
        load_weights(stored, torch.float32)


def test_what_cannot_be_trained_of_a_stored_form_is_refused(folder: Path, tmp_path: Path) -> None:
    """Full fine-tuning of 4 bits; another form beside `quantization`."""
    stored = save_quantized(tmp_path / "four", folder, ("down_proj",))
    with pytest.raises(
        UserError, match=r"is stored in 4 bits, and such weights cannot be trained(.|\n)*peft_type: LORA"
    ):
        check_quantized_checkpoint(stored, None, trains_weights=True)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shutil.copytree(folder, tmp_path / "other")
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    other = read_checkpoint(locate_model(str(tmp_path / "other")))
    with pytest.raises(UserError, match=r"quantized already, in another form \(gptq\)"):
        check_quantized_checkpoint(other, "nf4", trains_weights=False)


def test_without_bitsandbytes_a_stored_form_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python is told that there is none."""
    stored = save_quantized(tmp_path / "model", folder, ("down_proj",))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(
        UserError, match=r"is stored in 4 bits, and bitsandbytes is not installed(.|\n)*pip install bits"
    ):
        check_quantized_checkpoint(stored, None, trains_weights=False)
