"""Settings that transformers knows and this toolkit does not use: refused at start, or told to be without effect.

The library would take each of them without a word, or fail at the first evaluation, which may be hours into a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glm_edge_ft.config.draft import PEFT, TRAINING, Draft
from glm_edge_ft.config.schema import Field, peft_fields, training_fields
from glm_edge_ft.config.values import shown

GENERATION = (*TRAINING, "generation_config")

_LEAVE_OUT = "leave it out"
_MODES = "leave it out; replies are made greedily, or with do_sample, num_beams or both"
_ASSISTED = ("belongs to assisted decoding, which takes one prompt at a time; evaluation takes batches", _LEAVE_OUT)
_OUTPUT = ("asks for more than the tokens of the replies, which nothing here reads", _LEAVE_OUT)
_CHECKPOINT_IDS = ("comes from the checkpoint's own files, not from the config", _LEAVE_OUT)
_CONSTRAINED = ("selects constrained beam search, whose code transformers would download", _MODES)
_GROUPED = ("selects group beam search, whose code transformers would download", _MODES)
_OTHER_CACHE = ("belongs to a key cache other than the dynamic one", _LEAVE_OUT)
_ENCODER_DECODER = ("has no effect on these models: it starts the decoder of an encoder-decoder model", _LEAVE_OUT)

# key → what is wrong with it, what to write; found by `GenerationConfig.get_generation_mode` and by generating
_REFUSED_GENERATION: Mapping[str, tuple[str, str]] = {
    "stop_strings": ("needs a tokenizer inside generate, which has none here", "leave it out; stop ids end a reply"),
    "token_healing": ("needs a tokenizer inside generate, which has none here", _LEAVE_OUT),
    "prompt_lookup_num_tokens": _ASSISTED,
    "max_matching_ngram_size": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "assistant_confidence_threshold": _ASSISTED,
    "assistant_ensemble_weight": _ASSISTED,
    "assistant_lookbehind": _ASSISTED,
    "target_lookbehind": _ASSISTED,
    "num_assistant_tokens": _ASSISTED,
    "num_assistant_tokens_schedule": _ASSISTED,
    "is_assistant": _ASSISTED,
    "speculation_type": _ASSISTED,
    "use_mtp": _ASSISTED,
    "prefill_chunk_size": ("cuts prompts in parts, which evaluation takes whole", _LEAVE_OUT),
    "return_dict_in_generate": _OUTPUT,
    "output_attentions": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_scores": _OUTPUT,
    "output_logits": _OUTPUT,
    "cache_implementation": ("is not supported here: only the dynamic key cache is", "leave it out, or write dynamic"),
    "cache_config": _OTHER_CACHE,
    "max_cache_len": _OTHER_CACHE,
    "compile_config": ("cannot be written in YAML: generate takes an object of Python", _LEAVE_OUT),
    "disable_compile": ("has no effect here: nothing of generation is compiled", _LEAVE_OUT),
    "continuous_batching_config": ("has no effect here: evaluation makes its own batches", _LEAVE_OUT),
    "num_beam_groups": _GROUPED,
    "diversity_penalty": _GROUPED,
    "dola_layers": ("selects DoLa decoding, whose code transformers would download", _MODES),
    "constraints": _CONSTRAINED,
    "force_words_ids": _CONSTRAINED,
    "penalty_alpha": ("selects contrastive search, whose code transformers would download", _MODES),
    "low_memory": ("is not supported by beam search any more", _LEAVE_OUT),
    "min_length": ("counts the prompt too", "write min_new_tokens: the least number of tokens of a reply"),
    "decoder_start_token_id": _ENCODER_DECODER,
    "forced_bos_token_id": _ENCODER_DECODER,
    "eos_token_id": _CHECKPOINT_IDS,
    "pad_token_id": _CHECKPOINT_IDS,
    "bos_token_id": _CHECKPOINT_IDS,
}
# values that switch a key off, beside null and false
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "cache_implementation": ("dynamic",),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "min_length": (0,),
}

_REFUSED_TRAINING: Mapping[str, tuple[str, str]] = {
    "generation_num_beams": ("has no effect here", "write generation_config.num_beams instead"),
    "generation_max_length": ("has no effect here", "write generation_config.max_new_tokens instead"),
    "use_liger_kernel": ("would take the place of this toolkit's own loss", _LEAVE_OUT),
    "fsdp": ("is not supported by this toolkit", "leave it out; use deepspeed to share a model between GPUs"),
    "fsdp_config": ("is not supported by this toolkit", "leave it out; use deepspeed to share a model between GPUs"),
}
_NOT_THERE = "has no effect here; "
_WITHOUT_EFFECT: Mapping[str, str] = {
    "sortish_sampler": _NOT_THERE + "train_sampling_strategy orders the rows",
    "length_column_name": _NOT_THERE + "rows are as long as their tokens",
    "label_names": _NOT_THERE + "labels are made of the conversations",
    "batch_eval_metrics": _NOT_THERE + "scores are taken over all replies",
    "include_for_metrics": _NOT_THERE + "scores are taken from the replies",
    "eval_accumulation_steps": _NOT_THERE + "evaluation keeps no logits",
    "eval_do_concat_batches": _NOT_THERE + "evaluation keeps no logits",
    "eval_use_gather_object": _NOT_THERE + "evaluation keeps no logits",
    "prediction_loss_only": _NOT_THERE + "predict_with_generate: false evaluates by the loss alone",
    "use_cache": _NOT_THERE + "training needs no cache, and generation_config.use_cache is for replies",
    "liger_kernel_config": _NOT_THERE + "use_liger_kernel is not supported",
    "local_rank": _NOT_THERE + "torchrun says it",
    "restore_callback_states_from_checkpoint": _NOT_THERE + "what keeps a state is always restored",
    "enable_jit_checkpoint": _NOT_THERE + "SIGTERM ends any run with a checkpoint",
}
# keys that another one must switch on
_ONLY_WITH: Mapping[str, str] = {
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "push_to_hub",
    ),
    "activation_checkpointing_kwargs": "activation_checkpointing",
}
_ABOUT_MODEL = "is what PEFT itself writes there, about MODEL"
_NEEDS_DATA = "belongs to a way to begin that needs a pass over the data, which this toolkit does not make"
_GPTQ = "belongs to layers of GPTQ, which no model here has"
_REFUSED_LORA: Mapping[str, str] = {
    "auto_mapping": _ABOUT_MODEL,
    "peft_version": _ABOUT_MODEL,
    "base_model_name_or_path": _ABOUT_MODEL,
    "revision": _ABOUT_MODEL,
    "eva_config": _NEEDS_DATA,
    "corda_config": _NEEDS_DATA,
    "lora_ga_config": _NEEDS_DATA,
    "megatron_core": "belongs to megatron_config",
    "use_qalora": _GPTQ,
    "qalora_group_size": _GPTQ,
}


def check_unsupported_training(draft: Draft) -> None:
    """Refuse and drop `training_args` that this toolkit does not support; give a notice for those without effect."""
    training = draft.training
    for name, (what, fix) in _REFUSED_TRAINING.items():
        value = training.get(name)
        if value in (None, False, "", [], {}):
            continue
        if name == "fsdp" and training.get("deepspeed"):
            draft.refuse((*TRAINING, name), f"cannot stand beside deepspeed, and {what}", "keep deepspeed only")
        else:
            draft.refuse((*TRAINING, name), what, fix)
        del training[name]
    for name, text in _WITHOUT_EFFECT.items():
        if _is_set(training, name, training_fields()):
            draft.notice((*TRAINING, name), text)
            del training[name]
    for name, switch in _ONLY_WITH.items():
        if (
            _is_set(training, name, training_fields())
            and not training.get(switch)
            and not draft.refused(training, *TRAINING, switch)
        ):
            draft.notice((*TRAINING, name), f"{_NOT_THERE}it belongs to {switch}, which is not set")


def _is_set(values: Mapping[str, Any], name: str, fields: Mapping[str, Field]) -> bool:
    """Whether a key has another value than its default."""
    value, default = values.get(name), fields[name].default
    return value not in (None, [], {}, "") and repr(value) != default


def check_generation(draft: Draft) -> None:
    """Refuse what evaluation cannot generate with: it decodes batches, greedily, by sampling, by beams or by both."""
    generation = draft.generation
    for name, (what, fix) in _REFUSED_GENERATION.items():
        value = generation.get(name)
        if value is None or value is False or value in _HARMLESS.get(name, ()):
            continue
        seen = shown(value, draft.document.texts.get((*GENERATION, name)))
        draft.refuse((*GENERATION, name), f"{seen}: {name} {what}", fix)
    if generation.get("max_length") is not None:
        path = (*GENERATION, "max_length")
        if draft.wrote(*GENERATION, "max_new_tokens"):
            draft.notice(path, "has no effect here; max_new_tokens decides the length of a reply")
            del generation["max_length"]
        else:
            fix = "write max_new_tokens instead: the largest number of tokens of a reply"
            draft.refuse(path, "counts the prompt too, so that a long prompt leaves no room for a reply", fix)


def check_unsupported_peft(draft: Draft) -> None:
    """Refuse keys of an adapter that nothing here reads, or that its own file gets from PEFT."""
    peft = draft.peft or {}
    known = peft_fields("LORA")
    for name, what in _REFUSED_LORA.items():
        if _is_set(peft, name, known):
            draft.refuse((*PEFT, name), what, _LEAVE_OUT)
            del peft[name]
    if _is_set(peft, "loftq_config", known) and peft.get("init_lora_weights") != "loftq":
        draft.refuse((*PEFT, "loftq_config"), "belongs to init_lora_weights: loftq, which is not set", _LEAVE_OUT)
    if peft.get("fan_in_fan_out"):
        draft.notice((*PEFT, "fan_in_fan_out"), _NOT_THERE + "PEFT sees by each layer how its weight lies")
