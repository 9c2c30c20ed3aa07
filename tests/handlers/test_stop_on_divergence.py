# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from ignite.engine import Engine

from monai_sacb.handlers import StopOnDivergence


@pytest.mark.parametrize("wrap", [lambda loss: {"loss": loss}, lambda loss: [{"loss": torch.tensor(loss)}]])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_ends_at_the_first_bad_loss(wrap: Any, value: float) -> None:
    losses = [0.5, -1e30, 0.25, value, 0.5]
    seen = []

    def step(engine: Engine, batch: int) -> Any:
        seen.append(batch)
        return wrap(losses[engine.state.iteration - 1])

    engine = Engine(step)
    StopOnDivergence().attach(engine)
    with pytest.raises(ValueError, match=rf"diverged: the loss of step 4 \(epoch 2\) is {value}"):
        engine.run(range(3), max_epochs=2)
    assert seen == [0, 1, 2, 0]
