# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

from ignite.engine import Events

from monai.engines import Workflow

from monai_sacb.handlers.pair_metric import pair_items
from monai_sacb.utils import process_rank, world_size

__all__ = ["PairSaver"]


class PairSaver:
    """
    Pass the first pairs of an evaluation to a transform that writes them. Of several processes that share the pairs,
    each writes its own.

    Args:
        transform: takes the entries of one pair, of the batch and of the results, such as a ``Compose`` that ends in
            :py:class:`monai_sacb.transforms.SaveRegistrationd`.
        max_pairs: number of pairs; all of them by default.
    """

    def __init__(self, transform: Callable, max_pairs: int | None = None) -> None:
        self.transform = transform
        self.max_pairs = max_pairs
        self._num_saved = 0

    def attach(self, engine: Workflow) -> None:
        """Write after each iteration."""
        engine.add_event_handler(Events.STARTED, self._started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)

    def _started(self, engine: Workflow) -> None:
        self._num_saved = 0

    def _iteration_completed(self, engine: Workflow) -> None:
        for item in pair_items(engine):
            place = self._num_saved * world_size() + process_rank()
            if self.max_pairs is None or place < self.max_pairs:
                self.transform(item)
                self._num_saved += 1
