"""The weights of a GLM under the names and in the number formats of a GGUF file, one tensor at a time.

llama.cpp computes GLM-Edge as its architecture `chatglm`: rotary positions on neighbouring pairs as transformers' Glm
has them, gate and up of the feed-forward layer in one matrix. Its graph expects heads that are together as wide as the
hidden states, as those of the released models are. Where they are wider (the embedded models), the hidden states are
filled up with zeros to that width (`Width`), which leaves every result as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PretrainedConfig, PreTrainedModel

ARCHITECTURE = "chatglm"
VISION_PREFIX = "model.vision."
_LARGEST_F16 = 65504.0
# Which side of a weight `(out, in)` is as wide as the hidden states.
_HIDDEN_LAST = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_up_proj")
_HIDDEN_FIRST = ("o_proj", "down_proj")
_NORMS = ("norm", "input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Width:
    """Hidden states of `model` numbers, written as `file` numbers of which the last are zero.

    The mean of squares that a norm divides by is then smaller by `share`: norms are scaled by its root, and their
    epsilon by itself, so that what follows them is the same.
    """

    model: int
    file: int

    @property
    def share(self) -> float:
        """The part of the written numbers that the model has."""
        return self.model / self.file


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file.

    Attributes:
        name: in the file.
        key: in the model.
        shape: as numpy has it, `(out, in)`.
        kind: its number format.
        scale: the model's numbers are multiplied by it.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    scale: float = 1.0

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape of its bytes."""
        from gguf.quants import quant_shape_to_byte_shape

        return quant_shape_to_byte_shape(self.shape, self.kind)

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        size = 1
        for side in self.byte_shape:
            size *= side
        return size


def check_computation(where: str, config: PretrainedConfig) -> None:
    """Raise UserError for a model that llama.cpp would compute in another way than transformers does."""
    if config.model_type != "glm":
        fix = "llama.cpp's convert_hf_to_gguf.py writes other models, from a folder that `merge` made"
        raise UserError.single(where, f"is of the type {config.model_type}, not a GLM-Edge", fix)
    settings: Any = config
    rope = settings.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise UserError.single(where, f"its positions are scaled ({rope['rope_type']}), which is not written here", "")
    if settings.hidden_act != "silu":
        what = f"its hidden_act is {settings.hidden_act!r}; llama.cpp computes GLM-Edge with 'silu'"
        raise UserError.single(where, what, "")
    if settings.num_attention_heads * settings.head_dim < settings.hidden_size:
        what = (
            f"its {settings.num_attention_heads} heads of {settings.head_dim} are together less wide than its hidden "
        )
        what += f"states ({settings.hidden_size}), which llama.cpp's {ARCHITECTURE} cannot have"
        raise UserError.single(where, what, "")


def file_width(config: PretrainedConfig) -> Width:
    """Return how wide the hidden states are, and how wide llama.cpp wants them."""
    settings: Any = config
    return Width(settings.hidden_size, settings.num_attention_heads * settings.head_dim)


def add_settings(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """Write the keys of the architecture."""
    settings: Any = config
    width, rope = file_width(config), settings.rope_parameters
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(width.file)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps * width.share)
    writer.add_rope_dimension_count(int(settings.head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(settings.vocab_size)


def plan_tensors(model: PreTrainedModel, kind: GGMLQuantizationType) -> list[PlannedTensor]:
    """Return the tensors of the language part, in the model's order; weights on the meta device will do.

    Args:
        model: a GLM, or a GLM-Edge-V, whose vision part is left out.
        kind: the format of matrices; norms and biases are written in float32, as llama.cpp wants them.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    config: Any = model.config
    width = file_width(config)
    names = get_tensor_name_map(MODEL_ARCH.CHATGLM, config.num_hidden_layers)
    planned = []
    for key, weight in model.state_dict().items():
        if key.startswith(VISION_PREFIX) or (key == "lm_head.weight" and config.tie_word_embeddings):
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"GGUF has no name for {key}")
        shape = _widen(key, tuple(weight.shape), width)
        scale = width.share**0.5 if _part(key) in _NORMS else 1.0
        planned.append(PlannedTensor(name, key, shape, format_for(shape, kind), scale))
    return planned


def format_for(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return a tensor's format: `kind` for matrices, f16 where its blocks do not fit their rows, else float32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def write_tensors(
    writer: GGUFWriter, path: Path, planned: list[PlannedTensor], arrays: Iterator[np.ndarray[Any, Any]]
) -> None:
    """Write header, keys and tensors; only one tensor is held in its new format at a time.

    Args:
        writer: has all keys.
        path: the file.
        planned: what is written.
        arrays: their numbers in float32, in the same order.
    """
    import numpy as np
    from gguf.quants import quantize

    for tensor in planned:
        writer.add_tensor_info(tensor.name, tensor.byte_shape, np.dtype(np.uint8), tensor.nbytes, tensor.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, numbers in zip(planned, arrays, strict=True):
        _check_numbers(tensor, numbers)
        writer.write_tensor_data(np.ascontiguousarray(quantize(numbers, tensor.kind)))
    writer.close()


def read_arrays(weights: Mapping[str, torch.Tensor], planned: list[PlannedTensor]) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the numbers of each planned tensor in float32, filled up with zeros to the planned shape."""
    import numpy as np

    for tensor in planned:
        numbers = weights[tensor.key].detach().float().numpy()
        if tensor.scale != 1:
            numbers = numbers * np.float32(tensor.scale)
        numbers = numbers.reshape(numbers.shape[-len(tensor.shape) :])
        if numbers.shape != tensor.shape:
            missing = [tensor.shape[axis] - numbers.shape[axis] for axis in range(numbers.ndim)]
            numbers = np.pad(numbers, [(0, count) for count in missing])
        yield numbers


def _check_numbers(tensor: PlannedTensor, numbers: np.ndarray[Any, Any]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType

    largest = float(np.abs(numbers).max(initial=0.0))
    if not np.isfinite(largest):
        raise UserError.single(tensor.key, "holds numbers that are not finite", "the training failed: use another")
    if tensor.kind == GGMLQuantizationType.F16 and largest > _LARGEST_F16:
        what = f"holds the number {largest:.4g}, and f16 ends at {_LARGEST_F16:.0f}"
        raise UserError.single(tensor.key, what, "write --type bf16 or f32")


def _widen(key: str, shape: tuple[int, ...], width: Width) -> tuple[int, ...]:
    part = _part(key)
    if part in _NORMS:
        return (width.file,)
    if part in _HIDDEN_FIRST:
        return (width.file, *shape[1:])
    if part in _HIDDEN_LAST and len(shape) == 2:
        return (shape[0], width.file)
    return shape  # a bias of q_proj, k_proj or v_proj


def _part(key: str) -> str:
    return key.split(".")[-2]
