"""What changed between the run that wrote a checkpoint and the run that wants to continue from it.

What would break the continuation, or bend it unseen, is refused with both values; what only makes it another run than
the uninterrupted one is said. The earlier run is known by the `run.json` in its checkpoint and by the adapter's own
config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.pickles import check_pickles
from glm_edge_ft.checks.processes import Processes, read_processes
from glm_edge_ft.checks.versions import PACKAGES, read_versions
from glm_edge_ft.errors import Problem
from glm_edge_ft.model.weight_files import weights_fingerprint
from glm_edge_ft.training.checkpoints import ENCODER_FILE, RUN_RECORD

if TYPE_CHECKING:
    from glm_edge_ft.config import RunConfig
    from glm_edge_ft.model.checkpoint import ModelLocation

KEPT_BY_THE_OPTIMIZER = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
"""Values that lie in the saved optimizer and scheduler, so that a new one in the config has no effect."""

SAID = (
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
"""Values that take effect, and make the run another one than it would have been."""

_FREE_ADAPTER_KEYS = frozenset(
    {
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "peft_version",
        "auto_mapping",
        "task_type",
    }
)


_DERIVED_ADAPTER_KEYS = frozenset(
    {"encoder_hidden_size", "num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim"}
)
"""What PEFT fills in from the model where the config is silent, so that the saved value says nothing of the config."""


def compare_with_checkpoint(
    checkpoint: Path,
    config: RunConfig,
    location: ModelLocation,
    train_fingerprint: str,
    adapter: Mapping[str, Any] | None,
    trainable: int,
    processes: Processes,
) -> tuple[list[Problem], list[str]]:
    """Return what stands against continuing from `checkpoint`, and notices of what changed.

    Args:
        checkpoint: a whole checkpoint, in its run's output folder.
        config: today's config.
        location: MODEL.
        train_fingerprint: key of today's encoded training data.
        adapter: today's PEFT config as a dict, or None for full fine-tuning.
        trainable: number of parameters that are trained today.
        processes: how today's run shares its work.
    """
    problems = _compare_adapters(checkpoint, _read(checkpoint / "adapter_config.json"), adapter)
    before = read_processes(checkpoint)
    problems += compare_processes(checkpoint, before, processes, is_adapter=adapter is not None)
    problems += check_pickles(checkpoint)
    if adapter and adapter.get("prefix_projection") and not (checkpoint / ENCODER_FILE).is_file():
        what = f"{checkpoint} holds the computed prefix alone, without the projection ({ENCODER_FILE})"
        problems.append(Problem("peft_config.prefix_projection", what, "start afresh (RESUME no)"))
    record = _read(checkpoint / RUN_RECORD) or _read(checkpoint.parent / RUN_RECORD)  # of then, else of the last start
    if record is None:
        return problems, []
    again = "write the old value, or start afresh (RESUME no)"
    notices = []
    found, remark = compare_models(checkpoint, record, location)
    problems += found
    notices += [remark] if remark else []
    old_config, old_facts = record.get("config") or {}, record.get("facts") or {}
    if adapter is None and not problems and old_facts.get("trainable_parameters") not in (None, trainable):
        frozen, freeze = old_config.get("freezeV"), config.freezeV
        if frozen != freeze:
            problems.append(Problem("freezeV", f"{freeze}, but {checkpoint} was trained with {frozen}", again))
    if old_config.get("quantization") != config.quantization:
        forms = [form or "none" for form in (config.quantization, old_config.get("quantization"))]
        problems.append(Problem("quantization", f"{forms[0]}, but {checkpoint} was trained with {forms[1]}", again))
    old = old_config.get("training_args") or {}
    new = config.training_args
    if old.get("optim") != new.get("optim"):
        what = f"{new.get('optim', 'the default')}, but {checkpoint} was trained with {old.get('optim', 'the default')}"
        problems.append(Problem("training_args.optim", what, again))
    for key in KEPT_BY_THE_OPTIMIZER:
        if old.get(key) != new.get(key):
            what = f"training_args.{key} {old.get(key)} -> {new.get(key)}"
            notices.append(f"{what}: no effect, the checkpoint's optimizer keeps its own; only a fresh start takes it")
    for key in SAID:
        if old.get(key) != new.get(key):
            notices.append(f"training_args.{key} {old.get(key)} -> {new.get(key)} since the checkpoint was written")
    packed = bool(old_config.get("padding_free", False))
    if packed != config.padding_free:
        change = f"padding_free {str(packed).lower()} -> {str(config.padding_free).lower()}"
        notices.append(f"{change} since the checkpoint was written: the same gradients, but not the same bits")
    notices += note_processes(before, processes, old, new)
    if ((record.get("data") or {}).get("train") or {}).get("fingerprint") != train_fingerprint:
        notices.append("the training data, or how it is encoded, changed since the checkpoint was written")
    return problems, notices + note_versions(record.get("versions") or {}, read_versions())


def compare_models(checkpoint: Path, record: Mapping[str, Any], location: ModelLocation) -> tuple[list[Problem], str]:
    """Compare MODEL with the one that the run began from: by its weights where they are known, else by its name."""
    before, name = record.get("model"), location.name
    old, new = record.get("model_fingerprint"), weights_fingerprint(location)
    fix = "give the model of then, or start afresh (RESUME no)"
    if old is None or new is None:
        what = f"{checkpoint} was trained from {before}"
        return ([Problem(f"MODEL {name}", what, fix)] if before != name else []), ""
    if old != new:
        what = f"{checkpoint} was trained from {before}" + (", whose weights were others" if before == name else "")
        return [Problem(f"MODEL {name}", what, fix)], ""
    return [], f"MODEL {before} -> {name}: the same weights under another name" if before != name else ""


def note_versions(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Say which libraries are others than when the checkpoint was written."""
    changed = [
        f"{name} {old[name]} -> {new.get(name, 'none')}"
        for name in PACKAGES
        if old.get(name, new.get(name)) != new.get(name)
    ]
    if not changed:
        return []
    return [f"since the checkpoint was written: {', '.join(changed)}; the run goes on, perhaps not with the same bits"]


