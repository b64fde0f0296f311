"""A value other than the default for every key of the four classes of settings, and what comes of it.

`effect`: something that can be observed of the run differs. `notice`: the run is the same, and one line says so.
`refused`: exit code 2. `elsewhere`: the effect needs what this machine, or a run of three steps, has not; `why` says
what that is, and the run is the same without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from glm_edge_ft.model.precision import detect_hardware

Class = Literal["effect", "notice", "refused", "elsewhere"]


@dataclass(frozen=True)
class Try:
    """One key with a value.

    Attributes:
        value: the value.
        comes_of_it: its class.
        beside: further `training_args`, also of the run that it is compared with; for keys of generation and of
            adapters, further keys of their section.
        ranks: processes of the run.
        resumed: whether the run goes on from a checkpoint of step 1.
        why: for `elsewhere`, what its effect needs.
    """

    value: Any
    comes_of_it: Class = "effect"
    beside: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    resumed: bool = False
    why: str = ""


def _needs(value: Any, why: str, **beside: Any) -> Try:
    return Try(value, "elsewhere", beside, why=why)


_SAMPLED = {"do_sample": True}
_BEAMS = {"num_beams": 3, "max_new_tokens": 8}
_GPU, _MACHINES, _PACKAGE = "a GPU", "several machines", "a package for reports that is not installed"
_WORKERS = {"dataloader_num_workers": 1}
_OF_BF16: Class = "effect" if detect_hardware().cpu_has_bf16 else "refused"

TRAINING: Mapping[str, Try] = {
    "output_dir": Try("other"),
    "per_device_train_batch_size": Try(3),
    "num_train_epochs": Try(1, beside={"max_steps": -1}),
    "max_steps": Try(2),
    "learning_rate": Try(1e-3),
    "lr_scheduler_type": Try("cosine"),
    "lr_scheduler_kwargs": Try({"num_cycles": 2}, beside={"lr_scheduler_type": "cosine"}),
    "warmup_steps": Try(2),
    "optim": Try("sgd"),
    "optim_args": Try("momentum=0.9", beside={"optim": "sgd"}),
    "weight_decay": Try(0.5),
    "adam_beta1": Try(0.5),
    "adam_beta2": Try(0.5),
    "adam_epsilon": Try(1e-2),
    "optim_target_modules": Try(["q_proj"], "notice"),
    "gradient_accumulation_steps": Try(2),
    "average_tokens_across_devices": Try(False, ranks=2),
    "max_grad_norm": Try(0.01),
    "label_smoothing_factor": Try(0.3),
    "bf16": Try(True, _OF_BF16),
    "fp16": Try(True, "refused"),
    "bf16_full_eval": Try(True, beside={"test": "test.jsonl"}),
    "fp16_full_eval": Try(True, beside={"test": "test.jsonl"}),
    "tf32": Try(True, "refused"),
    "activation_checkpointing": Try(True),
    "activation_checkpointing_kwargs": Try({"use_reentrant": True}, beside={"activation_checkpointing": True}),
    "gradient_checkpointing": Try(True),
    "gradient_checkpointing_kwargs": Try({"use_reentrant": True}, beside={"gradient_checkpointing": True}),
    "torch_compile": Try(True),
    "torch_compile_backend": Try("eager"),
    "torch_compile_mode": Try("reduce-overhead"),
    "use_liger_kernel": Try(True, "refused"),
    "liger_kernel_config": Try({"rope": True}, "notice"),
    "use_cache": Try(True, "notice"),
    "neftune_noise_alpha": Try(5.0),
    "torch_empty_cache_steps": _needs(1, _GPU),
    "auto_find_batch_size": _needs(True, "memory that runs out"),
    "logging_strategy": Try("epoch"),
    "logging_steps": Try(2),
    "logging_first_step": Try(True, beside={"logging_steps": 3}),
    "log_on_each_node": _needs(False, _MACHINES),
    "logging_nan_inf_filter": _needs(True, "a loss that is not finite, which stops the run or is warned of"),
    "include_num_input_tokens_seen": Try("all"),
    "log_level": Try("info"),
    "log_level_replica": Try("info", ranks=2),
    "disable_tqdm": Try(False),
    "report_to": Try("tensorboard"),
    "run_name": _needs("me", _PACKAGE),
    "project": _needs("me", _PACKAGE),
    "trackio_space_id": _needs("me/me", _PACKAGE),
    "trackio_bucket_id": _needs("me/me", _PACKAGE),
    "trackio_static_space_id": _needs("me/me", _PACKAGE),
    "eval_strategy": Try("no"),
    "eval_steps": Try(2),
    "eval_delay": Try(3, beside={"eval_steps": 1}),
    "per_device_eval_batch_size": Try(1),
    "prediction_loss_only": Try(True, "notice"),
    "eval_on_start": Try(True),
    "eval_do_concat_batches": Try(False, "notice"),
    "eval_use_gather_object": Try(True, "notice", ranks=2),
    "eval_accumulation_steps": Try(2, "notice"),
    "include_for_metrics": Try(["inputs"], "notice"),
    "batch_eval_metrics": Try(True, "notice"),
    "save_only_model": Try(True),
    "save_strategy": Try("no"),
    "save_steps": Try(1),
    "save_on_each_node": _needs(True, _MACHINES),
    "save_total_limit": Try(1, beside={"save_steps": 1}),
    "enable_jit_checkpoint": Try(True, "notice"),
    "push_to_hub": Try(True, "refused"),
    "hub_token": Try("hf_x", "notice"),
    "hub_private_repo": Try(True, "notice"),
    "hub_model_id": Try("me/me", "notice"),
    "hub_strategy": Try("end", "notice"),
    "hub_always_push": Try(True, "notice"),
    "hub_revision": Try("main", "notice"),
    "load_best_model_at_end": Try(
        True, beside={"save_steps": 1, "eval_steps": 1, "learning_rate": 3.0, "max_steps": 2}
    ),
    "metric_for_best_model": Try("rouge-1", beside={"load_best_model_at_end": True, "save_steps": 1, "eval_steps": 1}),
    "greater_is_better": Try(True, "notice"),
    "ignore_data_skip": Try(True, resumed=True),
    "restore_callback_states_from_checkpoint": Try(True, "notice", resumed=True),
    "full_determinism": Try(True),
    "seed": Try(7),
    "data_seed": Try(7),
    "use_cpu": _needs(True, _GPU),
    "accelerator_config": Try({"split_batches": True}),
    "parallelism_config": Try({"tp_size": 2}, "refused"),
    "dataloader_drop_last": Try(True),
    "dataloader_num_workers": Try(1),
    "dataloader_pin_memory": _needs(True, _GPU),
    "dataloader_persistent_workers": Try(True, beside=_WORKERS),
    "dataloader_prefetch_factor": Try(3, beside=_WORKERS),
    "dataloader_multiprocessing_context": Try("spawn", beside=_WORKERS),
    "dataloader_in_order": Try(False, beside=_WORKERS),
    "remove_unused_columns": Try(True, "notice"),
    "label_names": Try(["labels"], "notice"),
    "train_sampling_strategy": Try("random"),
    "length_column_name": Try("size", "notice"),
    "ddp_find_unused_parameters": Try(True, ranks=2),
    "ddp_bucket_cap_mb": Try(1, ranks=2),
    "ddp_broadcast_buffers": Try(False, ranks=2),
    "ddp_static_graph": Try(True, ranks=2),
    "ddp_backend": Try("gloo", "elsewhere", ranks=2, why=_GPU),
    "ddp_timeout": Try(77, "elsewhere", ranks=2, why="a process that does not answer"),
    "fsdp": Try("full_shard", "refused"),
    "fsdp_config": Try({"min_num_params": 9}, "refused"),
    "deepspeed": Try({"zero_optimization": {"stage": 2}}),
    "debug": Try("underflow_overflow"),
    "skip_memory_metrics": Try(False),
    "do_train": _needs(True, "nothing: it says what the command does"),
    "do_eval": _needs(True, "nothing: data_config and eval_strategy say the same"),
    "do_predict": Try(True, "refused"),
    "resume_from_checkpoint": Try("checkpoint-1", "refused"),
    "local_rank": Try(0, "notice"),
    "sortish_sampler": Try(True, "notice"),
    "predict_with_generate": Try(False),
    "generation_max_length": Try(9, "refused"),
    "generation_num_beams": Try(2, "refused"),
    "generation_config": Try({"max_new_tokens": 3}),
}

GENERATION: Mapping[str, Try] = {
    "max_length": Try(64, "notice"),
    "max_new_tokens": Try(3),
    "min_length": Try(5, "refused"),
    "min_new_tokens": Try(7),
    "early_stopping": Try(True, beside=_BEAMS),
    "max_time": Try(1e-3),
    "stop_strings": Try(["a"], "refused"),
    "do_sample": Try(True),
    "num_beams": Try(3),
    "use_mtp": Try(True, "refused"),
    "use_cache": Try(False),
    "cache_implementation": Try("static", "refused"),
    "cache_config": Try({"a": 1}, "refused"),
    "max_cache_len": Try(9, "refused"),
    "temperature": Try(0.1, beside=_SAMPLED),
    "top_k": Try(1, beside=_SAMPLED),
    "top_p": Try(0.1, beside=_SAMPLED),
    "min_p": Try(0.5, beside=_SAMPLED),
    "top_h": Try(0.5, beside=_SAMPLED),
    "typical_p": Try(0.5, beside=_SAMPLED),
    "epsilon_cutoff": Try(0.1, beside=_SAMPLED),
    "eta_cutoff": Try(0.1, beside=_SAMPLED),
    "repetition_penalty": Try(2.0),
    "encoder_repetition_penalty": Try(2.0),
    "length_penalty": Try(-20.0, beside=_BEAMS),
    "no_repeat_ngram_size": Try(1),
    "bad_words_ids": Try([[5]]),
    "renormalize_logits": Try(True),
    "forced_bos_token_id": Try(5, "refused"),
    "forced_eos_token_id": Try(5),
    "remove_invalid_values": Try(True),
    "exponential_decay_length_penalty": Try([1, 2.0]),
    "suppress_tokens": Try([5]),
    "begin_suppress_tokens": Try([5]),
    "sequence_bias": Try([[[5], 9.0]]),
    "token_healing": Try(True, "refused"),
    "guidance_scale": Try(2.0),
    "watermarking_config": Try({"bias": 9.0}),
    "num_return_sequences": Try(2, "refused"),
    "output_attentions": Try(True, "refused"),
    "output_hidden_states": Try(True, "refused"),
    "output_scores": Try(True, "refused"),
    "output_logits": Try(True, "refused"),
    "return_dict_in_generate": Try(True, "refused"),
    "pad_token_id": Try(5, "refused"),
    "bos_token_id": Try(5, "refused"),
    "eos_token_id": Try(5, "refused"),
    "encoder_no_repeat_ngram_size": Try(2),
    "decoder_start_token_id": Try(5, "refused"),
    "is_assistant": Try(True, "refused"),
    "num_assistant_tokens": Try(5, "refused"),
    "num_assistant_tokens_schedule": Try("constant", "refused"),
    "assistant_confidence_threshold": Try(0.5, "refused"),
    "prompt_lookup_num_tokens": Try(3, "refused"),
    "max_matching_ngram_size": Try(2, "refused"),
    "assistant_early_exit": Try(2, "refused"),
    "assistant_lookbehind": Try(2, "refused"),
    "target_lookbehind": Try(2, "refused"),
    "assistant_ensemble_weight": Try(0.5, "refused"),
    "speculation_type": Try("mtp", "refused"),
    "compile_config": Try({"mode": "default"}, "refused"),
    "disable_compile": Try(True, "refused"),
    "continuous_batching_config": Try({"a": 1}, "refused"),
    "low_memory": Try(True, "refused"),
    "penalty_alpha": Try(0.6, "refused"),
    "dola_layers": Try("low", "refused"),
    "diversity_penalty": Try(0.5, "refused"),
    "num_beam_groups": Try(2, "refused"),
    "constraints": Try([1], "refused"),
    "force_words_ids": Try([[5]], "refused"),
    "prefill_chunk_size": Try(2, "refused"),
}

_OF_ALL_ADAPTERS: Mapping[str, Try] = {
    "task_type": Try("SEQ_CLS", "refused"),
    "peft_type": Try("IA3", "refused"),
    "auto_mapping": Try({"base_model_class": "A"}, "refused"),
    "peft_version": Try("0.1", "refused"),
    "base_model_name_or_path": Try("me/me", "refused"),
    "revision": Try("main", "refused"),
    "inference_mode": Try(True, "refused"),
    "modules_to_save": Try(["lm_head"]),
}
LORA: Mapping[str, Try] = {
    **_OF_ALL_ADAPTERS,
    "r": Try(2),
    "target_modules": Try(["q_proj"]),
    "exclude_modules": Try(["q_proj"]),
    "lora_alpha": Try(32),
    "lora_dropout": Try(0.5),
    "fan_in_fan_out": Try(True, "notice"),
    "bias": Try("all", "notice"),
    "use_rslora": Try(True),
    "init_lora_weights": Try("gaussian"),
    "layers_to_transform": Try([0]),
    "layers_pattern": Try("layers", "elsewhere", {"layers_to_transform": [0]}, why="layers of another name"),
    "rank_pattern": Try({"q_proj": 2}),
    "alpha_pattern": Try({"q_proj": 2}),
    "megatron_config": Try({"a": 1}, "refused"),
    "megatron_core": Try("a", "refused"),
    "trainable_token_indices": Try([5]),
    "loftq_config": Try({"loftq_bits": 4}, "refused"),
    "eva_config": Try({"rho": 1.0}, "refused"),
    "corda_config": Try({"corda_method": "kpm"}, "refused"),
    "lora_ga_config": Try({"direction": "ArBr"}, "refused"),
    "use_dora": Try(True),
    "velora_config": Try({"num_groups": 8}),
    "alora_invocation_tokens": Try([5], "refused"),
    "use_qalora": Try(True, "refused"),
    "qalora_group_size": Try(8, "refused"),
    "monteclora_config": Try({}, "refused"),
    "layer_replication": Try([[0, 2], [1, 3]], "refused"),
    "runtime_config": Try({"ephemeral_gpu_offload": True}, "elsewhere", why=_GPU),
    "lora_bias": Try(True, "refused"),
    "target_parameters": Try(["self_attn.q_proj.weight"], beside={"lora_dropout": 0.0}),
    "use_bdlora": Try({}, "refused"),
    "arrow_config": Try({"top_k": 2}, "refused"),
    "kasa_config": Try({}, "refused"),
    "ensure_weight_tying": Try(True, "notice"),
}
PREFIX: Mapping[str, Try] = {
    **_OF_ALL_ADAPTERS,
    "num_virtual_tokens": Try(7),
    "token_dim": Try(7, "refused"),
    "num_transformer_submodules": Try(2, "refused"),
    "num_attention_heads": Try(7, "refused"),
    "num_layers": Try(7, "refused"),
    "init_weights": Try("zero"),
    "encoder_hidden_size": Try(7, "refused"),
    "prefix_projection": Try(True),
}
