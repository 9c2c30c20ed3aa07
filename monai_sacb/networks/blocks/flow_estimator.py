# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""How each level of the pyramid turns two feature maps and the field so far into a better field."""

from __future__ import annotations

import torch
from torch import nn

from monai_sacb.networks.blocks.conv_norm_act import ConvNormAct, SameConv
from monai_sacb.networks.blocks.sacb_block import SACBlock
from monai_sacb.networks.blocks.similarity_matching import SimilarityMatching
from monai_sacb.networks.layers import compose, exponential, warp

__all__ = ["ConvFlowEstimator", "MatchingFlowEstimator"]


def _added(delta: torch.Tensor, ddf: torch.Tensor | None, integration_steps: int) -> torch.Tensor:
    """The flow of this level, integrated where there are steps to do so, and then the field so far, if any."""
    padding_mode = "zeros"
    if integration_steps > 0:
        delta = exponential(delta, integration_steps)
        # a field that ends at the border of the grid would fold there
        padding_mode = "border"
    if ddf is not None:
        delta = compose(delta, ddf, padding_mode=padding_mode)
    return delta


class MatchingFlowEstimator(nn.Module):
    """
    Coarse level: both maps through one shared :py:class:`SACBlock`, then :py:class:`SimilarityMatching`.

    Args:
        channels: channels of the feature maps.
        num_clusters: clusters of the block.
        spatial_dims: 2 or 3.
        negative_slope: slope of the LeakyReLU activations.
        scaled_matching: divide the feature products of the matching by the square root of ``channels``.
        integration_steps: squarings by which the flow of this level is integrated as a velocity; 0 takes it as it is.

    Source: Cheng et al., SACB-Net, CVPR 2025, section 3.
    """

    def __init__(
        self,
        channels: int,
        num_clusters: int,
        spatial_dims: int = 3,
        negative_slope: float = 0.1,
        scaled_matching: bool = False,
        integration_steps: int = 0,
    ) -> None:
        super().__init__()
        self.integration_steps = integration_steps
        self.sacb = SACBlock(channels, num_clusters, spatial_dims, negative_slope)
        self.matching = SimilarityMatching(window=3, scale=channels**-0.5 if scaled_matching else 1.0)

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            moving, fixed: features of the two images at this level, ``(B, C, *spatial)``.
            ddf: the field so far, ``(B, d, *spatial)`` in voxels of this level, or None at the coarsest level.

        Returns:
            the improved field, ``(B, d, *spatial)`` in voxels of this level.
        """
        if ddf is not None:
            moving = warp(moving, ddf)
        # the fixed image comes first: a clusterer that replays recorded results relies on the order
        fixed = self.sacb(fixed)
        moving = self.sacb(moving)
        delta = self.matching(moving, fixed)
        return _added(delta, ddf, self.integration_steps)


class ConvFlowEstimator(nn.Module):
    """
    Finest level: two shared convolutions on both maps, then a stack of convolutions on the pair.

    Args:
        channels: channels of the feature maps.
        spatial_dims: 2 or 3.
        negative_slope: slope of the LeakyReLU activations.
        integration_steps: as for :py:class:`MatchingFlowEstimator`.

    Source: Cheng et al., SACB-Net, CVPR 2025, section 3.
    """

    def __init__(
        self, channels: int, spatial_dims: int = 3, negative_slope: float = 0.1, integration_steps: int = 0
    ) -> None:
        super().__init__()
        self.integration_steps = integration_steps
        self.refine = nn.Sequential(
            ConvNormAct(spatial_dims, channels, channels, negative_slope),
            ConvNormAct(spatial_dims, channels, channels, negative_slope),
        )
        self.flow = nn.Sequential(
            ConvNormAct(spatial_dims, 2 * channels, channels, negative_slope),
            ConvNormAct(spatial_dims, channels, channels, negative_slope),
            SameConv(spatial_dims, channels, spatial_dims),
        )

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            moving, fixed: features of the two images at this level, ``(B, C, *spatial)``.
            ddf: the field so far, ``(B, d, *spatial)`` in voxels of this level, or None for the identity.

        Returns:
            the improved field, ``(B, d, *spatial)`` in voxels of this level.
        """
        if ddf is not None:
            moving = warp(moving, ddf)
        # instance norm treats every image alone, so both can share one batch
        batch = moving.shape[0]
        maps = self.refine(torch.cat([moving, fixed]))
        moving, fixed = maps[:batch], maps[batch:]
        delta = self.flow(torch.cat([fixed, moving], 1))
        # a field in half precision is off by tenths of a voxel
        if delta.dtype != torch.float64:
            delta = delta.float()
        return _added(delta, ddf, self.integration_steps)
