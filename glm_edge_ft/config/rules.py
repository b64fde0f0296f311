"""Rules over typed values: the defaults of this toolkit, and combinations that cannot work."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from glm_edge_ft.config.deepspeed import check_deepspeed
from glm_edge_ft.config.document import nearest
from glm_edge_ft.config.draft import PEFT, TRAINING, Draft
from glm_edge_ft.config.schema import PEFT_TYPES, reporting_integrations
from glm_edge_ft.config.unsupported import check_generation, check_unsupported_peft, check_unsupported_training
from glm_edge_ft.config.values import shown
from glm_edge_ft.distributed import launch
from glm_edge_ft.files import did_you_mean, expand_home

# Where the file is silent, this toolkit chooses otherwise than transformers:
TRAINING_DEFAULTS: Mapping[str, Any] = {
    "train_sampling_strategy": "group_by_length",  # rows of like length share a batch: less padding, same result
    "report_to": "none",  # nothing is sent anywhere, and nothing asks for a login, unless the file names a service
    "remove_unused_columns": False,  # the columns are this project's own; the collator needs all of them
    "seed": 42,  # written out so that run.json states it
    "logging_steps": 10,  # 500, the library's default, shows nothing of a short run
}

GENERATED_METRICS = ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "exact-match")
METRICS = ("loss", *GENERATED_METRICS)


def check_peft(draft: Draft) -> None:
    """Hold the rules of `peft_config`: a supported type, a causal language model, trainable."""
    peft, training = draft.peft, draft.training
    if peft is None:
        return
    check_unsupported_peft(draft)
    kind = peft.get("peft_type")
    if kind is None and not draft.wrote("peft_config", "peft_type"):
        draft.refuse((*PEFT, "peft_type"), "missing", "write peft_type: LORA or PREFIX_TUNING, or drop peft_config")
    task = peft.setdefault("task_type", "CAUSAL_LM")
    if task != "CAUSAL_LM":
        draft.refuse((*PEFT, "task_type"), f"{shown(task)} is not what these models do", "write task_type: CAUSAL_LM")
    if peft.get("inference_mode"):
        draft.refuse((*PEFT, "inference_mode"), "`true` would leave nothing to train", "leave the key out")
    if kind == "PREFIX_TUNING":
        if peft.get("num_virtual_tokens") is None and not draft.wrote("peft_config", "num_virtual_tokens"):
            draft.refuse((*PEFT, "num_virtual_tokens"), "missing", "write how many, such as num_virtual_tokens: 16")
        if training.get("activation_checkpointing"):
            training["activation_checkpointing"] = False
            draft.notice((*TRAINING, "activation_checkpointing"), "switched off: it cannot work with PREFIX_TUNING")
    if kind == "LORA":
        _check_lora(draft, peft)


def _check_lora(draft: Draft, peft: dict[str, Any]) -> None:
    targets = peft.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"\w+(\s*,\s*\w+)*", targets):
        # PEFT reads a text as a pattern for whole module paths, which a bare name never matches
        targets = peft["target_modules"] = re.split(r"\s*,\s*", targets)
    if isinstance(targets, list) and not targets:
        draft.refuse(
            (*PEFT, "target_modules"), "an empty list leaves nothing to train", "name modules, or leave it out"
        )
    if isinstance(targets, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if peft.get(name) is not None:
                draft.refuse(
                    (*PEFT, name), "cannot stand beside a target_modules that is a pattern", "write a list there"
                )
    elif peft.get("layers_pattern") and peft.get("layers_to_transform") is None:
        draft.refuse((*PEFT, "layers_pattern"), "needs layers_to_transform", "write the layer numbers there")


def apply_training_rules(draft: Draft) -> None:
    """Hold the rules of `training_args` and fill in what the file leaves to the toolkit."""
    training = draft.training
    check_unsupported_training(draft)
    check_generation(draft)
    if training.get("remove_unused_columns"):
        training["remove_unused_columns"] = False
        draft.notice((*TRAINING, "remove_unused_columns"), "set to false: training needs all columns of this data")
    for name, value in TRAINING_DEFAULTS.items():
        training.setdefault(name, value)
    _check_output_dir(draft)
    _check_simple_conflicts(draft)
    _check_reporting(draft)
    _check_flags_of_other_scripts(draft)
    evaluates = _settle_evaluation(draft)
    training.setdefault("predict_with_generate", bool(draft.data.get("val_file") or draft.data.get("test_file")))
    _check_best_model(draft, evaluates)
    for name in ("deepspeed", "accelerator_config"):
        _resolve_json_file(draft, name)


def check_padding_free(draft: Draft) -> None:
    """Refuse what cannot be with `padding_free: true`, where one row of the batch holds all conversations."""
    if not draft.top.get("padding_free"):
        return
    switched_off = "write padding_free: false"
    if draft.peft and draft.peft.get("peft_type") == "PREFIX_TUNING":
        what = "`true` cannot work with PREFIX_TUNING: its prefix stands before the whole batch, not before each row"
        draft.refuse(("padding_free",), what, f"{switched_off}, or peft_type: LORA")
    for name, reason in (
        ("neftune_noise_alpha", "its noise is scaled by the length of a row, which here is that of the whole batch"),
        ("torch_compile", "rows begin elsewhere in each batch, and each would be compiled anew"),
    ):
        if draft.training.get(name):
            draft.refuse((*TRAINING, name), f"cannot stand beside padding_free: true: {reason}", switched_off)


def _check_output_dir(draft: Draft) -> None:
    path = (*TRAINING, "output_dir")
    output_dir, fix = draft.training.get("output_dir"), "write output_dir: ./output/NAME"
    if not output_dir:
        if "output_dir" in draft.training:
            draft.refuse(path, f"{shown(output_dir)} names no folder", fix)
        elif not draft.wrote("training_args", "output_dir"):
            draft.refuse(path, "missing", fix)
        return
    try:
        if expand_home(output_dir).is_file():
            del draft.training["output_dir"]
            draft.refuse(path, f"{shown(output_dir)} is a file", "name a folder, which is created where it is missing")
    except (OSError, ValueError, RuntimeError):
        del draft.training["output_dir"]
        draft.refuse(path, f"{shown(output_dir)} cannot be the path of a folder", fix)


def _check_simple_conflicts(draft: Draft) -> None:
    training = draft.training
    for first, second in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if training.get(first) and training.get(second):
            fix = "keep one of them, or none: the precision is then chosen by what the machine has"
            draft.refuse((*TRAINING, second), f"{first} and {second} cannot both be true", fix)
    if training.get("max_steps", -1) > 0 and draft.wrote("training_args", "num_train_epochs"):
        text = f"max_steps: {training['max_steps']} decides the length of the run; num_train_epochs is not used"
        draft.notice((*TRAINING, "num_train_epochs"), text)
    if not training.get("dataloader_num_workers"):
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if training.get(name):
                draft.refuse((*TRAINING, name), "needs dataloader_num_workers of 1 or more", f"leave {name} out")
    if training.get("deepspeed") and draft.top.get("max_tokens_per_pass"):
        text = "has no effect beside deepspeed, under which a batch goes through the model whole"
        draft.notice(("max_tokens_per_pass",), f"{text}: lower per_device_train_batch_size")
    if training.get("resume_from_checkpoint") is not None:
        fix = "leave it out and give RESUME as the fourth argument: yes, or a checkpoint's number"
        draft.refuse((*TRAINING, "resume_from_checkpoint"), "is not read from the config", fix)


def _check_reporting(draft: Draft) -> None:
    services = draft.training["report_to"]
    if services is None:
        draft.training["report_to"] = "none"
        return
    known = reporting_integrations()
    for service in [services] if isinstance(services, str) else services:
        if service not in known:
            close = nearest(service, known)
            hint = f"did you mean {close}? " if close else ""
            fix = f"{hint}write none, tensorboard or another of: {', '.join(sorted(known))}"
            draft.refuse((*TRAINING, "report_to"), f"{shown(service)} is no service to report to", fix)


def _check_flags_of_other_scripts(draft: Draft) -> None:
    """`do_train` and the like steer other tools' scripts; here the files in `data_config` say what is done."""
    training, data = draft.training, draft.data
    if training.get("do_train") is False:
        fix = "leave it out"
        draft.refuse((*TRAINING, "do_train"), "`false` contradicts this command, which trains", fix)
    if training.get("do_eval") is False and training.get("eval_strategy", "no") != "no":
        what = f"`false` contradicts eval_strategy: {training['eval_strategy']}"
        draft.refuse((*TRAINING, "do_eval"), what, "leave do_eval out, or write eval_strategy: no")
    if training.get("do_predict") and not data.get("test_file"):
        draft.refuse(
            (*TRAINING, "do_predict"), "`true` needs data_config.test_file", "name one, or leave do_predict out"
        )
    if training.get("do_predict") is False and data.get("test_file"):
        data["test_file"] = None
        draft.notice((*TRAINING, "do_predict"), "false: data_config.test_file is not used")


