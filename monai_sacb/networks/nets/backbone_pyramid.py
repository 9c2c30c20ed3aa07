# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Backbones of MONAI, and any other, as the encoder of the registration network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from monai.networks.layers.factories import Norm
from monai.networks.nets import ResNet
from monai.networks.nets.segresnet_ds import SegResEncoder
from monai.networks.nets.swin_unetr import SwinTransformer
from monai.utils import ensure_tuple_rep, optional_import

from monai_sacb.networks.blocks import ConvNormAct
from monai_sacb.utils import check_count

__all__ = ["BackbonePyramid", "ResNetPyramidEncoder", "SegResNetPyramidEncoder", "SwinPyramidEncoder"]

# a ResNet and a SwinTransformer of MONAI have this many stages, no more and no fewer
NUM_STAGES = 4


def _check_image(spatial_dims: int, in_channels: int) -> None:
    if spatial_dims not in (2, 3):
        raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
    check_count("in_channels", in_channels)


def _replace_batch_norms(module: nn.Module, spatial_dims: int) -> None:
    """In place; scale and shift stay the same parameters, the running statistics go."""
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            norm = Norm[Norm.INSTANCE, spatial_dims](child.num_features, eps=child.eps, affine=child.affine)
            norm.weight, norm.bias = child.weight, child.bias
            setattr(module, name, norm)
        else:
            _replace_batch_norms(child, spatial_dims)


class BackbonePyramid(nn.Module):
    """
    A backbone as the encoder of :py:class:`monai_sacb.networks.nets.SACBNet`.

    The backbone takes an image and returns a list of maps, each of half the size of the one before. If the first has
    half the size of the image, a stem of two convolutions delivers the level of full resolution. Every map of the
    backbone passes through an instance norm without parameters, since the matching compares features by their products.

    Args:
        backbone: the module; it becomes part of this one. Its batch norms, which would mix the images of a batch, are
            replaced by instance norms with the same scale and shift.
        channels: channels of the backbone's maps, finest first. The backbone may return further, coarser maps: they
            are not used.
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        stem_channels: channels of the stem; None for a backbone whose first map has the size of the image.
        divisor: number that the sizes of images must be multiples of, at least twice. None: 2 to the power of the
            number of levels below the first; more for a backbone that computes coarser maps than are used, or wants it.

    Attributes:
        channels: the channels of the levels, finest first, the stem's included.
        divisor: the number above.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        spatial_dims: int = 3,
        in_channels: int = 1,
        stem_channels: int | None = None,
        divisor: int | None = None,
    ) -> None:
        super().__init__()
        _check_image(spatial_dims, in_channels)
        stem = () if stem_channels is None else (stem_channels,)
        self.channels = (*stem, *channels)
        if len(channels) == 0 or len(self.channels) < 2:
            raise ValueError(f"a pyramid needs at least two levels, got channels {list(self.channels)}.")
        for width in self.channels:
            check_count("each number of channels", width)
        if divisor is not None:
            check_count("divisor", divisor)
        self.divisor = 2 ** (len(self.channels) - 1) if divisor is None else divisor
        self.num_maps = len(channels)
        self.has_stem = stem_channels is not None
        self.stem: nn.Module = nn.Identity()
        if stem_channels is not None:
            self.stem = nn.Sequential(
                ConvNormAct(spatial_dims, in_channels, stem_channels),
                ConvNormAct(spatial_dims, stem_channels, stem_channels),
            )
        _replace_batch_norms(backbone, spatial_dims)
        self.backbone = backbone

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """
        Args:
            image: ``(B, in_channels, *spatial)``, every axis a multiple of ``divisor`` and at least twice as long.

        Returns:
            the feature maps, full resolution first.
        """
        features: list[torch.Tensor] = []
        if self.has_stem:
            features.append(self.stem(image))
        for feature in self.backbone(image)[: self.num_maps]:
            features.append(F.instance_norm(feature))
        return features


def _check_stages(name: str, stages: Sequence[Any]) -> None:
    if not 1 <= len(stages) <= NUM_STAGES:
        raise ValueError(f"{name} must have one to {NUM_STAGES} entries, one for each stage, got {list(stages)}.")


class SwinPyramidEncoder(BackbonePyramid):
    """
    MONAI's ``SwinTransformer`` below a stem: maps at scales 1 (the stem's), 1/2, 1/4, and so on.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        stem_channels: channels of the stem.
        embed_dim: channels at scale 1/2; each further level has twice as many.
        window_size: size of the windows of attention, one number or one for each axis.
        depths: number of transformer blocks of each stage, one to four of them; n stages give n + 2 levels.
        num_heads: number of attention heads of each stage, which must divide its channels.
        options: further arguments of ``SwinTransformer``, such as ``use_checkpoint`` or ``use_v2``.

    Raises:
        ModuleNotFoundError: When einops is not installed, which MONAI's transformer needs.
        ValueError: When an argument is out of its range.

    Source: Hatamizadeh et al., Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images,
    BrainLes 2021, for the network; the stem is this project's.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        stem_channels: int = 8,
        embed_dim: int = 12,
        window_size: int | Sequence[int] = 4,
        depths: Sequence[int] = (2, 2, 2),
        num_heads: Sequence[int] = (2, 4, 8),
        **options: Any,
    ) -> None:
        if not optional_import("einops")[1]:
            raise ModuleNotFoundError("MONAI's SwinTransformer needs the package einops: pip install einops.")
        _check_image(spatial_dims, in_channels)
        _check_stages("depths", depths)
        check_count("embed_dim", embed_dim)
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads must have {len(depths)} entries as depths has, got {list(num_heads)}.")
        for stage, heads in enumerate(num_heads):
            check_count("each of num_heads", heads)
            if embed_dim * 2**stage % heads != 0:
                raise ValueError(
                    f"num_heads must divide the channels of its stage, {embed_dim * 2**stage}, got {heads}."
                )
        missing = NUM_STAGES - len(depths)
        backbone = SwinTransformer(
            in_chans=in_channels,
            embed_dim=embed_dim,
            window_size=ensure_tuple_rep(window_size, spatial_dims),
            patch_size=ensure_tuple_rep(2, spatial_dims),
            depths=[*depths, *[1] * missing],
            num_heads=[*num_heads, *[1] * missing],
            spatial_dims=spatial_dims,
            **options,
        )
        # it always runs four stages
        for stage in range(len(depths), NUM_STAGES):
            for name in (f"layers{stage + 1}", f"layers{stage + 1}c"):
                if hasattr(backbone, name):
                    setattr(backbone, name, nn.ModuleList([nn.Identity()]))
        channels = [embed_dim * 2**level for level in range(len(depths) + 1)]
        super().__init__(backbone, channels, spatial_dims, in_channels, stem_channels)


