# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from monai.engines import PrepareBatch

from monai_sacb.utils import plain_tensor

__all__ = ["PrepareRegistrationBatch"]

ENTRIES = ("image", "label", "field_of_view", "landmarks", "anatomy")
TARGET_KEYS = tuple(f"{role}_{key}" for key in ENTRIES for role in ("moving", "fixed"))


class PrepareRegistrationBatch(PrepareBatch):
    """
    Turn a batch of pairs into the network's input and the loss's target, for MONAI's engines.

    The input is both images as one tensor, moving first; the target is a dictionary of the images and, where the batch
    has them, the labels, the fields of view, the landmarks and the images of the anatomy that the loss compares.
    """

    def __call__(
        self,
        batchdata: Mapping[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            batchdata: ``moving_image`` and ``fixed_image``, ``(B, C, *spatial)``; possibly the same with
                ``label`` and ``field_of_view``, ``(B, 1, *spatial)``, ``landmarks``, ``(B, N, d)`` in voxels, and
                ``anatomy``, ``(B, C, *spatial)``.
            device, non_blocking, kwargs: passed to ``Tensor.to``.

        Returns:
            tensor ``(B, 2 * C, *spatial)``, and the dictionary.
        """
        # plain tensors: the meta data of two images cannot be merged into one
        target = {
            key: plain_tensor(batchdata[key]).to(device=device, non_blocking=non_blocking, **kwargs)
            for key in TARGET_KEYS
            if key in batchdata
        }
        return torch.cat([target["moving_image"], target["fixed_image"]], 1), target
