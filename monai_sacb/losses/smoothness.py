# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.modules.loss import _Loss

from monai.utils import LossReduction

from monai_sacb.losses.spacing import check_spacing, voxel_sizes
from monai_sacb.networks.layers.neighborhood import shifted

__all__ = ["BendingPenaltyLoss", "GradientPenaltyLoss"]


def _check_field(pred: torch.Tensor, least: int) -> int:
    """The number of axes of a field, unless it is none."""
    dims = pred.dim() - 2
    if dims not in (2, 3) or pred.shape[1] != dims or min(pred.shape[2:]) < least:
        raise ValueError(
            f"pred must be a field (B, d, *spatial) of at least {least} voxels along each of its d = 2 or 3 axes, got "
            f"shape {list(pred.shape)}."
        )
    return dims


class _FieldPenalty(_Loss):
    """Base of penalties on a field: the unit of length and the reduction."""

    def __init__(
        self, spacing: float | Sequence[float] | None = None, reduction: LossReduction | str = LossReduction.MEAN
    ) -> None:
        super().__init__(reduction=LossReduction(reduction).value)
        self.spacing = check_spacing(spacing)

    def _reduce(self, penalty: torch.Tensor, sizes: Sequence[float]) -> torch.Tensor:
        """Penalties ``(B, d, ...)`` of components in voxels, as those of components in mm, reduced."""
        if self.spacing is not None:
            scale = penalty.new_tensor([size * size for size in sizes])
            penalty = penalty * scale.view(1, -1, *[1] * (penalty.dim() - 2))
        if self.reduction == LossReduction.MEAN.value:
            return penalty.mean()
        return penalty.sum() if self.reduction == LossReduction.SUM.value else penalty


class GradientPenaltyLoss(_FieldPenalty):
    """
    Mean over the axes of the mean squared forward difference of a displacement field.

    MONAI's ``DiffusionLoss`` sums squared central differences over the axes and is about three times as large: weights
    do not carry over.

    Args:
        spacing: voxel size in mm, for displacements in mm and derivatives per mm; one for all axes or one for each.
            Defaults to ``None``: voxels. Voxels as long as wide give the same value either way.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, over images and components. ``"none"`` gives ``(B, d, 1, 1[,
            1])``: there is one difference less than voxels along every axis, so that no voxel has them all.

    Raises:
        ValueError: When an argument is out of its range.

    Source: Cheng et al., SACB-Net, CVPR 2025; Balakrishnan et al., VoxelMorph, IEEE TMI 2019, section III.
    """

    def forward(self, pred: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pred: DDF ``(B, d, *spatial)`` in voxels, d = 2 or 3.

        Returns:
            the penalty, a scalar unless ``reduction="none"``.

        Raises:
            ValueError: When the shape is not that of a field with at least two voxels along every axis, or does not fit
                the spacing.
        """
        dims = _check_field(pred, 2)
        sizes = voxel_sizes(self.spacing, dims)
        if pred.dtype != torch.float64:
            pred = pred.float()
        spatial = list(range(2, pred.dim()))
        penalty = torch.zeros((), dtype=pred.dtype, device=pred.device)
        for axis, size in zip(spatial, sizes):
            penalty = penalty + pred.diff(dim=axis).square().mean(spatial, keepdim=True) / size**2
        return self._reduce(penalty / dims, sizes)


# second differences: a sum of factors times values at offsets from the corner of the window of 3 voxels
_Stencil = list[tuple[float, list[int]]]


def _second_differences(sizes: Sequence[float]) -> list[tuple[float, _Stencil]]:
    """Every second difference, ``[1, -2, 1]`` along one axis or central along two, with its weight in the energy."""
    dims = len(sizes)
    result: list[tuple[float, _Stencil]] = []
    for first in range(dims):
        for second in range(first, dims):
            steps = [(1.0, 1, 0), (-2.0, 0, 0), (1.0, -1, 0)]
            if second > first:
                steps = [(0.25 * a * b, a, b) for a in (1, -1) for b in (1, -1)]
            stencil = []
            for factor, along_first, along_second in steps:
                offset = [1] * dims
                offset[first] += along_first
                offset[second] += along_second
                stencil.append((factor, offset))
            # mixed derivatives occur twice in the matrix of second derivatives
            result.append(((1.0 if first == second else 2.0) / (sizes[first] * sizes[second]) ** 2, stencil))
    return result


def _difference(x: torch.Tensor, stencil: _Stencil, inner: list[int]) -> torch.Tensor:
    result = torch.zeros([*x.shape[:2], *inner], dtype=x.dtype, device=x.device)
    for factor, offset in stencil:
        result.add_(shifted(x, offset, inner), alpha=factor)
    return result


class _BendingEnergy(torch.autograd.Function):
    """Map of the bending energy at the inner voxels; keeps nothing but the field, one derivative at a time."""

    @staticmethod
    def forward(ctx: Any, pred: torch.Tensor, sizes: Sequence[float]) -> torch.Tensor:
        ctx.save_for_backward(pred)
        ctx.sizes = sizes
        inner = [size - 2 for size in pred.shape[2:]]
        energy = torch.zeros([*pred.shape[:2], *inner], dtype=pred.dtype, device=pred.device)
        for weight, stencil in _second_differences(sizes):
            difference = _difference(pred, stencil, inner)
            energy.addcmul_(difference, difference, value=weight)
        return energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (pred,) = ctx.saved_tensors
        inner = list(grad.shape[2:])
        result = torch.zeros_like(pred, memory_format=torch.contiguous_format)
        for weight, stencil in _second_differences(ctx.sizes):
            slope = _difference(pred, stencil, inner).mul_(grad)
            for factor, offset in stencil:
                shifted(result, offset, inner).add_(slope, alpha=2 * weight * factor)
        return result, None


class BendingPenaltyLoss(_FieldPenalty):
    """
    Bending energy of a displacement field: the squared second derivatives, of which affine motion has none.

    In voxels it equals MONAI's ``BendingEnergyLoss`` (of MONAI 1.6.1: ``[1, -2, 1]`` along one axis, central
    differences along two). This one can measure in mm, and keeps no derivative for the backward pass.

    Args:
        spacing: voxel size in mm, for displacements in mm and derivatives per mm; one for all axes or one for each.
            Defaults to ``None``: voxels. Voxels of s mm along every axis divide the value by s².
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (a map of the components at the inner voxels, ``(B, d,
            *(spatial - 2))``).

    Raises:
        ValueError: When an argument is out of its range.

    Source: Rueckert et al., Nonrigid registration using free-form deformations, IEEE TMI 1999, equation 8.
    """

    def forward(self, pred: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pred: DDF ``(B, d, *spatial)`` in voxels, d = 2 or 3.

        Returns:
            the penalty, a scalar unless ``reduction="none"``.

        Raises:
            ValueError: When the shape is not that of a field with at least three voxels along every axis, or does not
                fit the spacing.
        """
        sizes = voxel_sizes(self.spacing, _check_field(pred, 3))
        if pred.dtype != torch.float64:
            pred = pred.float()
        return self._reduce(_BendingEnergy.apply(pred, sizes), sizes)
