# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from monai.utils import ensure_tuple_rep

from monai_sacb.networks.blocks import ConvFlowEstimator, MatchingFlowEstimator
from monai_sacb.networks.layers import compose, self_similarity, warp
from monai_sacb.networks.nets.feature_pyramid import FeaturePyramidEncoder
from monai_sacb.utils import check_count

__all__ = ["SACBNet"]


def _levels(encoder: nn.Module) -> tuple[list[int], int]:
    """Channels of an encoder's levels and the divisor of its sizes."""
    channels = getattr(encoder, "channels", None)
    if not isinstance(encoder, nn.Module) or not isinstance(channels, Sequence) or isinstance(channels, str):
        raise TypeError(
            "encoder must be a module whose attribute channels lists those of its levels, got "
            f"{type(encoder).__name__} with channels {channels!r}."
        )
    if len(channels) < 2:
        raise ValueError(f"encoder must have at least two levels, got channels {list(channels)}.")
    for width in channels:
        check_count("each number of the encoder's channels", width)
    smallest = 2 ** (len(channels) - 1)
    divisor = getattr(encoder, "divisor", smallest)
    check_count("the encoder's divisor", divisor)
    if divisor % smallest != 0:
        raise ValueError(
            f"the encoder's divisor must be a multiple of {smallest} for {len(channels)} levels, got {divisor}."
        )
    return list(channels), divisor


