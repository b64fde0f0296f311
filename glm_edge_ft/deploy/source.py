"""MODEL_OR_CHECKPOINT of the commands after training: find it, open it, and use it with the settings of its run.

It is an embedded model, a hub id, or the folder of a model, a run, a checkpoint or an adapter. `find_source` needs the
file system alone, so that a wrong name shows at once.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glm_edge_ft.checks.preflight import prepare
from glm_edge_ft.config import RunConfig, load_config
from glm_edge_ft.console import show_notice
from glm_edge_ft.errors import UserError
from glm_edge_ft.files import expand_home
from glm_edge_ft.model.checkpoint import ModelLocation
from glm_edge_ft.model.loading import locate_model
from glm_edge_ft.model.quantization import REQUIREMENT, is_installed
from glm_edge_ft.model.saved_folder import ADAPTER_CONFIG, SavedAdapter, read_adapter
from glm_edge_ft.run import Plan, Prepared, RunRequest
from glm_edge_ft.training.checkpoints import RUN_RECORD, ResumePlan, find_checkpoints
from glm_edge_ft.training.deepspeed import skip_deepspeed_import

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from glm_edge_ft.model.checkpoint import Checkpoint

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# The settings of training that also say how a trained model is evaluated.
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
_TRAINING_ARGS_OF_USE = {
    "predict_with_generate": True,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "remove_unused_columns": False,
}
_NO_DEEPSPEED = "training_args.deepspeed=null"  # its file need not be on this machine
_DEFAULTS = {
    "data_config": {"train_file": "none.jsonl"},
    "max_input_length": 2048,
    "max_output_length": 512,
    "training_args": {"output_dir": "output"},
}


@dataclass(frozen=True)
class Source:
    """What MODEL_OR_CHECKPOINT names.

    Attributes:
        name: as written.
        location: the model, or an adapter's base model with the adapter's folder.
        adapter: what its config says; None for a whole model.
        record: the `run.json` of the run that wrote it, or None.
        run: the content of `record`; empty where there is none or it cannot be read.
        step: the N of a `checkpoint-N`, or None.
        base_is_given: whether `--base` named the base model.
    """

    name: str
    location: ModelLocation
    adapter: SavedAdapter | None = None
    record: Path | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    base_is_given: bool = False

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The config of the run, as its record has it; None where there is none."""
        config = self.run.get("config")
        return config if isinstance(config, dict) else None

    @property
    def quantization(self) -> Literal["nf4"] | None:
        """The form of an adapter's base model in its run; None: unquantized."""
        return "nf4" if self.adapter and self.config and self.config.get("quantization") == "nf4" else None


def find_source(name: str, base: str | None = None) -> Source:
    """Return what MODEL_OR_CHECKPOINT names; an adapter's base model is found by itself unless `base` names it.

    Raises UserError when there is no such model, with the checkpoints that are there; when the base model of an adapter
    is not on this machine; and for a `base` beside a whole model.
    """
    folder, where = expand_home(name), f"MODEL {name}"
    numbered = _CHECKPOINT.fullmatch(folder.name)
    if not folder.is_dir():
        above = folder.parent
        if str(above) != "." and above.is_dir() and not folder.is_file():  # a path was meant, not a hub id
            found = _usable_folders(above)
            if found or numbered:
                raise UserError.single(where, "there is no such folder", _listed(found, above))
        return _without_base(Source(name, locate_model(name)), base)
    places = [folder, folder.absolute().parent] if numbered else [folder]
    record = next((place / RUN_RECORD for place in places if (place / RUN_RECORD).is_file()), None)
    run, step = _read_record(record), int(numbered[1]) if numbered else None
    if (folder / "config.json").is_file():  # beside an adapter, `locate_model` refuses the folder
        return _without_base(Source(name, locate_model(name), None, record, run, step), base)
    if not (folder / ADAPTER_CONFIG).is_file():
        inside_run = not _usable_folders(folder) and (folder.parent / RUN_RECORD).is_file()  # such as predictions/
        searched = folder.parent if inside_run else folder
        what = "the folder holds neither a model nor an adapter"
        raise UserError.single(where, what, _listed(_usable_folders(searched), searched))
    adapter = read_adapter(folder.absolute())
    location = locate_model(base) if base is not None else _find_base(where, adapter, run)
    location = replace(location, adapter=adapter.folder)
    return Source(name, location, adapter, record, run, step, base_is_given=base is not None)


def _without_base(source: Source, base: str | None) -> Source:
    if base is not None:
        what = f"is given, but {source.name} is a whole model"
        raise UserError.single(f"--base {base}", what, "leave --base out; it belongs to an adapter")
    return source


def _listed(found: Sequence[Path], folder: Path) -> str:
    if not found:
        return f"no checkpoint was found in {folder} either; give a model's folder, a run's output folder, or a hub id"
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f"found there: {', '.join(map(str, found[:8]))}{more}"


def _usable_folders(folder: Path) -> list[Path]:
    """Return the folders with a model or an adapter in them: this one, those below it, and their checkpoints."""
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not _CHECKPOINT.fullmatch(path.name))
    found = []
    for place in (folder, *below):
        if any((place / file).is_file() for file in (ADAPTER_CONFIG, "config.json")):
            found.append(place)
        found += [checkpoint.path for checkpoint in find_checkpoints(place)]
    return found