def _settle_evaluation(draft: Draft) -> bool | None:
    """Switch evaluation off where no file is there for it; return whether it takes place during training.

    None means that this cannot be told, since a key that decides it was refused.
    """
    training = draft.training
    if draft.refused(draft.data, "data_config", "val_file") or draft.refused(training, *TRAINING, "eval_strategy"):
        return None
    if not draft.data.get("val_file"):
        wanted = [name for name in ("eval_strategy", "eval_on_start") if training.get(name) not in (None, "no", False)]
        for name in wanted:
            draft.notice((*TRAINING, name), "evaluation is off, since data_config names no val_file")
        training["eval_strategy"], training["eval_on_start"] = "no", False
    evaluates = training.get("eval_strategy", "no") != "no"
    if not evaluates:
        off = "eval_strategy is no" if draft.data.get("val_file") else "no val_file means no evaluation"
        scheduler = training.get("lr_scheduler_type")
        if scheduler in ("reduce_lr_on_plateau", "greedy"):
            what = f"`{scheduler}` follows the evaluation loss, but {off}"
            draft.refuse((*TRAINING, "lr_scheduler_type"), what, "write another schedule, such as cosine, or evaluate")
        if training.get("save_strategy") == "best":
            what = f"`best` saves after the best evaluation, but {off}"
            draft.refuse((*TRAINING, "save_strategy"), what, "write save_strategy: steps, or evaluate")
    return evaluates


