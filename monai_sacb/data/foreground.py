# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What of an image is not background, and the value of what is."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from monai_sacb.utils import plain_tensor

__all__ = ["background_value", "foreground_mask"]

# Hounsfield units: air is at -1000, fat above -200, lungs between
CT_AIR = -500.0
# share of voxels with exactly the least value from which on this is a stripped or padded image
STRIPPED_SHARE = 0.25
# share of the voxels above which an intensity counts as an outlier
OUTLIERS = 0.005
HISTOGRAM_BINS = 256


def background_value(image: torch.Tensor) -> float:
    """
    The value of what lies outside an image: its least value for CT, else 0.

    Args:
        image: of any shape; one with a value of -500 or less is taken for CT, where 0 would be water.
    """
    least = float(plain_tensor(image).min())
    return least if least <= CT_AIR else 0.0


def _otsu(values: np.ndarray) -> float:
    """The threshold that parts values in the two classes of least variance, outliers above left out."""
    top = np.partition(values, int((1 - OUTLIERS) * (values.size - 1)))[int((1 - OUTLIERS) * (values.size - 1))]
    low = float(values.min())
    if top <= low:
        return low
    counts, edges = np.histogram(values, HISTOGRAM_BINS, (low, float(top)))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    mean_below = sums[:-1] / np.maximum(below, 1)
    mean_above = (sums[-1] - sums[:-1]) / np.maximum(above, 1)
    best = np.argmax(below * above * (mean_above - mean_below) ** 2)
    # the same parts where values are dense; where there is a gap between them, its middle and not its lower end
    return float((mean_below[best] + mean_above[best]) / 2)


def _solid(mask: np.ndarray) -> np.ndarray:
    """The largest connected piece, without the holes in it."""
    pieces, count = ndimage.label(mask)
    if count == 0:
        return mask
    body = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    outside, _ = ndimage.label(~body)
    # what of the outside reaches a face of the volume
    open_pieces = np.unique(np.concatenate([np.take(outside, [0, -1], axis).ravel() for axis in range(3)]))
    return ~np.isin(outside, open_pieces[open_pieces > 0])


def foreground_mask(image: torch.Tensor) -> torch.Tensor:
    """
    Where a volume shows something.

    - CT (a value of -500 or less): the largest piece above -500 and what it encloses, that is, the body with its lungs.
    - An image of which a quarter or more has exactly the least value, as where a skull was stripped or an image was
      padded: all else.
    - Any other: the largest piece, and what it encloses, above half of Otsu's threshold, measured from the least value.
      Half of it, since Otsu's parts bright tissue from dark at times; of an image without background it leaves most.

    Args:
        image: ``(1, D, H, W)``.

    Returns:
        ``(1, D, H, W)``, bool, on the image's device; never empty: everything, where none of this leaves anything.

    Raises:
        ValueError: When the shape is another one.
    """
    if image.dim() != 4 or image.shape[0] != 1 or image.numel() == 0:
        raise ValueError(f"image must have shape (1, D, H, W), got {list(image.shape)}.")
    values = plain_tensor(image)[0].detach().float().cpu().numpy()
    least = float(values.min())
    if least <= CT_AIR:
        mask = _solid(values > CT_AIR)
    elif np.mean(values == least) >= STRIPPED_SHARE:
        mask = values > least
    else:
        mask = _solid(values > least + (_otsu(values.ravel()) - least) / 2)
    if not mask.any():
        mask = np.ones_like(mask)
    return torch.from_numpy(np.ascontiguousarray(mask))[None].to(image.device)
