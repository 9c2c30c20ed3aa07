# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Similarity of the parts of two images that masks leave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from monai.utils import LossReduction

__all__ = ["fill_outside", "masked_similarity"]


def _fill(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Means where the count is not 0, elsewhere those of ever larger boxes, linear in between."""
    means, known = total / count.clamp(min=1), count > 0
    sizes = list(count.shape[2:])
    if max(sizes) == 1 or bool(known.all()):
        return means
    padding = [n for size in reversed(sizes) for n in (0, size % 2)]
    dims = len(sizes)
    pool, mode = (F.avg_pool2d, "bilinear") if dims == 2 else (F.avg_pool3d, "trilinear")
    coarse = _fill(*(2**dims * pool(F.pad(x, padding), 2) for x in (total, count)))
    around = F.interpolate(coarse, scale_factor=2, mode=mode, align_corners=False)
    for axis, size in enumerate(sizes, start=2):
        around = around.narrow(axis, 0, size)
    return torch.where(known, means, around)


def fill_outside(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The image with everything outside a mask replaced by what lies nearby inside, smoothly: no edge at the border.

    Args:
        image: ``(B, C, *spatial)``, floating point, 2-D or 3-D.
        mask: ``(B, 1, *spatial)``, not zero inside; where a mask has no voxel, the image becomes zero.

    Returns:
        ``(B, C, *spatial)``; the image itself inside, and free of what it was outside, NaN too.
    """
    inside = mask != 0
    return _fill(torch.where(inside, image, 0), inside.to(image.dtype))


def masked_similarity(similarity: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """
    A similarity as a weighted mean of its own map.

    Args:
        similarity: ``(warped, fixed) -> loss``, with an attribute ``reduction`` as PyTorch's and MONAI's losses have
            it, and with ``"none"`` a map on the images' grid.

    Returns:
        ``(warped, fixed, weight) -> loss``, with a weight ``(B, 1, *spatial)``; infinite where nothing has a weight.

    Raises:
        ValueError: When the similarity has no such attribute.
    """
    if not hasattr(similarity, "reduction"):
        raise ValueError(f"with masks, the similarity must have an attribute 'reduction', got {similarity!r}.")
    # the caller's own goes on as it is
    local: Any = copy.copy(similarity)
    local.reduction = LossReduction.NONE.value

    def compare(warped: torch.Tensor, fixed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        values = local(warped, fixed)
        if values.dim() != weight.dim() or values.shape[2:] != weight.shape[2:]:
            raise ValueError(
                f"with masks, the similarity must give a map of the shape {list(weight.shape[2:])} with reduction "
                f"'none', got {list(values.shape)}."
            )
        total = weight.sum() * values.shape[1]
        return (values * weight).sum() / total if total > 0 else values.sum() + torch.inf

    return compare
