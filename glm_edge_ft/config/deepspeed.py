"""The JSON settings behind `training_args.deepspeed`: their keys and types, and what is completed for the machine.

What is known without DeepSpeed is checked here. `checks/deepspeed.py` asks transformers and DeepSpeed for the rest:
which values contradict the YAML, and which DeepSpeed refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict

from glm_edge_ft.config.builder import TRAINING, ConfigBuilder
from glm_edge_ft.config.keys import Key, Mismatch, key_table, nearest, shown
from glm_edge_ft.errors import UserError

AUTO = "auto"
PATH = (*TRAINING, "deepspeed")
BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
ADAMW = ("adamw_torch", "adamw_torch_fused")

# Where transformers puts a number in the place of "auto"; elsewhere it means DeepSpeed's default, as no key does.
_BY_SIZE = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
_FILLED = (*BATCH_KEYS, *(f"zero_optimization.{key}" for key in _BY_SIZE))


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_TYPES: Mapping[str, Any] = {
    "flag": Annotated[bool, Strict(), BeforeValidator(lambda value: value == 1 if value in (0, 1) else value)],
    "number": Annotated[float, Strict(), Field(allow_inf_nan=False)],
    "numbers": list[float],
    "count": Annotated[int, Strict(), Field(ge=0, lt=2**62), BeforeValidator(_whole)],
    "text": Annotated[str, Strict()],
    "stage": Annotated[int, Strict(), Field(ge=0, le=3)],
    "device": Literal["none", "cpu", "nvme"],
    "true": Literal[True],
    "zero": Annotated[float, Strict(), Field(ge=0, le=0)],
    "linear": Literal["linear"],
}


@cache
def deepspeed_keys() -> dict[str, Key]:
    """Return the keys of the JSON that reach DeepSpeed; those of a section are in its `fields`."""
    return _keys(key_table()["deepspeed"]["keys"])


def _keys(table: Mapping[str, Any]) -> dict[str, Key]:
    keys: dict[str, Key] = {}
    for name, content in table.items():
        if isinstance(content, dict):
            keys[name] = Key(dict, fields=_keys(content))
        else:
            keys |= dict.fromkeys(content, Key(_TYPES[name]))
    return keys


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, a byte order mark allowed.

    Raises:
        UserError: it is no JSON object, or has a key twice.
        OSError, ValueError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        what = f"is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        raise UserError.single(str(path), what, "correct that file") from error
    if not isinstance(content, dict):
        raise UserError.single(str(path), "holds no JSON object", "name a file that begins with {")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError.single("", f"states the key `{twice}` twice in one place", "delete one of the two there")
    return content


def read_deepspeed(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings behind a checked `training_args.deepspeed`: the JSON file's, or the mapping itself."""
    return read_json(Path(value)) if isinstance(value, str) else dict(value)


