"""What changed between the run that wrote a checkpoint and the run that continues from it.

Changes that would break the continuation, or alter it silently, are refused with both values; all others are notices.
The earlier run is known by the `run.json` and `processes.json` in its checkpoint and by the adapter's own config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.pickles import check_pickles
from glm_edge_ft.checks.processes import Processes, note_processes, read_processes
from glm_edge_ft.checks.summary import PACKAGES, read_versions
from glm_edge_ft.errors import Problem
from glm_edge_ft.model.weight_files import weights_fingerprint
from glm_edge_ft.training.checkpoints import ENCODER_FILE, RUN_RECORD

if TYPE_CHECKING:
    from glm_edge_ft.model.checkpoint import ModelLocation
    from glm_edge_ft.run import Plan

# Stored in the optimizer and scheduler of the checkpoint, so that a new value in the config has no effect.
KEPT_BY_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# These take effect, and the run differs from an uninterrupted one.
REPORTED_CHANGES = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_sampling_strategy",
    "seed",
    "data_seed",
    "max_steps",
    "num_train_epochs",
    "lr_scheduler_type",
    "warmup_steps",
)
_FREE_ADAPTER_KEYS = {"base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "peft_version"}
_FREE_ADAPTER_KEYS |= {"auto_mapping", "task_type"}
# PEFT derives these from the model where the config does not set them.
_DERIVED_ADAPTER_KEYS = {"encoder_hidden_size", "num_attention_heads", "num_layers", "num_transformer_submodules"}
_DERIVED_ADAPTER_KEYS |= {"token_dim"}
_AGAIN = "write the old value, or start afresh (RESUME no)"


def compare_with_checkpoint(
    plan: Plan, train_fingerprint: str, adapter: Mapping[str, Any] | None, trainable: int, processes: Processes
) -> tuple[list[Problem], list[str]]:
    """Return what prevents the run from continuing, and notices of what changed.

    Args:
        plan: the run; its `resume.path` is a whole checkpoint in the run's output folder.
        train_fingerprint: key of the encoded training data.
        adapter: PEFT's config as a dict, or None for full fine-tuning.
        trainable: number of trained parameters.
        processes: how this run shares its work.
    """
    checkpoint, config = plan.resume.path, plan.config
    assert checkpoint is not None
    problems = _compare_adapters(checkpoint, _read(checkpoint / "adapter_config.json"), adapter)
    before = read_processes(checkpoint)
    problems += compare_processes(checkpoint, before, processes, is_adapter=adapter is not None)
    problems += check_pickles(checkpoint)
    if adapter and adapter.get("prefix_projection") and not (checkpoint / ENCODER_FILE).is_file():
        what = f"{checkpoint} holds the computed prefix alone, without the projection ({ENCODER_FILE})"
        problems.append(Problem("peft_config.prefix_projection", what, "start afresh (RESUME no)"))
    record = _read(checkpoint / RUN_RECORD) or _read(checkpoint.parent / RUN_RECORD)
    if record is None:
        return problems, []
    found, notices = compare_models(checkpoint, record, plan.location)
    old_config, old_facts = record.get("config") or {}, record.get("facts") or {}
    old, new = old_config.get("training_args") or {}, config.training_args
    fixed = {
        "quantization": (old_config.get("quantization") or "none", config.quantization or "none"),
        "training_args.optim": (old.get("optim", "the default"), new.get("optim", "the default")),
    }
    if (
        adapter is None
        and not problems
        and not found
        and old_facts.get("trainable_parameters") not in (None, trainable)
    ):
        fixed["freezeV"] = (old_config.get("freezeV"), config.freezeV)
    problems += found
    problems += [
        Problem(key, f"{now}, but {checkpoint} was trained with {then}", _AGAIN)
        for key, (then, now) in fixed.items()
        if then != now
    ]
    for key in (*KEPT_BY_THE_OPTIMIZER, *REPORTED_CHANGES):
        if old.get(key) != new.get(key):
            end = " since the checkpoint was written"
            if key in KEPT_BY_THE_OPTIMIZER:
                end = (
                    ": no effect, the optimizer in the checkpoint keeps its own; only a fresh start uses the new value"
                )
            notices.append(f"training_args.{key} {old.get(key)} -> {new.get(key)}{end}")
    packed = bool(old_config.get("padding_free", False))
    if packed != config.padding_free:
        change = f"padding_free {str(packed).lower()} -> {str(config.padding_free).lower()}"
        notices.append(f"{change} since the checkpoint was written: the same gradients, but not the same bits")
    notices += note_processes(before, processes, old, new)
    if ((record.get("data") or {}).get("train") or {}).get("fingerprint") != train_fingerprint:
        notices.append("the training data, or how it is encoded, changed since the checkpoint was written")
    return problems, notices + note_versions(record.get("versions") or {}, read_versions())


def compare_models(
    checkpoint: Path, record: Mapping[str, Any], location: ModelLocation
) -> tuple[list[Problem], list[str]]:
    """Compare MODEL with the one that the run began from: by its weights where they are known, else by its name."""
    before, name = record.get("model"), location.name
    old, new = record.get("model_fingerprint"), weights_fingerprint(location)
    is_known = old is not None and new is not None
    if before != name if not is_known else old != new:
        others = ", whose weights were others" if before == name else ""
        what = f"{checkpoint} was trained from {before}{others}"
        return [Problem(f"MODEL {name}", what, "give that model, or start afresh (RESUME no)")], []
    return [], [f"MODEL {before} -> {name}: the same weights under another name"] if before != name else []


def note_versions(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return a notice of the libraries whose versions changed since the checkpoint was written."""
    changed = [
        f"{name} {old[name]} -> {new.get(name, 'none')}"
        for name in PACKAGES
        if name in old and old[name] != new.get(name)
    ]
    end = "the run goes on, perhaps not with the same bits"
    return [f"since the checkpoint was written: {', '.join(changed)}; {end}"] if changed else []


