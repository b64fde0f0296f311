"""Attention over rows that are concatenated without padding between them.

A packed batch is one row `(1, tokens)`. Where its rows begin and end comes as `cu_seq_lens_q`, the name that
transformers gives it in padding-free batches, and no row sees another:

    rows       a a a b b                        attention    a a a b b
    cu_seq_lens_q  [0, 3, 5]                              a  x . . . .
    position_ids   [0, 1, 2, 0, 1]                        a  x x . . .
                                                          a  x x x . .
                                                          b  . . . x .
                                                          b  . . . x x

The matrix is never made. On a GPU in 16 bit the flash kernels of PyTorch take all rows at once; elsewhere each row, or
several neighbours of one length together, goes through scaled_dot_product_attention. Batches that are not packed, those
of evaluation and generation, are computed by transformers' "sdpa", bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from glm_edge_ft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from glm_edge_ft.model.precision import Precision

PACKED = "packed"
FLASH_ATTENTION = "flash_attention_2"
_SIXTEEN_BIT = (torch.bfloat16, torch.float16)
_CAUSAL = (-1, 0)  # a window of varlen_attn: all tokens before a token, none after it


@dataclass(frozen=True)
class Attention:
    """How a run computes attention.

    Attributes:
        implementation: transformers' name for it; None: what the model was loaded with.
        description: for the run's header.
    """

    implementation: str | None
    description: str


def choose_attention(packs: bool, device: torch.device, precision: Precision, config: Any) -> Attention:
    """Return how a run computes attention, on `device` and for a model's `config`; `packs`: its batches are packed."""
    dtype = getattr(torch, precision.compute)
    fields = config.to_dict()
    head_dim = fields.get("head_dim") or config.hidden_size // config.num_attention_heads
    has_flash = _has_flash_kernels(device, dtype, head_dim)
    if packs and has_flash and not fields.get("attention_dropout"):
        return Attention(PACKED, "varlen_attn, the flash kernels of PyTorch, for rows without padding")
    if packs:
        return Attention(PACKED, "sdpa, row by row")
    if has_flash and _has_flash_attention_package():
        return Attention(FLASH_ATTENTION, "flash_attention_2, since flash-attn is installed")
    return Attention(None, "sdpa")


def use_attention(model: PreTrainedModel, attention: Attention) -> None:
    """Make `model` compute attention so. A vision part has no packed rows: `PACKED` leaves its outputs as they are."""
    if attention.implementation is not None:
        model.set_attn_implementation(attention.implementation)


def check_packing(model: PreTrainedModel) -> None:
    """Raise UserError where packed rows of `model`, which may be on the meta device, would not be kept apart.

    That is an architecture whose layers pass on more between tokens than full causal attention does, or that takes no
    positions.
    """
    reason = _find_obstacle(model)
    if reason is not None:
        raise UserError.single("padding_free", f"true, but {reason}", "write padding_free: false, or leave it out")


def _find_obstacle(model: Any) -> str | None:
    fields, kind = model.config.to_dict(), model.config.model_type
    if not model._supports_attention_backend:
        return f"models of type {kind} compute attention in code of their own"
    if "position_ids" not in inspect.signature(type(model.get_decoder()).forward).parameters:
        return f"models of type {kind} take no position_ids, which start anew in every row"
    layers = set(fields.get("layer_types") or []) - {"full_attention"}
    if layers or model._is_stateful:
        what = ", ".join(sorted(layers)) or "layers with a state"
        return f"models of type {kind} have {what} beside full attention, and rows could reach one another there"
    if fields.get("sliding_window") is not None and not fields.get("layer_types"):
        return f"this model attends within a sliding window of {fields['sliding_window']} tokens"
    return None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return causal attention within each row, `(1, tokens, heads, head_dim)`; an attention function of transformers.

    Args:
        module: the attention layer.
        query: `(1, heads, tokens, head_dim)`.
        key, value: `(1, key_value_heads, tokens, head_dim)`.
        attention_mask: what `packed_mask` returned.
        dropout: of attention weights.
        scaling: of the products; None: 1 / sqrt(head_dim).
        cu_seq_lens_q: where rows begin, and the number of tokens, `(rows + 1,)` int32. None: the batch is not packed,
            and transformers' `sdpa_attention_forward` computes it.
        max_length_q: tokens of the longest row.
        kwargs: what else transformers passes to attention.

    Raises:
        ValueError: positions start anew within a row, but `cu_seq_lens_q` is missing.
    """
    is_marked = attention_mask is not None and attention_mask.numel() == 0
    if cu_seq_lens_q is None:
        if is_marked:
            raise ValueError("packed rows reached attention without cu_seq_lens_q: they would see one another")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or not (attention_mask is None or is_marked):
        raise ValueError("packed rows are one row without mask and cache")
    device = query.device
    computing = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query.dtype
    if dropout == 0.0 and _has_flash_kernels(device, computing, query.shape[-1]):
        assert max_length_q is not None
        return _all_rows(query, key, value, scaling, cu_seq_lens_q, max_length_q, computing), None
    lengths = cu_seq_lens_q.diff().tolist()
    return _row_by_row(module, query, key, value, lengths, dropout, scaling), None


def packed_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return the mask that "sdpa" gets, and for packed rows, which need none, an empty one that marks them as such.

    Where positions start anew in a batch without padding mask, transformers asks for a mask of all tokens by all tokens
    (`allow_is_causal_skip` is false).
    """
    can_be_left_out = allow_is_causal_skip or allow_is_bidirectional_skip
    if attention_mask is None and batch_size == 1 and q_length == kv_length and not can_be_left_out:
        return torch.empty(0, dtype=torch.bool)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **kwargs,
    )


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)


def _all_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    cu_seq_lens: torch.Tensor,
    longest: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return attention by one call of PyTorch's flash kernels; autocast does not know them, so this casts."""
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    rows = (cu_seq_lens, cu_seq_lens, longest, longest)
    grouped = query.shape[1] != key.shape[1]
    output = varlen_attn(query, key, value, *rows, scale=scaling, window_size=_CAUSAL, enable_gqa=grouped)
    assert isinstance(output, torch.Tensor)
    return output.unsqueeze(0)


def _row_by_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Return attention by a call for each row; neighbours of one length, which batches by length have, share a call."""
    outputs, start = [], 0
    for length, neighbours in groupby(lengths):
        rows = len(list(neighbours))
        place = slice(start, start + rows * length)
        start += rows * length
        queries, keys, values = (
            states[0, :, place].unflatten(1, (rows, length)).transpose(0, 1)  # (rows, heads, length, head_dim)
            for states in (query, key, value)
        )
        output, _ = sdpa_attention_forward(
            module, queries, keys, values, None, dropout=dropout, scaling=scaling, is_causal=True
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)


def _has_flash_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the flash kernels of PyTorch compute this: 16 bit, heads of up to 256, NVIDIA from Ampere on."""
    if device.type != "cuda" or dtype not in _SIXTEEN_BIT or head_dim % 8 or head_dim > 256:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _has_flash_attention_package() -> bool:
    """Whether flash-attn is there and can be loaded; one that was built for another PyTorch cannot."""
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return False
    try:
        import flash_attn  # noqa: F401
    except (ImportError, OSError):
        return False
    return True
