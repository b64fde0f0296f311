"""The JSON settings behind `training_args.deepspeed`: checked beside the YAML, and completed for the machine.

The YAML decides. transformers fills every "auto" of the JSON from its own arguments. A number that stands in the JSON
instead is compared with those arguments, their defaults included, and the first that differs ends the run, but only
after the weights were read; a schedule, an optimizer and some of their settings it does not compare, and lets the JSON
win in silence. So here whatever the JSON states and the YAML would do otherwise is refused at once, also where the
YAML is silent and a default would apply. Reads no more than the standard library can.
"""

from __future__ import annotations

import ast
import json
import math
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

# What a value is that is not of its kind; values of `OTHER` are looked at one by one.
SECTION, BOOL, COUNT = "no JSON object", "neither true nor false", "no whole number from 0 on"
NUMBER, TEXT, OTHER = "no number", "no text", ""

# What of the JSON reaches DeepSpeed: sections → keys under which runs were tried, with LoRA and all weights. Others may
# stand in the file as long as they switch nothing on.
USED: Mapping[str, Mapping[str, str]] = {
    "": {
        **dict.fromkeys(BATCH_KEYS, OTHER),
        **dict.fromkeys(("zero_optimization", "bf16", "fp16", "optimizer", "scheduler"), SECTION),
        **dict.fromkeys(("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown"), BOOL),
        "communication_data_type": TEXT,
        "steps_per_print": NUMBER,
    },
    "zero_optimization": {
        "stage": OTHER,
        **dict.fromkeys(("offload_optimizer", "offload_param"), SECTION),
        **dict.fromkeys(("contiguous_gradients", "reduce_scatter", "allgather_partitions", "overlap_comm"), BOOL),
        **dict.fromkeys(("round_robin_gradients", "ignore_unused_parameters", "memory_efficient_linear"), BOOL),
        "log_trace_cache_warnings": BOOL,
        **dict.fromkeys((f"stage3_gather_{kind}_weights_on_model_save" for kind in ("16bit", "fp16")), BOOL),
        **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "sub_group_size"), COUNT),
        **dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), COUNT),
        **dict.fromkeys(("stage3_model_persistence_threshold", "stage3_max_live_parameters"), COUNT),
        "stage3_max_reuse_distance": COUNT,
    },
    "zero_optimization.offload_optimizer": {
        **{"device": OTHER, "nvme_path": OTHER, "pin_memory": BOOL, "buffer_count": COUNT},
    },
    "zero_optimization.offload_param": {
        **{"device": OTHER, "nvme_path": OTHER, "pin_memory": BOOL, "buffer_count": COUNT, "buffer_size": COUNT},
        "max_in_cpu": COUNT,
    },
    "bf16": {"enabled": OTHER},
    "fp16": {
        **{"enabled": OTHER, "loss_scale": NUMBER, "consecutive_hysteresis": BOOL},
        **dict.fromkeys(("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"), COUNT),
    },
    "optimizer": {"type": OTHER, "params": SECTION},
    "optimizer.params": {
        **dict.fromkeys(("lr", "betas", "eps", "weight_decay", "adam_w_mode"), OTHER),
        "torch_adam": BOOL,
    },
    "scheduler": {"type": OTHER, "params": SECTION},
    "scheduler.params": dict.fromkeys(
        ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps", "warmup_type"), OTHER
    ),
}

# Where transformers puts a number in the place of "auto"; elsewhere it means DeepSpeed's default, as nothing does.
_BY_SIZE = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
FILLED = (*BATCH_KEYS, *(f"zero_optimization.{key}" for key in _BY_SIZE))

_CPU = '{"device": "cpu"}'
INSTEAD: Mapping[str, str] = {
    "zero_optimization.cpu_offload": f'write "offload_optimizer": {_CPU} there',
    "zero_optimization.cpu_offload_param": f'write "offload_param": {_CPU} there',
    "activation_checkpointing": "leave it out, and write gradient_checkpointing: true in the YAML",
    "amp": "leave it out, and write bf16: true or fp16: true in the YAML",
    "torch_autocast": "leave it out, and write bf16: true or fp16: true in the YAML",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "leave it out; report_to in the YAML does it"),
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
    _check_keys(draft, settings, "", name)
    zero = find(settings, "zero_optimization")
    if isinstance(zero, dict):
        _check_zero(draft, zero, name)
    if find(settings, "zero_optimization.stage") == 3 and draft.training.get("torch_compile"):
        text = "with ZeRO-3 it compiles DeepSpeed's own code too: a small model took no step within ten minutes"
        draft.notice((*TRAINING, "torch_compile"), text)
    if draft.top.get("on_nonfinite_loss") == "warn":
        what = (
            "`warn` leaves out steps whose gradient is not finite, but DeepSpeed has taken a step before that is seen"
        )
        draft.refuse(("on_nonfinite_loss",), what, "write stop, or leave training_args.deepspeed out")
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
    if isinstance(stated, bool) != isinstance(expected, bool):
        return False
    return type(stated) in (int, float, bool, str, list) and bool(stated == expected)


