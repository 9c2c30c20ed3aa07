# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from monai_sacb.networks.layers import reference_grid

__all__ = ["WarpedLabelDiceLoss"]

# A voxel at p + ddf(p) lies between 2^d voxels of the moving image, and each of them gives its label the part that
# linear interpolation gives to it. Overlap and volume of all labels are sums of these parts: no map of a label is made.


def _corners(
    ddf: torch.Tensor, label: torch.Tensor, num_labels: int
) -> Iterator[tuple[torch.Tensor, list[tuple[torch.Tensor, int]]]]:
    """
    The voxels of the moving image around every displaced voxel, one corner after the other.

    Args:
        ddf: ``(B, d, *spatial)`` in voxels.
        label: ``(B, 1, *spatial)``, label map of the moving image, of any size.
        num_labels: labels of other values than 1 to this are background.

    Returns:
        the labels of the corner ``(B, *spatial)``, 0 outside the image; its weight along every axis, together with the
        sign of the weight's derivative.
    """
    shape, dims = label.shape[2:], ddf.shape[1]
    points = reference_grid(list(ddf.shape[2:]), ddf.device).to(ddf.dtype) + ddf
    lower, parts = [], []
    for axis, size in enumerate(shape):
        # along an axis of a single voxel nothing is displaced
        position = points[:, axis] if size > 1 else torch.zeros_like(points[:, axis])
        floor = position.floor()
        lower.append(floor.long())
        parts.append(position - floor)
    flat = label.reshape(-1)
    first = torch.arange(len(label), device=label.device).view(-1, *[1] * dims) * shape.numel()
    for corner in itertools.product((0, 1), repeat=dims):
        index, inside = first, torch.ones_like(first, dtype=torch.bool)
        for axis, size in enumerate(shape):
            place = lower[axis] + corner[axis]
            inside = inside & (place >= 0) & (place < size)
            index = index + place.clamp_(0, size - 1) * shape[axis + 1 :].numel()
        value = _known(flat[index], num_labels).mul_(inside)
        yield value, [(part, 1) if step else (1 - part, -1) for part, step in zip(parts, corner)]


