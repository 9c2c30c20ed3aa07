# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import nn

from monai.networks import eval_mode
from monai.transforms import Transform

from monai_sacb.inferers import RegistrationInferer
from monai_sacb.networks.layers import warp
from monai_sacb.networks.nets import IdentityField
from monai_sacb.transforms.common import with_geometry
from monai_sacb.utils import image_name, plain_tensor

__all__ = ["RegisterPaird"]


class RegisterPaird(Transform):
    """
    Register the moving image of a pair to the fixed one: the displacement field, and the moving image warped by it.

    A network gives the field, and the inferer may improve it by instance optimization; without a network, instance
    optimization starts from no displacement at all. No gradient passes, and nothing about it is random: before the
    random transforms of a ``CacheDataset``, a pair is registered once. The images are paired by array index, on grids
    of one size: transforms such as ``Orientationd``, ``Spacingd``, ``ResampleToMatchd`` and :py:class:`PadPaird` bring
    them there. Results take the geometry of the fixed image, and further images of the moving side, such as labels,
    are warped by :py:class:`WarpByDDFd`.

    Args:
        network: ``(B, 2 * C, *spatial)``, the moving image's channels before the fixed image's, to a DDF
            ``(B, d, *spatial)``. A module works in evaluation mode meanwhile. None for instance optimization alone.
        inferer: ``(inputs, network) -> DDF``, such as :py:class:`monai_sacb.inferers.RegistrationInferer`, which is the
            default: as it is with a network, and without one with 100 iterations of
            :py:class:`monai_sacb.inferers.InstanceOptimization`, from coarse to fine.
        moving_key, fixed_key: the two images, ``(C, *spatial)`` in 2-D or 3-D, with intensities in about [0, 1], as
            networks are trained with and as the default similarity expects.
        ddf_key: where the field goes, DDF ``(d, *spatial)`` in voxels of the fixed grid, pull-back, float32.
        warped_key: where the warped image ``(C, *spatial)`` goes, sampled linearly, zeros outside; None for none.
        device: where to compute; a network is moved there. By default where the parameters of the network are, or else
            where the fixed image is. Results are brought to the device of the fixed image.

    Raises:
        ValueError: When the images are not finite, of other dimensions than 2-D and 3-D, or of two shapes, or neither
            network nor inferer would do anything.

    Example::

        >>> register = Compose([
        ...     LoadImaged(["moving_image", "fixed_image"], ensure_channel_first=True),
        ...     ResampleToMatchd("moving_image", key_dst="fixed_image"),
        ...     ScaleIntensityRangePercentilesd(["moving_image", "fixed_image"], 0.5, 99.5, 0, 1, clip=True),
        ...     RegisterPaird(),
        ... ])
        >>> warped = register({"moving_image": "a.nii.gz", "fixed_image": "b.nii.gz"})["warped_image"]

    """

    def __init__(
        self,
        network: Callable[[torch.Tensor], torch.Tensor] | None = None,
        inferer: Callable[..., torch.Tensor] | None = None,
        moving_key: Hashable = "moving_image",
        fixed_key: Hashable = "fixed_image",
        ddf_key: Hashable = "pred",
        warped_key: Hashable | None = "warped_image",
        device: torch.device | str | None = None,
    ) -> None:
        if network is not None and not callable(network):
            raise ValueError(f"network must be callable or None, got {network!r}.")
        if inferer is not None and not callable(inferer):
            raise ValueError(f"inferer must be callable or None, got {inferer!r}.")
        if network is None and isinstance(inferer, RegistrationInferer) and inferer.iterations == 0:
            raise ValueError("without a network, the inferer must have iterations, got 0.")
        self.device = None if device is None else torch.device(device)
        if isinstance(network, nn.Module) and self.device is not None:
            network = network.to(self.device)
        self.network = IdentityField() if network is None else network
        if inferer is None and network is None:
            inferer = RegistrationInferer(iterations=100)
        self.inferer = RegistrationInferer() if inferer is None else inferer
        self.moving_key = moving_key
        self.fixed_key = fixed_key
        self.ddf_key = ddf_key
        self.warped_key = warped_key

    def _working_device(self, fixed: torch.Tensor) -> torch.device:
        if self.device is not None:
            return self.device
        parameters = self.network.parameters() if isinstance(self.network, nn.Module) else iter(())
        first = next(parameters, None)
        return fixed.device if first is None else first.device

    def _check(self, moving: Any, fixed: Any) -> None:
        for key, image in ((self.moving_key, moving), (self.fixed_key, fixed)):
            if not isinstance(image, torch.Tensor) or image.dim() not in (3, 4):
                given = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
                raise ValueError(f"{image_name(key, image)} must be an image (C, *spatial), 2-D or 3-D, got {given}.")
            bad = int((~torch.isfinite(plain_tensor(image))).sum())
            if bad:
                raise ValueError(f"{image_name(key, image)} has {bad} NaN or infinite voxels.")
        if moving.shape != fixed.shape:
            raise ValueError(
                f"{image_name(self.moving_key, moving)} has shape {list(moving.shape)}, but "
                f"{image_name(self.fixed_key, fixed)} has {list(fixed.shape)}; images are paired by their indices: "
                "resample or pad them to one size first (ResampleToMatchd, PadPaird)."
            )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        moving, fixed = data[self.moving_key], data[self.fixed_key]
        self._check(moving, fixed)
        device = self._working_device(fixed)
        # half precision and whole numbers are for storage
        images = [plain_tensor(image).detach().to(device, torch.float32)[None] for image in (moving, fixed)]
        modules = [self.network] if isinstance(self.network, nn.Module) else []
        with eval_mode(*modules):
            ddf = self.inferer(torch.cat(images, 1), self.network)
            expected = [1, fixed.dim() - 1, *fixed.shape[1:]]
            if not isinstance(ddf, torch.Tensor) or list(ddf.shape) != expected:
                given = list(ddf.shape) if isinstance(ddf, torch.Tensor) else type(ddf).__name__
                raise ValueError(f"the network and the inferer must return a field {expected}, got {given}.")
            result = {**data, self.ddf_key: with_geometry(ddf[0].float().to(fixed.device), fixed)}
            if self.warped_key is not None:
                result[self.warped_key] = with_geometry(warp(images[0], ddf)[0].to(fixed.device), fixed)
        return result
