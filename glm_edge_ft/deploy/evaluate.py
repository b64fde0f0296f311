"""`python -m glm_edge_ft evaluate`: metrics and predictions of models on any data file, without training.

Loss, replies and scores are made by the trainer's own evaluation, under one set of settings for all models, so that the
rows of the table can be compared, and a checkpoint gets here the numbers that its run logged.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.environment import quiet_libraries
from glm_edge_ft.config import RunConfig
from glm_edge_ft.console import show, show_notice
from glm_edge_ft.deploy.opening import load_model, open_checkpoint, prepare_use
from glm_edge_ft.deploy.settings import default_settings, settings_of_file, settings_of_run
from glm_edge_ft.deploy.source import Source, find_source, quantization_of_run
from glm_edge_ft.distributed import launch
from glm_edge_ft.errors import Problem, ProblemList, UserError
from glm_edge_ft.files import DATA_SUFFIXES, can_be_made, did_you_mean, expand_home, make_folder
from glm_edge_ft.model.saved_adapter import ADAPTER_CONFIG
from glm_edge_ft.run import Prepared, build_collator, build_generation_context, load_evaluations
from glm_edge_ft.training.checkpoints import (
    METRICS_FILE,
    PREDICTIONS_FOLDER,
    RUN_RECORD,
    find_checkpoints,
    move_aside,
)

if TYPE_CHECKING:
    from glm_edge_ft.model.checkpoint import Checkpoint
    from glm_edge_ft.training.trainer import GlmEdgeTrainer

PREFIX = "test"


@dataclass(frozen=True)
class EvaluateRequest:
    """One command line, as given."""

    data_file: Path
    models: tuple[str, ...]
    out: Path
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    base: str | None = None


def evaluate(request: EvaluateRequest) -> None:
    """Measure each model on the data file; print a table, and write metrics and predictions under `--out`.

    Raises UserError with all that is wrong with the command line and the data, before weights are read.
    """
    sources, config = _check(request)
    quiet_libraries()
    opened = _open_all(sources, config, request)
    make_folder(request.out, "--out")
    earlier = [request.out / name for name in (METRICS_FILE, PREDICTIONS_FOLDER) if (request.out / name).exists()]
    if earlier:
        show_notice(f"what was in {request.out} now lies in {move_aside(request.out, earlier)}")
    measured = []
    for remark in opened[0].datasets["test"].report.remarks():
        show_notice(f"{request.data_file.name}: {remark}")
    for source, prepared, label in zip(sources, opened, _labels(sources), strict=True):
        metrics = _measure(prepared)
        written = request.out / PREDICTIONS_FOLDER / f"{PREFIX}-0.jsonl"
        written.replace(written.with_name(f"{label}.jsonl"))
        measured.append(metrics)
        _write_metrics(request, source, metrics)
    show(_table([source.name for source in sources], measured))
    show(f"\nmetrics:     {request.out / METRICS_FILE}\npredictions: {request.out / PREDICTIONS_FOLDER}")


def _check(request: EvaluateRequest) -> tuple[list[Source], RunConfig]:
    problems = ProblemList()
    problems.problems += [*_check_data_file(request.data_file), *_check_out(request.out)]
    if launch().world_size != 1:
        problems.add("torchrun", "starts several processes, and models are measured in one", "start it with python")
    sources: list[Source] = []
    for name in request.models:
        is_adapter = (expand_home(name) / ADAPTER_CONFIG).is_file()
        try:
            sources.append(find_source(name, request.base if is_adapter else None))
        except UserError as error:
            problems.extend(error)
    config = None
    try:
        config = _settings(request, sources)
    except UserError as error:
        problems.extend(error)
    problems.raise_if_any()
    assert config is not None
    return sources, config


def _check_data_file(path: Path) -> list[Problem]:
    if path.is_dir():
        return [Problem(f"DATA_FILE {path}", "is a folder", f"name a file in it, such as {path / 'test.jsonl'}")]
    if not path.is_file():
        return [
            Problem(f"DATA_FILE {path}", "there is no such file", did_you_mean(path) + "name a file of conversations")
        ]
    if path.suffix.lower() not in DATA_SUFFIXES:
        return [Problem(f"DATA_FILE {path}", "has an unknown format", f"use one of {', '.join(DATA_SUFFIXES)}")]
    return []


def _check_out(out: Path) -> list[Problem]:
    if out.exists() and not out.is_dir():
        return [Problem(f"--out {out}", "is a file", "name a folder")]
    if (out / RUN_RECORD).is_file() or find_checkpoints(out):
        return [Problem(f"--out {out}", "is the output folder of a run", "name a folder of its own")]
    if not can_be_made(out):
        return [Problem(f"--out {out}", "cannot be made or written to", "name a folder of yours")]
    return []


def _settings(request: EvaluateRequest, sources: Sequence[Source]) -> RunConfig:
    """Return the settings for all models: the YAML file's, else those of the first run among them, else defaults."""
    if request.config is not None:
        return settings_of_file(request.config, request.overrides)
    found = [(source, settings_of_run(source, request.overrides)) for source in sources]
    runs = [(source, config) for source, config in found if config is not None]
    if not runs:
        return default_settings(request.overrides)
    (first, config), *others = runs
    show_notice(f"all are measured with the settings of {first.record}; --config YAML names others")
    for source, other in others:
        if _what_counts(other) != _what_counts(config):
            show_notice(f"{source.record} has other lengths or generation settings, which are not used")
    return config


