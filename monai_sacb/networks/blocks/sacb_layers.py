# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Spatial-awareness convolution for any network of MONAI, by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from monai.networks.layers.factories import Conv, LayerFactory, Norm
from monai.utils import ensure_tuple_rep

from monai_sacb.networks.blocks.sacb_block import ClusterAdaptive, SACBlock
from monai_sacb.utils import check_count

__all__ = ["SACBConv", "SACBNorm", "register_sacb_layers"]

# what the layers are called in MONAI's factories
FACTORY_NAME = "SACB"


class SACBConv(ClusterAdaptive):
    """
    A convolution that adapts to regions found by clustering its input, with the arguments of ``torch.nn.Conv3d``.

    The input is smoothed and clustered image by image; the centroid of each cluster gives the gate of every tap and the
    bias that hold for its voxels: the inner part of :py:class:`SACBlock`, without its first convolution and its
    shortcut, and for any number of output channels. In MONAI's layer factory, it is ``Conv["sacb", spatial_dims]``.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: odd size of the window, the same for all axes.
        stride: step of the output's voxels, one number or one for each axis.
        padding: must keep the size at a stride of 1: ``kernel_size // 2`` or ``"same"``; None stands for the former.
        dilation, groups: must be 1.
        bias: whether there is a bias.
        num_clusters: number of clusters K.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: When an argument is out of its range.

    Source: Cheng et al., SACB-Net: Spatial-awareness Convolutions for Medical Image Registration, CVPR 2025, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str | None = None,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        num_clusters: int = 7,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_count(name, value)
        kernel = ensure_tuple_rep(kernel_size, spatial_dims)
        check_count("kernel_size", kernel[0])
        if kernel[0] % 2 != 1 or len(set(kernel)) != 1:
            raise ValueError(f"kernel_size must be one odd number for all axes, got {kernel_size}.")
        same = padding is None or padding == "same"
        if not same and set(ensure_tuple_rep(padding, spatial_dims)) != {kernel[0] // 2}:
            raise ValueError(f"padding must be {kernel[0] // 2} for a kernel_size of {kernel[0]}, got {padding!r}.")
        if set(ensure_tuple_rep(dilation, spatial_dims)) != {1} or groups != 1:
            raise ValueError(f"dilation and groups must be 1, got {dilation} and {groups}.")
        steps = ensure_tuple_rep(stride, spatial_dims)
        for step in steps:
            check_count("stride", step)
        self.stride = [int(step) for step in steps]
        self.spatial_dims = spatial_dims
        self.kernel_size = int(kernel[0])
        self.set_up(in_channels, out_channels, num_clusters, self.kernel_size**spatial_dims, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, in_channels, *spatial)``.

        Returns:
            ``(B, out_channels, *spatial)``, each axis divided by its stride, rounded up.
        """
        y = self.adapt(x, self.kernel_size)
        if max(self.stride) == 1:
            return y
        # every other voxel, as an average of one
        return F.avg_pool3d(y, 1, self.stride) if self.spatial_dims == 3 else F.avg_pool2d(y, 1, self.stride)


class SACBNorm(nn.Module):
    """
    Instance norm, and then a :py:class:`SACBlock` on what it gives, for the place of a norm.

    MONAI's networks take their norms by name, with the number of channels filled in, but none takes its convolutions
    so: this is how spatial-awareness convolution gets into them, after each convolution and before its activation. In
    MONAI's layer factory, it is ``Norm["sacb", spatial_dims]``, and ``norm=("sacb", {"num_clusters": 5})`` in a
    network.

    Args:
        num_features: number of channels.
        num_clusters: number of clusters K.
        eps: added to the variance.
        affine: whether the norm has a scale and a shift for each channel.
        negative_slope: slope of the LeakyReLU activations in the block.
        spatial_dims: 2 or 3.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        num_features: int,
        num_clusters: int = 7,
        eps: float = 1e-5,
        affine: bool = True,
        negative_slope: float = 0.1,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.block = SACBlock(num_features, num_clusters, spatial_dims, negative_slope)
        # by these names, networks find the scale and shift of a norm
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, num_features, *spatial)``.

        Returns:
            ``(B, num_features, *spatial)``.
        """
        return self.block(F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps))


def _sacb_conv_factory(dim: int) -> Callable[..., nn.Module]:
    """Convolution that adapts to clusters of its input, in 2 or 3 dimensions."""
    return partial(SACBConv, spatial_dims=dim)


def _sacb_norm_factory(dim: int) -> Callable[..., nn.Module]:
    """Instance norm and spatial-awareness convolution block, in 2 or 3 dimensions."""
    return partial(SACBNorm, spatial_dims=dim)


def register_sacb_layers() -> None:
    """
    Make ``Conv["sacb", dim]`` and ``Norm["sacb", dim]`` known to MONAI's layer factories; importing this package does.

    Names that are there already stay what they are, with a warning if they are not ours.
    """
    factories: list[tuple[LayerFactory, Callable[[int], Callable[..., nn.Module]]]] = [
        (Conv, _sacb_conv_factory),
        (Norm, _sacb_norm_factory),
    ]
    for factory, function in factories:
        if FACTORY_NAME not in factory:
            factory.add_factory_callable(FACTORY_NAME, function)
        elif getattr(factory.components[FACTORY_NAME].value, "__module__", None) != __name__:
            logging.getLogger(__name__).warning(
                f"MONAI's factory of {factory.name.lower()} has a '{FACTORY_NAME}' already, which stays: that of this "
                "package has no name there."
            )
