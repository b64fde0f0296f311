"""Fine-tuning of the GLM-Edge chat models and the GLM-Edge-V vision models."""

IGNORE_INDEX = -100
"""The label of a token that is not supervised; the default `ignore_index` of PyTorch's cross entropy."""
