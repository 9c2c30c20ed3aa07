# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from monai.networks.layers.factories import Pool

from monai_sacb.networks.blocks import ConvNormAct

__all__ = ["FeaturePyramidEncoder"]


class FeaturePyramidEncoder(nn.Module):
    """
    The encoder of SACB-Net: feature maps at scales 1, 1/2, 1/4, 1/8 and 1/16.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        base_channels: width c; the levels have 2c, 4c, 8c, 16c and 16c channels.
        negative_slope: slope of the LeakyReLU activations.
        use_checkpoint: keep only the output of each level in training and compute the rest again for the gradient.

    Attributes:
        channels: the channels of the levels, finest first.

    Raises:
        ValueError: When an argument is out of its range.

    Source: Cheng et al., SACB-Net, CVPR 2025, section 3.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        base_channels: int = 4,
        negative_slope: float = 0.1,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("base_channels", base_channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.use_checkpoint = use_checkpoint
        c = base_channels
        self.channels = (2 * c, 4 * c, 8 * c, 16 * c, 16 * c)
        level1 = nn.Sequential(
            ConvNormAct(spatial_dims, in_channels, c, negative_slope),
            ConvNormAct(spatial_dims, c, 2 * c, negative_slope),
            ConvNormAct(spatial_dims, 2 * c, 2 * c, negative_slope),
        )
        self.levels = nn.ModuleList([level1])
        for finer, channels in zip(self.channels[:-1], self.channels[1:]):
            self.levels.append(
                nn.Sequential(
                    Pool[Pool.AVG, spatial_dims](2),
                    ConvNormAct(spatial_dims, finer, channels, negative_slope),
                    ConvNormAct(spatial_dims, channels, channels, negative_slope),
                )
            )

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """
        Args:
            image: ``(B, in_channels, *spatial)``, every axis a multiple of 16 and at least 32.

        Returns:
            five feature maps, level 1 (full resolution) first.
        """
        features = []
        for level in self.levels:
            if not torch.jit.is_scripting() and self.use_checkpoint and self.training:
                image = checkpoint(level, image, use_reentrant=False)
            else:
                image = level(image)
            features.append(image)
        return features