def compare_processes(checkpoint: Path, before: Processes, now: Processes, is_adapter: bool) -> list[Problem]:
    """Refuse a checkpoint whose parts of DeepSpeed's optimizer this run cannot read, or would read wrongly."""
    where, written = "training_args.deepspeed", f"{checkpoint} was written by {before}"
    afresh = "start afresh (RESUME no)"
    if not is_adapter:
        afresh += f", or from its weights: MODEL {checkpoint}, another output_dir, no RESUME"
    if before.zero_stage != now.zero_stage:
        file = "leave the key out" if before.zero_stage is None else f"name a file of stage {before.zero_stage}"
        what = f"{written}, this run works {now.engine()}, which stores the optimizer in another form"
        return [Problem(where, what, f"{file}, or {afresh}")]
    if before.zero_stage is None:
        return []
    if before.world_size not in (None, now.world_size):
        what = f"{written}, each with its part of the optimizer; this run has {now.world_size}"
        started = f"start it with {before.world_size} (torchrun --nproc_per_node, --nnodes)"
        return [Problem("number of processes", what, f"{started}, or {afresh}")]
    cut = now.cut or {}
    return [
        Problem(
            where,
            f"zero_optimization.{key} is {json.dumps(cut.get(key))}, but {checkpoint} was written with "
            f"{json.dumps(value)}, which divides the optimizer in another way",
            f"write the old value, or {afresh}",
        )
        for key, value in (before.cut or {}).items()
        if value != cut.get(key)
    ]


def _compare_adapters(checkpoint: Path, old: dict[str, Any] | None, new: Mapping[str, Any] | None) -> list[Problem]:
    kinds = [_comparable(settings["peft_type"]) if settings else "full fine-tuning" for settings in (old, new)]
    if kinds[0] != kinds[1]:
        what = f"{kinds[1]}, but {checkpoint} was trained with {kinds[0]}"
        return [Problem("peft_config", what, "give the config of that run, or start afresh (RESUME no)")]
    if not old or not new:
        return []
    problems = []
    for key in sorted((set(old) | set(new)) - _FREE_ADAPTER_KEYS):
        then, now = _comparable(old.get(key)), _comparable(new.get(key))
        if then != now and not (key in _DERIVED_ADAPTER_KEYS and now is None):
            problems.append(Problem(f"peft_config.{key}", f"{now}, but {checkpoint} was trained with {then}", _AGAIN))
    return problems


def _comparable(value: Any) -> Any:
    """Return a value as it reads back from JSON, sets in order."""
    if isinstance(value, set | frozenset | list | tuple):
        return sorted(value, key=str)
    return json.loads(json.dumps(value, default=str))


def _read(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
