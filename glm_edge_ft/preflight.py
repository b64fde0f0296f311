"""Everything that can be known before the weights are read, cheapest first.

`check_inputs` needs the standard library, PyYAML and pydantic alone: config, data folder, MODEL and RESUME are
checked within a second. `prepare` reads the tokenizer, checks adapter and precision against the real model's
structure, and encodes the data. Each collects all mistakes before it raises.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glm_edge_ft.config import RunConfig, check_data_files, load_config
from glm_edge_ft.console import is_main_process, show_notice
from glm_edge_ft.errors import ProblemList, UserError
from glm_edge_ft.model.loading import ModelLocation, locate_model
from glm_edge_ft.training.checkpoints import ResumePlan, resolve_resume

if TYPE_CHECKING:
    from transformers import GenerationConfig, Seq2SeqTrainingArguments

    from glm_edge_ft.data.dataset import EncodedDataset
    from glm_edge_ft.data.encoding import ConversationEncoder
    from glm_edge_ft.model.loading import Checkpoint
    from glm_edge_ft.model.memory import MemoryEstimate
    from glm_edge_ft.model.precision import Precision

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class RunRequest:
    """One command line, as given."""

    data_dir: Path
    model: str
    config: Path
    resume: str | None = None
    overrides: tuple[str, ...] = ()
    check: bool = False
    preview: int | None = None
    json_path: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A command line that makes sense: config read, files there, MODEL found, RESUME resolved."""

    request: RunRequest
    config: RunConfig
    location: ModelLocation
    resume: ResumePlan
    output_dir: Path
    data_files: dict[str, Path]


@dataclass(frozen=True)
class Prepared:
    """All that training needs but the weights.

    Attributes:
        datasets: encoded rows by split, `train` and, where the config names them, `val` and `test`.
        parameters: (trainable, all) parameter counts with the adapter in place.
    """

    plan: Plan
    checkpoint: Checkpoint
    precision: Precision
    encoder: ConversationEncoder
    datasets: dict[str, EncodedDataset]
    parameters: tuple[int, int]
    memory: MemoryEstimate
    training_arguments: Seq2SeqTrainingArguments
    generation_config: GenerationConfig


def check_inputs(request: RunRequest) -> Plan:
    """Check the command line and every file that it names. Raises UserError with all that is wrong."""
    problems = ProblemList()
    location = None
    with _collect(problems):
        location = locate_model(request.model)
    if request.json_path is not None and not (request.check or request.preview):
        problems.add("--json", "goes with --check or --preview", "add one of them, or leave --json out")
    config = None
    with _collect(problems):
        config = load_config(request.config, request.overrides)
    if config is None:
        problems.raise_if_any()
        raise AssertionError("a config that was not read has its problems")
    for problem in check_data_files(config, request.data_dir):
        problems.problems.append(problem)
    if config.training_args.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        problems.add(
            "training_args.deepspeed", "is set, but DeepSpeed is not installed", "pip install deepspeed==0.19.8"
        )
    output_dir = Path(config.training_args["output_dir"]).expanduser()
    if output_dir.exists() and not output_dir.is_dir():
        problems.add("training_args.output_dir", f"{output_dir} is a file", "name a folder")
    resume = ResumePlan(None)
    with _collect(problems):
        resume = resolve_resume(request.resume, output_dir)
    problems.raise_if_any()
    assert location is not None  # it has its problem otherwise
    for notice in config.notices:
        show_notice(notice)
    if config.freezeV:
        show_notice("freezeV: true has no meaning here: a chat model has no vision tower")
    data = config.data_config
    named = zip(SPLITS, (data.train_file, data.val_file, data.test_file), strict=True)
    files = {split: request.data_dir / name for split, name in named if name is not None}
    return Plan(request, config, location, resume, output_dir, files)


