# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Instance optimization: a field improved for the one pair of images it belongs to."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch
import torch.nn.functional as F

from monai_sacb.losses import BendingPenaltyLoss, LNCCLoss
from monai_sacb.networks.layers import warp

__all__ = ["refine_ddf"]


def _refine_one(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    ddf: torch.Tensor,
    objective: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    iterations: int,
    learning_rate: float,
    spacing: int,
    patience: int,
) -> torch.Tensor:
    """The same for one pair, ``(1, ...)``, without checks."""
    spatial = list(ddf.shape[2:])
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    with torch.no_grad():
        best, best_value, best_step = ddf, objective(moving, fixed, ddf).item(), 0
    if not math.isfinite(best_value):
        raise ValueError(f"the objective of the field to be refined must be finite, got {best_value}.")
    grid = [math.ceil((size - 1) / spacing) + 1 for size in spatial]
    # a mean over the neighborhood of every control point: what is finer than their grid would only alias
    pool = F.avg_pool2d if len(spatial) == 2 else F.avg_pool3d
    width = spacing // 2 * 2 + 1
    smooth = pool(ddf, width, stride=1, padding=width // 2, count_include_pad=False)
    control = F.interpolate(smooth, size=grid, mode=mode, align_corners=True).requires_grad_()
    optimizer = torch.optim.Adam([control], learning_rate)
    for step in range(iterations + 1):
        field = F.interpolate(control, size=spatial, mode=mode, align_corners=True)
        with torch.set_grad_enabled(step < iterations):
            objective_value = objective(moving, fixed, field)
        value = objective_value.item()
        if value < best_value:
            best, best_value, best_step = field.detach(), value, step
        # a value that is not finite is no improvement either
        if step == iterations or step - best_step >= patience or not math.isfinite(value):
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / iterations))
        # of the field alone: a similarity that has parameters of its own collects no gradients
        (control.grad,) = torch.autograd.grad(objective_value, control)
        optimizer.step()
    return best


def check_refinement(
    regularization_weight: float, iterations: int, learning_rate: float, spacing: int, patience: int
) -> None:
    """Refuse numbers that :py:func:`refine_ddf` cannot work with; see there."""
    for name, number, least in (("iterations", iterations, 0), ("spacing", spacing, 1), ("patience", patience, 1)):
        if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}.")
    for name, value in (("regularization_weight", regularization_weight), ("learning_rate", learning_rate)):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")


def check_pair(moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> None:
    """Refuse tensors that :py:func:`refine_ddf` cannot work with; see there."""
    dims = fixed.dim() - 2
    if dims not in (2, 3) or moving.shape != fixed.shape or list(ddf.shape) != [len(fixed), dims, *fixed.shape[2:]]:
        raise ValueError(
            "moving and fixed must have one shape (B, C, *spatial) of 2 or 3 spatial axes and ddf must be (B, d, "
            f"*spatial), got {list(moving.shape)}, {list(fixed.shape)} and {list(ddf.shape)}."
        )
    if min(fixed.shape[2:]) < 5:
        raise ValueError(f"refinement needs at least 5 voxels along every axis, got shape {list(fixed.shape)}.")


def refine_ddf(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    ddf: torch.Tensor,
    similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    regularization: Callable[[torch.Tensor], torch.Tensor] | None = None,
    regularization_weight: float = 1.0,
    iterations: int = 50,
    learning_rate: float = 0.3,
    spacing: int = 2,
    patience: int = 15,
) -> torch.Tensor:
    """
    Improve a displacement field for the images at hand by gradient descent on the field itself.

    The field is laid down as displacements of a coarse grid of control points, linear in between, which Adam moves so
    as to lower similarity plus regularization. Every pair of a batch is treated alone. The result is the best field
    that was seen, the given one among them: its objective is never worse than at the start. The same input gives the
    same bits on a CPU; on a GPU, gradients of interpolation add up in an order that varies.

    Args:
        moving: ``(B, C, *spatial)``, 2-D or 3-D.
        fixed: ``(B, C, *spatial)``.
        ddf: field to start from, ``(B, d, *spatial)`` in voxels of the fixed grid, pull-back.
        similarity: ``(warped, fixed) -> loss``. Defaults to :py:class:`monai_sacb.losses.LNCCLoss` with windows of 5
            voxels.
        regularization: ``(ddf) -> loss``. Defaults to
            :py:class:`monai_sacb.losses.BendingPenaltyLoss`, in voxels.
        regularization_weight: weight of the regularization.
        iterations: steps at most; 0 returns the field as it is.
        learning_rate: size of the first steps, in voxels; it falls to zero along half a cosine.
        spacing: distance of the control points in voxels.
        patience: stop when the objective has not improved for this many steps, or is not finite.

    Returns:
        DDF of the shape and type of ``ddf``, without gradient.

    Raises:
        ValueError: When shapes do not belong together, an axis has less than 5 voxels, a number is out of its range, or
            the objective of the given field is not finite.

    Source: Balakrishnan et al., VoxelMorph, IEEE TMI 2019, section V (instance-specific optimization), of the field
    rather than of a network; Siebert et al., ConvexAdam, 2021, for the coarse grid of control points.
    """
    check_refinement(regularization_weight, iterations, learning_rate, spacing, patience)
    check_pair(moving, fixed, ddf)
    if iterations == 0:
        return ddf.detach()
    compare = LNCCLoss(kernel_size=5) if similarity is None else similarity
    penalty = BendingPenaltyLoss() if regularization is None else regularization

    def objective(moving: torch.Tensor, fixed: torch.Tensor, field: torch.Tensor) -> torch.Tensor:
        loss = compare(warp(moving, field), fixed)
        return loss + regularization_weight * penalty(field) if regularization_weight > 0 else loss

    # engines infer without gradients; a field in half precision is off by tenths of a voxel
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(ddf.device.type, enabled=False):
        dtype = torch.float64 if ddf.dtype == torch.float64 else torch.float32
        # a copy: tensors of inference mode cannot take part in a gradient
        pairs = zip(*(t.detach().to(dtype).clone().split(1) for t in (moving, fixed, ddf)))
        refined = [
            _refine_one(image, target, start, objective, iterations, learning_rate, spacing, patience)
            for image, target, start in pairs
        ]
    return torch.cat(refined).to(ddf.dtype)
