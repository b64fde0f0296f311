"""DeepSpeed's JSON as transformers and DeepSpeed read it: asked before the weights are read."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_edge_ft.config.deepspeed import read_deepspeed
from glm_edge_ft.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments

_SECTIONS = {"DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedFP16Config": "fp16"}


def check_deepspeed(named: str | Mapping[str, Any], args: Seq2SeqTrainingArguments, steps: int | None) -> None:
    """Ask transformers and DeepSpeed whether they can work with the settings of a run.

    Args:
        named: `training_args.deepspeed` of the config.
        args: the Trainer's arguments, whose `deepspeed` holds the completed settings.
        steps: optimizer steps of the run; None where they are not known.

    Raises:
        UserError: for each value that contradicts another argument, or that DeepSpeed refuses or cannot run here.
    """
    assert isinstance(args.deepspeed, dict)
    file = f"{Path(named).name}: " if isinstance(named, str) else ""
    stated = {key: value for key, value in read_deepspeed(named).items() if key in ("optimizer", "scheduler")}
    found = [
        *((what, 'write "auto" there, or leave the key out') for what in mismatches(stated, args, steps)),
        *((what, "correct it there, or leave it out") for what in refused_by_deepspeed(args.deepspeed)),
    ]
    if found:
        raise UserError(Problem("training_args.deepspeed", f"{file}{what}", fix) for what, fix in found)


def mismatches(stated: Mapping[str, Any], args: Seq2SeqTrainingArguments, steps: int | None) -> list[str]:
    """Return what transformers finds different in the JSON and in the arguments: `key=value, but argument=value`.

    Args:
        stated: `optimizer` and `scheduler` of the JSON, which the completed settings leave out.
        args: the Trainer's arguments.
        steps: optimizer steps of the run; None where they are not known.
    """
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, set_hf_deepspeed_config

    assert isinstance(args.deepspeed, dict)
    without_sizes = {key: value for key, value in args.deepspeed.items() if key != "zero_optimization"}
    config = HfTrainerDeepSpeedConfig({**without_sizes, **stated})
    set_hf_deepspeed_config(args.hf_deepspeed_config)  # making another one has taken its place
    config.trainer_config_process(args)
    if steps is not None:
        with contextlib.suppress(ValueError):  # it lists the mismatches, which have their own attribute
            config.trainer_config_finalize(args, None, steps)
    return [text.removeprefix("- ds ").replace(" vs hf ", ", but ") for text in config.mismatches]


def refused_by_deepspeed(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield what DeepSpeed itself refuses in completed settings, or cannot run on this machine.

    Batch sizes and "auto" are left to the YAML.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    written: dict[str, Any] = {**_without_auto(settings), "train_micro_batch_size_per_gpu": 1}
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        written.pop(key, None)
    try:
        DeepSpeedConfig(written)
    except ValidationError as error:
        section = [_SECTIONS[error.title]] if error.title in _SECTIONS else []
        for found in error.errors():
            yield f"{'.'.join(map(str, (*section, *found['loc'])))} is `{found['input']}`: {found['msg']}"
    except Exception as error:  # whatever its parser raises, the file is what the user can change
        yield f"DeepSpeed refuses these settings: {type(error).__name__}: {error}"
    else:
        yield from _missing_tools(settings.get("zero_optimization", {}))


def _missing_tools(zero: Mapping[str, Any]) -> Iterator[str]:
    """Yield what this machine lacks for the operators that DeepSpeed compiles at first use."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    devices = {key: zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    for key, device in devices.items():
        if device == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
            yield f"zero_optimization.{key}.device is `nvme`, for which DeepSpeed needs the library libaio (libaio-dev)"
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    needed = {"deepspeed_shm_comm": on_cpu, "cpu_adam": devices["offload_optimizer"] != "none"}
    compiles = [name for name, is_needed in needed.items() if is_needed and not installed_ops.get(name)]
    if compiles and not (shutil.which(get_cxx_compiler()) and is_ninja_available()):
        yield f"DeepSpeed compiles {' and '.join(compiles)} for this run: install ninja and a C++ compiler (g++)"


def _without_auto(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
