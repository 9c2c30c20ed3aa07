# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
import torch.distributed as dist
from ignite.engine import Events

from monai.engines import Workflow
from monai.utils.enums import CommonKeys

from monai_sacb.utils import world_size

__all__ = ["ProcessMeanLoss"]


class ProcessMeanLoss:
    """
    Replace the loss of every training step by its mean over all processes.

    The handlers that are attached after this one show and check the loss of the whole batch, that of a single process
    with all the pairs; and one that stops the training does so in all processes.
    """

    def attach(self, engine: Workflow) -> None:
        """Average after every step."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Workflow) -> None:
        """Average the loss of this step; without other processes, leave it as it is."""
        number = world_size()
        if number == 1:
            return
        output = engine.state.output
        items = output if isinstance(output, list) else [output]
        loss = torch.tensor(float(items[0][CommonKeys.LOSS]), dtype=torch.float64, device=engine.state.device)
        dist.all_reduce(loss)
        for item in items:
            item[CommonKeys.LOSS] = loss.item() / number
