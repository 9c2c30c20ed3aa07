# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time

import torch
from ignite.engine import Events

from monai.engines import Workflow
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys

from monai_sacb.handlers.pair_metric import pair_values
from monai_sacb.utils import peak_memory_mb

__all__ = ["PairResources"]

BYTES_PER_MB = 1e6


def _synchronize(device: torch.device) -> None:
    """Wait for what a GPU has still to do: it belongs to the time before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> float:
    """Peak memory in MB, see :py:class:`PairResources`; NaN where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / BYTES_PER_MB
    return peak_memory_mb()


class PairResources:
    """
    Measure what the registration of each pair takes: seconds, and peak memory in MB (10⁶ bytes).

    Measured is the inferer, from the transfer of the images to the device until the field is there, a refinement
    included; loading, warping and metrics are not. Pairs of one batch share its seconds equally. The peak is that of
    the whole iteration, the same for all pairs of a batch: on CUDA, what PyTorch has allocated on the device at most,
    network included; on a CPU, the peak resident size of the process since it began, which never falls from one pair to
    the next, and includes data that are kept in memory. The first pair takes longer where something is set up.

    At the end of an epoch, ``engine.state.metric_details`` holds one row for each pair, ``(pairs, 1)``, and
    ``engine.state.metrics`` the means.

    Args:
        seconds, peak_memory: names under which they are kept. :py:class:`RegistrationTable` writes those that it is
            told of.
    """

    def __init__(self, seconds: str = "seconds", peak_memory: str = "peak_memory_mb") -> None:
        self.seconds = seconds
        self.peak_memory = peak_memory
        self._started = 0.0
        self._rows: list[tuple[float, float]] = []

    def attach(self, engine: Workflow) -> None:
        """Measure every iteration."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.ITERATION_STARTED, self._iteration_started)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._forward_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_started(self, engine: Workflow) -> None:
        self._rows = []

    def _iteration_started(self, engine: Workflow) -> None:
        device = engine.state.device
        _synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._started = time.perf_counter()

    def _forward_completed(self, engine: Workflow) -> None:
        device = engine.state.device
        _synchronize(device)
        # before the metrics and the table, in whatever order they are attached
        seconds, memory = time.perf_counter() - self._started, _peak_memory(device)
        num_pairs = len(engine.state.output[CommonKeys.IMAGE])
        self._rows += [(seconds / num_pairs, memory)] * num_pairs
        for name, value in ((self.seconds, seconds / num_pairs), (self.peak_memory, memory)):
            pair_values(engine)[name] = torch.full([num_pairs, 1], value, dtype=torch.float64)

    def _epoch_completed(self, engine: Workflow) -> None:
        rows = torch.tensor(self._rows, dtype=torch.float64).view(-1, 2)
        for i, name in enumerate((self.seconds, self.peak_memory)):
            engine.state.metric_details[name] = rows[:, i : i + 1]
            engine.state.metrics[name] = rows[:, i].mean().item()