class _ResNetMaps(ResNet):
    """The maps between its stages in place of classes."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x0 = self.act(self.bn1(self.conv1(x)))
        x1 = self.layer1(self.maxpool(x0))
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        return [x0, x1, x2, x3, self.layer4(x3)]


class ResNetPyramidEncoder(BackbonePyramid):
    """
    MONAI's ``ResNet`` with instance norms: maps at scales 1 (its first convolution), 1/2, 1/4, and so on.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        channels: of each stage, one to four of them; n stages give n + 1 levels, the first as wide as the second
            (before the expansion of bottlenecks).
        layers: number of blocks of each stage.
        block: ``"basic"`` or ``"bottleneck"``, whose maps have four times the channels.
        first_kernel: window of the first convolution.

    Raises:
        ValueError: When an argument is out of its range.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        channels: Sequence[int] = (8, 16, 32, 64),
        layers: Sequence[int] = (1, 1, 1, 1),
        block: str = "basic",
        first_kernel: int = 3,
    ) -> None:
        _check_image(spatial_dims, in_channels)
        _check_stages("channels", channels)
        if len(layers) != len(channels):
            raise ValueError(f"layers must have {len(channels)} entries as channels has, got {list(layers)}.")
        for value in (*channels, *layers):
            check_count("each of channels and layers", value)
        if block not in ("basic", "bottleneck"):
            raise ValueError(f"block must be 'basic' or 'bottleneck', got {block!r}.")
        if first_kernel < 1 or first_kernel % 2 != 1:
            raise ValueError(f"first_kernel must be a positive odd number, got {first_kernel}.")
        missing = NUM_STAGES - len(channels)
        backbone = _ResNetMaps(
            block=block,
            layers=[*layers, *[1] * missing],
            block_inplanes=[*channels, *[1] * missing],
            spatial_dims=spatial_dims,
            n_input_channels=in_channels,
            conv1_t_size=first_kernel,
            feed_forward=False,
        )
        for stage in range(len(channels), NUM_STAGES):
            setattr(backbone, f"layer{stage + 1}", nn.Identity())
        expansion = 1 if block == "basic" else 4
        widths = [channels[0], *(expansion * width for width in channels)]
        super().__init__(backbone, widths, spatial_dims, in_channels)


class SegResNetPyramidEncoder(BackbonePyramid):
    """
    The encoder of MONAI's ``SegResNetDS``, with instance norms: maps at scales 1, 1/2, 1/4, and so on.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        init_filters: channels of the first level; each further one has twice as many.
        blocks_down: number of residual blocks of each level.

    Raises:
        ValueError: When an argument is out of its range.

    Source: Myronenko, 3D MRI brain tumor segmentation using autoencoder regularization, BrainLes 2018.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        init_filters: int = 6,
        blocks_down: Sequence[int] = (1, 1, 1, 1, 1),
    ) -> None:
        _check_image(spatial_dims, in_channels)
        check_count("init_filters", init_filters)
        for value in blocks_down:
            check_count("each of blocks_down", value)
        backbone = SegResEncoder(
            spatial_dims=spatial_dims,
            init_filters=init_filters,
            in_channels=in_channels,
            norm="instance",
            blocks_down=tuple(blocks_down),
        )
        channels = [init_filters * 2**level for level in range(len(blocks_down))]
        super().__init__(backbone, channels, spatial_dims, in_channels)
