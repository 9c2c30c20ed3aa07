# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What a place looks like beside its surroundings, in images of any contrast, as a network's input."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["self_similarity"]


def _window(x: torch.Tensor, start: list[int], size: list[int]) -> torch.Tensor:
    for axis in range(len(size)):
        x = x.narrow(axis + 2, start[axis], size[axis])
    return x


def self_similarity(image: torch.Tensor, radius: int = 1, dilation: int = 2) -> torch.Tensor:
    """
    The descriptor of :py:func:`monai_sacb.losses.mind_ssc` in plain operations: it can be scripted and exported.

    Args:
        image: ``(B, C, *spatial)``, 2-D or 3-D; the channels are compared together.
        radius: half width of a patch, ``2 * radius + 1`` voxels wide.
        dilation: distance of the patches from the voxel, in voxels.

    Returns:
        ``(B, 12, *spatial)``, or in 2-D ``(B, 4, *spatial)``, float32 at least, values in [0, 1]; unchanged where
        intensities are multiplied by any number but zero or shifted, and 1 where there is no contrast.

    Source: Heinrich et al., Towards realtime multimodal fusion for image-guided interventions using self-similarities,
    MICCAI 2013.
    """
    if image.dtype != torch.float64:
        image = image.float()
    dims = image.dim() - 2
    spatial = list(image.shape[2:])
    reach = radius + dilation
    kernel = 2 * radius + 1
    padded = F.pad(image, [reach, reach] * dims, mode="replicate")
    distances: list[torch.Tensor] = []
    for second in range(1, dims):
        for first in range(second):
            for falling in range(2):
                # two pairs of patches that differ by the same step look up one map of distances
                size = [n + 2 * radius for n in spatial]
                size[first] += dilation
                size[second] += dilation
                start = [dilation] * dims
                end = [dilation] * dims
                one = [0] * dims
                other = [0] * dims
                start[second] = 0
                one[second] = dilation
                if falling == 0:
                    end[first] = 0
                    one[first] = dilation
                else:
                    start[first] = 0
                    other[first] = dilation
                squares = (_window(padded, start, size) - _window(padded, end, size)).square().mean(1, keepdim=True)
                patches = F.avg_pool3d(squares, kernel, 1) if dims == 3 else F.avg_pool2d(squares, kernel, 1)
                distances.append(_window(patches, one, spatial))
                distances.append(_window(patches, other, spatial))
    distance = torch.cat(distances, 1)
    mean = distance.mean(1, keepdim=True)
    # a variance below a thousandth of its mean over the image is noise, and is taken for as much
    floor = 1e-3 * mean.flatten(1).mean(1).view([-1] + [1] * (dims + 1))
    # images without any contrast must not divide by zero
    variance = torch.maximum(mean, floor) + 1e-8
    return torch.exp((distance.amin(1, keepdim=True) - distance) / variance)
