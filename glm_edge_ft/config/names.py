"""Names of keys: what older versions called them, and what a mistyped one most likely means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from glm_edge_ft.config.document import KeyPath, dotted, nearest
from glm_edge_ft.config.draft import Draft
from glm_edge_ft.config.schema import PEFT_TYPES, Field, generation_fields, make_field, peft_fields, training_fields
from glm_edge_ft.config.values import Mismatch, coerce, shown


@dataclass(frozen=True)
class Renamed:
    """A key of older transformers that has a successor.

    Attributes:
        new: today's key.
        annotation: the type that the old key had; None takes the successor's.
        convert: old value → new value; None as its result means that there is nothing to set.
    """

    new: str
    annotation: str | None = None
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Retired:
    """A key that no longer does anything: it is left out, with the reason as a notice."""

    why: str


@dataclass(frozen=True)
class Replaced:
    """A key whose meaning is written in another way, now or here, which only the user can do."""

    fix: str
    what: str = "is no longer a key"


def when(new_value: Any) -> Callable[[Any], Any]:
    """Convert an old switch: true becomes the given value, false and null set nothing."""
    return lambda old: new_value if old else None


OLD_TRAINING_NAMES: Mapping[str, Renamed | Retired | Replaced] = {
    "evaluation_strategy": Renamed("eval_strategy"),
    "warmup_ratio": Renamed("warmup_steps", "float"),
    "group_by_length": Renamed(
        "train_sampling_strategy", "bool", lambda grouped: "group_by_length" if grouped else "random"
    ),
    "gradient_checkpointing": Renamed("activation_checkpointing"),
    "gradient_checkpointing_kwargs": Renamed("activation_checkpointing_kwargs"),
    "no_cuda": Renamed("use_cpu"),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size"),
    "push_to_hub_token": Renamed("hub_token"),
    "push_to_hub_model_id": Renamed("hub_model_id"),
    "include_inputs_for_metrics": Renamed("include_for_metrics", "bool", when(["inputs"])),
    "include_tokens_per_second": Renamed("include_num_input_tokens_seen", "bool", when("all")),
    "adafactor": Renamed("optim", "bool", when("adafactor")),
    "torchdynamo": Renamed("torch_compile_backend"),
    "xpu_backend": Renamed("ddp_backend"),
    "evaluate_during_training": Renamed("eval_strategy", "bool", when("steps")),
    "overwrite_output_dir": Retired("a run without RESUME starts afresh in output_dir, one with RESUME goes on there"),
    "save_safetensors": Retired("weights are always saved as safetensors"),
    "logging_dir": Retired("curves are in output_dir; set TENSORBOARD_LOGGING_DIR to move TensorBoard's files"),
    "use_mps_device": Retired("an Apple GPU is used when there is one"),
    "fp16_backend": Retired("torch's own mixed precision is the only one"),
    "half_precision_backend": Retired("torch's own mixed precision is the only one"),
    "fp16_opt_level": Retired("it belonged to apex, which is no longer used"),
    "use_legacy_prediction_loop": Retired("there is one evaluation loop only"),
    "jit_mode_eval": Retired("torch_compile: true is the way to compile now"),
    "use_ipex": Retired("the Intel extension is no longer needed on CPU"),
    "tpu_num_cores": Retired("all cores are used"),
    "mp_parameters": Retired("it belonged to SageMaker only"),
    "past_index": Retired("no model of this project keeps such a state"),
    "ray_scope": Retired("hyperparameter search is not part of this project"),
    "_n_gpu": Retired("the number of GPUs is found on the machine"),
    "push_to_hub_organization": Replaced("write hub_model_id: ORGANIZATION/NAME"),
    "tpu_metrics_debug": Replaced("write debug: tpu_metrics_debug"),
    "fsdp_min_num_params": Replaced("leave it out; use deepspeed to share a model between GPUs"),
    "fsdp_transformer_layer_cls_to_wrap": Replaced("leave it out; use deepspeed to share a model between GPUs"),
    "sharded_ddp": Replaced("write deepspeed"),
    "dispatch_batches": Replaced("write it inside accelerator_config, as dispatch_batches"),
    "split_batches": Replaced("write it inside accelerator_config, as split_batches"),
    "tokenizer": Replaced("leave it out: the tokenizer comes from MODEL on the command line"),
}

_ELSEWHERE = "is a key of other tools"
OLD_TOP_NAMES: Mapping[str, Retired | Replaced] = {
    "combine": Retired("every assistant turn of a conversation is always supervised"),
    "model_name_or_path": Replaced("leave it out: MODEL is the second argument on the command line"),
    "tokenizer": Replaced("leave it out: the tokenizer comes from MODEL on the command line"),
    "load_in_4bit": Replaced("write quantization: nf4", _ELSEWHERE),
    "quantization_bit": Replaced("write quantization: nf4, which is 4 bits", _ELSEWHERE),
    "quantization_config": Replaced("write quantization: nf4", _ELSEWHERE),
}

# values of enumerated keys that transformers 5 no longer has
OLD_VALUES: Mapping[str, Mapping[str, str]] = {"optim": {"adamw_hf": "adamw_torch"}}

TOP_FIELDS: Mapping[str, Field] = {
    "max_input_length": make_field("max_input_length", "int | None", "512"),
    "max_output_length": make_field("max_output_length", "int | None", "512"),
    "freezeV": make_field("freezeV", "bool | None", "False"),
    "max_images": make_field("max_images", "int | None", "1"),
    "on_bad_image": make_field("on_bad_image", "Literal['error', 'skip'] | None", "'error'"),
    "image_placeholder_tokens": make_field("image_placeholder_tokens", "int | None", "None"),
    "cache_image_features": make_field("cache_image_features", "bool | None", "True"),
    "max_tokens_per_pass": make_field("max_tokens_per_pass", "int | None", "None"),
    "padding_free": make_field("padding_free", "bool | None", "False"),
    "on_nonfinite_loss": make_field("on_nonfinite_loss", "Literal['stop', 'warn'] | None", "'stop'"),
    "quantization": make_field("quantization", "Literal['nf4', 'none'] | None", "'none'"),
}
DATA_FIELDS: Mapping[str, Field] = {
    "train_file": make_field("train_file", "str", None),
    "val_file": make_field("val_file", "str | None", "None"),
    "test_file": make_field("test_file", "str | None", "None"),
    "num_proc": make_field("num_proc", "int | None", "1"),
}
SECTIONS = ("data_config", "training_args", "peft_config")


def section_names() -> dict[str, tuple[str, ...]]:
    """Return the keys of each section; the top of the file is the section ``""``."""
    return {
        "": (*TOP_FIELDS, *SECTIONS),
        "data_config": tuple(DATA_FIELDS),
        "training_args": tuple(training_fields()),
        "training_args.generation_config": tuple(generation_fields()),
        "peft_config": tuple(dict.fromkeys(name for kind in PEFT_TYPES for name in peft_fields(kind))),
    }


def refuse_unknown(draft: Draft, path: KeyPath, known: Mapping[str, Field]) -> None:
    """Note an unknown key with the key most likely meant, or the section that it belongs to."""
    key, section = str(path[-1]), dotted(path[:-1])
    elsewhere = [name for name, keys in section_names().items() if key in keys and name != section]
    old = OLD_TRAINING_NAMES.get(key)
    if section != "training_args" and isinstance(old, Renamed):
        elsewhere = elsewhere or ["training_args"]
    names = [*known, *SECTIONS, *DATA_FIELDS] if not section else [*known]
    if section == "training_args":
        names.append("generation_config")
    close = nearest(key, names)
    if elsewhere:
        places = " or ".join(name or "the top of the file" for name in elsewhere)
        draft.refuse(path, f"unknown key `{key}`", f"`{key}` belongs under {places}".replace("under the", "at the"))
    elif close:
        draft.refuse(path, f"unknown key `{key}`", f"did you mean {close}?")
    else:
        shown_names = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        draft.refuse(path, f"unknown key `{key}`", f"leave it out; keys here: {shown_names}")


def move_into_sections(draft: Draft) -> None:
    """Read keys that the fine-tuning guide lists without their section as those of the section, with a notice."""
    document = draft.document
    for section, names in (("data_config", tuple(DATA_FIELDS)), ("training_args", ("generation_config",))):
        written = [name for name in names if name in document.values]
        inner = document.values.get(section)
        if not written or not (inner is None or isinstance(inner, dict)):
            continue
        inner = document.values[section] = {} if inner is None else inner
        for name in written:
            old, new = (name,), (section, name)
            if name in inner and document.is_overridden(old) == document.is_overridden(new):
                draft.refuse(old, f"`{name}` is given twice", f"`{name}` belongs under {section}: delete this one")
                del document.values[name]
            elif name in inner and document.is_overridden(new):
                del document.values[name]
            else:
                inner[name] = document.values.pop(name)
                document.move(old, new)
        verb = "is read as a key" if len(written) == 1 else "are read as keys"
        draft.notice((section, written[0]), f"{', '.join(written)} at the top of the file {verb} of {section}")


def translate_old_names(draft: Draft) -> None:
    """Replace keys and values of older versions by today's, each with a notice; refuse old and new that differ."""
    for name, old_top in OLD_TOP_NAMES.items():
        if name in draft.document.values:
            _drop(draft, draft.document.values, (name,), old_top)
    training = draft.document.values.get("training_args")
    if not isinstance(training, dict):
        return
    for name, old in OLD_TRAINING_NAMES.items():
        if name not in training:
            continue
        if isinstance(old, Renamed):
            _rename(draft, training, name, old)
        else:
            _drop(draft, training, ("training_args", name), old)
    for name, values in OLD_VALUES.items():
        value = training.get(name)
        if isinstance(value, str) and value in values:
            training[name] = values[value]
            draft.notice(("training_args", name), f"{value} no longer exists, {values[value]} is used")


