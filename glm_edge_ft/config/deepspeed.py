"""The JSON settings behind `training_args.deepspeed`: checked beside the YAML, and completed for the machine.

The YAML decides. transformers fills every "auto" of the JSON from its own arguments. A number that stands in the JSON
instead is compared with those arguments, their defaults included, and the first that differs ends the run, but only
after the weights were read; a schedule, an optimizer and some of their settings it does not compare, and lets the JSON
win in silence. So here whatever the JSON states and the YAML would do otherwise is refused at once, also where the
YAML is silent and a default would apply. Reads no more than the standard library can.
"""

from __future__ import annotations

import ast
import copy
import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_edge_ft.config.document import nearest
from glm_edge_ft.config.draft import TRAINING, Draft
from glm_edge_ft.config.schema import training_fields
from glm_edge_ft.config.values import shown

AUTO = "auto"
PATH = (*TRAINING, "deepspeed")

# Key of the JSON → the YAML's name for the same setting.
SAME_SETTING: Mapping[str, str] = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
}
BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")

ADAMW = ("adamw_torch", "adamw_torch_fused")

# DeepSpeed's schedules → what the YAML calls the curve most like it; it has no name for the others.
SCHEDULES: Mapping[str, str] = {
    "WarmupLR": "constant_with_warmup",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
SECTIONS = ("zero_optimization", "optimizer", "optimizer.params", "scheduler", "scheduler.params", "bf16", "fp16")

# The fields of DeepSpeed 0.19.8's `DeepSpeedZeroConfig`, which forbids others, under the names that a JSON uses.
ZERO_KEYS = (
    *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
    *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "load_from_fp32_weights"),
    *("elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow", "sub_group_size", "cpu_offload_param"),
    *("cpu_offload_use_pin_memory", "cpu_offload", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold"),
    *("stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"),
    *("stage3_gather_fp16_weights_on_model_save", "ignore_unused_parameters", "legacy_stage1"),
    *("round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights"),
    *("zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear"),
    *("pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks"),
    *("save_muon_momentum_buffer_in_memory", "leaf_module", "mics_shard_size", "mics_hierarchical_params_gather"),
)

# What people most often write at the top of such a file. DeepSpeed passes over a mistyped one in silence.
TOP_KEYS = (
    *(*BATCH_KEYS, "optimizer", "scheduler", "bf16", "fp16", "zero_optimization", "steps_per_print"),
    *("wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients"),
    *("gradient_predivide_factor", "communication_data_type", "activation_checkpointing", "flops_profiler"),
    *("comms_logger", "data_types", "checkpoint", "dump_state", "tensorboard", "csv_monitor", "wandb", "aio"),
)

# Sections that take over what the Trainer does, or need a model that was built for them.
_TAKES_OVER = "leave it out"
UNUSABLE: Mapping[str, str] = {
    "amp": "is mixed precision by apex; this toolkit uses bf16 or fp16",
    "autotuning": "starts runs of its own with other batch sizes",
    "compression_training": "changes the layers of the model, which could not be saved as released",
    "curriculum_learning": "changes the batches, which this toolkit makes",
    "data_efficiency": "changes the batches, which this toolkit makes",
    "elasticity": "changes the batch size, which the YAML decides",
    "hybrid_engine": "belongs to training with rewards",
    "pipeline": "needs a model that is cut into stages",
    "progressive_layer_drop": "needs a model that can drop its layers",
    "sparse_attention": "needs a model with another attention",
    "tensor_parallel": "splits layers in a way that this toolkit cannot save",
    "torch_autocast": "is mixed precision of its own; this toolkit uses bf16 or fp16",
}


@dataclass(frozen=True)
class Expected:
    """What the YAML makes of one setting of the JSON.

    Attributes:
        value: the value that the JSON may state; None when it may state none.
        why: the YAML's value in words, with its place.
        source: the keys of `training_args` that decide it.
    """

    value: Any
    why: str
    source: str


def check_deepspeed(draft: Draft, settings: Mapping[str, Any], name: str, world_size: int) -> None:
    """Note in the draft everything in a DeepSpeed JSON that contradicts the YAML or cannot work with this toolkit.

    Args:
        draft: the configuration, its sections typed.
        settings: the JSON's content.
        name: the JSON file as messages name it.
        world_size: number of processes of the run.
    """
    sections = {section: find(settings, section) for section in SECTIONS}
    for section, value in sections.items():
        if value is not None and not isinstance(value, dict):
            draft.refuse(PATH, f"{name}: {section} is {shown(value)}, no JSON object", 'write {"key": value} there')
    for key in settings:
        _check_top_key(draft, key, name)
    zero = sections["zero_optimization"]
    if isinstance(zero, dict):
        _check_zero(draft, zero, name)
    _check_offloaded_optimizer(draft, settings, name)
    for key, expected in expected_values(draft, settings, world_size).items():
        stated = find(settings, key)
        if stated is None or stated == AUTO or (expected.value is not None and _same(stated, expected.value)):
            continue
        fix = f'write "auto" there, or leave the key out: it then follows {expected.source}'
        if key.endswith(".type"):
            fix = f"leave {key.partition('.')[0]} out of the JSON: {expected.source} then decides"
        seen = f'`"{stated}"`, a text' if _is_text_for_number(stated, expected.value) else shown(stated)
        draft.refuse(PATH, f"{name}: {key} is {seen}, but {expected.why}", fix)


def find(settings: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or None where the JSON does not state it."""
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, dict | Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _same(stated: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):  # names that mean the same
        return isinstance(stated, str) and stated.lower() in expected
    return type(stated) in (int, float, bool, str, list) and bool(stated == expected)


def _is_text_for_number(stated: Any, expected: Any) -> bool:
    return isinstance(stated, str) and type(expected) in (int, float)


def _check_top_key(draft: Draft, key: str, name: str) -> None:
    if key in UNUSABLE:
        draft.refuse(PATH, f"{name}: {key} {UNUSABLE[key]}", _TAKES_OVER)
    elif key not in TOP_KEYS:
        close = difflib.get_close_matches(key, TOP_KEYS, n=1, cutoff=0.85)
        if close:
            draft.refuse(PATH, f"{name}: unknown key `{key}`", f"did you mean {close[0]}?")


def _check_zero(draft: Draft, zero: Mapping[str, Any], name: str) -> None:
    stage = zero.get("stage", 0)
    where = f"{name}: zero_optimization"
    if type(stage) is not int or not 0 <= stage <= 3:
        draft.refuse(PATH, f"{where}.stage is {shown(stage)}", "write 0 (off), 1, 2 or 3")
        stage = None
    for key in zero:
        if key not in ZERO_KEYS:
            close = nearest(key, ZERO_KEYS)
            fix = f"did you mean {close}?" if close else "leave it out"
            draft.refuse(PATH, f"{name}: unknown key `zero_optimization.{key}`", fix)
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.get(key)
        if offload is None:
            continue
        if not isinstance(offload, dict):
            draft.refuse(PATH, f"{where}.{key} is {shown(offload)}, no JSON object", 'write {"device": "cpu"} there')
            continue
        device = offload.get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            draft.refuse(PATH, f"{where}.{key}.device is {shown(device)}", "write cpu, nvme or none")
        elif device == "nvme" and not offload.get("nvme_path"):
            draft.refuse(PATH, f"{where}.{key}.nvme_path: missing", "name a folder of a local disk there")
        elif device != "none" and stage is not None and stage < lowest:
            what = f"{where}.{key} has no meaning at stage {stage}"
            draft.refuse(PATH, what, f"leave it out, or write stage: {lowest}")


def _check_offloaded_optimizer(draft: Draft, settings: Mapping[str, Any], name: str) -> None:
    """Refuse an optimizer in whose place accelerate would put DeepSpeed's Adam for the CPU without a word."""
    device = find(settings, "zero_optimization.offload_optimizer.device")
    optimizer = draft.training.get("optim")
    if device in ("cpu", "nvme") and optimizer is not None and optimizer not in ADAMW:
        what = f"{name}: zero_optimization.offload_optimizer works with AdamW alone, but {_said(draft, 'optim')}"
        draft.refuse(PATH, what, "write optim: adamw_torch, or leave offload_optimizer out of the JSON")


def expected_values(draft: Draft, settings: Mapping[str, Any], world_size: int) -> dict[str, Expected]:
    """Return what the YAML says of each key that a JSON could state as well.

    Keys whose value in the YAML was refused are left out.
    """
    expected: dict[str, Expected] = {}
    for key, name in SAME_SETTING.items():
        if _is_known(draft, name):
            expected[key] = Expected(_value(draft, name), _said(draft, name), name)
    if _is_known(draft, "adam_beta1", "adam_beta2"):
        why = f"{_said(draft, 'adam_beta1')} and {_said(draft, 'adam_beta2')}"
        betas = [_value(draft, "adam_beta1"), _value(draft, "adam_beta2")]
        expected["optimizer.params.betas"] = Expected(betas, why, "adam_beta1 and adam_beta2")
    batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if _is_known(draft, *batch):
        size, steps = (_value(draft, name) for name in batch)
        processes = f"{world_size} process" + ("es" if world_size > 1 else "")
        why = f"{_said(draft, batch[0])}, {_said(draft, batch[1])}, with {processes}: {size * steps * world_size}"
        expected["train_batch_size"] = Expected(size * steps * world_size, why, " and ".join(batch))
    return expected | _expected_precision(draft) | _expected_optimizer(draft) | _expected_schedule(draft, settings)


def _expected_precision(draft: Draft) -> dict[str, Expected]:
    """A precision that the YAML leaves open is chosen by what the machine has, which no JSON can know."""
    expected: dict[str, Expected] = {}
    for name, other in (("bf16", "fp16"), ("fp16", "bf16")):
        if not _is_known(draft, name):
            continue
        value = draft.training.get(name)
        if value is None and draft.training.get(other):
            expected[f"{name}.enabled"] = Expected(False, _said(draft, other), other)
        elif value is None:
            why = f"{name} is not set, so that the machine decides"
            expected[f"{name}.enabled"] = Expected(None, why, name)
        else:
            expected[f"{name}.enabled"] = Expected(value, _said(draft, name), name)
    return expected


def _expected_optimizer(draft: Draft) -> dict[str, Expected]:
    if not _is_known(draft, "optim"):
        return {}
    optimizer = str(draft.training.get("optim") or "adamw_torch")
    names = ("adamw", "adam") if optimizer in ADAMW else None
    said = _said(draft, "optim") if draft.training.get("optim") else "optim is AdamW, its default"
    expected = {"optimizer.type": Expected(names, said, "optim")}
    if names is not None:
        expected["optimizer.params.adam_w_mode"] = Expected(True, said, "optim")
    return expected


def _expected_schedule(draft: Draft, settings: Mapping[str, Any]) -> dict[str, Expected]:
    why = "warmup_steps rises along a line"
    expected = {"scheduler.params.warmup_type": Expected("linear", why, "warmup_steps")}
    if _is_known(draft, "lr_scheduler_type"):
        schedule, stated = _value(draft, "lr_scheduler_type"), find(settings, "scheduler.type")
        allowed = stated if isinstance(stated, str) and SCHEDULES.get(stated) == schedule else None
        expected["scheduler.type"] = Expected(allowed, _said(draft, "lr_scheduler_type"), "lr_scheduler_type")
    if not _is_known(draft, "max_steps", "warmup_steps"):
        return expected
    steps, warmup = _value(draft, "max_steps"), _value(draft, "warmup_steps")
    open_end = "the data and num_train_epochs decide the length of the run"
    if steps > 0:
        expected["scheduler.params.total_num_steps"] = Expected(steps, _said(draft, "max_steps"), "max_steps")
    else:
        expected["scheduler.params.total_num_steps"] = Expected(None, open_end, "num_train_epochs")
    said = _said(draft, "warmup_steps")
    count: int | None = None
    if warmup >= 1 or warmup == 0:
        count = max(1, int(warmup))
    elif steps > 0:
        count = max(1, math.ceil(steps * warmup))
        said += f" of {steps} steps: {count}"
    else:
        said += f" of all steps, and {open_end}"
    expected["scheduler.params.warmup_num_steps"] = Expected(count, said, "warmup_steps")
    return expected


def _is_known(draft: Draft, *names: str) -> bool:
    return not any(draft.refused(draft.training, *TRAINING, name) for name in names)


def _value(draft: Draft, name: str) -> Any:
    """Return the YAML's value, or transformers' default where it is silent."""
    value = draft.training.get(name)
    return ast.literal_eval(str(training_fields()[name].default)) if value is None else value


def _said(draft: Draft, name: str) -> str:
    value = shown(_value(draft, name))
    if draft.training.get(name) is None:
        return f"{name} is {value}, its default"
    where = draft.document.where((*TRAINING, name)).removesuffix(f": training_args.{name}")
    where = where.replace(draft.document.name, Path(draft.document.name).name)
    return f"{name} is {value} ({where})"


def count_processes() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def read_deepspeed(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings behind a checked `training_args.deepspeed`: the JSON file's, or the mapping itself."""
    if isinstance(value, str):
        return dict(json.loads(Path(value).read_text(encoding="utf-8-sig")))
    return dict(value)


def complete_deepspeed(settings: Mapping[str, Any], *, has_gpu: bool, bf16: bool, fp16: bool) -> dict[str, Any]:
    """Return a copy of a checked JSON's content with what the YAML, the machine and whole checkpoints need.

    - Batch sizes, accumulation and clipping become "auto" where they are missing: without them DeepSpeed would use
      defaults of its own.
    - `optimizer` and `scheduler` go: they say what the YAML says, and its own do just that, while DeepSpeed's schedule
      of the same name takes other values, and its optimizer would let biases and norms decay too. Where states are
      offloaded, accelerate puts DeepSpeed's AdamW for the CPU in place of torch's.
    - `bf16` and `fp16` follow the precision that was chosen.
    - At stage 3 whole weights are gathered for saving; DeepSpeed would leave placeholders in the saved model.
    - Without a GPU nothing is pinned or overlapped.

    Args:
        settings: the JSON's content; not changed.
        has_gpu: whether the run is on GPUs.
        bf16, fp16: the precision of the run; at most one is true.
    """
    completed = copy.deepcopy(dict(settings))
    for key in BATCH_KEYS:
        if completed.get(key) is None:
            completed[key] = AUTO
    for key in ("optimizer", "scheduler"):
        completed.pop(key, None)
    completed["bf16"] = {**(completed.get("bf16") or {}), "enabled": bf16}
    completed["fp16"] = {**(completed.get("fp16") or {}), "enabled": fp16}
    completed["zero_optimization"] = zero = dict(completed.get("zero_optimization") or {})
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero.pop("stage3_gather_fp16_weights_on_model_save", None)  # the old name of the same switch
    if not has_gpu:
        zero["overlap_comm"] = False
        for key in ("offload_optimizer", "offload_param"):
            if zero.get(key):
                zero[key]["pin_memory"] = False
    return completed
