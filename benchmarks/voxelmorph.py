# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI's VoxelMorph with the interface of this project's networks, to be trained by the same bundle."""

from __future__ import annotations

import torch
from torch import nn

from monai.networks.nets import VoxelMorph, VoxelMorphUNet

__all__ = ["VoxelMorphField"]


class VoxelMorphField(nn.Module):
    """
    MONAI's VoxelMorph, with the channels of the paper, taking both images as one tensor and returning the field alone.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of one image.
        integration_steps: squarings that integrate the network's velocity; 0 takes it as the displacement.

    Source: Balakrishnan et al., VoxelMorph: A Learning Framework for Deformable Medical Image Registration, IEEE TMI
    2019.
    """

    def __init__(self, spatial_dims: int = 3, in_channels: int = 1, integration_steps: int = 7) -> None:
        super().__init__()
        backbone = VoxelMorphUNet(
            spatial_dims=spatial_dims,
            in_channels=2 * in_channels,
            unet_out_channels=32,
            channels=(16, 32, 32, 32, 32, 32),
            final_conv_channels=(16, 16),
        )
        self.net = VoxelMorph(backbone, integration_steps, spatial_dims=spatial_dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, 2 * in_channels, *spatial)``, the moving image's channels before the fixed image's; every size a
                multiple of 8.

        Returns:
            DDF ``(B, spatial_dims, *spatial)``, in voxels of the fixed grid, pull-back.
        """
        moving, fixed = x.chunk(2, 1)
        return self.net(moving, fixed)[1]