def _check_best_model(draft: Draft, evaluates: bool | None) -> None:
    training = draft.training
    loads_best = bool(training.get("load_best_model_at_end"))
    best_path = (*TRAINING, "load_best_model_at_end")
    if loads_best and evaluates is False:
        off = "eval_strategy is no" if draft.data.get("val_file") else "data_config names no val_file"
        fix = "name a val_file and write eval_strategy: steps, or write load_best_model_at_end: false"
        draft.refuse(best_path, f"the best model is found by evaluation, but {off}", fix)
    elif loads_best and evaluates and training.get("save_strategy", "steps") != "best":
        _check_save_against_eval(draft)
    metric = training.get("metric_for_best_model")
    if metric is None:
        if not loads_best and training.get("save_strategy") != "best":
            if training.get("greater_is_better") is not None:
                draft.notice((*TRAINING, "greater_is_better"), "has no effect here; no model is chosen by a metric")
            return
        metric = "loss"
    metric = metric.removeprefix("eval_")
    path = (*TRAINING, "metric_for_best_model")
    if metric not in METRICS:
        close = nearest(metric, METRICS)
        hint = f"did you mean {close}? " if close else ""
        draft.refuse(path, f"there is no metric {shown(metric)}", f"{hint}write one of {', '.join(METRICS)}")
        return
    if metric in GENERATED_METRICS and not training["predict_with_generate"]:
        what = f"{shown(metric)} compares generated replies, but predict_with_generate is false"
        draft.refuse(path, what, "change that, or write loss")
    training["metric_for_best_model"] = metric
    greater = training.get("greater_is_better")
    if greater is not None and greater != (metric != "loss"):
        what = f"`{str(greater).lower()}` would keep the worst model, since the metric is {metric}"
        draft.refuse((*TRAINING, "greater_is_better"), what, "leave greater_is_better out")
    training["greater_is_better"] = metric != "loss"


