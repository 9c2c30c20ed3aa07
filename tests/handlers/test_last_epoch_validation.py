# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from ignite.engine import Engine

from monai_sacb.handlers import LastEpochValidation


class Validator:
    """Notes when it is run."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def run(self, epoch: int) -> None:
        self.epochs.append(epoch)


@pytest.mark.parametrize(
    "interval, epochs, expected", [(5, 2, [2]), (2, 5, [5]), (2, 4, []), (1, 3, []), (3, 3, []), (4, 1.5, [2])]
)
def test_runs_where_the_interval_leaves_the_last_epoch_out(interval: int, epochs: int, expected: list[int]) -> None:
    validator = Validator()
    trainer = Engine(lambda engine, batch: None)
    LastEpochValidation(validator, interval).attach(trainer)
    trainer.run([0], max_epochs=epochs)
    assert validator.epochs == expected


@pytest.mark.parametrize("interval", [0, -3])
def test_refuses_an_interval(interval: int) -> None:
    with pytest.raises(ValueError, match=f"interval must be at least 1, got {interval}"):
        LastEpochValidation(Validator(), interval)
