"""From the config to the libraries' own settings: the Trainer's arguments and how evaluation generates."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from glm_edge_ft.config.deepspeed import complete_deepspeed, read_deepspeed
from glm_edge_ft.console import show_notice
from glm_edge_ft.distributed import barrier, count_cores, init_cpu_process_group, set_single_process_env
from glm_edge_ft.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, Seq2SeqTrainingArguments

    from glm_edge_ft.config import RunConfig
    from glm_edge_ft.model.checkpoint import Checkpoint
    from glm_edge_ft.model.precision import Precision
    from glm_edge_ft.run import Plan

CPU_TOKENS_PER_PASS = 2048


def build_training_arguments(plan: Plan, precision: Precision) -> Seq2SeqTrainingArguments:
    """Return the Trainer's arguments: the config's, with the precision that was chosen.

    Raises UserError when transformers refuses a value that the config's own checks let through.
    """
    import torch
    from transformers import Seq2SeqTrainingArguments

    settings = dict(plan.config.training_args)
    settings |= {"bf16": precision.bf16, "fp16": precision.fp16, "output_dir": str(plan.output_dir)}
    if not torch.cuda.is_available():
        settings.setdefault("use_cpu", True)
    on_gpu = torch.cuda.is_available() and not settings.get("use_cpu")
    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"  # read when DeepSpeed is imported
    settings.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    settings.setdefault("logging_nan_inf_filter", False)  # a NaN must show as what it is
    # Every trained weight takes part in every step: a batch without image runs the vision part on a blank one.
    settings.setdefault("ddp_find_unused_parameters", False)
    settings.setdefault("log_level", "error")  # the Trainer's own lines repeat ours
    workers, cores = settings.get("dataloader_num_workers", 0), count_cores()
    if workers > cores:
        show_notice(f"training_args.dataloader_num_workers {workers} -> {cores}: this machine has {cores} cores")
        settings["dataloader_num_workers"] = cores
    if settings.get("deepspeed"):
        set_single_process_env()
        settings["deepspeed"] = complete_deepspeed(
            read_deepspeed(settings["deepspeed"]),
            has_gpu=on_gpu,
            bf16=precision.bf16,
            fp16=precision.fp16,
        )
    if plan.resume.path is not None:
        settings["eval_on_start"] = False  # the base model was evaluated when the run began
    barrier()
    if settings.get("use_cpu"):
        init_cpu_process_group(settings.get("ddp_backend"), settings.get("ddp_timeout", 1800))
    try:
        args = Seq2SeqTrainingArguments(**settings)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        what = f"transformers refuses these settings: {error}"
        raise UserError.single("training_args", what, "correct what it names, or leave it out") from error
    args._n_gpu = min(args.n_gpu, 1)  # with more, the Trainer would share each batch by nn.DataParallel
    return args


def tokens_per_pass(config: RunConfig, args: Seq2SeqTrainingArguments) -> int | None:
    """Return the most tokens that go through the model at once in training; None: the whole batch.

    A CPU is as fast with few tokens at once as with many, and needs less memory for them; a GPU is faster with many.
    DeepSpeed reduces the gradients in each backward pass, so that all processes would need as many of them.
    """
    if args.deepspeed:
        return None
    return config.max_tokens_per_pass or (CPU_TOKENS_PER_PASS if args.use_cpu else None)


def check_batches(args: Seq2SeqTrainingArguments, padding_free: bool) -> None:
    """Refuse what would give processes other numbers of batches, or cut packed batches. Raises UserError."""
    settings: Any = args.accelerator_config
    what, fix = "", "leave it out"
    if args.world_size > 1 and not settings.even_batches and not args.dataloader_drop_last:
        what = "even_batches: false gives processes other numbers of batches, so that they wait without end"
        fix = "leave it out, or write dataloader_drop_last: true"
    elif args.world_size > 1 and settings.dispatch_batches:
        what = "dispatch_batches: true joins the batches of all processes, which are padded to other lengths"
    elif padding_free and settings.dispatch_batches:
        what, fix = "dispatch_batches would cut packed batches", "leave it out, or write padding_free: false"
    if what:
        raise UserError.single("training_args.accelerator_config", what, fix)


def build_generation_config(config: RunConfig, checkpoint: Checkpoint) -> GenerationConfig:
    """Return how evaluation generates: greedy unless the config says otherwise, up to a stop id.

    Raises UserError when transformers refuses the combination.
    """
    from transformers import GenerationConfig

    settings = {
        "do_sample": False,
        "max_new_tokens": config.max_output_length,
        "eos_token_id": list(checkpoint.stop_ids),
        "pad_token_id": checkpoint.tokenizer.pad_token_id,
        "use_cache": True,
        **config.generation_config,
    }
    try:
        generation_config = GenerationConfig(**settings)
        generation_config.validate(strict=True)
    except (TypeError, ValueError, ImportError) as error:
        what = f"transformers refuses these settings: {error}"
        fix = "correct what it names, or leave it out"
        raise UserError.single("training_args.generation_config", what, fix) from error
    return generation_config
