"""A base model in 4 bits: which layers, and how they are loaded.

bitsandbytes stores a weight as NF4 (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", sections 2, 3):
64 numbers in a row of the flattened matrix are one block with a common scale, each number 4 bits that stand for one of
16 values; the scales are themselves quantized to a byte each, 256 of them with a scale of their own. A layer
dequantizes its weight in each pass.

The linear layers of the language model are quantized; embeddings, head, norms and the vision part are not, nor is a
layer whose rows are no whole blocks: bitsandbytes 0.50.2 uses wrong scales for most of those on a CPU.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import Problem, ProblemList, UserError
from glm_edge_ft.model.weight_files import join_first

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

    from glm_edge_ft.model.checkpoint import Checkpoint

BLOCK = 64  # numbers with a common scale
REQUIREMENT = "bitsandbytes==0.50.2"


def is_installed() -> bool:
    """Return whether bitsandbytes can be imported, without doing so."""
    return importlib.util.find_spec("bitsandbytes") is not None


def not_installed(where: str, what: str) -> Problem:
    """Return the problem of a run that needs bitsandbytes where there is none."""
    return Problem(where, f"{what}, and bitsandbytes is not installed", f"pip install {REQUIREMENT}")


def quantization_settings(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the `quantization_config` of a checkpoint whose files are quantized; None: they are not."""
    settings: dict[str, Any] | None = config.to_dict().get("quantization_config")
    return settings


def is_4bit_checkpoint(config: PretrainedConfig) -> bool:
    """Return whether a checkpoint's files hold weights that bitsandbytes quantized to 4 bits."""
    settings = quantization_settings(config)
    return settings is not None and bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))


def check_quantized_checkpoint(checkpoint: Checkpoint, wanted: str | None, trains_weights: bool) -> None:
    """Refuse what cannot be done with a checkpoint whose files are quantized.

    Args:
        checkpoint: the model.
        wanted: `quantization` of the config.
        trains_weights: whether its own weights are trained, not those of an adapter alone.

    Raises:
        UserError: 4-bit numbers without bitsandbytes or without adapter; `wanted` beside another form than that.
    """
    settings, problems = quantization_settings(checkpoint.config), ProblemList()
    where = f"MODEL {checkpoint.location.name}"
    if not is_4bit_checkpoint(checkpoint.config):
        if settings is not None and wanted is not None:
            what = f"its files are quantized already, in another form ({settings.get('quant_method')})"
            problems.add(where, what, "leave quantization out, or give the model that it was quantized from")
    else:
        if not is_installed():
            problems.problems.append(not_installed(where, "is stored in 4 bits"))
        if trains_weights:
            fix = "add peft_config with peft_type: LORA, or give the model that it was quantized from"
            problems.add(where, "is stored in 4 bits, and such weights cannot be trained", fix)
    problems.raise_if_any()


def find_quantizable_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the layers to quantize, of an unquantized model, which may be on the meta device."""
    from torch import nn

    from glm_edge_ft.model.glm_edge_v_config import VISION_PREFIX

    head: Any = model.get_output_embeddings()
    return tuple(
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and not name.startswith(VISION_PREFIX)
        and module.in_features % BLOCK == 0
    )


def find_4bit_layers(model: PreTrainedModel, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the layers that a checkpoint holds in 4 bits, found as transformers does on loading."""
    from torch import nn
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = list(model._keep_in_fp32_modules or ())
    skipped = HfQuantizer.get_modules_to_not_convert(model, settings.get("llm_int8_skip_modules"), kept)
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return tuple(name for name in linear if should_convert_module(name, skipped))


def bitsandbytes_config(meta_model: PreTrainedModel, compute: torch.dtype) -> BitsAndBytesConfig:
    """Return what transformers needs to quantize the weights one by one as it reads them.

    Args:
        meta_model: the unquantized model's structure.
        compute: format in which the layers compute.
    """
    from torch import nn
    from transformers import BitsAndBytesConfig

    layers = set(find_quantizable_layers(meta_model))
    linear = [name for name, module in meta_model.named_modules() if type(module) is nn.Linear]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=[f"{re.escape(name)}$" for name in linear if name not in layers],
    )


def fix_compute_dtype(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Make a loaded model in 4 bits compute in one format, in training as in evaluation; others stay as they are.

    bitsandbytes would dequantize to the format of the file in the backward pass and to that of the input in the forward
    pass. On a CPU with bfloat16 instructions, the first evaluation would also replace the weights by others with scales
    in bfloat16, through which no gradient is computed.

    Raises UserError where a layer on a CPU has rows that are no whole blocks.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    from bitsandbytes.nn import Linear4bit

    quantizer: Any = model.hf_quantizer
    if quantizer.pre_quantized and not model._keep_in_fp32_modules:
        for parameter in model.parameters():
            if parameter.is_floating_point():  # transformers leaves these as they are stored
                parameter.data = parameter.data.to(compute)
    torn = []
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            if module.in_features % weight.quant_state.blocksize and weight.device.type == "cpu":
                torn.append(name)
            module.compute_dtype, module.compute_type_is_set = compute, True
            module.support_avx512bf16_for_cpu = False
            weight.quant_state.dtype = compute
    if torn:
        what = f"{len(torn)} of its 4-bit layers have rows that are no whole blocks: {join_first(torn)}"
        fix = "use it on a GPU, or give the model that it was quantized from; bitsandbytes reads them wrongly on a CPU"
        raise UserError.single(f"MODEL {model.name_or_path}", what, fix)
