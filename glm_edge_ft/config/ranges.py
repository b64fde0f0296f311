"""Numbers that make sense for each key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from glm_edge_ft.config.document import KeyPath
from glm_edge_ft.config.draft import PEFT, TRAINING, Draft
from glm_edge_ft.config.values import shown


@dataclass(frozen=True)
class Range:
    """The numbers that make sense for one key.

    Attributes:
        low, high: bounds that belong to the range.
        above, below: bounds that do not.
        also: one more number, outside the bounds.
        steps: a step count: a whole number, or a fraction of all steps where it is below 1.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    also: float | None = None
    steps: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies in the range."""
        if self.also is not None and value == self.also:
            return True
        if self.steps and value >= 1 and value != int(value):
            return False
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def words(self) -> str:
        """Say the range: `a number from 0 to below 1`, `-1, or a number from 1 up`."""
        if self.steps:
            zero = "0, " if self.low == 0 else ""
            return f"{zero}a whole number of steps from 1 up, or a fraction of all steps below 1"
        also = "" if self.also is None else f"{self.also:g}, or "
        start = f"above {self.above:g}" if self.low is None else f"from {self.low:g}"
        if self.high is not None:
            end = f" to {self.high:g}" if self.high < 1e6 else f" to {self.high:.0f}"
        elif self.below is not None:
            end = f" to below {self.below:g}"
        else:
            end = " up" if self.low is not None else ""
        return f"{also}a number {start}{end}"


_POSITIVE, _COUNT, _STEPS = Range(above=0), Range(low=1), Range(above=0, steps=True)
_NOT_NEGATIVE, _SHARE, _SEED = Range(low=0), Range(low=0, below=1), Range(low=0, high=2**32 - 1)
RANGES: Mapping[KeyPath, Mapping[str, Range]] = {
    (): dict.fromkeys(
        ("max_input_length", "max_output_length", "max_images", "image_placeholder_tokens", "max_tokens_per_pass"),
        _COUNT,
    ),
    ("data_config",): {"num_proc": _COUNT},
    TRAINING: {
        "per_device_train_batch_size": _COUNT,
        "per_device_eval_batch_size": _COUNT,
        "gradient_accumulation_steps": _COUNT,
        "eval_accumulation_steps": _COUNT,
        "torch_empty_cache_steps": _COUNT,
        "num_train_epochs": _POSITIVE,
        "max_steps": Range(low=1, also=-1),
        "learning_rate": _POSITIVE,
        "warmup_steps": Range(low=0, steps=True),
        "weight_decay": _NOT_NEGATIVE,
        "adam_beta1": _SHARE,
        "adam_beta2": _SHARE,
        "adam_epsilon": _POSITIVE,
        "max_grad_norm": _NOT_NEGATIVE,
        "label_smoothing_factor": _SHARE,
        "neftune_noise_alpha": _NOT_NEGATIVE,
        "logging_steps": _STEPS,
        "eval_steps": _STEPS,
        "save_steps": _STEPS,
        "eval_delay": _NOT_NEGATIVE,
        "save_total_limit": _COUNT,
        "dataloader_num_workers": _NOT_NEGATIVE,
        "dataloader_prefetch_factor": _COUNT,
        "seed": _SEED,
        "data_seed": _SEED,
        "ddp_timeout": _COUNT,
        "generation_max_length": _COUNT,
        "generation_num_beams": _COUNT,
    },
    (*TRAINING, "generation_config"): {
        "max_new_tokens": _COUNT,
        "min_new_tokens": _NOT_NEGATIVE,
        "max_length": _COUNT,
        "num_beams": _COUNT,
        "num_return_sequences": Range(low=1, high=1),  # evaluation scores one reply for each prompt
        "temperature": _POSITIVE,
        "top_k": _NOT_NEGATIVE,
        "top_p": Range(above=0, high=1),
        "repetition_penalty": _POSITIVE,
        "assistant_ensemble_weight": Range(above=0, below=1),
    },
    PEFT: {
        "r": _COUNT,
        "lora_alpha": _COUNT,
        "lora_dropout": _SHARE,
        "num_virtual_tokens": _COUNT,
        "encoder_hidden_size": _COUNT,
    },
}


def check_ranges(draft: Draft) -> None:
    """Refuse numbers outside what makes sense for their key, and drop them so that no later rule trips over them."""
    sections = (draft.top, draft.data, draft.training, draft.generation, draft.peft or {})
    for (section_path, ranges), values in zip(RANGES.items(), sections, strict=True):
        for name, allowed in ranges.items():
            value = values.get(name)
            if value is not None and not allowed.holds(value):
                path = (*section_path, name)
                seen = shown(value, draft.document.texts.get(path))
                draft.refuse(path, f"{seen} is out of range", f"write {allowed.words()}")
                del values[name]