def _read_record(record: Path | None) -> Mapping[str, Any]:
    try:
        content = json.loads(record.read_text(encoding="utf-8")) if record is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _find_base(where: str, adapter: SavedAdapter, run: Mapping[str, Any]) -> ModelLocation:
    """Return an adapter's base model: as its config names it, else as the run's record does; a folder before a hub id.

    The config names an embedded model by its folder in the checkout that trained it, the record by its name.
    """
    names = [text for text in dict.fromkeys((adapter.base, str(run.get("model") or ""))) if text]
    located = []
    for text in names:
        with contextlib.suppress(UserError):
            located.append(locate_model(text))
    if located:
        return min(located, key=lambda location: not location.is_local)
    what = f"its base model is not here any more: {' or '.join(names)}"
    if not names:
        what = "its adapter_config.json does not name its base model"
    raise UserError.single(where, what, "give it: --base MODEL")


def run_settings(source: Source, overrides: Sequence[str] = ()) -> RunConfig | None:
    """Return how the run that wrote a model evaluated it, `--set` options laid over it; None where no run is known.

    Raises UserError when this version cannot read the run's config any more.
    """
    if source.config is None:
        return None
    try:
        _load(source.config, ())
    except UserError as error:
        key = error.problems[0].where.rpartition(": ")[2]  # without the name of the file that it was written to
        what = f"its config cannot be used: {key}: {error.problems[0].what}"
        raise UserError.single(str(source.record), what, "move the file away to go by the defaults") from error
    return _load(source.config, overrides)


def file_settings(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return how a YAML file evaluates a model. Raises UserError as `load_config` does."""
    config = load_config(path, (*overrides, _NO_DEEPSPEED))
    kept = {key: config.training_args[key] for key in _KEPT_TRAINING_ARGS if key in config.training_args}
    return replace(config, training_args=kept | _TRAINING_ARGS_OF_USE, peft_config=None, freezeV=False, notices=())


def default_settings(overrides: Sequence[str] = ()) -> RunConfig:
    """Return how a model is evaluated that has neither run nor file: greedily, replies of at most 512 tokens."""
    return _load(_DEFAULTS, overrides)


def _load(config: Mapping[str, Any], overrides: Sequence[str]) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
        return file_settings(path, overrides)


def open_checkpoint(source: Source) -> Checkpoint:
    """Read everything of a model but its weights; of an adapter its base model's, with the adapter's own tokenizer.

    Raises UserError; for a base model that `--base` did not name, with the advice to name it.
    """
    from glm_edge_ft.model.loading import read_checkpoint

    try:
        return read_checkpoint(source.location)
    except UserError as error:
        if source.adapter is None or source.base_is_given:
            raise
        what = f"its base model {source.location.name} cannot be used: {error.problems[0].what}"
        raise UserError.single(f"MODEL {source.name}", what, "give another: --base MODEL") from error


def prepare_inference(
    source: Source, config: RunConfig, *, takes_images: bool, output_dir: Path, data_files: dict[str, Path]
) -> Prepared:
    """Do the checks of a training run that also matter where nothing is trained; read no weights.

    `config` is that of `run_settings`, `file_settings` or `default_settings`, `data_files` what is evaluated, by split.
    Raises UserError with all that is wrong.
    """
    path = next(iter(data_files.values()), Path())
    config = _for_this_machine(config)
    training_args = {**config.training_args, "output_dir": str(output_dir)}
    data_config = replace(config.data_config, train_file=path.name)
    config = replace(config, data_config=data_config, training_args=training_args)
    request = RunRequest(path.parent, source.name, config.path, takes_images=takes_images)
    return prepare(Plan(request, config, source.location, ResumePlan(None), output_dir, data_files, trains=False))


def _for_this_machine(config: RunConfig) -> RunConfig:
    """Return the config without the number formats that this machine lacks: the run had another machine."""
    from glm_edge_ft.model.precision import choose_precision, detect_hardware

    try:
        choose_precision(config.training_args, trains_adapter=True, hardware=detect_hardware())
    except UserError as error:
        for problem in error.problems:
            show_notice(f"{problem.where} is {problem.what}: what the machine has is used")
        kept = {key: value for key, value in config.training_args.items() if key not in ("bf16", "fp16")}
        config = replace(config, training_args=kept)
    if config.quantization is not None and not is_installed():
        show_notice(
            f"the base model is used unquantized, not as its run had it (quantization: {config.quantization}): replies "
            f"can differ a little; pip install {REQUIREMENT} gives those of the run"
        )
        config = replace(config, quantization=None)
    return config


def load_model(prepared: Prepared) -> PreTrainedModel | PeftModel:
    """Read the weights, put the adapter on, and return the model on the device of the run, nothing trainable.

    The weights have the formats in which the model's own run evaluated it: 16 bits under an adapter and where the files
    hold 16-bit numbers, float32 for a model that was trained whole.

    Raises UserError when they cannot be read, or when the adapter does not fit its base model.
    """
    import torch

    from glm_edge_ft.checks.adapter_trial import check_is_loaded
    from glm_edge_ft.model.loading import load_weights
    from glm_edge_ft.model.precision import choose_precision, detect_hardware
    from glm_edge_ft.model.saved_folder import load_adapter

    skip_deepspeed_import()
    adapter, config = prepared.plan.location.adapter, prepared.plan.config
    is_frozen = adapter is not None or prepared.checkpoint.config.dtype in (torch.bfloat16, torch.float16)
    chosen = choose_precision(config.training_args, is_frozen, detect_hardware())
    device = prepared.training_arguments.device
    model = load_weights(prepared.checkpoint, getattr(torch, chosen.weights), config.quantization, device)
    model.requires_grad_(False)
    whole: Any = model
    if adapter is not None:
        whole = load_adapter(model, adapter)
        check_is_loaded(whole, adapter)
    return whole.to(device).eval()