def _drop(draft: Draft, section: dict[str, Any], path: KeyPath, old: Retired | Replaced) -> None:
    del section[str(path[-1])]
    if isinstance(old, Retired):
        draft.notice(path, f"retired and ignored: {old.why}")
    else:
        draft.refuse(path, f"`{path[-1]}` {old.what}", old.fix)


def _rename(draft: Draft, training: dict[str, Any], name: str, old: Renamed) -> None:
    old_path, new_path = ("training_args", name), ("training_args", old.new)
    document, new_field = draft.document, training_fields()[old.new]
    raw = training.pop(name)
    old_field = make_field(name, old.annotation, None) if old.annotation else new_field
    try:
        value = old.convert(coerce(document, old_path, raw, old_field))
    except Mismatch as mismatch:
        draft.refuse(mismatch.path, mismatch.what, mismatch.fix)
        return
    if name == "warmup_ratio" and not 0 <= value < 1:
        draft.refuse(old_path, f"{shown(raw)} is not a fraction from 0 to below 1", "write warmup_steps: 0.1 or so")
        return
    if value is None and raw is not None:
        draft.notice(old_path, f"old name for {old.new}; switched off, it sets nothing")
        return
    wins = document.is_overridden(old_path)
    if old.new in training and wins == document.is_overridden(new_path):
        try:
            present = coerce(document, new_path, training[old.new], new_field)
        except Mismatch:
            return  # the bad value is reported under its own name
        if present == value:
            draft.notice(old_path, f"old name for {old.new}, which is given too with the same value")
        else:
            what = f"{shown(raw)} contradicts {old.new}: {shown(present)}, today's name for the same setting"
            draft.refuse(old_path, what, f"keep {old.new} only")
        return
    if old.new in training and not wins:
        draft.notice(old_path, f"old name for {old.new}, which --set gives")
        return
    document.forget(new_path)
    training[old.new] = value
    document.written_as[new_path] = old_path
    seen = "" if old.new.endswith("_token") else f": {draft.plain(value)}"  # a secret is not printed
    draft.notice(old_path, f"old name, read as {old.new}{seen}")
