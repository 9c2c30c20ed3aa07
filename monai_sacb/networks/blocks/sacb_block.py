# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from monai_sacb.networks.blocks.conv_norm_act import ConvNormAct
from monai_sacb.networks.layers import KMeans, cluster_adaptive_conv
from monai_sacb.networks.layers.neighborhood import window_mean

__all__ = ["ClusterAdaptive", "SACBlock"]

# widths of the two small networks that turn a centroid into gates and a bias (SACB-Net, section 3)
GATE_WIDTH = 128
BIAS_WIDTH = 64


def _mlp(in_features: int, width: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out_features)
    )


class _Clusterer(nn.Module):
    """Lets any callable stand where a module is expected."""

    def __init__(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.function(points)


class ClusterAdaptive(nn.Module):
    """
    What :py:class:`SACBlock` and :py:class:`monai_sacb.networks.blocks.SACBConv` share: a clusterer, the weight of a
    convolution, and the two networks that turn the centroids of clusters into gates of its taps and into a bias.

    Attributes:
        clusterer: ``(points (B, N, C) in row-major voxel order) -> (labels (B, N) integer, centroids (B, K, C))``,
            called once per forward pass. Any callable may be assigned; scripting is promised for the default,
            :py:class:`monai_sacb.networks.layers.KMeans`, through which no gradient flows.
    """

    def set_up(self, in_channels: int, out_channels: int, num_clusters: int, num_taps: int, bias: bool = True) -> None:
        """Make the parts; a class calls it where its parameters are to be made."""
        self.clusterer = KMeans(num_clusters)
        self.gate_mlp = _mlp(in_channels, GATE_WIDTH, num_taps)
        self.bias_mlp = _mlp(in_channels, BIAS_WIDTH, out_channels) if bias else None
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, num_taps))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "clusterer" and not isinstance(value, nn.Module):
            if not callable(value):
                raise TypeError(f"clusterer must be callable, got {type(value).__name__}.")
            value = _Clusterer(value)
        super().__setattr__(name, value)

    def adapt(self, x: torch.Tensor, kernel_size: int = 3) -> torch.Tensor:
        """The convolution of ``(B, C_in, *spatial)`` that adapts to its clusters, ``(B, C_out, *spatial)``."""
        labels, centroids = self.clusterer(window_mean(x).flatten(2).transpose(1, 2))
        centroids = centroids.to(self.weight.dtype)
        gates = torch.sigmoid(self.gate_mlp(centroids))
        if self.bias_mlp is not None:
            bias = self.bias_mlp(centroids)
        else:
            bias = gates.new_zeros([gates.shape[0], gates.shape[1], self.weight.shape[0]])
        return cluster_adaptive_conv(x, self.weight, gates, bias, labels, kernel_size)


class SACBlock(ClusterAdaptive):
    """
    Spatial-awareness convolution block: a residual convolution that adapts to regions found by clustering its features.

    The features are smoothed and clustered image by image; the centroid of each cluster gives, through two small
    networks, a gate for every tap of one shared convolution and a bias, which hold for the voxels of that cluster.

    Args:
        channels: number of input and output channels.
        num_clusters: number of clusters K.
        spatial_dims: 2 or 3.
        negative_slope: slope of the LeakyReLU activations.

    Attributes:
        clusterer: ``(points (B, N, C) in row-major voxel order) -> (labels (B, N) integer, centroids (B, K, C))``,
            called once per forward pass. Any callable may be assigned; scripting is promised for the default,
            :py:class:`monai_sacb.networks.layers.KMeans`, through which no gradient flows.

    Raises:
        ValueError: When an argument is out of its range.

    Source: Cheng et al., SACB-Net: Spatial-awareness Convolutions for Medical Image Registration, CVPR 2025, section 3.
    """

    def __init__(self, channels: int, num_clusters: int, spatial_dims: int = 3, negative_slope: float = 0.1) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}.")
        if num_clusters < 1:
            raise ValueError(f"num_clusters must be at least 1, got {num_clusters}.")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        self.channels = channels
        self.spatial_dims = spatial_dims
        self.proj_in = ConvNormAct(spatial_dims, channels, channels, negative_slope)
        self.set_up(channels, channels, num_clusters, 3**spatial_dims)
        self.act = nn.LeakyReLU(negative_slope)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, channels, *spatial)``.

        Returns:
            ``(B, channels, *spatial)``.
        """
        h = self.proj_in(x)
        return x + self.act(self.adapt(h))
