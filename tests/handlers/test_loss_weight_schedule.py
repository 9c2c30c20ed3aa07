# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from ignite.engine import Engine

from monai_sacb.handlers import LossWeightSchedule
from monai_sacb.losses import RegistrationLoss

ILL_CASES = [
    ({"name": "bending"}, r"\['inverse_consistency', 'label', 'landmarks', .*\], got 'bending'"),
    ({"milestones": []}, r"finite weights of at least 0, got \[\]"),
    ({"milestones": [(5, 0.0), (5, 1.0)]}, r"growing steps from 1"),
    ({"milestones": [(5, 0.0), (3, 1.0)]}, r"growing steps from 1"),
    ({"milestones": [(5, -1.0)]}, r"weights of at least 0, got \[\(5, -1\.0\)\]"),
    ({"milestones": [(5, float("nan"))]}, r"weights of at least 0"),
    ({"milestones": [(1, 1.0), (5, float("nan"))]}, r"weights of at least 0"),
    ({"milestones": [(1, 1.0), (5, float("inf"))]}, r"weights of at least 0"),
    ({"milestones": [(0, 1.0)]}, r"growing steps from 1"),
]


def test_linear_between_milestones() -> None:
    loss, seen = RegistrationLoss(), []
    engine = Engine(lambda engine, batch: seen.append(loss.weights["regularization"]))
    LossWeightSchedule(loss, "regularization", [[2, 0.0], [4, 1.0], [8, 3.0]]).attach(engine)
    engine.run(range(5), max_epochs=2)
    assert seen == pytest.approx([0, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3, 3])
    assert loss.weights["similarity"] == 1 and loss.weights["label"] == 0


def test_resumed_training_goes_on() -> None:
    loss, seen = RegistrationLoss(), []
    engine = Engine(lambda engine, batch: seen.append(loss.weights["regularization"]))
    LossWeightSchedule(loss, "regularization", [(1, 1.0), (11, 11.0)]).attach(engine)
    engine.load_state_dict({"epoch": 2, "max_epochs": 3, "epoch_length": 4})
    engine.run(range(4))
    assert seen == pytest.approx([9, 10, 11, 11])


@pytest.mark.parametrize(("arguments", "message"), ILL_CASES)
def test_ill_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossWeightSchedule(RegistrationLoss(), **{"name": "regularization", "milestones": [(1, 1.0)], **arguments})
