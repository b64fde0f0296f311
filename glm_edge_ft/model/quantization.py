"""A base model in 4 bits: which layers, and how they are loaded.

bitsandbytes keeps a weight as NF4 (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", sections 2 and 3):
64 numbers in a row of the flattened matrix are one block with a common scale, each number half a byte that names one of
16 values; the scales are themselves kept in a byte each, 256 of them with a scale of their own. To compute, a layer
makes plain numbers of its weight each time, and forgets them.

The linear layers of the language model are kept so; embeddings, head, norms and the vision part stay plain, and so does
a layer whose rows are no whole blocks: bitsandbytes 0.50.2 takes wrong scales for most of those on a CPU.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glm_edge_ft.errors import Problem, UserError
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


def stored_settings(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return how a checkpoint says that its files are quantized, in the words of transformers; None: they are not."""
    settings = getattr(config, "quantization_config", None)
    return None if settings is None else dict(settings if isinstance(settings, Mapping) else settings.to_dict())


def is_stored_in_4_bits(config: PretrainedConfig) -> bool:
    """Return whether a checkpoint's files hold weights that bitsandbytes made 4-bit numbers of."""
    settings = stored_settings(config)
    return settings is not None and bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))


def check_stored_form(checkpoint: Checkpoint, wanted: str | None, trains_weights: bool) -> None:
    """Refuse what cannot be done with a checkpoint whose files are quantized.

    Args:
        checkpoint: the model.
        wanted: `quantization` of the config.
        trains_weights: whether its own weights are trained, not those of an adapter alone.

    Raises:
        UserError: 4-bit numbers without bitsandbytes or without adapter; `wanted` beside another form than that.
    """
    settings, where = stored_settings(checkpoint.config), f"MODEL {checkpoint.location.name}"
    if settings is None:
        return
    if not is_stored_in_4_bits(checkpoint.config):
        if wanted is not None:
            what = f"its files are quantized already, in another form ({settings.get('quant_method')})"
            fix = "leave quantization out, or give the model that it was quantized from"
            raise UserError.single(where, what, fix)
        return
    problems = [] if is_installed() else [not_installed(where, "is stored in 4 bits")]
    if trains_weights:
        what = "is stored in 4 bits, and such weights cannot be trained"
        problems.append(
            Problem(where, what, "add peft_config with peft_type: LORA, or give the model it was made from")
        )
    if problems:
        raise UserError(problems)


def find_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the layers that are kept in 4 bits, of a plain model; on the meta device will do."""
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


def find_stored_layers(model: PreTrainedModel, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the layers that a checkpoint holds in 4 bits, as transformers tells them on loading."""
    from torch import nn
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = list(model._keep_in_fp32_modules or ())
    plain = HfQuantizer.get_modules_to_not_convert(model, settings.get("llm_int8_skip_modules"), kept)
    return tuple(
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and should_convert_module(name, plain)
    )


def loading_settings(twin: PreTrainedModel, compute: torch.dtype) -> BitsAndBytesConfig:
    """Return what transformers needs to quantize the weights one by one as it reads them.

    Args:
        twin: the model's structure, plain, on the meta device.
        compute: format in which the layers compute.
    """
    from torch import nn
    from transformers import BitsAndBytesConfig

    layers = set(find_layers(twin))
    plain = [name for name, module in twin.named_modules() if type(module) is nn.Linear and name not in layers]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=[f"{re.escape(name)}$" for name in plain],
    )


def fix_compute_dtype(model: PreTrainedModel, compute: torch.dtype) -> None:
    """Make a model in 4 bits, once loaded, compute in one format, in training as in evaluation.

    bitsandbytes would make plain numbers of a weight in the format of the file in the backward pass and in the format
    of the input in the forward pass. On a CPU with bfloat16 instructions, the first evaluation would besides replace
    the weights by others with scales in bfloat16, through which no gradient comes back. A model without such layers
    stays as it is.

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
