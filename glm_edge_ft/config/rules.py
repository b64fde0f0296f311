"""Rules over typed values: the defaults of this toolkit, keys without support, and combinations that cannot work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from glm_edge_ft.config.builder import GENERATION, PEFT, TRAINING, ConfigBuilder
from glm_edge_ft.config.deepspeed import check_deepspeed, find, read_json
from glm_edge_ft.config.keys import Key, library_keys, nearest, shown
from glm_edge_ft.errors import UserError
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

_NO_EFFECT = "has no effect here; "
# What of a LoRA works on weights in 4 bits. PEFT's other initializations take something out of the weights and would
# write the rest back, rounded anew; its layer on 4-bit weights ignores the variants, or refuses them after loading.
_QUANTIZED_INITIALIZATIONS = (None, True, False, "gaussian")
_UNQUANTIZED_VARIANTS = ("velora_config", "monteclora_config", "kasa_config", "use_bdlora")


def apply_rules(builder: ConfigBuilder) -> None:
    """Apply every rule to the typed sections, and fill in what the file leaves to the toolkit."""
    training, peft = builder.training, builder.peft
    if peft is not None:
        _apply_table(builder, PEFT, peft, library_keys("LORA"))
        _check_peft(builder, peft)
    _apply_table(builder, TRAINING, training, library_keys("training_args"))
    _apply_table(builder, GENERATION, builder.generation, library_keys("generation_config"))
    _note_what_decides(builder)
    for name, value in TRAINING_DEFAULTS.items():
        training.setdefault(name, value)
    training["report_to"] = training["report_to"] or "none"
    _check_output_dir(builder)
    _check_conflicts(builder)
    _check_padding_free(builder)
    evaluates = _settle_evaluation(builder)
    training.setdefault("predict_with_generate", bool(builder.data.get("val_file") or builder.data.get("test_file")))
    _check_best_model(builder, evaluates)
    _read_json_setting(builder, "accelerator_config")
    settings = _read_json_setting(builder, "deepspeed")
    _check_quantization(builder, find(settings, "zero_optimization.stage"))


def _apply_table(
    builder: ConfigBuilder, path: tuple[str, ...], values: dict[str, Any], keys: Mapping[str, Key]
) -> None:
    """Apply `keys.toml` to a section: refuse what is not supported, leave out what has no effect."""
    for name in [name for name in values if name in keys and keys[name].rule]:
        value, rule = values[name], keys[name].rule
        if value is None or (value == keys[name].default and isinstance(value, type(keys[name].default))):
            continue
        if value in ([], {}, "") and path != GENERATION:  # generate would take it for something
            continue
        if "refused" in rule and value is not False and value not in rule.get("harmless", ()):
            what = f"{shown(value)}: {name} {rule['refused']}"
            builder.refuse((*path, name), what, rule.get("instead", "leave it out"))
            del values[name]
        elif "no_effect" in rule:
            builder.notice((*path, name), _NO_EFFECT + rule["no_effect"])
            del values[name]
        elif "needs" in rule and not (values.get(rule["needs"]) or builder.is_refused(values, *path, rule["needs"])):
            builder.notice((*path, name), f"{_NO_EFFECT}it belongs to {rule['needs']}, which is not set")


def _check_peft(builder: ConfigBuilder, peft: dict[str, Any]) -> None:
    refuse_if, task = builder.refuse_if, peft.setdefault("task_type", "CAUSAL_LM")
    what = f"{shown(task)} is not what these models do"
    refuse_if(task != "CAUSAL_LM", (*PEFT, "task_type"), what, "write task_type: CAUSAL_LM")
    is_alone = peft.get("loftq_config") and peft.get("init_lora_weights") != "loftq"
    refuse_if(
        is_alone, (*PEFT, "loftq_config"), "belongs to init_lora_weights: loftq, which is not set", "leave it out"
    )
    if peft.get("peft_type") == "PREFIX_TUNING":
        path, fix = (*PEFT, "num_virtual_tokens"), "write how many, such as num_virtual_tokens: 16"
        refuse_if(peft.get("num_virtual_tokens") is None and not builder.is_set(*path), path, "missing", fix)
        if builder.training.get("activation_checkpointing"):
            builder.training["activation_checkpointing"] = False
            text = "switched off: it cannot work with PREFIX_TUNING"
            builder.notice((*TRAINING, "activation_checkpointing"), text)
    targets = peft.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"\w+(\s*,\s*\w+)*", targets):
        # PEFT reads a text as a pattern for whole module paths, which a bare name never matches
        targets = peft["target_modules"] = re.split(r"\s*,\s*", targets)
    what, fix = "an empty list leaves nothing to train", "name modules, or leave it out"
    refuse_if(targets == [], (*PEFT, "target_modules"), what, fix)
    layers, pattern = peft.get("layers_to_transform"), peft.get("layers_pattern")
    if isinstance(targets, str):
        what, fix = "cannot be set beside a target_modules that is a pattern", "write a list there"
        refuse_if(layers is not None, (*PEFT, "layers_to_transform"), what, fix)
        refuse_if(pattern is not None, (*PEFT, "layers_pattern"), what, fix)
    else:
        what, fix = "needs layers_to_transform", "write the layer numbers there"
        refuse_if(pattern and layers is None, (*PEFT, "layers_pattern"), what, fix)


def _check_output_dir(builder: ConfigBuilder) -> None:
    path, fix = (*TRAINING, "output_dir"), "write output_dir: ./output/NAME"
    if builder.is_refused(builder.training, *path):
        return
    output_dir, what = builder.training.get("output_dir"), "missing"
    try:
        if output_dir and not expand_home(output_dir).is_file():
            return
        if output_dir is not None or "output_dir" in builder.training:
            what = f"{shown(output_dir)} is a file" if output_dir else f"{shown(output_dir)} names no folder"
    except (OSError, ValueError, RuntimeError):
        what = f"{shown(output_dir)} cannot be the path of a folder"
    builder.training.pop("output_dir", None)
    builder.refuse(path, what, fix)


def _check_conflicts(builder: ConfigBuilder) -> None:
    """Refuse settings of which only one can be, or that need another."""
    training, generation, refuse_if = builder.training, builder.generation, builder.refuse_if
    fix = "keep one of them, or none: the precision is then chosen by what the machine has"
    for first, second in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        both = training.get(first) and training.get(second)
        refuse_if(both, (*TRAINING, second), f"{first} and {second} cannot both be true", fix)
    for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        is_alone = training.get(name) and not training.get("dataloader_num_workers")
        refuse_if(is_alone, (*TRAINING, name), "needs dataloader_num_workers of 1 or more", f"leave {name} out")
    what = "counts the prompt too, so that a long prompt leaves no room for a reply"
    fix = "write max_new_tokens instead: the largest number of tokens of a reply"
    refuse_if(generation.get("max_length") is not None, (*GENERATION, "max_length"), what, fix)
    # `do_train` and the like are flags of other scripts; here the files in `data_config` decide what is done
    what = "`false` contradicts this command, which trains"
    refuse_if(training.get("do_train") is False, (*TRAINING, "do_train"), what, "leave it out")
    strategy = training.get("eval_strategy", "no")
    what, fix = f"`false` contradicts eval_strategy: {strategy}", "leave do_eval out, or write eval_strategy: no"
    refuse_if(training.get("do_eval") is False and strategy != "no", (*TRAINING, "do_eval"), what, fix)
    what, fix = "`true` needs data_config.test_file", "name one, or leave do_predict out"
    refuse_if(training.get("do_predict") and not builder.data.get("test_file"), (*TRAINING, "do_predict"), what, fix)


def _check_padding_free(builder: ConfigBuilder) -> None:
    """Refuse what cannot be with `padding_free: true`, where one row of the batch holds all conversations."""
    if not builder.top.get("padding_free"):
        return
    fix = "write padding_free: false"
    what = "`true` cannot work with PREFIX_TUNING: its prefix is put before the whole batch, not before each row"
    is_prefix = builder.peft is not None and builder.peft.get("peft_type") == "PREFIX_TUNING"
    builder.refuse_if(is_prefix, ("padding_free",), what, f"{fix}, or peft_type: LORA")
    for name, reason in (
        ("neftune_noise_alpha", "its noise is scaled by the length of a row, which here is that of the whole batch"),
        ("torch_compile", "rows begin elsewhere in each batch, and each would be compiled anew"),
    ):
        what = f"cannot be set beside padding_free: true: {reason}"
        builder.refuse_if(builder.training.get(name), (*TRAINING, name), what, fix)


def _note_what_decides(builder: ConfigBuilder) -> None:
    """Give a notice for each setting that another one overrides."""
    training = builder.training
    if builder.generation.get("max_length") is not None and builder.is_set(*GENERATION, "max_new_tokens"):
        del builder.generation["max_length"]
        builder.notice((*GENERATION, "max_length"), _NO_EFFECT + "max_new_tokens decides the length of a reply")
    if training.get("remove_unused_columns"):
        training["remove_unused_columns"] = False
        builder.notice((*TRAINING, "remove_unused_columns"), "set to false: training needs all columns of this data")
    if training.get("max_steps", -1) > 0 and builder.is_set("training_args", "num_train_epochs"):
        text = f"max_steps: {training['max_steps']} decides the length of the run; num_train_epochs is not used"
        builder.notice((*TRAINING, "num_train_epochs"), text)
    if training.get("deepspeed") and builder.top.get("max_tokens_per_pass"):
        text = "has no effect with deepspeed, which takes a batch as a whole: lower per_device_train_batch_size"
        builder.notice(("max_tokens_per_pass",), text)
    if training.get("do_predict") is False and builder.data.get("test_file"):
        builder.data["test_file"] = None
        builder.notice((*TRAINING, "do_predict"), "false: data_config.test_file is not used")


def _settle_evaluation(builder: ConfigBuilder) -> bool | None:
    """Switch evaluation off where it has no file; return whether it takes place during training.

    None: this is not known, since a key that decides it was refused.
    """
    training, has_file = builder.training, bool(builder.data.get("val_file"))
    if builder.is_refused(builder.data, "data_config", "val_file") or builder.is_refused(
        training, *TRAINING, "eval_strategy"
    ):
        return None
    if not has_file:
        for name in ("eval_strategy", "eval_on_start"):
            if training.get(name) not in (None, "no", False):
                builder.notice((*TRAINING, name), "evaluation is off, since data_config names no val_file")
        training["eval_strategy"], training["eval_on_start"] = "no", False
    if training.get("eval_strategy", "no") != "no":
        return True
    off = "eval_strategy is no" if has_file else "no val_file means no evaluation"
    scheduler = training.get("lr_scheduler_type")
    if scheduler in ("reduce_lr_on_plateau", "greedy"):
        what = f"`{scheduler}` follows the evaluation loss, but {off}"
        builder.refuse((*TRAINING, "lr_scheduler_type"), what, "write another schedule, such as cosine, or evaluate")
    if training.get("save_strategy") == "best":
        what = f"`best` saves after the best evaluation, but {off}"
        builder.refuse((*TRAINING, "save_strategy"), what, "write save_strategy: steps, or evaluate")
    return False


def _check_best_model(builder: ConfigBuilder, evaluates: bool | None) -> None:
    training = builder.training
    loads_best, metric = training.get("load_best_model_at_end"), training.get("metric_for_best_model")
    if loads_best and evaluates is False:
        off = "eval_strategy is no" if builder.data.get("val_file") else "data_config names no val_file"
        fix = "name a val_file and write eval_strategy: steps, or write load_best_model_at_end: false"
        what = f"the best model is found by evaluation, but {off}"
        builder.refuse((*TRAINING, "load_best_model_at_end"), what, fix)
    elif loads_best and evaluates and training.get("save_strategy", "steps") != "best":
        _check_save_against_eval(builder)
    if metric is None and not loads_best and training.get("save_strategy") != "best":
        if training.get("greater_is_better") is not None:
            builder.notice((*TRAINING, "greater_is_better"), _NO_EFFECT + "no model is chosen by a metric")
        return
    metric = "loss" if metric is None else metric.removeprefix("eval_")
    path = (*TRAINING, "metric_for_best_model")
    if metric not in METRICS:
        close = nearest(metric, METRICS)
        hint = f"did you mean {close}? " if close else ""
        builder.refuse(path, f"there is no metric {shown(metric)}", f"{hint}write one of {', '.join(METRICS)}")
        return
    if metric in GENERATED_METRICS and not training["predict_with_generate"]:
        what = f"{shown(metric)} compares generated replies, but predict_with_generate is false"
        builder.refuse(path, what, "change that, or write loss")
    training["metric_for_best_model"] = metric
    if training.get("greater_is_better") not in (None, metric != "loss"):
        what = f"{shown(training['greater_is_better'])} would keep the worst model, since the metric is {metric}"
        builder.refuse((*TRAINING, "greater_is_better"), what, "leave greater_is_better out")
    training["greater_is_better"] = metric != "loss"


def _check_save_against_eval(builder: ConfigBuilder) -> None:
    training = builder.training
    if any(builder.is_refused(training, *TRAINING, name) for name in ("save_strategy", "save_steps", "eval_steps")):
        return
    save, evaluate = training.get("save_strategy", "steps"), training["eval_strategy"]
    eval_steps = training.get("eval_steps") or training.get("logging_steps", TRAINING_DEFAULTS["logging_steps"])
    save_steps = training.get("save_steps", 500)
    what = fix = ""
    if save != evaluate:
        what, fix = f"save_strategy is {save}, eval_strategy is {evaluate}", f"write save_strategy: {evaluate}"
    elif evaluate == "steps" and (
        (eval_steps < 1) != (save_steps < 1) or Fraction(str(save_steps)) % Fraction(str(eval_steps))
    ):
        what = f"save_steps {save_steps} is not a multiple of eval_steps {eval_steps}"
        fix = f"write save_steps: {eval_steps}"
    if what:
        builder.refuse((*TRAINING, "load_best_model_at_end"), f"the best model must have been saved: {what}", fix)


def _read_json_setting(builder: ConfigBuilder, name: str) -> dict[str, Any]:
    """Return the content of a JSON file that a key names, its path now absolute, or the mapping written in its place.

    The path starts from the config's own folder, else from the working folder.
    """
    value, path, file = builder.training.get(name), (*TRAINING, name), name
    if isinstance(value, str):
        try:
            folders = dict.fromkeys((builder.path.absolute().parent, Path.cwd()))
            tried = [folder / expand_home(value) for folder in folders]
            found = next((candidate for candidate in tried if candidate.is_file()), None)
            if found is None:
                hint = next(filter(None, (did_you_mean(expand_home(value), folder) for folder in folders)), "")
                what = f"no such file {shown(value)}; looked for {' and '.join(str(candidate) for candidate in tried)}"
                builder.refuse(path, what, f"{hint}correct the path, or {name}: null")
                return {}
            builder.training[name], file, value = str(found.resolve()), found.name, read_json(found)
        except UserError as error:
            builder.refuse(path, f"{shown(value)} {error.problems[0].what}", error.problems[0].fix)
            return {}
        except (OSError, ValueError, RuntimeError) as error:
            builder.refuse(path, f"{shown(value)} cannot be read: {error}", "correct the path")
            return {}
    if name == "deepspeed" and value is not None:
        check_deepspeed(builder, value, file)
    return value or {}


def _check_quantization(builder: ConfigBuilder, stage: int | None) -> None:
    """Refuse what needs more of the weights than 4-bit numbers that stay as they are."""
    if builder.top.get("quantization") in (None, "none"):
        builder.top["quantization"] = None
        return
    without = "leave it out, or leave quantization out"
    if builder.values.get("peft_config") is None:
        what = "weights in 4 bits cannot be trained, and without peft_config all of them are"
        fix = "add peft_config with peft_type: LORA (configs/lora.yaml), or leave quantization out"
        builder.refuse(("quantization",), what, fix)
    peft = builder.peft or {}
    initialization = peft.get("init_lora_weights")
    if initialization not in _QUANTIZED_INITIALIZATIONS:
        what = f"{shown(initialization)} needs unquantized weights"
        builder.refuse((*PEFT, "init_lora_weights"), what, "write true or gaussian, or leave quantization out")
    for key in _UNQUANTIZED_VARIANTS:
        if peft.get(key) not in (None, False):
            builder.refuse((*PEFT, key), "does not work on weights in 4 bits", without)
    if stage == 3:
        what = "stage 3 partitions the weights, which separates 4-bit numbers from their scales"
        builder.refuse((*TRAINING, "deepspeed"), what, "write ds_zero_2.json, or leave quantization out")
