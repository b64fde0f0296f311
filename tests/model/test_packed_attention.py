"""Rows without padding between them: the same loss and gradients as one by one, and no row sees another."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from glm_edge_ft.data.collator import PackedCollator, PaddedCollator
from glm_edge_ft.errors import UserError
from glm_edge_ft.model import packed_attention
from glm_edge_ft.model.glm_edge_v import load_glm_edge_v
from glm_edge_ft.model.loading import load_weights, locate_model, read_checkpoint
from glm_edge_ft.model.packed_attention import (
    PACKED,
    Attention,
    check_packing,
    choose_attention,
    use_attention,
)
from glm_edge_ft.model.precision import Precision
from glm_edge_ft.training.loss import install_supervised_loss
from tests.closeness import assert_same_gradients
from tests.model.vision_fixtures import SMALL_VOCABULARY, image_row, random_images, write_checkpoint

LENGTHS = (9, 5, 5, 14, 1, 5)
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FLOAT32 = Precision("float32", bf16=False, fp16=False, reason="")
BFLOAT16 = Precision("float32", bf16=True, fp16=False, reason="")


def glm(rotary: float = 0.5) -> Any:
    """Return a small GLM with grouped heads, whose rotary embedding turns a part of each head."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary}
    return decided(GlmForCausalLM(GlmConfig(**SMALL, head_dim=16, rope_parameters=rope)))


def decided(model: Any) -> Any:
    """Make the weights of a model large enough that every prediction depends on what stands before it."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=1.0 if "embed" in name else 0.2)
    return model


def ready(model: Any) -> Any:
    """Make a model compute loss and packed rows as training does."""
    install_supervised_loss(model)
    use_attention(model, Attention(PACKED, ""))
    return model.train()


def random_rows(lengths: Sequence[int] = LENGTHS, vocabulary: int = 290) -> list[dict[str, Any]]:
    """Return rows of these lengths, all of whose tokens are supervised."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, vocabulary, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": row} for row in rows]


def gradients_of(model: Any, batches: Sequence[dict[str, Any]], supervised: int) -> tuple[float, dict[str, Any]]:
    """Return the summed loss of batches over `supervised` tokens, and every gradient that came of it."""
    model.zero_grad()
    losses = [model(**batch, num_items_in_batch=supervised).loss for batch in batches]
    sum(losses).backward()
    return sum(loss.item() for loss in losses), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }


def assert_packed_equals_single_rows(
    model: Any, rows: Sequence[dict[str, Any]], bound: float = 1e-4, **images: Any
) -> None:
    """Fail unless a packed batch gives the loss and the gradients of its rows, each alone.

    `bound` is that of `assert_same_gradients`.
    """
    install_supervised_loss(model)
    model.train()
    supervised = sum(int((torch.as_tensor(row["labels"][1:]) != -100).sum()) for row in rows)
    alone = [PaddedCollator(0)([row]) for row in rows]
    places = iter(range(10**6))
    for batch, row in zip(alone, rows, strict=True):
        of_row = [next(places) for _ in range(row.get("shown", 0))]
        batch |= {name: values[of_row] for name, values in images.items() if of_row}
    expected, gradients = gradients_of(model, alone, supervised)
    use_attention(model, Attention(PACKED, ""))
    found, packed = gradients_of(model, [PackedCollator()(rows) | images], supervised)
    assert found == pytest.approx(expected, rel=1e-5)
    assert_same_gradients(packed, gradients, bound)


@pytest.mark.parametrize("rotary", [0.5, 1.0])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_loss_and_gradients_are_those_of_the_rows_one_by_one(rotary: float, checkpointing: bool) -> None:
    """T3: grouped heads, part of a head rotated; activations kept or computed again."""
    model = glm(rotary)
    if checkpointing:
        model.activation_checkpointing_enable()
    assert_packed_equals_single_rows(model, random_rows())


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), id="llama"),
        pytest.param(lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)), id="qwen2"),
    ],
)
def test_other_chat_models_can_be_packed(model: Callable[[], Any]) -> None:
    """Those whose layers are full causal attention."""
    made = decided(model())
    check_packing(made)
    assert_packed_equals_single_rows(made, random_rows())


def test_the_embedded_chat_model_learns_the_same_from_packed_rows() -> None:
    """T3: glm-edge-nano itself, all of its gradients."""
    model = load_weights(read_checkpoint(locate_model("glm-edge-nano")), torch.float32)
    assert_packed_equals_single_rows(model, random_rows((40, 17, 17, 62, 8)))