def find(settings: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or None where the JSON does not state it."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def check_deepspeed(builder: ConfigBuilder, settings: Mapping[str, Any], name: str) -> None:
    """Note in the builder what of a DeepSpeed JSON cannot work with this toolkit or with the YAML.

    Args:
        builder: the configuration, its sections typed.
        settings: the JSON's content.
        name: the JSON file as messages name it.
    """
    training = builder.training
    for what, fix in (
        *_check_keys(settings, deepspeed_keys()),
        *_check_offload(settings),
        *_check_optimizer(training, settings),
    ):
        builder.refuse(PATH, f"{name}: {what}", fix)
    for precision, other in (("bf16", "fp16"), ("fp16", "bf16")):
        decided = training.get(precision) is not None or training.get(other)
        if not decided and find(settings, f"{precision}.enabled") not in (None, AUTO):
            what = f"{name}: {precision}.enabled is set, but {precision} is not, so that the machine decides"
            builder.refuse(PATH, what, f'write "auto" there, or {precision}: true in the YAML')
    if find(settings, "zero_optimization.stage") == 3 and training.get("torch_compile"):
        text = "with ZeRO-3 it compiles DeepSpeed's own code too: a small model took no step within ten minutes"
        builder.notice((*TRAINING, "torch_compile"), text)
    if builder.top.get("on_nonfinite_loss") == "warn":
        what = "`warn` skips steps whose gradient is not finite, but DeepSpeed takes a step before that is seen"
        builder.refuse(("on_nonfinite_loss",), what, "write stop, or leave training_args.deepspeed out")


_Found = Iterator[tuple[str, str]]


def _check_keys(content: Mapping[str, Any], known: Mapping[str, Key], section: str = "") -> _Found:
    """Yield keys that are not supported and values of the wrong type, each with what to write instead."""
    for name, value in content.items():
        key = f"{section}{name}"
        if name not in known:
            if not _is_off(name, value):
                close = nearest(name, known)
                fix = key_table()["deepspeed"]["instead"].get(key) or (
                    f"did you mean {close}?" if close else "leave it out"
                )
                yield f"`{key}` is not supported", fix
        elif value in (None, AUTO) and name != "stage":
            continue
        elif isinstance(value, dict) and known[name].fields:
            yield from _check_keys(value, known[name].fields, f"{key}.")
        else:
            try:
                known[name].read((key,), value)
            except Mismatch as mismatch:
                yield f"{key} is {shown(json.dumps(value))}", f"{mismatch.fix}, or leave it out"


def _is_off(key: str, value: Any) -> bool:
    """Return whether a key that does not reach DeepSpeed would switch nothing on there."""
    if isinstance(value, dict):
        return not value.get("enabled", True) or all(_is_off(inner, content) for inner, content in value.items())
    return value is None or value is False or value == AUTO or value == key_table()["deepspeed"]["off"].get(key)


def _check_offload(settings: Mapping[str, Any]) -> _Found:
    stage = find(settings, "zero_optimization.stage") or 0
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = find(settings, f"zero_optimization.{key}.device")
        if device == "nvme" and find(settings, f"zero_optimization.{key}.nvme_path") is None:
            yield f"zero_optimization.{key}.nvme_path: missing", "name a folder of a local disk there"
        elif device in ("cpu", "nvme") and stage in range(lowest):
            fix = f"leave it out, or write stage: {lowest}"
            yield f"zero_optimization.{key} has no effect at stage {stage}", fix


def _check_optimizer(training: Mapping[str, Any], settings: Mapping[str, Any]) -> _Found:
    """Yield an optimizer or a schedule other than the YAML's: transformers would use it without a word."""
    optim, schedule = training.get("optim") or ADAMW[0], training.get("lr_scheduler_type") or "linear"
    kind = find(settings, "optimizer.type")
    if isinstance(kind, str) and kind != AUTO and not (optim in ADAMW and kind.lower() in ("adam", "adamw")):
        yield f"optimizer.type is {shown(kind)}, but optim is {optim}", "leave optimizer out of the JSON: optim decides"
    kind = find(settings, "scheduler.type")
    if isinstance(kind, str) and kind != AUTO and key_table()["deepspeed"]["schedules"].get(kind) != schedule:
        fix = "leave scheduler out of the JSON: lr_scheduler_type decides"
        yield f"scheduler.type is {shown(kind)}, but lr_scheduler_type is {schedule}", fix
    if find(settings, "zero_optimization.offload_optimizer.device") in ("cpu", "nvme") and optim not in ADAMW:
        # accelerate would put DeepSpeed's Adam for the CPU in its place
        what = f"zero_optimization.offload_optimizer works with AdamW alone, but optim is {optim}"
        yield what, "write optim: adamw_torch, or leave offload_optimizer out of the JSON"


def complete_deepspeed(settings: Mapping[str, Any], *, has_gpu: bool, bf16: bool, fp16: bool) -> dict[str, Any]:
    """Return a copy of a checked JSON's content with what the YAML, the machine and whole checkpoints need.

    - Keys that are not supported go; they switch nothing on.
    - Batch sizes, accumulation and clipping become "auto" where they are missing: without them DeepSpeed would use
      defaults of its own.
    - `optimizer` and `scheduler` go: they state what the YAML states. DeepSpeed's schedule of the same name takes other
      values, and its optimizer decays biases and norms too. Where states are offloaded, accelerate puts DeepSpeed's
      AdamW for the CPU in place of torch's.
    - `bf16` and `fp16` follow the precision that was chosen.
    - At stage 3 whole weights are gathered for saving; DeepSpeed would leave placeholders in the saved model.
    - Without a GPU nothing is pinned or overlapped.

    Args:
        settings: the JSON's content; not changed.
        has_gpu: whether the run is on GPUs.
        bf16, fp16: the precision of the run; at most one is true.
    """
    completed = dict.fromkeys(BATCH_KEYS, AUTO) | _supported(settings, deepspeed_keys())
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


def _supported(content: Mapping[str, Any], known: Mapping[str, Key], section: str = "") -> dict[str, Any]:
    """Return a copy of a checked section with the keys that DeepSpeed is to see."""
    found: dict[str, Any] = {}
    for name, key in known.items():
        value = content.get(name)
        if value is not None and (value != AUTO or f"{section}{name}" in _FILLED):
            found[name] = _supported(value, key.fields, f"{section}{name}.") if isinstance(value, dict) else value
    return found
