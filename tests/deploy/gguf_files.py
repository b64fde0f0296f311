"""GGUF files read back with the `gguf` package, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize

from glm_edge_ft.deploy.export_gguf import export_gguf
from glm_edge_ft.errors import UserError

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class GgufFile:
    """A file's content.

    Attributes:
        keys: its metadata.
        tensors: its numbers in float32, `(out, in)`.
        kinds: the name of each tensor's format.
    """

    keys: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    kinds: dict[str, str]


def export(model: Path | str, out: Path, kind: str = "f16") -> GgufFile:
    """Export a model and read the file of its language part."""
    export_gguf(str(model), out, kind=kind)
    return read_gguf(out)


def refusal(model: Path | str, out: Path, kind: str = "f16") -> str:
    """Return the message that an export is refused with; nothing is left on disk."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        export_gguf(str(model), out, kind=kind)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def read_gguf(path: Path) -> GgufFile:
    """Read a whole file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors, kinds = {}, {}
    for tensor in reader.tensors:
        shape = tuple(int(side) for side in reversed(tensor.shape))
        numbers = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        tensors[str(tensor.name)] = numbers.reshape(shape)
        kinds[str(tensor.name)] = tensor.tensor_type.name
    return GgufFile(keys, tensors, kinds)


def model_key(name: str) -> str:
    """Return transformers' name of a tensor of the language part."""
    module, _, suffix = name.rpartition(".")
    if module in TOP_NAMES:
        return f"{TOP_NAMES[module]}.{suffix}"
    _, layer, part = module.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"