def _is_text_for_number(stated: Any, expected: Any) -> bool:
    return isinstance(stated, str) and type(expected) in (int, float)


def _check_keys(draft: Draft, content: Mapping[str, Any], section: str, name: str) -> None:
    for key, value in content.items():
        dotted = f"{section}.{key}" if section else key
        if key not in USED[section]:
            if not _is_off(key, value):
                close = nearest(key, USED[section])
                fix = INSTEAD.get(dotted) or (f"did you mean {close}?" if close else "leave it out")
                draft.refuse(PATH, f"{name}: `{dotted}` is not supported", fix)
        elif value not in (None, AUTO) and not _is_of_kind(value, kind := USED[section][key]):
            fix = 'write {"key": value} there' if kind == SECTION else "correct it, or leave it out"
            draft.refuse(PATH, f"{name}: {dotted} is {shown(value)}, {kind}", fix)
        elif isinstance(value, dict) and dotted in USED:
            _check_keys(draft, value, dotted, name)


def _is_of_kind(value: Any, kind: str) -> bool:
    if kind in (SECTION, TEXT):
        return isinstance(value, dict if kind == SECTION else str)
    if kind == OTHER:
        return True
    if kind == BOOL:
        return isinstance(value, int) and value in (0, 1)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and (kind == NUMBER or (0 <= value < 2**62 and value == int(value)))


def _is_off(key: str, value: Any) -> bool:
    """Return whether a key that does not reach DeepSpeed would switch nothing on there."""
    if isinstance(value, dict):
        return not value.get("enabled", True) or all(_is_off(inner, content) for inner, content in value.items())
    return value is None or value is False or value == AUTO or (key, value) in _NEUTRAL


_NEUTRAL = (
    *(("zero_hpz_partition_size", 1), ("gradient_predivide_factor", 1), ("mics_shard_size", -1)),
    *(("compute_grad_norm", True), ("load_from_fp32_weights", True), ("override_module_apply", True)),
    *(("use_multi_rank_bucket_allreduce", True), ("check_grad_overflow", True)),
)


def _check_zero(draft: Draft, zero: Mapping[str, Any], name: str) -> None:
    stage = zero.get("stage", 0)
    where = f"{name}: zero_optimization"
    if type(stage) is not int or not 0 <= stage <= 3:
        draft.refuse(PATH, f"{where}.stage is {shown(stage)}", "write 0 (off), 1, 2 or 3")
        stage = None
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.get(key)
        if not isinstance(offload, dict):
            continue
        device = offload.get("device", "none")
        if device not in ("none", "cpu", "nvme"):
            draft.refuse(PATH, f"{where}.{key}.device is {shown(device)}", "write cpu, nvme or none")
        elif device == "nvme" and not isinstance(offload.get("nvme_path"), str):
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
    why = "warmup_steps rises from 0 along a line"
    values = {"warmup_type": "linear", "warmup_min_lr": 0}
    expected = {f"scheduler.params.{key}": Expected(value, why, "warmup_steps") for key, value in values.items()}
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


def read_deepspeed(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings behind a checked `training_args.deepspeed`: the JSON file's, or the mapping itself."""
    if isinstance(value, str):
        return dict(json.loads(Path(value).read_text(encoding="utf-8-sig")))
    return dict(value)


def complete_deepspeed(settings: Mapping[str, Any], *, has_gpu: bool, bf16: bool, fp16: bool) -> dict[str, Any]:
    """Return a copy of a checked JSON's content with what the YAML, the machine and whole checkpoints need.

    - What was not tried (`USED`) and switches nothing on, is left out.
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
    completed = dict.fromkeys(BATCH_KEYS, AUTO) | _used(settings, "")
    for key in ("optimizer", "scheduler"):
        completed.pop(key, None)
    completed["bf16"] = {**completed.get("bf16", {}), "enabled": bf16}
    completed["fp16"] = {**completed.get("fp16", {}), "enabled": fp16}
    completed["zero_optimization"] = zero = {"stage": 0} | completed.get("zero_optimization", {})
    if zero.get("stage") == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero.pop("stage3_gather_fp16_weights_on_model_save", None)  # the old name of the same switch
    if not has_gpu:
        zero["overlap_comm"] = False
        for key in ("offload_optimizer", "offload_param"):
            if zero.get(key):
                zero[key]["pin_memory"] = False
    return completed


def _used(content: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Return a copy of a checked section without what DeepSpeed is not to see."""
    found: dict[str, Any] = {}
    for key in USED[section]:
        dotted, value = f"{section}.{key}" if section else key, content.get(key)
        if value is not None and (value != AUTO or dotted in FILLED):
            found[key] = _used(value, dotted) if dotted in USED else value
    return found
