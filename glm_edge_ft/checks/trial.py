"""What a run builds of its settings is built once before the weights are read.

Optimizer, schedule, reporting and generation are the libraries' own, with the run's own numbers: what they would refuse
after an hour, they refuse here, and a key that changes nothing is named.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.deepspeed import check_deepspeed
from glm_edge_ft.config.keys import shown
from glm_edge_ft.console import show_notice
from glm_edge_ft.distributed import is_main_process
from glm_edge_ft.errors import ProblemList, UserError, first_line

if TYPE_CHECKING:
    from transformers import GenerationConfig, Seq2SeqTrainingArguments

    from glm_edge_ft.data.dataset import EncodedDataset
    from glm_edge_ft.model.checkpoint import Checkpoint

_OTHER_PART = "choose another, install what it names, correct its settings, or give those it asks for"
_ONLINE = "log in where there is a network (hf auth login, or hub_token), or leave push_to_hub out"
_TRIED_STEPS = 1000
# Values for an argument of an optimizer; at least one gives another optimizer than the value of a known argument.
_TRIED_VALUES = ("0.123", "7", "true", "false", "std", "bfloat16")
_ID_KEYS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id", "sequence_bias")


def count_steps(args: Seq2SeqTrainingArguments, rows: int) -> int:
    """Return how many optimizer steps a fresh run takes, as the Trainer counts them. Raises UserError for none."""
    size = args.train_batch_size
    ranks = 1 if args.accelerator_config.split_batches else args.world_size  # type: ignore[union-attr]
    batches = rows // size // ranks if args.dataloader_drop_last else math.ceil(math.ceil(rows / size) / ranks)
    if batches == 0:
        processes = f" for each of {ranks} processes" if ranks > 1 else ""
        raise UserError.single(
            "training_args.dataloader_drop_last",
            f"`true`, but the {rows} training rows are no whole batch of {size}{processes}: no step would be taken",
            f"lower training_args.per_device_train_batch_size to at most {rows // ranks or 1}, or write false",
        )
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def check_training_parts(args: Seq2SeqTrainingArguments, written: Mapping[str, Any], rows: int | None) -> None:
    """Build optimizer, schedule and reporting once, for one small parameter, as the Trainer does after the weights.

    Args:
        args: the Trainer's arguments.
        written: `training_args` of the config.
        rows: training rows; None where they could not be read, so that the run's length is not known.

    Raises:
        UserError: for each that cannot be built, or would have no use.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    problems, steps = ProblemList(), max(args.max_steps, 10)
    if rows is not None:
        with problems.collect():
            steps = count_steps(args, rows)
    parts: dict[str, Callable[[], object]] = {
        "optim": lambda: _check_optimizer(args, written, problems),
        "lr_scheduler_type": lambda: _check_schedule(args, written, steps, problems),
        "report_to": lambda: [kind() for kind in get_reporting_integration_callbacks(args.report_to)],
    }
    if args.activation_checkpointing_kwargs:
        parts["activation_checkpointing_kwargs"] = lambda: _check_checkpointing(args.activation_checkpointing_kwargs)
    if args.push_to_hub and is_main_process():
        parts["push_to_hub"] = lambda: _check_login(args.hub_token)
    for key, build in parts.items():
        try:
            build()
        except Exception as error:  # whatever the package behind it raises, the key is what the user can change
            value = getattr(args, key)
            what = f"{getattr(value, 'value', value)} cannot be used here: {first_line(error)}"
            problems.add(f"training_args.{key}", what, _ONLINE if key == "push_to_hub" else _OTHER_PART)
    if args.deepspeed:
        with problems.collect():
            check_deepspeed(written["deepspeed"], args, None if rows is None else steps)
    problems.raise_if_any()


def _check_login(token: str | None) -> None:
    from huggingface_hub import HfApi

    HfApi().whoami(token=token)


def _check_checkpointing(kwargs: Any) -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    settings: dict[str, Any] = {"use_reentrant": False, **kwargs}
    for name in ("use_reentrant", "preserve_rng_state"):
        if not isinstance(settings.get(name, False), bool):
            raise ValueError(f"{name} takes true or false")
    checkpoint(torch.nn.Identity(), torch.zeros(1, requires_grad=True), **settings).backward()


def _check_optimizer(args: Seq2SeqTrainingArguments, written: Mapping[str, Any], problems: ProblemList) -> None:
    """Build the optimizer; name settings that it does not read: those without which it is the same."""
    import torch
    from transformers import Trainer

    def optimizer(**changes: Any) -> tuple[Any, Any]:
        changed = copy.copy(args)
        for name, value in changes.items():
            setattr(changed, name, value)
        return Trainer.get_optimizer_cls_and_kwargs(changed)

    def reads(argument: str, value: str) -> bool:
        others = [part for part in arguments if part.partition("=")[0] != argument]
        try:
            return bool(optimizer(optim_args=",".join([*others, f"{argument}={value}"]))[1] != settings)
        except Exception:  # a value that it does not take was read
            return True

    kind, settings = optimizer()
    kind([torch.nn.Parameter(torch.zeros(4, 4))], **settings)
    name = getattr(args.optim, "value", args.optim)
    others = {key: 0.123 for key in ("adam_beta1", "adam_beta2", "adam_epsilon") if key in written}
    for key, other in {**others, **({"optim_target_modules": None} if args.optim_target_modules else {})}.items():
        if optimizer(**{key: other}) == (kind, settings):
            show_notice(f"training_args.{key} has no effect: {name} does not read it")
    arguments = [part for part in (args.optim_args or "").replace(" ", "").split(",") if part]
    for argument in (part.partition("=")[0] for part in arguments):
        if not any(reads(argument, value) for value in _TRIED_VALUES):
            what = f"{shown(args.optim_args)}: {name} reads no argument {shown(argument)}"
            problems.add("training_args.optim_args", what, "correct its name, or leave it out")


