"""What a run will need: an estimate of the memory of weights, gradients and optimizer states."""

from __future__ import annotations

from dataclasses import dataclass

BYTES_PER_WEIGHT = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINED_BYTES = 4  # trained weights, their gradients and each optimizer state are float32
ADAM_STATES = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs besides activations.

    Attributes:
        weights: of the whole model, frozen and trained.
        gradients: of the trained parameters.
        optimizer: AdamW's two states of the trained parameters.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Bytes altogether."""
        return self.weights + self.gradients + self.optimizer


def estimate_memory(all_parameters: int, trainable_parameters: int, weights_dtype: str) -> MemoryEstimate:
    """Return what weights, gradients and AdamW states of one unsharded process take.

    Args:
        all_parameters: number of parameters, the adapter's included.
        trainable_parameters: number of those that are trained.
        weights_dtype: format of the frozen weights; trained ones are float32.
    """
    frozen = all_parameters - trainable_parameters
    return MemoryEstimate(
        weights=frozen * BYTES_PER_WEIGHT[weights_dtype] + trainable_parameters * TRAINED_BYTES,
        gradients=trainable_parameters * TRAINED_BYTES,
        optimizer=trainable_parameters * TRAINED_BYTES * ADAM_STATES,
    )
