# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Images of different contrasts made comparable."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from monai_sacb.networks.layers import warp
from monai_sacb.utils import check_count

__all__ = ["check_pair", "common_region", "match_channels", "match_contrast"]

NUM_BINS = 64
# of the Gaussian along the bins, in bins
SIGMA = 1.0
# voxels' worth of the mean of all bins that each bin gets, so that empty ones have a value
PRIOR = 1e-3


def _smooth(values: torch.Tensor) -> torch.Tensor:
    radius = int(4 * SIGMA)
    offsets = torch.arange(-radius, radius + 1, dtype=values.dtype, device=values.device)
    kernel = (-0.5 * (offsets / SIGMA).square()).exp()
    return F.conv1d(F.pad(values[None, None], (radius, radius), mode="replicate"), kernel[None, None])[0, 0]


def _match(moving: torch.Tensor, warped: torch.Tensor, fixed: torch.Tensor, num_bins: int) -> torch.Tensor:
    """One channel of one image; ``warped`` and ``fixed`` are values at the same places, ``(N,)``."""
    low, high = moving.min(), moving.max()
    # what is not finite has no bins
    if not bool((high - low > 0) & torch.isfinite(high - low)) or len(warped) == 0:
        return moving

    def place(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The bin below each value, and the share of the next one."""
        position = ((values - low) / (high - low) * (num_bins - 1)).clamp(0, num_bins - 1)
        index = position.floor().long().clamp(max=num_bins - 2)
        return index, position - index

    index, upper = place(warped)
    counts, sums = fixed.new_zeros(num_bins), fixed.new_zeros(num_bins)
    for shift, weight in ((0, 1 - upper), (1, upper)):
        counts.scatter_add_(0, index + shift, weight)
        sums.scatter_add_(0, index + shift, weight * fixed)
    # the lowest intensity is most often that of the background, which has no neighbors
    background = sums[0] / counts[0] if bool(counts[0] > 0) else fixed.mean()
    counts[0] = sums[0] = 0
    counts, sums = _smooth(counts), _smooth(sums)
    mean = sums.sum() / counts.sum() if bool(counts.sum() > 0) else background
    curve = (sums + PRIOR * mean) / (counts + PRIOR)
    curve[0] = background
    index, upper = place(moving)
    return torch.lerp(curve[index], curve[index + 1], upper)


def match_channels(
    moving: torch.Tensor, warped: torch.Tensor, fixed: torch.Tensor, counted: torch.Tensor, num_bins: int = NUM_BINS
) -> torch.Tensor:
    """
    :py:func:`match_contrast` where the ``warped`` moving image is at hand, and the voxels that are ``counted``, bool
    ``(B, 1, *spatial)``; without checks.
    """
    matched = [
        [_match(channel, one[where], other[where], num_bins) for channel, one, other in zip(*images)]
        for *images, (where,) in zip(moving, warped, fixed, counted)
    ]
    return torch.stack([torch.stack(channels) for channels in matched])


def check_pair(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    ddf: torch.Tensor,
    moving_mask: torch.Tensor | None,
    fixed_mask: torch.Tensor | None,
) -> None:
    """Refuse images, a field and masks whose shapes are not those of :py:func:`match_contrast`."""
    dims = fixed.dim() - 2
    if dims not in (2, 3) or moving.shape != fixed.shape or list(ddf.shape) != [len(fixed), dims, *fixed.shape[2:]]:
        raise ValueError(
            "moving and fixed must have one shape (B, C, *spatial) of 2 or 3 spatial axes and ddf must be (B, d, "
            f"*spatial), got {list(moving.shape)}, {list(fixed.shape)} and {list(ddf.shape)}."
        )
    expected = [len(fixed), 1, *fixed.shape[2:]]
    for name, mask in (("moving_mask", moving_mask), ("fixed_mask", fixed_mask)):
        if mask is not None and list(mask.shape) != expected:
            raise ValueError(f"{name} must be {expected}, one channel on the images' grid, got {list(mask.shape)}.")


def common_region(
    fixed: torch.Tensor, ddf: torch.Tensor, moving_mask: torch.Tensor | None, fixed_mask: torch.Tensor | None
) -> torch.Tensor:
    """Where a field leads from the fixed image into the moving one, inside the masks: bool, ``(B, 1, *spatial)``."""
    inside = torch.ones_like(fixed[:, :1]) if moving_mask is None else (moving_mask != 0).to(fixed.dtype)
    # wholly inside: at the border of an image, interpolation mixes in zeros
    counted = warp(inside, ddf) > 0.99
    return counted if fixed_mask is None else counted & (fixed_mask != 0)


def match_contrast(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    ddf: torch.Tensor,
    moving_mask: torch.Tensor | None = None,
    fixed_mask: torch.Tensor | None = None,
    num_bins: int = NUM_BINS,
) -> torch.Tensor:
    """
    The moving image in about the contrast of the fixed one: each of its intensities is exchanged for the mean of what
    the fixed image has at the places where it lies under a first field.

    It is the curve that the correlation ratio measures the fit of. Where two tissues have one intensity in the moving
    image, they cannot be told apart afterwards, either.

    Args:
        moving: ``(B, C, *spatial)``, floating point, 2-D or 3-D; each channel by itself.
        fixed: ``(B, C, *spatial)``.
        ddf: first field, ``(B, d, *spatial)`` in voxels of the fixed grid, pull-back.
        moving_mask: ``(B, 1, *spatial)``, not zero where the moving image counts; everywhere by default.
        fixed_mask: likewise of the fixed image.
        num_bins: of the curve over the range of the moving image's intensities, linear in between.

    Returns:
        ``(B, C, *spatial)`` on the grid of the moving image; a channel that is constant or not finite, or has
        no voxel that counts, as it is.

    Raises:
        ValueError: When the shapes do not belong together, or ``num_bins`` is below 2.

    Source: Roche et al., The correlation ratio as a new similarity measure for multimodal image registration, MICCAI
    1998.
    """
    check_count("num_bins", num_bins, 2)
    check_pair(moving, fixed, ddf, moving_mask, fixed_mask)
    with torch.no_grad():
        counted = common_region(fixed, ddf, moving_mask, fixed_mask)
        return match_channels(moving, warp(moving, ddf), fixed, counted, num_bins)
