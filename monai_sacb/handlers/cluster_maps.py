# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from ignite.engine import Events
from torch import nn

from monai.engines import Workflow
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys

from monai_sacb.networks import ClusterRecorder

__all__ = ["ClusterMaps"]


class ClusterMaps:
    """
    Add the clusters of the network's blocks to the results of every pair, see
    :py:func:`monai_sacb.networks.cluster_labels`.

    The network does not run once more for it.

    Args:
        network: the network of the evaluator that this is attached to.
        moving_key, fixed_key: where the label maps ``(4, *spatial)`` of the two images go.

    Raises:
        ValueError: When the network has no such blocks.
    """

    def __init__(
        self, network: nn.Module, moving_key: str = "moving_clusters", fixed_key: str = "fixed_clusters"
    ) -> None:
        self.recorder = ClusterRecorder(network)
        self.moving_key = moving_key
        self.fixed_key = fixed_key

    def attach(self, engine: Workflow) -> None:
        """Record while the network runs."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._started)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._forward_completed)

    def _started(self, engine: Workflow) -> None:
        self.recorder.start()

    def _forward_completed(self, engine: Workflow) -> None:
        self.recorder.stop()
        output = engine.state.output
        moving, fixed = self.recorder.maps(output[CommonKeys.IMAGE].shape[2:])
        output[self.moving_key], output[self.fixed_key] = moving, fixed