def test_a_vision_model_learns_the_same_from_packed_rows(tmp_path: Path) -> None:
    """T3: rows with one image, with two, and with none; the vision part is trained too."""
    shape = SMALL_VOCABULARY
    two = [*image_row(shape, 8, 9), shape.user, 10, *image_row(shape, 11)[1:]]
    rows = [
        {"input_ids": ids, "labels": [-100 if token == shape.image else token for token in ids], "shown": shown}
        for ids, shown in ((image_row(shape, 5, 6, 7), 1), ([shape.user, 20, 21, shape.assistant, 22], 0), (two, 2))
    ]
    model = load_glm_edge_v(write_checkpoint(tmp_path, shape), torch.float32)
    assert_packed_equals_single_rows(model, rows, pixel_values=random_images(3))


def test_the_embedded_vision_model_learns_the_same_from_packed_rows() -> None:
    """T3: glm-edge-v-nano itself, with an image and without."""
    checkpoint = read_checkpoint(locate_model("glm-edge-v-nano"))
    config: Any = checkpoint.config
    image = [config.boi_token_id] * config.tokens_per_image
    rows = [
        {"input_ids": [5, *image, 6, 7], "labels": [-100] * (len(image) + 1) + [6, 7], "shown": 1},
        {"input_ids": [8, 9, 10], "labels": [8, 9, 10], "shown": 0},
    ]
    assert_packed_equals_single_rows(load_weights(checkpoint, torch.float32), rows, 3e-4, pixel_values=random_images(1))


def test_no_row_sees_another() -> None:
    """Other tokens in one row: not a bit of any other row's hidden states moves, and no gradient reaches over."""
    model = ready(glm())
    batch = PackedCollator()(random_rows())
    starts = batch["cu_seq_lens_q"].tolist()
    del batch["labels"]
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        inputs = {name: values for name, values in batch.items() if name != "input_ids"}
        states = model.get_decoder()(inputs_embeds=embeddings, **inputs).last_hidden_state
        states[:, start:end].square().sum().backward()
        reached = embeddings.grad[0].abs().sum(dim=-1).nonzero().flatten().tolist()
        assert reached == list(range(start, end)), row
        changed = batch["input_ids"].clone()
        changed[0, start:end] = (changed[0, start:end] + 7) % 290 + 1
        others = model.get_decoder()(**batch | {"input_ids": changed}).last_hidden_state
        moved = (others != states).any(dim=-1)[0].nonzero().flatten().tolist()
        assert moved == list(range(start, end)), row


def test_positions_alone_do_not_keep_rows_apart_and_this_is_refused() -> None:
    """A model class that drops the rows' places on the way must not train rows that see one another."""
    batch = PackedCollator()(random_rows())
    del batch["cu_seq_lens_q"]
    with pytest.raises(ValueError, match="packed rows reached attention without cu_seq_lens_q"):
        ready(glm())(**batch)


def test_no_mask_of_all_tokens_by_all_is_made() -> None:
    """Tokens by tokens would be the largest tensor of a long batch."""
    model, seen = ready(glm()), []
    attention = packed_attention.sdpa_attention_forward

    def noting(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen.append((query.shape[0], query.shape[2], mask))
        return attention(module, query, key, value, mask, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_attention, "sdpa_attention_forward", noting)
        model(**PackedCollator()(random_rows()))
    assert seen == [(1, 9, None), (2, 5, None), (1, 14, None), (1, 1, None), (1, 5, None)] * 2


def test_batches_that_are_not_packed_keep_every_bit() -> None:
    """Padded on either side, and generation with its cache: as transformers' sdpa."""
    plain, packed = glm().eval(), ready(glm()).eval()
    rows = [{"input_ids": row["input_ids"]} for row in random_rows()]
    for side in ("right", "left"):
        batch = PaddedCollator(0, side)(rows)
        assert torch.equal(plain(**batch).logits, packed(**batch).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    assert torch.equal(plain.generate(**batch, **options), packed.generate(**batch, **options))


def test_the_vision_part_keeps_every_bit(tmp_path: Path) -> None:
    """Its attention is neither causal nor packed."""
    model = load_glm_edge_v(write_checkpoint(tmp_path, SMALL_VOCABULARY), torch.float32)
    with torch.no_grad():
        before = model.model.vision(random_images(2))
        use_attention(model, Attention(PACKED, ""))
        assert torch.equal(model.model.vision(random_images(2)), before)


@pytest.mark.parametrize(
    ("kind", "config", "what"),
    [
        (BloomForCausalLM, BloomConfig(hidden_size=32, n_head=2, n_layer=1, vocab_size=50), "code of their own"),
        (MambaForCausalLM, MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50), "code of their own"),
        (MistralForCausalLM, MistralConfig(**SMALL, sliding_window=8), "sliding"),
        (Qwen2ForCausalLM, Qwen2Config(**SMALL, use_sliding_window=True, max_window_layers=1), "sliding_attention"),
    ],
)
def test_architectures_whose_rows_would_mix_are_refused(kind: Any, config: PretrainedConfig, what: str) -> None:
    """Before the weights are read: on the meta device."""
    with torch.device("meta"):
        model = kind(config)
    with pytest.raises(UserError, match=what):
        check_packing(model)


# ---- the branch for GPUs, as far as it can be held without one ----


def by_definition(query: Any, key: Any, value: Any, starts: Any, *_: Any, scale: float, **options: Any) -> Any:
    """Compute what varlen_attn's documentation says, in float64: `(tokens, heads, head_dim)`."""
    assert options == {"window_size": (-1, 0), "enable_gqa": True}
    groups = query.shape[1] // key.shape[1]
    key, value = (states.double().repeat_interleave(groups, dim=1) for states in (key, value))
    products = torch.einsum("qhd,khd->hqk", query.double(), key) * scale
    token = torch.arange(len(query))
    row = torch.bucketize(token, starts[1:], right=True)
    allowed = (row[:, None] == row[None, :]) & (token[:, None] >= token[None, :])
    weights = products.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)


