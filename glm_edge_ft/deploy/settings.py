"""How a model is used after training: as its run used it, as a YAML file says, or by defaults."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glm_edge_ft.config import RunConfig, load_config
from glm_edge_ft.deploy.source import Source, read_record
from glm_edge_ft.errors import UserError

# The settings of training that also say how a trained model is evaluated; nothing is trained, saved or logged here.
_KEPT_TRAINING_ARGS = (
    "bf16",
    "dataloader_num_workers",
    "disable_tqdm",
    "fp16",
    "log_level",
    "per_device_eval_batch_size",
    "seed",
    "use_cpu",
)
_NOT_HERE = ("training_args.deepspeed=null",)  # its file need not be on this machine
_DEFAULTS = {
    "data_config": {"train_file": "none.jsonl"},
    "max_input_length": 2048,
    "max_output_length": 512,
    "training_args": {"output_dir": "output"},
}


def settings_of_run(source: Source, overrides: Sequence[str] = ()) -> RunConfig | None:
    """Return the config of the run that wrote a model, as its `run.json` has it, or None where there is none.

    Overrides are `--set` options, as `load_config` takes them.

    Raises UserError when this version cannot read it as a config any more.
    """
    config = read_record(source.record).get("config") if source.record is not None else None
    if not isinstance(config, dict):
        return None
    try:
        _load(config, ())
    except UserError as error:
        key = error.problems[0].where.rpartition(": ")[2]  # without the name of the file that it was written to
        what = f"its config cannot be used: {key}: {error.problems[0].what}"
        raise UserError.single(str(source.record), what, "move the file away to go by the defaults") from error
    return _for_use(_load(config, overrides))


def settings_of_file(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return a YAML file's settings, `--set` options laid over them. Raises UserError as `load_config` does."""
    return _for_use(load_config(path, (*overrides, *_NOT_HERE)))


def default_settings(overrides: Sequence[str] = ()) -> RunConfig:
    """Return what holds where neither a run nor a file says anything: greedy replies of at most 512 tokens."""
    return _for_use(_load(_DEFAULTS, overrides))


def _load(config: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
        return load_config(path, (*overrides, *_NOT_HERE))


def _for_use(config: RunConfig) -> RunConfig:
    kept = {key: config.training_args[key] for key in _KEPT_TRAINING_ARGS if key in config.training_args}
    training = {
        **kept,
        "predict_with_generate": True,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
    }
    return replace(config, training_args=training, peft_config=None, freezeV=False, notices=())