def compare_processes(checkpoint: Path, before: Processes, now: Processes, is_adapter: bool) -> list[Problem]:
    """Refuse what DeepSpeed's parts of the optimizer do not go into, or would go into in silence with new states."""
    where, written = "training_args.deepspeed", f"{checkpoint} was written by {before}"
    afresh = "start afresh (RESUME no)"
    if not is_adapter:
        afresh += f", or from its weights: MODEL {checkpoint}, another output_dir, no RESUME"
    if before.zero_stage != now.zero_stage:
        file = "leave the key out" if before.zero_stage is None else f"name a file of stage {before.zero_stage}"
        what = f"{written}, this run works {now.engine()}: its optimizer is kept in another form"
        return [Problem(where, what, f"{file}, or {afresh}")]
    if before.zero_stage is None:
        return []
    if before.world_size not in (None, now.world_size):
        what = f"{written}, each with its part of the optimizer; this run has {now.world_size}"
        started = f"start it with {before.world_size} (torchrun --nproc_per_node, --nnodes)"
        return [Problem("number of processes", what, f"{started}, or {afresh}")]
    changed = {key: value for key, value in (before.cut or {}).items() if value != (now.cut or {}).get(key)}
    return [
        Problem(
            where,
            f"zero_optimization.{key} is {json.dumps((now.cut or {}).get(key))}, but {checkpoint} was written with "
            f"{json.dumps(value)}: the parts of the optimizer are cut in another way",
            f"write the old value, or {afresh}",
        )
        for key, value in changed.items()
    ]


def note_processes(before: Processes, now: Processes, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say what another number of processes does to the steps of a run without DeepSpeed."""
    if before.world_size in (None, now.world_size) or now.world_size is None or now.zero_stage is not None:
        return []
    assert before.world_size is not None
    batches = [_rows_of_a_step(settings, size) for settings, size in ((old, before.world_size), (new, now.world_size))]
    said = f"the checkpoint was written by {before.world_size} processes, this run has {now.world_size}: "
    if batches[0] == batches[1]:
        return [said + f"a step takes {batches[1]} conversations as before; dropout draws other numbers"]
    said += (
        f"a step takes {batches[1]} conversations instead of {batches[0]}, and the place in the data goes by today's"
    )
    per_process = batches[1] // int(new.get("gradient_accumulation_steps") or 1)
    if batches[0] % per_process == 0:
        return [f"{said}; training_args.gradient_accumulation_steps {batches[0] // per_process} keeps {batches[0]}"]
    return [f"{said}; choose batch size and accumulation anew to keep {batches[0]}"]


def _rows_of_a_step(settings: Mapping[str, Any], world_size: int) -> int:
    """Return how many conversations an optimizer step takes, transformers' defaults where the config is silent."""
    batch = settings.get("per_device_train_batch_size") or 8
    return int(batch) * int(settings.get("gradient_accumulation_steps") or 1) * world_size


def _compare_adapters(checkpoint: Path, old: dict[str, Any] | None, new: Mapping[str, Any] | None) -> list[Problem]:
    kinds = [_comparable(settings["peft_type"]) if settings else "full fine-tuning" for settings in (old, new)]
    if kinds[0] != kinds[1]:
        what = f"{kinds[1]}, but {checkpoint} was trained with {kinds[0]}"
        return [Problem("peft_config", what, "give the config of that run, or start afresh (RESUME no)")]
    if not old or not new:
        return []
    problems = []
    for key in sorted((set(old) | set(new)) - _FREE_ADAPTER_KEYS):
        values = [_comparable(settings.get(key)) for settings in (old, new)]
        if values[0] != values[1] and not (key in _DERIVED_ADAPTER_KEYS and values[1] is None):
            what = f"{values[1]}, but {checkpoint} was trained with {values[0]}"
            problems.append(Problem(f"peft_config.{key}", what, "write the old value, or start afresh (RESUME no)"))
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
