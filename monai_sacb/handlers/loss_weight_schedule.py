# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from ignite.engine import Events

from monai.engines import Workflow

from monai_sacb.losses import RegistrationLoss

__all__ = ["LossWeightSchedule"]


class LossWeightSchedule:
    """
    Set a weight of the loss before every training step, linearly between milestones.

    It depends on the number of the step alone, so that a training that is resumed goes on as if nothing had happened.
    Bending energy, for instance, leaves affine motion free and can carry the field of an untrained network away; grown
    from zero, it does not.

    Args:
        loss: the loss.
        name: name of the term.
        milestones: steps, counted from 1 and growing, and the weight at each: ``[[100, 0.0], [800, 1.0]]``. The first
            weight holds before the first of them, the last one after the last.

    Raises:
        ValueError: When the loss has no such term, or the milestones are none, do not grow, or are
            out of range.
    """

    def __init__(self, loss: RegistrationLoss, name: str, milestones: Sequence[tuple[int, float]]) -> None:
        if name not in loss.weights:
            raise ValueError(f"the terms of the loss are {sorted(loss.weights)}, got '{name}'.")
        steps, weights = [step for step, _ in milestones], [weight for _, weight in milestones]
        if not steps or steps[0] < 1 or steps != sorted(set(steps)) or not all(0 <= w < math.inf for w in weights):
            raise ValueError(
                f"milestones must be growing steps from 1 with finite weights of at least 0, got {milestones}."
            )
        self.loss = loss
        self.name = name
        self.steps = steps
        self.step_weights = weights

    def attach(self, engine: Workflow) -> None:
        """Look before every step."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Workflow) -> None:
        """Set the weight for this step."""
        self.loss.weights[self.name] = float(np.interp(engine.state.iteration, self.steps, self.step_weights))
