# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What a place looks like beside its surroundings, in images of any contrast, as a network's input."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from monai_sacb.networks.layers.neighborhood import shifted

__all__ = ["neighbor_pairs", "self_similarity"]


def neighbor_pairs(spatial: list[int], dilation: int) -> list[list[list[int]]]:
    """
    The pairs of neighbors whose patches are compared, two by two: those in one plane that differ by the same step.

    Both pairs look up the same map of distances, in windows of the image's size. Offsets count from the first corner
    of the image, padded by the dilation. For patches, both the padding and the map of squares have their radius more on
    every side, which leaves the offsets as they are.

    Args:
        spatial: the image's shape.
        dilation: distance of the neighbors, in voxels.

    Returns:
        of every two pairs, the size of their map; the offsets of its two operands; and the offsets in the map at which
        the distances of the first and of the second pair begin.
    """
    dims = len(spatial)
    pairs: list[list[list[int]]] = []
    for second in range(1, dims):
        for first in range(second):
            for falling in (True, False):
                size = list(spatial)
                # not in place: in tracing, a size is a tensor that the lists share
                size[first] = spatial[first] + dilation
                size[second] = spatial[second] + dilation
                start, end = [dilation] * dims, [dilation] * dims
                one, other = [0] * dims, [0] * dims
                start[second] = 0
                one[second] = dilation
                if falling:
                    end[first] = 0
                    one[first] = dilation
                else:
                    start[first] = 0
                    other[first] = dilation
                pairs.append([size, start, end, one, other])
    return pairs


def self_similarity(image: torch.Tensor, radius: int = 1, dilation: int = 2) -> torch.Tensor:
    """
    The descriptor of :py:func:`monai_sacb.losses.mind_ssc` in plain operations: it can be scripted and exported.

    By default, its patches are smaller. Intensities are not scaled as there: their squares must be finite.

    Args:
        image: ``(B, C, *spatial)``, 2-D or 3-D; the channels are compared together. Intensities should be of the order
            of 1 or larger.
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
    for size, start, end, one, other in neighbor_pairs(spatial, dilation):
        window = [n + 2 * radius for n in size]
        squares = (shifted(padded, start, window) - shifted(padded, end, window)).square().mean(1, keepdim=True)
        patches = F.avg_pool3d(squares, kernel, 1) if dims == 3 else F.avg_pool2d(squares, kernel, 1)
        distances.append(shifted(patches, one, spatial))
        distances.append(shifted(patches, other, spatial))
    distance = torch.cat(distances, 1)
    mean = distance.mean(1, keepdim=True)
    # a variance below a thousandth of its mean over the image is noise, and is taken for as much
    floor = 1e-3 * mean.flatten(1).mean(1).view([-1] + [1] * (dims + 1))
    # images without any contrast must not divide by zero
    variance = torch.maximum(mean, floor) + 1e-8
    return torch.exp((distance.amin(1, keepdim=True) - distance) / variance)