class SACBNet(nn.Module):
    """
    SACB-Net: the dense displacement field that lays a moving image on a fixed one.

    A feature pyramid shared by both images, and at each scale a flow estimator whose convolutions adapt to regions
    found by clustering the features. The network takes both images as one tensor and returns the field, as MONAI's
    ``LocalNet`` and ``RegUNet`` do; :py:func:`monai_sacb.networks.layers.warp` or MONAI's ``Warp`` applies it.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of one image.
        base_channels: width c of the first convolution; the levels have 2c, 4c, 8c, 16c and 16c channels.
        num_clusters: clusters of the blocks, one number or one for each of the levels 2, 3, 4 and 5 (from 2 on, where
            an encoder has another number of levels).
        negative_slope: slope of the LeakyReLU activations.
        scaled_matching: divide the feature products of the matching by the square root of the channels, as attention
            does; the paper does not. Undivided, they make the softmax of a random start nearly one-hot, and training
            slower. The setting is part of the state: weights bring along what they were trained with.
        use_checkpoint: keep only what passes between the levels in training and compute the rest, the clustering
            too, once more for the gradient: less memory, more time.
        diffeomorphic: take the flow of each level for a stationary velocity and integrate it by scaling and squaring
            (:py:func:`monai_sacb.networks.layers.exponential`) before it is composed with the field so far; the paper
            does not. Fields hardly fold then, unless the flow of the finest level is as rough as noise, but each level
            costs ``integration_steps`` more warps of a field. The setting is part of the state as well, and a whole
            state without it is of a plain network; weights that make a diffeomorphic network plain are warned of.
        integration_steps: number of squarings, at least 1; without effect unless ``diffeomorphic``.
        encoder: what takes the place of the paper's encoder (``base_channels`` is without effect then): a module that
            turns an image ``(B, in_channels, *spatial)`` into a list of feature maps, the first of the image's size and
            each further one of half the size of the one before. It has the attribute ``channels``, those of the maps,
            finest first, two levels or more; and perhaps ``divisor``, which the sizes of images are padded to multiples
            of, at least twice, by default 2 to the power of the number of levels below the first. It must treat every
            image of a batch by itself, and keeps what it likes whatever ``use_checkpoint`` is. See
            :py:class:`monai_sacb.networks.nets.BackbonePyramid`.
        align_corners: double the size of a level's field so that the corner voxels of both grids coincide, as the paper
            does. But the pyramid averages blocks of two voxels, so that a coarse voxel lies between two fine ones:
            ``False`` puts the field there. The setting is part of the state as well; a whole state without it is of
            the paper's network, and weights that put corners on corners again are warned of.
        self_similarity: let the encoder see how the surroundings of each voxel resemble each other
            (:py:func:`monai_sacb.networks.layers.self_similarity`, 12 channels, in 2-D 4) instead of the intensities,
            for images of whatever contrast; the paper does not. The setting is noted in the state.
        num_passes: how often the network works: each further pass registers the moving image, warped by the field so
            far, once more, and the two fields are composed. The same weights serve all passes, each of which takes the
            time of the first; the paper has one. The setting is part of the state as well, and a whole state without
            it is of one pass; weights of more passes than this raise it, until others are loaded.

    Raises:
        TypeError: When the encoder is not a module with ``channels``.
        ValueError: When an argument is out of its range.

    Attributes:
        optional_state: entries of a state dict that older states do not have.

    Source: Cheng et al., SACB-Net: Spatial-awareness Convolutions for Medical Image Registration, CVPR 2025; Zhao et
    al., Recursive Cascaded Networks for Unsupervised Medical Image Registration, ICCV 2019, for more than one pass.

    Example::

        >>> net = SACBNet(spatial_dims=3, in_channels=1)
        >>> moving, fixed = torch.rand(1, 1, 40, 48, 36), torch.rand(1, 1, 40, 48, 36)
        >>> ddf = net(torch.cat([moving, fixed], 1))
        >>> warped = warp(moving, ddf)

    """

    optional_state = ("integration_steps", "align_corners", "self_similarity", "num_passes")

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        base_channels: int = 4,
        num_clusters: int | Sequence[int] = 7,
        negative_slope: float = 0.1,
        scaled_matching: bool = False,
        use_checkpoint: bool = False,
        diffeomorphic: bool = False,
        integration_steps: int = 7,
        encoder: nn.Module | None = None,
        align_corners: bool = True,
        self_similarity: bool = False,
        num_passes: int = 1,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        flags = {"diffeomorphic": diffeomorphic, "align_corners": align_corners, "self_similarity": self_similarity}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}.")
        check_count("integration_steps", integration_steps)
        check_count("num_passes", num_passes)
        if encoder is None:
            seen = 2 * spatial_dims * (spatial_dims - 1) if self_similarity else in_channels
            encoder = FeaturePyramidEncoder(spatial_dims, seen, base_channels, negative_slope, use_checkpoint)
        channels, self.divisor = _levels(encoder)
        # ensure_tuple_rep refuses a sequence that is not of one number per level
        clusters = ensure_tuple_rep(num_clusters, len(channels) - 1)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.use_checkpoint = use_checkpoint
        # 0: flows are taken as they are
        self.integration_steps = integration_steps if diffeomorphic else 0
        self.encoder = encoder
        self.feature_channels = channels
        self.align_corners = align_corners
        self.self_similarity = self_similarity
        # no fewer than asked for, whatever the weights: those of one pass may be trained on for more
        self.least_passes = num_passes
        self.num_passes = num_passes
        # coarsest level first, the order in which they work
        self.estimators = nn.ModuleList(
            [
                MatchingFlowEstimator(width, k, spatial_dims, negative_slope, scaled_matching, self.integration_steps)
                for width, k in zip(reversed(channels[1:]), reversed(clusters))
            ]
        )
        self.finest_estimator = ConvFlowEstimator(channels[0], spatial_dims, negative_slope, self.integration_steps)
        self.upsample_mode = "trilinear" if spatial_dims == 3 else "bilinear"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # no buffers: what decides about operations must be known when they are recorded
        destination[f"{prefix}integration_steps"] = torch.tensor(self.integration_steps)
        destination[f"{prefix}align_corners"] = torch.tensor(self.align_corners)
        destination[f"{prefix}self_similarity"] = torch.tensor(self.self_similarity)
        destination[f"{prefix}num_passes"] = torch.tensor(self.num_passes)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = {f"{prefix}{name}" for name in self.optional_state}
        rest = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(rest, prefix, *args)
        # a part of a state, such as an encoder's, says nothing by leaving them out
        whole = all(f"{prefix}{key}" in state_dict for key, _ in self.named_parameters())
        if whole or f"{prefix}integration_steps" in state_dict:
            self._set_steps(int(state_dict.get(f"{prefix}integration_steps", 0)))
        if whole or f"{prefix}align_corners" in state_dict:
            self._set_corners(bool(state_dict.get(f"{prefix}align_corners", True)))
        if whole or f"{prefix}num_passes" in state_dict:
            stored = int(state_dict.get(f"{prefix}num_passes", 1))
            check_count("num_passes", stored)
            self.num_passes = max(self.least_passes, stored)

    def _set_steps(self, integration_steps: int) -> None:
        if integration_steps != 0:
            check_count("integration_steps", integration_steps)
        elif self.integration_steps > 0:
            logging.getLogger(__name__).warning(
                "the weights are of a network that is not diffeomorphic: now this one is not either."
            )
        self.integration_steps = integration_steps
        for estimator in (*self.estimators, self.finest_estimator):
            estimator.integration_steps = integration_steps

    def _check_features(self, features: list[torch.Tensor], images: torch.Tensor) -> None:
        fits = len(features) == len(self.feature_channels)
        spatial = list(images.shape[2:])
        for feature, channels in zip(features, self.feature_channels):
            fits = fits and list(feature.shape) == [images.shape[0], channels] + spatial
            spatial = [size // 2 for size in spatial]
        if not fits:
            raise ValueError(
                f"for images {list(images.shape)}, the encoder must return maps with {self.feature_channels} channels, "
                f"each of half the size of the one before, got {[list(feature.shape) for feature in features]}."
            )

    def _set_corners(self, align_corners: bool) -> None:
        if align_corners and not self.align_corners:
            logging.getLogger(__name__).warning(
                "the weights are of a network that doubles fields with corners aligned: now this one does, too."
            )
        self.align_corners = align_corners

    def padded_size(self, size: int) -> int:
        """What an axis of this size is padded to: a multiple of ``divisor``, and at least twice of it."""
        return self.divisor * max(2, (size + self.divisor - 1) // self.divisor)

    def _upsample(self, ddf: torch.Tensor) -> torch.Tensor:
        """The same field on a grid of twice the size, in that grid's voxels."""
        return F.interpolate(2.0 * ddf, scale_factor=2.0, mode=self.upsample_mode, align_corners=self.align_corners)

    def _register(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        """One pass, on images of padded size."""
        # instance norm treats every image alone, so both can share one batch
        images = torch.cat([moving, fixed])
        if self.self_similarity:
            images = self_similarity(images)
        batch = moving.shape[0]
        features = list(self.encoder(images))
        self._check_features(features, images)
        ddf: torch.Tensor | None = None
        for estimator in self.estimators:
            # taken off the list, the maps of a level are freed when it is done
            maps = features.pop()
            moving, fixed = maps[:batch], maps[batch:]
            if not torch.jit.is_scripting() and self.use_checkpoint and self.training:
                ddf = checkpoint(estimator, moving, fixed, ddf, use_reentrant=False)
            else:
                ddf = estimator(moving, fixed, ddf)
            ddf = self._upsample(ddf)
        maps = features.pop()
        moving, fixed = maps[:batch], maps[batch:]
        if not torch.jit.is_scripting() and self.use_checkpoint and self.training:
            ddf = checkpoint(self.finest_estimator, moving, fixed, ddf, use_reentrant=False)
        else:
            ddf = self.finest_estimator(moving, fixed, ddf)
        return ddf

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, 2 * in_channels, *spatial)``, the moving image's channels before the fixed image's. Any size: axes
                are padded with zeros at their far ends, to at least 32 and a multiple of 16 (in place of 16, the
                ``divisor`` of another encoder, and twice of it), and the field is cropped.

        Returns:
            DDF ``(B, spatial_dims, *spatial)``, in voxels of the fixed grid, pull-back (``warped(p) = moving(p +
            ddf(p))``), channel i along array axis i.

        Raises:
            ValueError: When the shape does not fit the network, or the encoder's maps are not what it should return.
        """
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != 2 * self.in_channels:
            raise ValueError(
                f"expected the moving and the fixed image as one tensor (B, {2 * self.in_channels}, "
                f"{self.spatial_dims} spatial axes), got shape {list(x.shape)}."
            )
        spatial = list(x.shape[2:])
        padding: list[int] = []
        for size in spatial:
            # F.pad wants the last axis first
            padding = [0, self.padded_size(size) - size] + padding
        if max(padding) > 0:
            x = F.pad(x, padding)
        moving, fixed = x[:, : self.in_channels], x[:, self.in_channels :]
        ddf = self._register(moving, fixed)
        for _ in range(self.num_passes - 1):
            ddf = compose(self._register(warp(moving, ddf), fixed), ddf)
        for axis, size in enumerate(spatial):
            ddf = ddf.narrow(axis + 2, 0, size)
        return ddf.contiguous()