def _check_schedule(
    args: Seq2SeqTrainingArguments, written: Mapping[str, Any], steps: int, problems: ProblemList
) -> None:
    """Build the schedule with the run's own learning rate and steps, and go through its rates."""
    import torch
    from transformers import get_scheduler

    def rates(warmup: int, specific: Any) -> list[Any]:
        """Return the rates of some thousand steps; none where they follow the evaluation loss."""
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(4, 4))], lr=args.learning_rate)
        schedule: Any = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, specific)
        functions = getattr(schedule, "lr_lambdas", None)
        tried = {*range(0, steps, max(1, steps // _TRIED_STEPS)), *range(min(steps, 100)), steps - 1}
        return [args.learning_rate * functions[0](step) for step in sorted(tried)] if functions else []

    warmup, specific = args.get_warmup_steps(steps), args.lr_scheduler_kwargs
    found = rates(warmup, specific)
    name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if specific:
        try:
            rates(0, {"no such argument": 0})
            show_notice(f"training_args.lr_scheduler_kwargs has no effect: {name} takes none")
        except TypeError:
            pass
    if warmup and steps > 1 and found == rates(0, specific):
        show_notice(f"training_args.warmup_steps has no effect: {name} has no warmup")
    what, of_run = "", f"with learning_rate {args.learning_rate:g} in a run of {steps} steps {name}"
    bad = [rate for rate in found if not (isinstance(rate, float) and math.isfinite(rate) and rate >= 0)]
    if bad:
        what = f"{of_run} would come to a rate of {bad[0]}"
    elif found and max(found) > args.learning_rate * (1 + 1e-6):
        what = f"{of_run} would rise to {max(found):g}"
    elif found and max(found) < args.learning_rate * 0.5:
        written_warmup = f"; warmup_steps is {written['warmup_steps']:g}" if written.get("warmup_steps") else ""
        show_notice(
            f"training_args.lr_scheduler_type: {of_run} comes to a rate of {max(found):g} at most{written_warmup}"
        )
    if what:
        key = "lr_scheduler_kwargs" if specific else "lr_scheduler_type"
        problems.add(f"training_args.{key}", what, "correct it, so that rates stay between 0 and learning_rate")


def check_generation(settings: Mapping[str, Any], config: GenerationConfig, vocab_size: int) -> None:
    """Generate some tokens with a model of a few weights and the run's vocabulary, as the config asks for.

    Args:
        settings: `generation_config` of the run's config.
        config: what evaluation generates with.
        vocab_size: ids that the model has.

    Raises:
        UserError: that fails, or an id is not in the vocabulary.
    """
    import torch
    from transformers import GlmConfig, GlmForCausalLM

    if not settings:
        return
    problems, path = ProblemList(), "training_args.generation_config"
    for key in _ID_KEYS:
        beyond = [number for number in _numbers(settings.get(key)) if not 0 <= number < vocab_size]
        if beyond:
            what = f"{beyond[0]} is no token of this model, whose ids go from 0 to {vocab_size - 1}"
            problems.add(f"{path}.{key}", what, "correct the id, or leave it out")
    problems.raise_if_any()
    sizes: dict[str, Any] = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 8)
    sizes |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    model = GlmForCausalLM(GlmConfig(vocab_size=vocab_size, pad_token_id=0, **sizes)).eval()

    def failure(*without: str) -> str:
        tried = copy.deepcopy(config)
        for key in without:
            setattr(tried, key, False if key == "do_sample" else None)
        tried.max_new_tokens = min(tried.max_new_tokens or 4, 4)
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        try:
            with torch.random.fork_rng(devices=[]):
                model.generate(torch.ones_like(mask), attention_mask=mask, generation_config=tried)
        except Exception as error:  # whatever the library raises on these settings
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return ""

    if reason := failure():
        keys = sorted(settings, key=lambda key: key in ("do_sample", "num_beams"))  # without these, others are not read
        guilty = next((key for key in keys if not failure(key)), None)
        seen = f"{shown(settings[guilty])} cannot be used" if guilty else "these settings cannot be used together"
        raise UserError.single(
            f"{path}.{guilty}" if guilty else path, f"{seen}: {reason}", "correct it, or leave it out"
        )


def _numbers(value: Any) -> Iterator[int]:
    """Return the whole numbers of nested lists; of a `sequence_bias` the ids alone."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item)


def check_ids(dataset: EncodedDataset, checkpoint: Checkpoint) -> None:
    """Refuse rows with ids that the model has no embedding for. A vocabulary larger than the tokenizer's is fine."""
    import numpy as np

    vocab_size = vocabulary_of(checkpoint)
    ids, _ = dataset.tokens(0, sys.maxsize)
    position = int(ids.argmax())
    highest = int(ids[position])
    if highest >= vocab_size:
        row = int(np.searchsorted(dataset.rows_info["start"], position, side="right")) - 1
        token = shown(str(checkpoint.tokenizer.convert_ids_to_tokens(highest)))
        raise UserError.single(
            dataset.place(row),
            f"token {highest} ({token}) of the tokenizer is not in the model, whose ids go up to {vocab_size - 1}",
            f"use the tokenizer that belongs to MODEL {checkpoint.location.name}, or a model with its vocab_size",
        )


def vocabulary_of(checkpoint: Checkpoint) -> int:
    """Return how many ids the model has."""
    return int(checkpoint.config.get_text_config().vocab_size)
