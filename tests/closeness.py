"""Comparisons of gradients whose bounds hold on every processor."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

_LAYER = re.compile(r".*\blayers\.\d+\.")


def assert_same_gradients(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], bound: float = 1e-4
) -> None:
    """Fail unless the same weights have gradients of the same formats that differ by rounding alone.

    A difference is compared with the largest gradient of the weight's layer, outside of layers with the weight's own
    largest. Some gradients are zero but for rounding, such as that of a key's bias, which softmax does not see: what
    is left of them differs between processors and has no size of its own to compare with.

    Args:
        found, expected: name of the weight → gradient. A loss may stand among them under a name of its own.
        bound: the largest difference, as a share. The order of summation alone makes some 1e-7 to 3e-6 in float32.
    """
    assert found.keys() == expected.keys()
    scales: dict[str, float] = {}
    for name, gradient in expected.items():
        scales[_group(name)] = max(scales.get(_group(name), 0.0), float(gradient.abs().max()))
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype, name
        difference = float((found[name].double() - gradient.double()).abs().max())
        assert difference <= bound * scales[_group(name)], f"{name}: {difference} of {scales[_group(name)]}"


def _group(name: str) -> str:
    found = _LAYER.match(name)
    return found[0] if found else name