def _check_save_against_eval(draft: Draft) -> None:
    training = draft.training
    path = (*TRAINING, "load_best_model_at_end")
    if any(draft.refused(training, *TRAINING, name) for name in ("save_strategy", "save_steps", "eval_steps")):
        return
    save, evaluate = training.get("save_strategy", "steps"), training["eval_strategy"]
    if save != evaluate:
        what = f"the best model must have been saved: save_strategy is {save}, eval_strategy is {evaluate}"
        draft.refuse(path, what, f"write save_strategy: {evaluate}")
        return
    if evaluate != "steps":
        return
    eval_steps = training.get("eval_steps") or training.get("logging_steps", TRAINING_DEFAULTS["logging_steps"])
    save_steps = training.get("save_steps", 500)
    mixed = (eval_steps < 1) != (save_steps < 1)
    if mixed or Fraction(str(save_steps)) % Fraction(str(eval_steps)):
        what = (
            f"the best model must have been saved: save_steps {save_steps} is not a multiple of eval_steps {eval_steps}"
        )
        draft.refuse(path, what, f"write save_steps: {eval_steps}")


def _resolve_json_file(draft: Draft, name: str) -> None:
    """Replace the path of a JSON file by its absolute path: the config's own folder first, then the working folder."""
    value, path = draft.training.get(name), (*TRAINING, name)
    if name == "deepspeed" and isinstance(value, dict):
        check_deepspeed(draft, value, "deepspeed", launch().world_size)
    if not isinstance(value, str):
        return
    try:
        written = expand_home(value)
        tried = list(dict.fromkeys((draft.document.folder / written, Path.cwd() / written)))
        found = next((candidate for candidate in tried if candidate.is_file()), None)
        if found is None:
            places = " and ".join(str(candidate) for candidate in tried)
            hint = next(filter(None, (did_you_mean(written, base) for base in (draft.document.folder, Path.cwd()))), "")
            fix = f"{hint}correct the path, or {name}: null"
            draft.refuse(path, f"no such file {shown(value)}; looked for {places}", fix)
            return
        content = json.loads(found.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repetition)
    except _RepeatedKeyError as error:
        draft.refuse(path, f"{shown(value)} states the key `{error}` twice in one place", "delete one of the two there")
        return
    except json.JSONDecodeError as error:
        where = f"{shown(value)} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        draft.refuse(path, where, "correct that file")
        return
    except (OSError, ValueError, RuntimeError) as error:
        draft.refuse(path, f"{shown(value)} cannot be read: {error}", "correct the path")
        return
    if not isinstance(content, dict):
        draft.refuse(path, f"{shown(value)} holds no JSON object", "name a file that begins with {")
        return
    draft.training[name] = str(found.resolve())
    if name == "deepspeed":
        check_deepspeed(draft, content, found.name, launch().world_size)


class _RepeatedKeyError(Exception):
    """A key stands twice in a JSON object; the parser would take the last one."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return content


def check_peft_type(draft: Draft, raw: dict[str, Any]) -> str | None:
    """Return the supported `peft_type` in upper case, or None where it is missing or refused."""
    value = raw.get("peft_type")
    if isinstance(value, str) and value.strip().upper().replace("-", "_") in PEFT_TYPES:
        return value.strip().upper().replace("-", "_")
    if "peft_type" in raw:
        close = nearest(value, PEFT_TYPES) if isinstance(value, str) else None
        hint = f"did you mean {close}? " if close else ""
        seen = shown(value, draft.document.texts.get((*PEFT, "peft_type")))
        fix = f"{hint}write LORA or PREFIX_TUNING, or drop peft_config for full fine-tuning"
        draft.refuse((*PEFT, "peft_type"), f"{seen} is not supported", fix)
    return None
