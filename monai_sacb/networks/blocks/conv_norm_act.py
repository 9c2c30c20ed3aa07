# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from monai.networks.layers.factories import Conv

from monai_sacb.networks.layers import instance_norm_leaky_relu

__all__ = ["ConvNormAct", "SameConv"]

# Above this width, channels-last gains no time, and it rounds worse: the softmax of the coarse levels amplifies that.
CHANNELS_LAST_LIMIT = 16


class SameConv(nn.Module):
    """
    Convolution of window 3 that keeps the size, in the memory layout that is fast on its device.

    On a CPU that is channels-last for the few channels of the fine levels, where forward and backward pass then take a
    half to a fifth of the time.

    Args:
        spatial_dims: 2 or 3.
        in_channels, out_channels: channels of input and output.

    Raises:
        ValueError: When ``spatial_dims`` is not 2 or 3, or a number of channels is below 1.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        if min(in_channels, out_channels) < 1:
            raise ValueError(f"channels must be at least 1, got {in_channels} in and {out_channels} out.")
        self.spatial_dims = spatial_dims
        self.channels_last = out_channels <= CHANNELS_LAST_LIMIT
        self.conv = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, kernel_size=3, padding=1)

    def convolve(self, x: torch.Tensor) -> torch.Tensor:
        """The convolution alone."""
        # TorchScript passes over a whole block only
        if not torch.jit.is_scripting():
            # ONNX knows no layouts
            if torch.onnx.is_in_onnx_export():
                return self.conv(x)
            half = x.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
            if half and x.is_cpu and self.spatial_dims == 3 and x.shape[2] == 2:
                # where oneDNN itself pads two slices, its gradient of the weights in half precision is arbitrary
                x = F.pad(x, (0, 0, 0, 0, 1, 1))
                return F.conv3d(x, self.conv.weight, self.conv.bias, padding=(0, 1, 1))
        if not x.is_cpu or not self.channels_last:
            return self.conv(x)
        # the layout of either operand decides; maps of one channel have none, so that the result is converted as well
        if self.spatial_dims == 3:
            weight = self.conv.weight.contiguous(memory_format=torch.channels_last_3d)
            x = F.conv3d(x, weight, self.conv.bias, padding=1)
            return x.contiguous(memory_format=torch.channels_last_3d)
        weight = self.conv.weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, self.conv.bias, padding=1).contiguous(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, in_channels, *spatial)``.

        Returns:
            ``(B, out_channels, *spatial)``.
        """
        return self.convolve(x)


class ConvNormAct(SameConv):
    """
    Convolution of window 3 with bias, instance norm and LeakyReLU: the unit that the whole network is made of.

    Args:
        spatial_dims: 2 or 3.
        in_channels, out_channels: channels of input and output.
        negative_slope: slope of the LeakyReLU activation.

    Raises:
        ValueError: When ``spatial_dims`` is not 2 or 3, or a number of channels is below 1.

    Source: Cheng et al., SACB-Net, CVPR 2025, section 3.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, negative_slope: float = 0.1) -> None:
        super().__init__(spatial_dims, in_channels, out_channels)
        self.negative_slope = negative_slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, in_channels, *spatial)``.

        Returns:
            ``(B, out_channels, *spatial)``.
        """
        return instance_norm_leaky_relu(self.convolve(x), self.negative_slope)
