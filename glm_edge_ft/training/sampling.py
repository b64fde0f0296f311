"""The order in which an epoch takes the training rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGroupedEpochSampler(Sampler[int]):
    """Rows of similar length side by side, in an order that depends on seed and epoch alone.

    The parent's sampler draws from the global random state, which at the start of an epoch differs between an
    uninterrupted and a resumed run; the resumed run would then see other batches.
    """

    def __init__(self, lengths: Sequence[int], group_size: int, seed: int) -> None:
        self.lengths = lengths
        self.group_size = group_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.group_size, generator=generator))
