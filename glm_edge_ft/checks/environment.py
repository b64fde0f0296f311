"""What a process takes from its environment: one GPU, no setting behind the config, and no advice of the libraries."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from glm_edge_ft.console import show_notice
from glm_edge_ft.distributed import launch
from glm_edge_ft.errors import UserError

# accelerate's families, and what its launcher sets; then torch's, cuBLAS's, oneDNN's and transformers' switches.
_OVERRIDING_VARIABLE = re.compile(
    r"(ACCELERATE|FSDP|FP8|MEGATRON_LM|PARALLELISM_CONFIG|XLA_USE|XLA_DOWNCAST)_.*|SM_(HP_MP|FRAMEWORK)_PARAM\w+"
    r"|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|NVIDIA_TF32_OVERRIDE|(ONEDNN|DNNL)_DEFAULT_FPMATH_MODE"
    r"|CUBLAS_EMULATION_STRATEGY|CUBLAS_EMULATE_\w+_PRECISION"
    r"|TORCHDYNAMO_DISABLE|TORCH_COMPILE_(DISABLE|BACKEND|OVERRIDE_BACKENDS)|TORCHINDUCTOR_EMULATE_PRECISION_CASTS"
    r"|TRANSFORMERS_SDPA_FORCE_GQA|KUBEFLOW_TRAINER_SERVER_URL"  # the latter switches reporting on
)


def quiet_libraries() -> None:
    """Silence the libraries' advice to developers and the environment's settings; warnings about the run stay."""
    if removed := unset_overriding_variables():
        show_notice(f"not used, since the config alone decides how a run computes and reports: {', '.join(removed)}")
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advertises packages; PEFT imports it where it can
    import transformers.utils.logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def unset_overriding_variables() -> list[str]:
    """Remove variables by which libraries change precision, engine or compilation; return each as `NAME=value`.

    This has an effect only before the library that reads them is imported.
    """
    names = sorted(name for name in os.environ if _OVERRIDING_VARIABLE.fullmatch(name))
    return [f"{name}={os.environ.pop(name)}" for name in names]


def use_one_gpu(training_args: Mapping[str, Any]) -> str:
    """Restrict a process that no launcher started to its first GPU; return a notice where there are more.

    transformers would share each batch among all of them by `nn.DataParallel`, whose copies of the model are bound to
    the first GPU's weights. Raises UserError where a launcher started more processes than there are GPUs.
    """
    import torch

    count, here, visible = torch.cuda.device_count(), launch(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if count == 0 or training_args.get("use_cpu"):
        return ""
    if here.launcher != "none":
        shows_all = count > 1 or visible is None  # some launchers show each process only its own GPU
        if here.local_world_size > count and shows_all and not training_args.get("ddp_backend"):
            what = f"{here.local_world_size} processes were started on a machine with {count} GPU" + "s" * (count > 1)
            raise UserError.single("--nproc_per_node", what, f"write --nproc_per_node={count}")
        return ""
    if count == 1:
        return ""
    os.environ["CUDA_VISIBLE_DEVICES"] = (visible or "0").partition(",")[0]  # read at the first use of a GPU
    line = f"torchrun --standalone --nnodes=1 --nproc_per_node={count} {shlex.join(sys.argv)}"
    return f"one of {count} GPUs is used; to use all: {line}"