def _known(label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """The labels as whole numbers, those that are not 1 to ``num_labels`` as background."""
    label = label.long()
    return label * ((label > 0) & (label <= num_labels))


def _volume(label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Number of voxels of every label, ``(B, num_labels)``."""
    rows = _known(label, num_labels).flatten(1)
    table = torch.zeros([len(label), num_labels + 1], dtype=torch.float64, device=label.device)
    ones = torch.ones((), dtype=table.dtype, device=label.device).expand_as(rows)
    return table.scatter_add_(1, rows, ones)[:, 1:]


def has_labels(label: torch.Tensor) -> torch.Tensor:
    """Whether each label map ``(B, 1, *spatial)`` of a batch is one, and not -1 throughout: ``(B,)``."""
    return (label >= 0).flatten(1).any(1)


class _Overlap(torch.autograd.Function):
    """Overlap and volume of every label, as linear interpolation warps it; keeps nothing but its inputs."""

    @staticmethod
    def forward(
        ctx: Any, ddf: torch.Tensor, moving: torch.Tensor, fixed: torch.Tensor, num_labels: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(ddf, moving, fixed)
        ctx.num_labels = num_labels
        target = _known(fixed[:, 0], num_labels)
        # of every image: all labels where the fixed image has another one, all labels where it has the same
        image = torch.arange(len(ddf), device=ddf.device).view(-1, *[1] * (ddf.dim() - 2)) * 2
        # sums of millions of parts
        table = torch.zeros(2 * len(ddf) * (num_labels + 1), dtype=torch.float64, device=ddf.device)
        for label, weights in _corners(ddf, moving, num_labels):
            row = label.add((image + (label == target)).mul_(num_labels + 1))
            part = weights[0][0]
            for weight, _ in weights[1:]:
                part = part * weight
            table.index_add_(0, row.view(-1), part.reshape(-1).double())
        table = table.view(len(ddf), 2, num_labels + 1)[..., 1:]
        return table[:, 1].contiguous(), table.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_overlap: torch.Tensor, grad_volume: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ddf, moving, fixed = ctx.saved_tensors
        num_labels = ctx.num_labels
        target = _known(fixed[:, 0], num_labels)
        image = torch.arange(len(ddf), device=ddf.device).view(-1, *[1] * (ddf.dim() - 2)) * 2
        table = ddf.new_zeros([len(ddf), 2, num_labels + 1])
        table[:, 0, 1:] = grad_volume
        table[:, 1, 1:] = grad_volume + grad_overlap
        grad = torch.zeros_like(ddf, memory_format=torch.contiguous_format)
        for label, weights in _corners(ddf, moving, num_labels):
            value = table.view(-1)[label.add((image + (label == target)).mul_(num_labels + 1))]
            for axis, (_, sign) in enumerate(weights):
                if moving.shape[axis + 2] == 1:
                    continue
                slope = value
                for other, (weight, _) in enumerate(weights):
                    if other != axis:
                        slope = slope * weight
                grad[:, axis].add_(slope, alpha=sign)
        return grad, None, None, None


class WarpedLabelDiceLoss(nn.Module):
    """
    Dice loss of labels that are warped linearly, in time and memory that do not grow with their number.

    It equals MONAI's ``DiceLoss(include_background=False)`` of the warped one-hot map of the moving image and the
    one-hot map of the fixed one, which it never makes. The mean is taken over labels and pairs; a label that neither
    image has counts, as in MONAI's loss, as in perfect agreement (for equal constants). A label map that is -1
    throughout stands for a subject without labels, as :py:func:`monai_sacb.data.collate_pairs` fills up a batch; its
    pairs do not count.

    Args:
        smooth_nr: constant added to the numerator of the Dice, to avoid zero.
        smooth_dr: constant added to the denominator, to avoid NaN.

    Raises:
        ValueError: When a constant is not positive.
    """

    def __init__(self, smooth_nr: float = 1e-5, smooth_dr: float = 1e-5) -> None:
        super().__init__()
        for name, value in (("smooth_nr", smooth_nr), ("smooth_dr", smooth_dr)):
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        self.smooth_nr = smooth_nr
        self.smooth_dr = smooth_dr

    def forward(
        self, moving_label: torch.Tensor, fixed_label: torch.Tensor, ddf: torch.Tensor, num_labels: int
    ) -> torch.Tensor:
        """
        Args:
            moving_label: label map of the moving image, ``(B, 1, *spatial)``, whole numbers. What is not 1 to
                ``num_labels``, and what lies outside, is background.
            fixed_label: label map of the fixed image, on the grid of the field.
            ddf: DDF ``(B, d, *spatial)``, in voxels of the fixed grid, pull-back.
            num_labels: number of labels.

        Returns:
            the loss, a scalar in [0, 1]; 0 when no pair has labels.

        Raises:
            ValueError: When the shapes do not belong together or there are no labels.
        """
        dims = ddf.dim() - 2
        if (
            dims not in (2, 3)
            or ddf.shape[1] != dims
            or fixed_label.shape != (len(ddf), 1, *ddf.shape[2:])
            or moving_label.dim() != ddf.dim()
            or moving_label.shape[:2] != (len(ddf), 1)
        ):
            raise ValueError(
                "the label maps must be (B, 1, *spatial) and ddf (B, d, *spatial) with d = 2 or 3, got "
                f"{list(moving_label.shape)}, {list(fixed_label.shape)} and {list(ddf.shape)}."
            )
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}.")
        field = ddf if ddf.dtype == torch.float64 else ddf.float()
        overlap, volume = _Overlap.apply(field, moving_label, fixed_label, num_labels)
        fixed_volume = _volume(fixed_label, num_labels)
        dice = (2 * overlap + self.smooth_nr) / (volume + fixed_volume + self.smooth_dr)
        means = (1 - dice).mean(1)
        labelled = has_labels(moving_label) & has_labels(fixed_label)
        return ((means * labelled).sum() / labelled.sum().clamp(min=1)).to(field.dtype)
