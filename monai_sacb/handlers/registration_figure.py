# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ignite.engine import Events

from monai.engines import Workflow

from monai_sacb.handlers.pair_metric import pair_items
from monai_sacb.utils import is_writer, pair_names, replacing
from monai_sacb.visualize import plot_registration

__all__ = ["RegistrationFigure"]


class RegistrationFigure:
    """
    Write a picture of the first pair of an evaluation, see :py:func:`monai_sacb.visualize.plot_registration`.

    Args:
        path: the picture, PNG or any format that matplotlib writes.
        warped_key: the warped image among the results.
        ddf_key: the field among the results.
        dice, dice_before: metrics with one column for each structure; their means over the first pair are the title.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        warped_key: str = "warped_image",
        ddf_key: str = "pred",
        dice: str = "val_dice",
        dice_before: str = "val_dice_before",
    ) -> None:
        self.path = Path(path)
        self.warped_key = warped_key
        self.ddf_key = ddf_key
        self.dice = dice
        self.dice_before = dice_before
        self._item: dict[str, Any] | None = None

    def attach(self, engine: Workflow) -> None:
        """Keep the first pair, and draw it when the evaluation has ended."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)

    def _iteration_completed(self, engine: Workflow) -> None:
        if engine.state.iteration == 1 and is_writer():
            self._item = pair_items(engine)[0]

    def _completed(self, engine: Workflow) -> None:
        if self._item is None:
            return
        item, self._item = self._item, None
        title = " on ".join(pair_names(item))
        details = engine.state.metric_details
        if self.dice in details and self.dice_before in details:
            before, after = (float(details[name][0].nanmean()) for name in (self.dice_before, self.dice))
            title += f": Dice {before:.3f} before, {after:.3f} after"
        moving, fixed, warped = (item[key][0].cpu() for key in ("moving_image", "fixed_image", self.warped_key))
        figure = plot_registration(moving, fixed, warped, item[self.ddf_key], title)
        with replacing(self.path, alone=True) as path:
            figure.savefig(path, dpi=120)
