"""From MODEL_OR_CHECKPOINT to a model that can be asked: tokenizer and encoder first, then the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.checks.preflight import prepare
from glm_edge_ft.config import RunConfig
from glm_edge_ft.console import show_notice
from glm_edge_ft.deploy.source import Source
from glm_edge_ft.errors import UserError
from glm_edge_ft.model.quantization import REQUIREMENT, is_installed
from glm_edge_ft.run import Plan, Prepared, RunRequest
from glm_edge_ft.training.checkpoints import ResumePlan
from glm_edge_ft.training.deepspeed import skip_deepspeed_import

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from glm_edge_ft.model.checkpoint import Checkpoint


def open_checkpoint(source: Source) -> Checkpoint:
    """Read everything of a model but its weights; of an adapter its base model's, with the adapter's own tokenizer.

    Raises UserError; for a base model that was not named by `--base`, with the advice to name it.
    """
    from glm_edge_ft.model.loading import read_checkpoint

    try:
        return read_checkpoint(source.location)
    except UserError as error:
        if source.adapter is None or source.base_is_given:
            raise
        what = f"its base model {source.location.name} cannot be used: {error.problems[0].what}"
        raise UserError.single(f"MODEL {source.name}", what, "give another: --base MODEL") from error


def prepare_use(
    source: Source, config: RunConfig, *, takes_images: bool, output_dir: Path, data_files: dict[str, Path]
) -> Prepared:
    """Do the checks of a training run that also matter where nothing is trained; read no weights.

    Args:
        source: the model.
        config: how it is used (`settings`).
        takes_images: whether its prompts may have images.
        output_dir: where predictions go.
        data_files: what is evaluated, by split; none in a talk.

    Raises:
        UserError: with all that is wrong.
    """
    path = next(iter(data_files.values()), Path())
    training_args = {**_usable_precision(config), "output_dir": str(output_dir)}
    data_config = replace(config.data_config, train_file=path.name)
    config = replace(_usable_form(config), data_config=data_config, training_args=training_args)
    request = RunRequest(path.parent, source.name, config.path, takes_images=takes_images)
    return prepare(Plan(request, config, source.location, ResumePlan(None), output_dir, data_files, trains=False))


def _usable_precision(config: RunConfig) -> dict[str, Any]:
    """Return the training arguments without a number format that this machine lacks: the run had another machine."""
    from glm_edge_ft.model.precision import choose_precision, look_at_machine

    try:
        choose_precision(config.training_args, trains_adapter=True, machine=look_at_machine())
    except UserError as error:
        for problem in error.problems:
            show_notice(f"{problem.where} is {problem.what}: what the machine has is used")
        return {key: value for key, value in config.training_args.items() if key not in ("bf16", "fp16")}
    return dict(config.training_args)


def _usable_form(config: RunConfig) -> RunConfig:
    """Return the config without 4 bits where bitsandbytes is not installed: the run had another machine."""
    if config.quantization is None or is_installed():
        return config
    show_notice(
        f"the base model is used as plain numbers, not in 4 bits as its run had it (quantization: "
        f"{config.quantization}): replies can differ a little; pip install {REQUIREMENT} gives those of the run"
    )
    return replace(config, quantization=None)


def load_model(prepared: Prepared) -> PreTrainedModel | PeftModel:
    """Read the weights, put the adapter on, and return the model on the device of the run, nothing trainable.

    Raises UserError when they cannot be read, or when the adapter does not fit its base model.
    """
    from glm_edge_ft.model.loading import load_weights
    from glm_edge_ft.model.saved_adapter import load_adapter

    skip_deepspeed_import()
    adapter = prepared.plan.location.adapter
    quantization, device = prepared.plan.config.quantization, prepared.training_arguments.device
    model = load_weights(prepared.checkpoint, _weights_format(prepared), quantization, device)
    model.requires_grad_(False)
    whole: Any = model if adapter is None else load_adapter(model, adapter)
    return whole.to(device).eval()


def _weights_format(prepared: Prepared) -> torch.dtype:
    """Return the format for the weights: 16 bits where a run would freeze them so, else float32 as trained.

    So a model is measured in the formats in which its own run measured it: under an adapter, and where the files hold
    16-bit numbers, in those that the machine computes in; a model that was trained whole is kept in float32.
    """
    import torch

    from glm_edge_ft.model.precision import choose_precision, look_at_machine

    stored = getattr(prepared.checkpoint.config, "dtype", None)
    is_frozen = prepared.plan.location.adapter is not None or stored in (torch.bfloat16, torch.float16)
    chosen = choose_precision(prepared.plan.config.training_args, is_frozen, look_at_machine())
    return getattr(torch, chosen.weights)
