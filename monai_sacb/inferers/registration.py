# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from monai.inferers import Inferer

from monai_sacb.inferers.refinement import refine_ddf

__all__ = ["RegistrationInferer"]


class RegistrationInferer(Inferer):
    """
    Field of a registration network, refined for the pair at hand where this is wanted.

    Args:
        iterations: steps of :py:func:`monai_sacb.inferers.refine_ddf`; 0 takes the network's field as it is.
        refinement_args: other arguments of that function, its ``similarity`` or ``regularization_weight`` for instance.

    Raises:
        ValueError: When ``iterations`` is not a whole number of at least 0.
        TypeError: When an argument is not one of that function.
    """

    def __init__(self, iterations: int = 0, **refinement_args: Any) -> None:
        super().__init__()
        if not isinstance(iterations, int) or iterations < 0:
            raise ValueError(f"iterations must be a whole number of at least 0, got {iterations!r}.")
        # an unknown argument shall not wait for the first pair
        inspect.signature(refine_ddf).bind_partial(**refinement_args)
        self.iterations = iterations
        self.refinement_args = refinement_args

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
        ddf = network(inputs, *args, **kwargs)
        if self.iterations == 0:
            return ddf
        moving, fixed = inputs.chunk(2, 1)
        return refine_ddf(moving, fixed, ddf, iterations=self.iterations, **self.refinement_args)