def _in_own_form(source: Source, config: RunConfig, request: EvaluateRequest) -> RunConfig:
    """Return the settings with the base model in the form that a model's own run had it in, unless `--set` says one."""
    if any(text.partition("=")[0].strip() == "quantization" for text in request.overrides):
        return config
    if source.adapter is not None and source.record is None:
        return config
    return replace(config, quantization=quantization_of_run(source))


def _what_counts(config: RunConfig) -> tuple[Any, ...]:
    return config.max_input_length, config.max_output_length, config.generation_config, config.max_images


def _labels(sources: Sequence[Source]) -> list[str]:
    """Return a file name for each model: `demo`, `demo-checkpoint-120`, the last part of a hub id."""
    labels: list[str] = []
    for source in sources:
        path = expand_home(source.name)
        parts = path.absolute().parts[-1 if source.step is None else -2 :] if path.is_dir() else (path.name,)
        label = re.sub(r"[^\w.-]+", "_", "-".join(parts))
        taken = labels.count(label)
        labels.append(label if not taken else f"{label}-{len(labels) + 1}")
    return labels


def _open_all(sources: Sequence[Source], config: RunConfig, request: EvaluateRequest) -> list[Prepared]:
    """Read tokenizers, check structures and encode the data for all models, before the first takes its time."""
    problems, opened = ProblemList(), []
    for source in sources:
        try:
            images = _takes_images(open_checkpoint(source), config)
            files = {"test": request.data_file}
            own = _in_own_form(source, config, request)
            opened.append(prepare_use(source, own, takes_images=images, output_dir=request.out, data_files=files))
        except UserError as error:
            problems.problems += [problem for problem in error.problems if problem not in problems.problems]
    problems.raise_if_any()
    return opened


def _measure(prepared: Prepared) -> dict[str, float]:
    """Return the metrics of one model, `test_loss`, `test_rouge-l` and so on; its predictions lie in a file then."""
    import torch

    data = load_evaluations(prepared)["test"]
    metrics = _evaluator(prepared).evaluate(data, metric_key_prefix=PREFIX)
    gc.collect()  # the next model may need the room
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return metrics


def _takes_images(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Return whether rows may have images: not where a vision model was trained on text, with room for no image."""
    model: Any = checkpoint.config
    return checkpoint.is_vision and config.max_input_length > model.tokens_per_image


def _evaluator(prepared: Prepared) -> GlmEdgeTrainer:
    from peft import PeftModel
    from transformers import PrinterCallback, ProgressCallback

    from glm_edge_ft.data.pixels import pixel_normalizer
    from glm_edge_ft.training.loss import install_supervised_loss
    from glm_edge_ft.training.trainer import GlmEdgeTrainer

    model = load_model(prepared)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    install_supervised_loss(base)
    images = pixel_normalizer(prepared.image_processor, prepared.training_arguments.device)
    trainer = GlmEdgeTrainer(
        model=model,
        args=prepared.training_arguments,
        processing_class=prepared.checkpoint.tokenizer,
        data_collator=build_collator(prepared, "right", images),
        generation_context=build_generation_context(prepared, images),
        images=images,
        complete_saved_folder=lambda _: None,  # nothing is saved
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _write_metrics(request: EvaluateRequest, source: Source, metrics: dict[str, float]) -> None:
    from glm_edge_ft.training.logs import finite_or_none

    record: dict[str, Any] = {"model": source.name, "step": source.step, "data": str(request.data_file)}
    record |= {name: finite_or_none(value) for name, value in metrics.items()}
    with (request.out / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _table(names: Sequence[str], measured: Sequence[dict[str, float]]) -> str:
    from glm_edge_ft.training.logs import format_table
    from glm_edge_ft.training.metrics import METRIC_NAMES

    rows: list[tuple[str, ...]] = [("model", "loss", *METRIC_NAMES)]
    for name, metrics in zip(names, measured, strict=True):
        scores = [f"{metrics[f'{PREFIX}_{metric}']:.2f}" for metric in METRIC_NAMES]
        rows.append((name, f"{metrics[f'{PREFIX}_loss']:.4f}", *scores))
    return format_table(rows)
