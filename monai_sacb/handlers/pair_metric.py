# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from monai.engines import Workflow
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric

from monai_sacb.utils import gather_rows, world_size

__all__ = ["PairMetric", "pair_items", "pair_values"]


def pair_items(engine: Workflow) -> list[dict[str, Any]]:
    """What is known of every pair of the current, decollated iteration: its batch entries and the results."""
    return [{**batch, **output} for batch, output in zip(engine.state.batch, engine.state.output)]


def pair_values(engine: Workflow) -> dict[str, torch.Tensor]:
    """
    What has been measured in the current iteration: by name, one row for each of its pairs, ``(pairs, columns)``.

    Handlers add to it; those that are attached after them can read it when the iteration has been completed.
    """
    if getattr(engine.state, "pair_values", None) is None:
        engine.state.pair_values = {}
    values: dict[str, torch.Tensor] = engine.state.pair_values
    return values


class PairMetric(IgniteMetricHandler):
    """
    Any MONAI metric of pairs, attached to an evaluator; passes over pairs that lack what it measures.

    A data set without labels, or without true fields, thus needs no other configuration: the metric then does not
    appear among the results. Its details hold one row for each pair of the evaluation, NaN for those passed over.
    Where several processes share the pairs, all have the results of all pairs, in the order of their ``pair_index``.

    Args:
        metric_fn: the metric.
        keys: entries of the pair (of the batch or of the results) that the metric takes, one or two.
        fallback: of a key metric, the metric that decides in its place where there is nothing to measure.
        save_details: whether to keep the values of every pair in ``engine.state.metric_details``.

    Raises:
        ValueError: When there are not one or two keys; at the end of an evaluation, when the key metric could not be
            computed and has no fallback.
    """

    def __init__(
        self,
        metric_fn: CumulativeIterationMetric,
        keys: Sequence[str],
        fallback: str | None = None,
        save_details: bool = True,
    ) -> None:
        if isinstance(keys, str) or len(keys) not in (1, 2):
            raise ValueError(f"keys must be a list of one or two entries, got {keys!r}.")
        super().__init__(metric_fn=metric_fn, save_details=save_details)
        self.keys = tuple(keys)
        self.fallback = fallback
        self.measured: list[bool] = []
        # by the number of the pair; None where it was passed over
        self._rows: dict[int, torch.Tensor | None] = {}

    def reset(self) -> None:
        """Forget the pairs of the last evaluation."""
        self.measured, self._rows = [], {}
        super().reset()

    def iteration_completed(self, engine: Workflow) -> None:
        """Measure the pairs of this iteration."""
        items = pair_items(engine)
        measurable = [all(key in item for key in self.keys) for item in items]
        self.measured += measurable
        name, values = str(self._name), pair_values(engine)
        # nothing of an earlier iteration must pass for a value of this one
        values.pop(name, None)
        indices = [int(item.get("pair_index", len(self._rows) + i)) for i, item in enumerate(items)]
        self._rows.update(dict.fromkeys(indices))
        items = [item for item, can in zip(items, measurable) if can]
        if items:
            first, *others = ([item[key] for item in items] for key in self.keys)
            # one device for both, wherever the loader left the reference
            second = [y.to(x.device) for x, y in zip(first, others[0])] if others else None
            measured = torch.as_tensor(self.metric_fn(first, second)).detach()
            rows = measured.new_full((len(measurable), *measured.shape[1:]), torch.nan)
            rows[torch.tensor(measurable, device=rows.device)] = measured
            values[name] = rows.flatten(1)
            self._rows.update({index: row.cpu() for index, row, can in zip(indices, rows, measurable) if can})

    def _share(self) -> None:
        """Take over what the other processes have measured."""
        every = gather_rows(self._rows)
        self.measured = [row is not None for row in every.values()]
        rows = [row for row in every.values() if row is not None]
        self.metric_fn.reset()
        if rows:
            together = torch.stack(rows)
            self.metric_fn.extend(together)
            # what every process has must not be gathered once more
            self.metric_fn._synced_tensors, self.metric_fn._synced = [together], True

    def completed(self, engine: Workflow, name: str) -> None:
        """Write the result to the engine's metrics, if there is one."""
        # nothing of an earlier evaluation must pass for a result of this one
        engine.state.metrics.pop(name, None)
        engine.state.metric_details.pop(name, None)
        if world_size() > 1:
            self._share()
        if any(self.measured):
            super().completed(engine, name)
            if self.save_details and not all(self.measured):
                details = engine.state.metric_details[name]
                rows = details.new_full((len(self.measured), *details.shape[1:]), torch.nan)
                rows[torch.tensor(self.measured, device=rows.device)] = details
                engine.state.metric_details[name] = rows
        elif engine.state.key_metric_name == name:
            if self.fallback is None:
                raise ValueError(
                    f"the key metric '{name}' cannot be computed: no validation pair has {' and '.join(self.keys)}."
                )
            logging.getLogger(__name__).warning(
                f"No validation pair has {' and '.join(self.keys)}: the best model is chosen by '{self.fallback}'."
            )
            engine.state.key_metric_name = self.fallback
