# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from monai.inferers import Inferer

from monai_sacb.inferers.refinement import InstanceOptimization
from monai_sacb.utils import check_count

__all__ = ["RegistrationInferer"]


class RegistrationInferer(Inferer):
    """
    Field of a registration network, refined for the pair at hand where this is wanted.

    Whole images are compared: fields of view, by which a network may have been trained, play no part in the refinement.

    Args:
        iterations: steps of the refinement; 0 takes the network's field as it is. By default those of ``refinement``
            where it is given, and none where not.
        refinement: how it is done; by default :py:class:`monai_sacb.inferers.InstanceOptimization` as it comes.
        amp: let the network work in bfloat16 where that is safe, on any device; the field stays float32. MONAI's own
            ``amp`` is for CUDA alone, and its float16 needs a loss scale.

    Raises:
        ValueError: When an argument is not as said.
    """

    def __init__(
        self, iterations: int | None = None, refinement: InstanceOptimization | None = None, amp: bool = False
    ) -> None:
        super().__init__()
        if iterations is not None:
            check_count("iterations", iterations, 0)
        if refinement is not None and not isinstance(refinement, InstanceOptimization):
            raise ValueError(f"refinement must be an InstanceOptimization, got {refinement!r}.")
        if not isinstance(amp, bool):
            raise ValueError(f"amp must be True or False, got {amp!r}.")
        self.refinement = InstanceOptimization() if refinement is None else refinement
        default = 0 if refinement is None else refinement.iterations
        self.iterations = int(default if iterations is None else iterations)
        self.amp = amp

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            inputs: ``(B, 2 * C, *spatial)``, the moving image's channels before the fixed image's.
            network: ``(inputs) -> ddf``.
            args, kwargs: passed to the network.

        Returns:
            DDF ``(B, d, *spatial)``, in voxels of the fixed grid, pull-back.
        """
        # without amp, whatever precision the caller has set
        with torch.autocast(inputs.device.type, torch.bfloat16) if self.amp else nullcontext():
            ddf = network(inputs, *args, **kwargs)
        if self.iterations == 0:
            return ddf
        moving, fixed = inputs.chunk(2, 1)
        return self.refinement(moving, fixed, ddf, self.iterations)
