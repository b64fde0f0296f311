"""`quantization`: what can stand beside a base model in 4 bits, whose weights can be neither trained nor rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm_edge_ft.config.deepspeed import find, read_deepspeed
from glm_edge_ft.config.draft import PEFT, TRAINING, Draft
from glm_edge_ft.config.values import shown

PATH = ("quantization",)
_WITHOUT = "leave it out, or leave quantization out"
# Ways to begin that do not touch the base model's weights. PEFT's others take something out of them and would write
# the rest back, rounded anew or as bytes; `orthogonal` makes its matrices in the number format of the stored bytes.
PLAIN_BEGINNINGS = (None, True, False, "gaussian")
# PEFT's layer on 4-bit weights passes over these without a word, or refuses them once the weights were read.
UNUSED_VARIANTS: Mapping[str, str] = {
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
}


def check_quantization(draft: Draft) -> None:
    """Hold the rules of `quantization`: an adapter that leaves the weights alone, and nobody who cuts them up."""
    if draft.top.get("quantization") == "none":
        draft.top["quantization"] = None
    if draft.top.get("quantization") is None:
        return
    if draft.peft is None and draft.document.values.get("peft_config") is None:
        what = "weights in 4 bits cannot be trained, and without peft_config all of them are"
        draft.refuse(PATH, what, "add peft_config with peft_type: LORA (configs/lora.yaml), or leave quantization out")
    _check_beginning(draft, draft.peft or {})
    _check_sharing(draft)


def _check_beginning(draft: Draft, peft: Mapping[str, Any]) -> None:
    beginning = peft.get("init_lora_weights")
    if not any(beginning is plain or (plain is not None and beginning == plain) for plain in PLAIN_BEGINNINGS):
        what = f"{shown(beginning)} needs weights that are no 4-bit numbers"
        draft.refuse((*PEFT, "init_lora_weights"), what, "write true or gaussian, or leave quantization out")
    for key, name in UNUSED_VARIANTS.items():
        if peft.get(key) not in (None, False):
            draft.refuse((*PEFT, key), f"{name} does not work on weights in 4 bits", _WITHOUT)


def _check_sharing(draft: Draft) -> None:
    deepspeed = draft.training.get("deepspeed")
    if deepspeed is None:
        return
    try:
        stage = find(read_deepspeed(deepspeed), "zero_optimization.stage")
    except (OSError, ValueError):
        return  # a file that cannot be read has its own problem
    if stage == 3:
        what = "shares the weights among processes at stage 3, which tears 4-bit numbers from their scales"
        draft.refuse((*TRAINING, "deepspeed"), what, "write ds_zero_2.json, or leave quantization out")