def prepare(plan: Plan) -> Prepared:
    """Read tokenizer and config of the model, check adapter and precision, encode the data; read no weights.

    Raises UserError with all that is wrong, up to 20 rows of each data file among it.
    """
    from glm_edge_ft.data.encoding import ConversationEncoder
    from glm_edge_ft.model.loading import read_checkpoint
    from glm_edge_ft.model.memory import estimate_memory
    from glm_edge_ft.model.precision import choose_precision, look_at_machine

    config, problems = plan.config, ProblemList()
    precision = None
    with _collect(problems):
        precision = choose_precision(config.training_args, config.peft_config is not None, look_at_machine())
    checkpoint = None
    with _collect(problems):
        checkpoint = read_checkpoint(plan.location)
    if checkpoint is None:
        problems.raise_if_any()
        raise AssertionError("a checkpoint that was not read has its problem")
    parameters = (0, 0)
    with _collect(problems):
        parameters = _count_parameters(config, checkpoint)
    encoder = None
    with _collect(problems):
        encoder = ConversationEncoder(
            checkpoint.tokenizer, frozenset(checkpoint.stop_ids), config.max_input_length, config.max_output_length
        )
    training_arguments = generation_config = None
    with _collect(problems):
        generation_config = build_generation_config(config, checkpoint)
    if precision is not None:
        with _collect(problems):
            training_arguments = build_training_arguments(plan, precision)
    datasets = {}
    for split, path in plan.data_files.items() if encoder is not None else ():
        with _collect(problems):
            datasets[split] = _encode(path, encoder, config.data_config.num_proc)
            _check_longest_row(path, datasets[split], checkpoint)
    problems.raise_if_any()
    assert precision is not None and encoder is not None  # each has its problem otherwise
    assert training_arguments is not None and generation_config is not None
    memory = estimate_memory(parameters[1], parameters[0], precision.weights)
    return Prepared(
        plan, checkpoint, precision, encoder, datasets, parameters, memory, training_arguments, generation_config
    )


def build_training_arguments(plan: Plan, precision: Precision) -> Seq2SeqTrainingArguments:
    """Return the Trainer's arguments: the config's, with the precision that was chosen.

    Raises UserError when transformers refuses a value that the config's own checks let through.
    """
    import torch
    from transformers import Seq2SeqTrainingArguments

    settings = dict(plan.config.training_args)
    settings |= {"bf16": precision.bf16, "fp16": precision.fp16, "output_dir": str(plan.output_dir)}
    settings.setdefault("use_cpu", not torch.cuda.is_available())
    settings.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    settings.setdefault("logging_nan_inf_filter", False)  # a NaN must show as what it is
    settings.setdefault("log_level", "error")  # the Trainer's own lines repeat ours
    settings["dataloader_num_workers"] = clamp_workers(settings.get("dataloader_num_workers", 0), os.cpu_count() or 1)
    if plan.resume.path is not None:
        settings["eval_on_start"] = False  # the base model was evaluated when the run began
    try:
        return Seq2SeqTrainingArguments(**settings)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise UserError.single("training_args", f"transformers refuses these settings: {error}") from error


def clamp_workers(wanted: int, cores: int) -> int:
    """Return the number of loader processes, at most one for each core, with a notice when that is less than wanted."""
    if wanted <= cores:
        return wanted
    show_notice(f"training_args.dataloader_num_workers {wanted} -> {cores}: this machine has {cores} cores")
    return cores


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
        raise UserError.single(
            "training_args.generation_config", f"transformers refuses these settings: {error}"
        ) from error
    return generation_config


def _encode(path: Path, encoder: ConversationEncoder, num_proc: int) -> EncodedDataset:
    from glm_edge_ft.data.dataset import build_dataset

    dataset, notices = build_dataset([path], encoder, num_proc=num_proc, progress=is_main_process())
    for notice in notices:
        show_notice(notice)
    return dataset


def _check_longest_row(path: Path, dataset: EncodedDataset, checkpoint: Checkpoint) -> None:
    """Refuse rows with more tokens than the model has positions for."""
    limit, longest = getattr(checkpoint.config, "max_position_embeddings", None), int(dataset.lengths.max())
    if limit is not None and longest > limit:
        raise UserError.single(
            str(path),
            f"its longest row has {longest} tokens, the model takes {limit}",
            f"lower max_input_length and max_output_length until they add up to at most {limit}",
        )


def _count_parameters(config: RunConfig, checkpoint: Checkpoint) -> tuple[int, int]:
    """Return (trainable, all) counts, from the model's twin on the meta device."""
    from glm_edge_ft.model.adapters import check_adapter, count_parameters
    from glm_edge_ft.model.loading import build_meta_model

    model = build_meta_model(checkpoint)
    total = count_parameters(model)[1]
    if config.peft_config is None:
        return total, total
    trainable = check_adapter(config.peft_config, model)
    return trainable, total + trainable


@contextmanager
def _collect(problems: ProblemList) -> Iterator[None]:
    """Note the problems of a UserError raised inside, and go on after the block."""
    try:
        yield
    except UserError as error:
        problems.extend(error)
