# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
from ignite.engine import Events
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from monai.engines import Workflow
from monai.engines.utils import IterationEvents

from monai_sacb.handlers.pair_metric import pair_items
from monai_sacb.networks import ClusterRecorder
from monai_sacb.utils import pair_names
from monai_sacb.visualize import plot_clusters, plot_registration

__all__ = ["RegistrationImages"]


def _pixels(figure: Figure) -> np.ndarray:
    """The figure as ``(height, width, 3)``, uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: np.ndarray = np.asarray(canvas.buffer_rgba())[..., :3]
    return pixels


class RegistrationImages:
    """
    Show the first pair of every validation in TensorBoard: the images, overlays and deformed grid of
    :py:func:`monai_sacb.visualize.plot_registration`, and the clusters of the network.

    The network does not run once more for it.

    Args:
        summary_writer: TensorBoard's writer, the one of the curves; None where this process writes nothing.
        network: the network, for its clusters; None, or one without :py:class:`monai_sacb.networks.blocks.SACBlock`,
            for no clusters.
        warped_key: the warped image among the results.
        ddf_key: the field among the results.
    """

    def __init__(
        self,
        summary_writer: Any,
        network: nn.Module | None = None,
        warped_key: str = "warped_image",
        ddf_key: str = "pred",
    ) -> None:
        self.summary_writer = summary_writer
        self.recorder = ClusterRecorder(network) if network is not None and ClusterRecorder.fits(network) else None
        self.warped_key = warped_key
        self.ddf_key = ddf_key

    def attach(self, engine: Workflow) -> None:
        """Look at the first pair of every evaluation."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._started)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._forward_completed)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)

    def _is_shown(self, engine: Workflow) -> bool:
        return engine.state.iteration == 1 and self.summary_writer is not None

    def _started(self, engine: Workflow) -> None:
        if self.recorder is not None and self._is_shown(engine):
            self.recorder.start()

    def _forward_completed(self, engine: Workflow) -> None:
        if self.recorder is not None:
            self.recorder.stop()

    def _iteration_completed(self, engine: Workflow) -> None:
        if not self._is_shown(engine):
            return
        item = pair_items(engine)[0]
        title = " on ".join(pair_names(item))
        moving, fixed, warped = (item[key][0].cpu() for key in ("moving_image", "fixed_image", self.warped_key))
        figures = {"registration": plot_registration(moving, fixed, warped, item[self.ddf_key], title)}
        if self.recorder is not None:
            moving_maps, fixed_maps = self.recorder.maps(fixed.shape)
            figures["clusters"] = plot_clusters(moving, fixed, moving_maps[0], fixed_maps[0], title)
        for name, figure in figures.items():
            self.summary_writer.add_image(name, _pixels(figure), engine.state.epoch, dataformats="HWC")
        self.summary_writer.flush()
