"""Which number formats a run uses: what the config asks for, checked against the hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm_edge_ft.errors import ProblemList


@dataclass(frozen=True)
class Hardware:
    """Which number formats this machine computes in.

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


def detect_hardware() -> Hardware:
    """Return which formats this machine computes in; imports torch."""
    import torch

    has_gpu = torch.cuda.is_available()
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, and absent on builds for other CPUs
    return Hardware(
        has_gpu=has_gpu,
        gpu_has_bf16=has_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        cpu_has_bf16=bool(capability and capability()),
    )


def choose_precision(training_args: Mapping[str, Any], trains_adapter: bool, hardware: Hardware) -> Precision:
    """Return the formats for a run: what the config says, else the machine's best.

    A frozen base model is kept in the 16-bit format, since nothing is added to its weights. Weights that are trained
    stay in float32 under autocast: updates of 1e-5 vanish in 16-bit weights, and a loss scaler cannot unscale 16-bit
    gradients.

    Raises UserError when the config names a format that the machine lacks.
    """
    on_gpu = hardware.has_gpu and not training_args.get("use_cpu", False)
    wanted = {name: training_args.get(name) for name in ("bf16", "fp16")}
    has_bf16 = hardware.gpu_has_bf16 if on_gpu else hardware.cpu_has_bf16
    problems = ProblemList()
    if wanted["bf16"] and not has_bf16:
        what = "this GPU has no bfloat16" if on_gpu else "this CPU has no bfloat16 instructions"
        problems.add(
            "training_args.bf16", f"true, but {what}", "leave bf16 out: the toolkit takes what the machine has"
        )
    if wanted["fp16"] and not on_gpu:
        what = "true, but there is no GPU here, and fp16 training needs one"
        problems.add("training_args.fp16", what, "leave fp16 out: the toolkit takes what the machine has (here fp32)")
    problems.raise_if_any()
    best = "bf16" if hardware.gpu_has_bf16 else "fp16"
    is_open = on_gpu and wanted[best] is None and wanted["bf16"] is None and not wanted["fp16"]
    chosen = next((name for name, value in wanted.items() if value), best if is_open else None)
    if chosen is None:
        return Precision("float32", bf16=False, fp16=False, reason="fp32" + ("" if on_gpu else " (CPU)"))
    weights = ("bfloat16" if chosen == "bf16" else "float16") if trains_adapter else "float32"
    source = "the config says so" if wanted[chosen] else "this GPU has it"
    reason = f"{chosen} ({source}), base weights in {weights}"
    return Precision(weights, bf16=chosen == "bf16", fp16=chosen == "fp16", reason=reason)
