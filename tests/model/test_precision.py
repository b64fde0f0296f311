"""C7: number formats are chosen by what the machine has, and a config that asks for more is told so."""

from __future__ import annotations

from typing import Any

import pytest

from glm_edge_ft.errors import UserError
from glm_edge_ft.model.precision import Hardware, choose_precision

LAPTOP = Hardware(has_gpu=False, gpu_has_bf16=False, cpu_has_bf16=False)
SERVER = Hardware(has_gpu=False, gpu_has_bf16=False, cpu_has_bf16=True)
OLD_GPU = Hardware(has_gpu=True, gpu_has_bf16=False, cpu_has_bf16=False)
NEW_GPU = Hardware(has_gpu=True, gpu_has_bf16=True, cpu_has_bf16=True)


@pytest.mark.parametrize(
    ("machine", "training_args", "adapter", "expected"),
    [
        (LAPTOP, {}, True, ("float32", False, False)),
        (SERVER, {}, True, ("float32", False, False)),
        (SERVER, {"bf16": True}, True, ("bfloat16", True, False)),
        (OLD_GPU, {}, True, ("float16", False, True)),
        (OLD_GPU, {"fp16": False}, True, ("float32", False, False)),
        (OLD_GPU, {"bf16": False}, True, ("float32", False, False)),
        (NEW_GPU, {"fp16": False}, True, ("bfloat16", True, False)),
        (NEW_GPU, {}, True, ("bfloat16", True, False)),
        (NEW_GPU, {"bf16": False}, True, ("float32", False, False)),
        (NEW_GPU, {"fp16": True}, True, ("float16", False, True)),
        (NEW_GPU, {"use_cpu": True}, True, ("float32", False, False)),
    ],
)
def test_the_config_decides_and_else_the_machine(
    machine: Hardware, training_args: dict[str, Any], adapter: bool, expected: tuple[str, bool, bool]
) -> None:
    """C7: weights' format, bf16 and fp16 for each kind of machine."""
    chosen = choose_precision(training_args, adapter, machine)
    assert (chosen.weights, chosen.bf16, chosen.fp16) == expected


@pytest.mark.parametrize("training_args", [{"bf16": True}, {"fp16": True}])
def test_weights_that_are_trained_stay_in_float32(training_args: dict[str, Any]) -> None:
    """C7: `fp16: true` with 16-bit weights cannot be unscaled, so full fine-tuning never loads them so."""
    assert choose_precision(training_args, False, NEW_GPU).weights == "float32"


@pytest.mark.parametrize(
    ("machine", "training_args", "message"),
    [
        (LAPTOP, {"bf16": True}, "training_args.bf16: true, but this CPU has no bfloat16 instructions"),
        (LAPTOP, {"fp16": True}, "training_args.fp16: true, but there is no GPU here, and fp16 training needs one"),
        (SERVER, {"fp16": True}, "training_args.fp16: true, but there is no GPU here, and fp16 training needs one"),
        (OLD_GPU, {"bf16": True}, "training_args.bf16: true, but this GPU has no bfloat16"),
    ],
)
def test_a_format_that_the_machine_lacks_is_refused(
    machine: Hardware, training_args: dict[str, Any], message: str
) -> None:
    """C7: the key, why, and what to write instead."""
    with pytest.raises(UserError) as caught:
        choose_precision(training_args, True, machine)
    assert str(caught.value).startswith(message)
    assert "leave" in caught.value.problems[0].fix
