# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

from ignite.engine import Events

from monai.engines import Workflow
from monai.utils.enums import CommonKeys

__all__ = ["StopOnDivergence"]


class StopOnDivergence:
    """
    End a training with an error when its loss is not finite, before such weights are kept.

    Ignite's ``TerminateOnNan`` ends it too, but as if all were well.
    """

    def attach(self, engine: Workflow) -> None:
        """Look after every step."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Workflow) -> None:
        """
        Look at the loss of this step.

        Raises:
            ValueError: When it is NaN or infinite.
        """
        output = engine.state.output
        loss = float((output[0] if isinstance(output, list) else output)[CommonKeys.LOSS])
        if not math.isfinite(loss):
            raise ValueError(
                f"the training has diverged: the loss of step {engine.state.iteration} (epoch {engine.state.epoch}) is "
                f"{loss}. A lower learning rate may help, or a look at the images."
            )
