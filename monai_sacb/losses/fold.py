# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
from numbers import Real

import torch
from torch.nn.modules.loss import _Loss

from monai.utils import LossReduction

__all__ = ["FoldPenaltyLoss"]


def _volume(edges: list[torch.Tensor]) -> torch.Tensor:
    """Signed volume that d edges ``(B, d, *spatial)`` span, in 2-D their area: the determinant of their matrix."""
    if len(edges) == 2:
        return edges[0][:, 0] * edges[1][:, 1] - edges[0][:, 1] * edges[1][:, 0]
    return (edges[0] * torch.linalg.cross(edges[1], edges[2], dim=1)).sum(1)


class FoldPenaltyLoss(_Loss):
    """
    Penalty on places where a displacement field folds or is about to: ``relu(margin - det) ** power``.

    The determinant of the gradient of ``p -> p + ddf(p)`` is taken at corners of every cell between voxels, from the
    differences along the cell's edges that meet there: what a mapping that is linear along each axis has within the
    cell. Of the corners, every second one counts, two in 2-D and four in 3-D (no two of them share an edge), so that
    differences to both sides of a voxel do, at half the cost of all of them. Computed in float32 at least.

    Args:
        margin: determinant below which a place costs something; that of the identity is 1.
        power: exponent, at least 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, a map ``(B, corners, *(spatial - 1))``.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self, margin: float = 0.2, power: float = 2.0, reduction: LossReduction | str = LossReduction.MEAN
    ) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        for name, value, least in (("margin", margin, 0), ("power", power, 1)):
            if isinstance(value, bool) or not isinstance(value, Real) or not least <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least {least}, got {value!r}.")
        self.margin = float(margin)
        self.power = float(power)

    def forward(self, pred: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pred: DDF ``(B, d, *spatial)`` in voxels, d = 2 or 3, pull-back, channel i along array axis i.

        Returns:
            the penalty, at least 0; a scalar unless ``reduction="none"``.

        Raises:
            ValueError: When the shape is not that of a field with at least two voxels along every axis.
        """
        dims = pred.dim() - 2
        if dims not in (2, 3) or pred.shape[1] != dims or min(pred.shape[2:]) < 2:
            raise ValueError(
                f"pred must be a field (B, d, *spatial) of at least 2 voxels along each of its d = 2 or 3 axes, got "
                f"shape {list(pred.shape)}."
            )
        if pred.dtype != torch.float64:
            pred = pred.float()
        # places p + ddf(p), not displacements: the identity need not be added to every edge
        axes = [torch.arange(n, dtype=pred.dtype, device=pred.device) for n in pred.shape[2:]]
        places = pred + torch.stack(torch.meshgrid(axes, indexing="ij"))
        edges = [places.diff(dim=axis + 2) for axis in range(dims)]
        cells = [n - 1 for n in pred.shape[2:]]
        penalties = []
        for corner in itertools.product((0, 1), repeat=dims):
            if sum(corner) % 2:
                continue
            meeting = []
            for axis, edge in enumerate(edges):
                # the one along this axis that starts or ends at the corner
                for other, start in enumerate(corner):
                    if other != axis:
                        edge = edge.narrow(other + 2, start, cells[other])
                meeting.append(edge)
            penalty = (self.margin - _volume(meeting)).clamp(min=0)
            penalties.append(penalty.square() if self.power == 2 else penalty.pow(self.power))
        result = torch.stack(penalties, 1)
        if self.reduction == LossReduction.MEAN.value:
            return result.mean()
        return result.sum() if self.reduction == LossReduction.SUM.value else result
