# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from torch import nn

from monai_sacb.networks.layers import compose, reference_grid

__all__ = ["InverseConsistencyLoss"]


class InverseConsistencyLoss(nn.Module):
    """
    How far from its start a point ends that goes there by one field and back by the other: the mean squared distance.

    Points that leave the grid on the way there do not count: where they would come back to is not known. The mean is
    taken over the points that count, of all pairs together. Computed in float32 at least.

    Source: Christensen and Johnson, Consistent image registration, IEEE Transactions on Medical Imaging 20, 2001.
    """

    def forward(self, there: torch.Tensor, back: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            there: DDF ``(B, d, *spatial)``, in voxels of its own grid, pull-back, channel i along array axis i: of the
                moving image to the fixed one, say, whose points it takes to the moving image.
            back: DDF of the other direction, on a grid of the same size.
            mask: ``(B, 1, *spatial)``, not 0 where the points of the first grid count. Defaults to ``None``:
                everywhere.

        Returns:
            the mean squared distance in voxels², a scalar; 0 where no point counts.

        Raises:
            ValueError: When the shapes do not belong together.
        """
        dims = there.dim() - 2
        if dims not in (2, 3) or there.shape[1] != dims or back.shape != there.shape:
            raise ValueError(
                "both fields must have one shape (B, d, *spatial) with d = 2 or 3, got "
                f"{list(there.shape)} and {list(back.shape)}."
            )
        if mask is not None and mask.shape != (len(there), 1, *there.shape[2:]):
            raise ValueError(f"the mask of fields {list(there.shape)} must be of one channel, got {list(mask.shape)}.")
        dtype = torch.float64 if torch.float64 in (there.dtype, back.dtype) else torch.float32
        there, back = there.to(dtype), back.to(dtype)
        spatial = list(there.shape[2:])
        with torch.no_grad():
            places = reference_grid(spatial, there.device).to(dtype) + there
            last = places.new_tensor(spatial).sub(1).view(-1, *[1] * dims)
            counts = ((places >= 0) & (places <= last)).all(1)
            if mask is not None:
                counts = counts & (mask[:, 0] != 0)
        squared = compose(there, back).square().sum(1)
        return (squared * counts).sum() / counts.sum().clamp(min=1)
