"""Which number formats a run uses: what the config asks for, checked against what the machine has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm_edge_ft.errors import Problem, UserError


@dataclass(frozen=True)
class Machine:
    """What matters of this machine.

    Attributes:
        has_gpu: whether a CUDA device is visible.
        gpu_has_bf16: whether that device computes in bfloat16.
        cpu_has_bf16: whether the CPU has bfloat16 instructions; without them bf16 is emulated and slower than fp32.
    """

    has_gpu: bool
    gpu_has_bf16: bool
    cpu_has_bf16: bool


@dataclass(frozen=True)
class Precision:
    """The number formats of a run.

    Attributes:
        weights: dtype name in which the base model is loaded: `float32`, `bfloat16` or `float16`.
        bf16: train under bfloat16 autocast.
        fp16: train under float16 autocast with a loss scaler.
        reason: one line for the run's header.
    """

    weights: str
    bf16: bool
    fp16: bool
    reason: str

    @property
    def compute(self) -> str:
        """Dtype name in which the run computes."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"


def look_at_machine() -> Machine:
    """Return what this machine has; imports torch."""
    import torch

    has_gpu = torch.cuda.is_available()
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, and absent on builds for other CPUs
    return Machine(
        has_gpu=has_gpu,
        gpu_has_bf16=has_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        cpu_has_bf16=bool(capability and capability()),
    )


def choose_precision(training_args: Mapping[str, Any], trains_adapter: bool, machine: Machine) -> Precision:
    """Return the formats for a run, the config's word first, else the machine's best.

    A frozen base model is kept in the 16-bit format, since nothing is added to its weights. Weights that are trained
    stay in float32 under autocast: updates of 1e-5 vanish in 16-bit weights, and a loss scaler cannot unscale 16-bit
    gradients.

    Raises UserError when the config names a format that the machine lacks.
    """
    on_gpu = machine.has_gpu and not training_args.get("use_cpu", False)
    wanted_bf16, wanted_fp16 = training_args.get("bf16"), training_args.get("fp16")
    problems = [*_lacking("bf16", wanted_bf16, on_gpu, machine), *_lacking("fp16", wanted_fp16, on_gpu, machine)]
    if problems:
        raise UserError(problems)
    if wanted_bf16 or (on_gpu and machine.gpu_has_bf16 and wanted_bf16 is None and not wanted_fp16):
        weights = "bfloat16" if trains_adapter else "float32"
        return Precision(weights, bf16=True, fp16=False, reason=_reason("bf16", wanted_bf16, weights))
    if wanted_fp16 or (on_gpu and not machine.gpu_has_bf16 and wanted_fp16 is None and wanted_bf16 is None):
        weights = "float16" if trains_adapter else "float32"
        return Precision(weights, bf16=False, fp16=True, reason=_reason("fp16", wanted_fp16, weights))
    return Precision("float32", bf16=False, fp16=False, reason="fp32" + ("" if on_gpu else " (CPU)"))


def _reason(name: str, wanted: bool | None, weights: str) -> str:
    return f"{name} ({'the config says so' if wanted else 'this GPU has it'}), base weights in {weights}"


def _lacking(name: str, wanted: bool | None, on_gpu: bool, machine: Machine) -> list[Problem]:
    if not wanted:
        return []
    if on_gpu:
        if name == "fp16" or machine.gpu_has_bf16:
            return []
        what, fix = "this GPU has no bfloat16", "leave bf16 out (the toolkit then takes fp16), or write fp16: true"
    elif name == "bf16" and machine.cpu_has_bf16:
        return []
    else:
        what = (
            "there is no GPU here, and fp16 training needs one"
            if name == "fp16"
            else "this CPU has no bfloat16 instructions"
        )
        fix = f"leave {name} out: the toolkit takes what the machine has (here fp32)"
    return [Problem(f"training_args.{name}", f"true, but {what}", fix)]
