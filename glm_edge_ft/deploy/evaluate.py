"""`python -m glm_edge_ft evaluate`: metrics and predictions of models on any data file, without training.

Loss, replies and scores come from the trainer's own evaluation, under one set of settings for all models, so that the
rows of the table can be compared, and a checkpoint gets here the numbers that its run logged.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glm_edge_ft.checks.environment import quiet_libraries
from glm_edge_ft.config import RunConfig
from glm_edge_ft.console import show, show_notice
from glm_edge_ft.deploy.source import (
    Source,
    default_settings,
    file_settings,
    find_source,
    load_model,
    open_checkpoint,
    prepare_inference,
    run_settings,
)
from glm_edge_ft.distributed import launch
from glm_edge_ft.errors import ProblemList
from glm_edge_ft.files import DATA_SUFFIXES, append_text, can_be_made, did_you_mean, expand_home, make_folder
from glm_edge_ft.model.saved_folder import ADAPTER_CONFIG
from glm_edge_ft.run import Prepared, build_collator, build_generation_context, load_evaluations
from glm_edge_ft.training.checkpoints import (
    METRICS_FILE,
    PREDICTIONS_FOLDER,
    RUN_RECORD,
    find_checkpoints,
    move_aside,
)

PREFIX = "test"


def evaluate(
    data_file: Path,
    models: Sequence[str],
    out: Path,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    base: str | None = None,
) -> None:
    """Evaluate each model on the data file; print a table, and write metrics and predictions below `out`.

    Each argument is that of the command line; `base` belongs to the adapters among the models.

    Raises UserError with all that is wrong with the command line and the data, before weights are read.
    """
    problems, sources = ProblemList(), []
    _check_paths(problems, data_file, out)
    for name in models:
        is_adapter = (expand_home(name) / ADAPTER_CONFIG).is_file()
        with problems.collect():
            sources.append(find_source(name, base if is_adapter else None))
    with problems.collect():
        config = _settings(sources, config_file, overrides)
    problems.raise_if_any()
    from glm_edge_ft.training.logs import finite_or_none

    quiet_libraries()
    sets_quantization = any(text.partition("=")[0].strip() == "quantization" for text in overrides)
    opened = _open_all(sources, config, sets_quantization, data_file, out)
    make_folder(out, "--out")
    metrics_file, folder = out / METRICS_FILE, out / PREDICTIONS_FOLDER
    if earlier := [path for path in (metrics_file, folder) if path.exists()]:
        show_notice(f"the earlier files of {out} were moved to {move_aside(out, earlier)}")
    for remark in opened[0].datasets["test"].report.remarks():
        show_notice(f"{data_file.name}: {remark}")
    results = []
    for source, prepared, label in zip(sources, opened, _labels(sources), strict=True):
        metrics = _evaluate_model(prepared)
        (folder / f"{PREFIX}-0.jsonl").replace(folder / f"{label}.jsonl")
        line = {"model": source.name, "step": source.step, "data": str(data_file)}
        line |= {name: finite_or_none(value) for name, value in metrics.items()}
        append_text(metrics_file, json.dumps(line, ensure_ascii=False) + "\n")
        results.append(metrics)
    show(_table([source.name for source in sources], results))
    show(f"\nmetrics:     {metrics_file}\npredictions: {folder}")


def _check_paths(problems: ProblemList, data_file: Path, out: Path) -> None:
    where = f"DATA_FILE {data_file}"
    if data_file.is_dir():
        problems.add(where, "is a folder", f"name a file in it, such as {data_file / 'test.jsonl'}")
    elif not data_file.is_file():
        problems.add(where, "there is no such file", did_you_mean(data_file) + "name a file of conversations")
    elif data_file.suffix.lower() not in DATA_SUFFIXES:
        problems.add(where, "has an unknown format", f"use one of {', '.join(DATA_SUFFIXES)}")
    where = f"--out {out}"
    if out.exists() and not out.is_dir():
        problems.add(where, "is a file", "name a folder")
    elif (out / RUN_RECORD).is_file() or find_checkpoints(out):
        problems.add(where, "is the output folder of a run", "name a folder of its own")
    elif not can_be_made(out):
        problems.add(where, "cannot be made or written to", "name a folder of yours")
    if launch().world_size != 1:
        problems.add("torchrun", "starts several processes, and evaluate works in one", "start it with python")


def _settings(sources: Sequence[Source], config_file: Path | None, overrides: Sequence[str]) -> RunConfig:
    """Return the settings for all models: the YAML file's, else those of the first run among them, else defaults."""
    if config_file is not None:
        return file_settings(config_file, overrides)
    found = [(source, run_settings(source, overrides)) for source in sources]
    runs = [(source, config) for source, config in found if config is not None]
    if not runs:
        return default_settings(overrides)
    (first, config), *others = runs
    show_notice(f"all are evaluated with the settings of {first.record}; --config YAML names others")
    for source, other in others:
        keys = ("max_input_length", "max_output_length", "generation_config", "max_images")
        if any(vars(other)[key] != vars(config)[key] for key in keys):
            show_notice(f"{source.record} has other lengths or generation settings, which are not used")
    return config


def _labels(sources: Sequence[Source]) -> list[str]:
    """Return a file name for each model: `demo`, `demo-checkpoint-120`, the last part of a hub id."""
    labels: list[str] = []
    for source in sources:
        path = expand_home(source.name)
        parts = path.absolute().parts[-1 if source.step is None else -2 :] if path.is_dir() else (path.name,)
        label = re.sub(r"[^\w.-]+", "_", "-".join(parts))
        labels.append(f"{label}-{len(labels) + 1}" if label in labels else label)
    return labels


def _open_all(
    sources: Sequence[Source], config: RunConfig, sets_quantization: bool, data_file: Path, out: Path
) -> list[Prepared]:
    """Read tokenizers, check structures and encode the data for all models, before weights are read."""
    problems, opened, files = ProblemList(), [], {"test": data_file}
    for source in sources:
        own = config  # with the base model in the form that the model's own run had it in
        if not sets_quantization and not (source.adapter and source.record is None):
            own = replace(config, quantization=source.quantization)
        with problems.collect():
            checkpoint = open_checkpoint(source)
            model: Any = checkpoint.config
            # A vision model that was trained on text may leave no room for an image.
            takes_images = checkpoint.is_vision and config.max_input_length > model.tokens_per_image
            opened.append(prepare_inference(source, own, takes_images=takes_images, output_dir=out, data_files=files))
    problems.raise_if_any()
    return opened


def _evaluate_model(prepared: Prepared) -> dict[str, float]:
    """Return the metrics of one model, `test_loss`, `test_rouge-l` and so on, and write its predictions."""
    import torch
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
    metrics = trainer.evaluate(load_evaluations(prepared)["test"], metric_key_prefix=PREFIX)
    del trainer, model, base
    gc.collect()  # the next model may need the room
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return metrics


def _table(names: Sequence[str], results: Sequence[dict[str, float]]) -> str:
    from glm_edge_ft.training.logs import format_table
    from glm_edge_ft.training.metrics import METRIC_NAMES

    rows: list[tuple[str, ...]] = [("model", "loss", *METRIC_NAMES)]
    for name, metrics in zip(names, results, strict=True):
        scores = [f"{metrics[f'{PREFIX}_{metric}']:.2f}" for metric in METRIC_NAMES]
        rows.append((name, f"{metrics[f'{PREFIX}_loss']:.4f}", *scores))
    return format_table(rows)
