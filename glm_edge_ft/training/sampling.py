"""Which rows form a batch, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthGroupedEpochSampler(LengthGroupedSampler):
    """Rows of similar length side by side, in an order that depends on seed and epoch alone.

    The parent draws from the global random state, which at the start of an epoch differs between an uninterrupted and a
    resumed run; the resumed run would then see other batches.
    """

    def __init__(self, lengths: Sequence[int], group_size: int, seed: int) -> None:
        super().__init__(group_size, lengths=lengths)  # type: ignore[arg-type]
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


def plan_batches(
    lengths: Sequence[int],
    batch_size: int,
    process_index: int,
    world_size: int,
    groups: Sequence[Hashable] | None = None,
) -> tuple[list[list[int]], int]:
    """Return this rank's batches of sample indices, longest first, and how many of them count.

    All ranks get equally many batches, since under sharded weights each forward pass is a collective; a surplus batch
    repeats the last one and does not count.

    Args:
        lengths: tokens of each sample.
        batch_size: most samples of a batch.
        process_index, world_size: which rank this is, of how many.
        groups: a key for each sample; those with the same key, such as an image, share as few batches as possible.
    """
    members: dict[Hashable, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: -int(lengths[index])):
        members.setdefault(index if groups is None else groups[index], []).append(index)
    batches: list[list[int]] = []
    for group in members.values():
        for start in range(0, len(group), batch_size):
            part = group[start : start + batch_size]
            if not batches or len(batches[-1]) + len(part) > batch_size:
                batches.append([])
            batches[-1] += part
    mine = batches[process_index::world_size]
    surplus = -(-len(batches) // world_size) - len(mine)
    return mine + [batches[-1]] * surplus, len(mine)
