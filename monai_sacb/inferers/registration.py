# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from monai.inferers import Inferer

from monai_sacb.inferers.multiscale import InstanceOptimization
from monai_sacb.inferers.refinement import check_refinement, refine_ddf

__all__ = ["RegistrationInferer"]


class RegistrationInferer(Inferer):
    """
    Field of a registration network, refined for the pair at hand where this is wanted.

    Whole images are compared: fields of view, by which a network may have been trained, play no part in the refinement.

    Args:
        iterations: steps of :py:func:`monai_sacb.inferers.refine_ddf`; 0 takes the network's field as it is.
        similarity, regularization, regularization_weight, learning_rate, spacing, patience: as for that function.
        amp: let the network work in bfloat16 where that is safe, on any device; the field stays float32. MONAI's own
            ``amp`` is for CUDA alone, and its float16 needs a loss scale.
        refinement: refines from coarse to fine instead, in ``iterations`` steps, with its own settings: the ones above
            that are for :py:func:`monai_sacb.inferers.refine_ddf` play no part, and a similarity or a regularization
            among them is refused.

    Raises:
        ValueError: When a number is out of its range.
    """

    def __init__(
        self,
        iterations: int = 0,
        similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        regularization: Callable[[torch.Tensor], torch.Tensor] | None = None,
        regularization_weight: float = 1.0,
        learning_rate: float = 0.3,
        spacing: int = 2,
        patience: int = 15,
        amp: bool = False,
        refinement: InstanceOptimization | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(amp, bool):
            raise ValueError(f"amp must be True or False, got {amp!r}.")
        if refinement is not None and not isinstance(refinement, InstanceOptimization):
            raise ValueError(f"refinement must be an InstanceOptimization, got {refinement!r}.")
        if refinement is not None and (similarity is not None or regularization is not None):
            raise ValueError(
                "with a refinement, similarity and regularization are to be given to it, got "
                f"{similarity!r} and {regularization!r} beside it."
            )
        check_refinement(regularization_weight, iterations, learning_rate, spacing, patience)
        self.iterations = iterations
        self.similarity = similarity
        self.regularization = regularization
        self.regularization_weight = regularization_weight
        self.learning_rate = learning_rate
        self.spacing = spacing
        self.patience = patience
        self.amp = amp
        self.refinement = refinement

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
        if self.refinement is not None:
            return self.refinement(moving, fixed, ddf, self.iterations)
        return refine_ddf(
            moving,
            fixed,
            ddf,
            self.similarity,
            self.regularization,
            self.regularization_weight,
            self.iterations,
            self.learning_rate,
            self.spacing,
            self.patience,
        )
