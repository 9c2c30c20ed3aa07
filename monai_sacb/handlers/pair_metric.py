# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.engines import Workflow
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric

__all__ = ["PairMetric", "pair_items"]


def pair_items(engine: Workflow) -> list[dict[str, Any]]:
    """What is known of every pair of the current, decollated iteration: its batch entries and the results."""
    return [{**batch, **output} for batch, output in zip(engine.state.batch, engine.state.output)]


class PairMetric(IgniteMetricHandler):
    """
    Any MONAI metric of pairs, attached to an evaluator; passes over pairs that lack what it measures.

    A data set without labels, or without true fields, thus needs no other configuration: the metric then does not
    appear among the results.

    Args:
        metric_fn: the metric.
        keys: entries of the pair (of the batch or of the results) that the metric takes, one or two.
        save_details: whether to keep the values of every pair in ``engine.state.metric_details``.

    Raises:
        ValueError: When there are not one or two keys.
    """

    def __init__(self, metric_fn: CumulativeIterationMetric, keys: Sequence[str], save_details: bool = True) -> None:
        super().__init__(metric_fn=metric_fn, save_details=save_details)
        if isinstance(keys, str) or len(keys) not in (1, 2):
            raise ValueError(f"keys must be a list of one or two entries, got {keys!r}.")
        self.keys = tuple(keys)
        self.num_pairs = 0

    def reset(self) -> None:
        self.num_pairs = 0
        super().reset()

    def iteration_completed(self, engine: Workflow) -> None:
        """Measure the pairs of this iteration."""
        items = [item for item in pair_items(engine) if all(key in item for key in self.keys)]
        if items:
            self.num_pairs += len(items)
            columns = [[item[key] for item in items] for key in self.keys]
            # one device for both, wherever the loader left the reference
            columns[1:] = [[y.to(x.device) for x, y in zip(columns[0], column)] for column in columns[1:]]
            self.update((columns[0], columns[1] if len(columns) > 1 else None))

    def completed(self, engine: Workflow, name: str) -> None:
        """Write the result to the engine's metrics, if there is one."""
        if self.num_pairs > 0:
            super().completed(engine, name)
        elif engine.state.key_metric_name == name:
            raise ValueError(
                f"the key metric '{name}' cannot be computed: no validation pair has {' and '.join(self.keys)}."
            )
