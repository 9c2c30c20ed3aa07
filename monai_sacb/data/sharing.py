# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""How several processes divide the pairs of a data set among them."""

from __future__ import annotations

from collections.abc import Iterator, Sized

from torch.utils.data import Dataset, RandomSampler, Sampler, Subset

from monai_sacb.utils import check_count, process_share, world_size

__all__ = ["SharedRandomSampler", "share_dataset"]


class SharedRandomSampler(Sampler[int]):
    """
    This process's share of the items that ``torch.utils.data.RandomSampler`` would draw for all processes together.

    With n processes and batches of b items, the batches of one step are together the batch of n·b items that a single
    process would have had at this step, if the processes began with the same random state, as they do when each calls
    ``set_determinism`` with one seed. They draw as much from it, so that it stays the same.

    Args:
        data_source: the dataset.
        num_samples: items of an epoch, of all processes together; rounded up to a multiple of their number, so that all
            have as many.

    Raises:
        ValueError: When ``num_samples`` is below 1.
    """

    def __init__(self, data_source: Sized, num_samples: int) -> None:
        check_count("num_samples", num_samples)
        self.num_own = -(-num_samples // world_size())
        self.sampler = RandomSampler(data_source, num_samples=self.num_own * world_size())

    def __len__(self) -> int:
        return self.num_own

    def __iter__(self) -> Iterator[int]:
        every = list(self.sampler)
        return iter([every[place] for place in process_share(len(every))])


def share_dataset(dataset: Dataset, at_least_one: bool = True) -> Dataset:
    """
    This process's share of a dataset: every n-th item, of n processes.

    Args:
        dataset: the dataset, which has a length.
        at_least_one: give the last item to a process that would have none, since an engine needs one. The metrics and
            tables of this package count a pair once, however many processes have had it.

    Returns:
        a part of it; the dataset itself where this process is alone.
    """
    number = len(dataset)  # type: ignore[arg-type]
    if world_size() == 1:
        return dataset
    return Subset(dataset, process_share(number, at_least_one and number > 0))