def test_one_call_for_all_rows_equals_a_call_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into PyTorch's kernel and what becomes of its output, with the kernel's definition in its place."""
    expected = glm()
    ready(expected)(**PackedCollator()(random_rows())).loss.backward()
    monkeypatch.setattr(packed_attention, "varlen_attn", by_definition)
    monkeypatch.setattr(packed_attention, "_has_flash_kernels", lambda *_: True)
    found = glm()
    ready(found)(**PackedCollator()(random_rows())).loss.backward()
    kernels, rows = ({name: p.grad for name, p in made.named_parameters()} for made in (found, expected))
    assert_same_gradients(kernels, rows)


def test_pytorchs_kernel_takes_what_it_is_given() -> None:
    """An upgrade that changes its signature, or its gradient, shows here: shapes and formats, without computing."""
    parameters = inspect.signature(varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= parameters.keys()
    with FakeTensorMode():
        query = torch.empty(1, 4, 33, 16, requires_grad=True)
        key, value = (torch.empty(1, 2, 33, 16, requires_grad=True) for _ in range(2))
        starts = torch.empty(3, dtype=torch.int32)
        output = packed_attention._all_rows(query, key, value, 0.25, starts, 20, torch.bfloat16)
        assert (output.shape, output.dtype) == ((1, 33, 4, 16), torch.bfloat16)
        output.sum().backward()
    assert query.grad is not None
    assert (query.grad.shape, query.grad.dtype) == (query.shape, torch.float32)
    assert key.grad is not None
    assert key.grad.shape == key.shape


@pytest.mark.parametrize(
    ("packs", "precision", "dropout", "capability", "installed", "implementation", "said"),
    [
        (
            True,
            BFLOAT16,
            0.0,
            (8, 0),
            True,
            PACKED,
            "varlen_attn, the flash kernels of PyTorch, for rows without padding",
        ),
        (True, BFLOAT16, 0.1, (8, 0), True, PACKED, "sdpa, row by row"),
        (True, FLOAT32, 0.0, (9, 0), False, PACKED, "sdpa, row by row"),
        (True, BFLOAT16, 0.0, (7, 5), False, PACKED, "sdpa, row by row"),
        (False, BFLOAT16, 0.0, (8, 0), True, "flash_attention_2", "flash_attention_2, since flash-attn is installed"),
        (False, BFLOAT16, 0.0, (8, 0), False, None, "sdpa"),
        (False, FLOAT32, 0.0, (8, 0), True, None, "sdpa"),
        (False, BFLOAT16, 0.0, (7, 5), True, None, "sdpa"),
    ],
)
def test_what_a_gpu_computes_attention_with(
    monkeypatch: pytest.MonkeyPatch,
    packs: bool,
    precision: Precision,
    dropout: float,
    capability: tuple[int, int],
    installed: bool,
    implementation: str | None,
    said: str,
) -> None:
    """By its generation, the format and the package; the GPU itself is made up."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(packed_attention, "_has_flash_attention_package", lambda: installed)
    config = GlmConfig(**SMALL, head_dim=16, attention_dropout=dropout)
    assert choose_attention(packs, torch.device("cuda"), precision, config) == Attention(implementation, said)


def test_what_a_cpu_computes_attention_with() -> None:
    """The default run is untouched: whatever the model was loaded with."""
    config = GlmConfig(**SMALL, head_dim=16)
    assert choose_attention(False, torch.device("cpu"), BFLOAT16, config) == Attention(None, "sdpa")
    assert choose_attention(True, torch.device("cpu"), BFLOAT16, config) == Attention(PACKED, "sdpa, row by row")
