# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from ignite.engine import Events

from monai.engines import Workflow

from monai_sacb.losses import RegistrationLoss
from monai_sacb.utils import world_size

__all__ = ["LossTerms"]


class LossTerms:
    """
    Give every term of the loss a curve of its own: its mean over the epoch, without its weight.

    The means become the metrics ``loss_<name>`` of the engine, which MONAI's ``StatsHandler`` and
    ``TensorBoardStatsHandler`` show when they are attached after this handler. A term that was computed for some
    batches only, such as that of the labels, is averaged over them; a term that has a weight but was never computed is
    reported in the log. Where several processes share a training, the means are those over all of them.

    Args:
        loss: the loss.
    """

    def __init__(self, loss: RegistrationLoss) -> None:
        self.loss = loss
        self.logger = logging.getLogger(__name__)
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def attach(self, engine: Workflow) -> None:
        """Collect the terms of every step, and report when an epoch has ended."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_started(self, engine: Workflow) -> None:
        self._sums, self._counts = {}, {}

    def _iteration_completed(self, engine: Workflow) -> None:
        # the sums stay where the terms are: to read them would make the host wait for a GPU at every step
        for name, value in self.loss.last_terms.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def _share(self, engine: Workflow) -> None:
        """Add what the other processes have collected."""
        names = list(self.loss.weights)
        sums = torch.tensor([[float(self._sums.get(n, 0)), self._counts.get(n, 0)] for n in names], dtype=torch.float64)
        sums = sums.to(engine.state.device)
        dist.all_reduce(sums)
        self._counts = {name: int(count) for name, (_, count) in zip(names, sums.tolist()) if count > 0}
        self._sums = {name: value for name, value in zip(names, sums[:, 0]) if name in self._counts}

    def _epoch_completed(self, engine: Workflow) -> None:
        if world_size() > 1:
            self._share(engine)
        for name, weight in self.loss.weights.items():
            # nothing of an earlier epoch must pass for a value of this one
            engine.state.metrics.pop(f"loss_{name}", None)
            if name in self._sums:
                engine.state.metrics[f"loss_{name}"] = float(self._sums[name]) / self._counts[name]
            elif weight > 0:
                self.logger.warning(
                    f"The term '{name}' of the loss has the weight {weight:g}, but no pair of epoch "
                    f"{engine.state.epoch} has what it needs."
                )
