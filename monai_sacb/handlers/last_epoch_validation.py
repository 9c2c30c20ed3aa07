# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from ignite.engine import Events

from monai.engines import Workflow

__all__ = ["LastEpochValidation"]


class LastEpochValidation:
    """
    Validate after the last epoch too, where MONAI's ``ValidationHandler`` would not because of its interval.

    A training thus always ends with a best model of its own.

    Args:
        validator: the evaluator.
        interval: epochs between the validations of the ``ValidationHandler``.

    Raises:
        ValueError: When ``interval`` is below 1.
    """

    def __init__(self, validator: Workflow, interval: int) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}.")
        self.validator = validator
        self.interval = interval

    def attach(self, engine: Workflow) -> None:
        """Look after every epoch whether it is the last."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Workflow) -> None:
        """Validate, if this is the last epoch and the interval leaves it out."""
        if engine.state.epoch >= engine.state.max_epochs and engine.state.epoch % self.interval != 0:
            self.validator.run(engine.state.epoch)
