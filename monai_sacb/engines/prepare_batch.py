# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from monai.engines import PrepareBatch

__all__ = ["PrepareRegistrationBatch"]

TARGET_KEYS = tuple(f"{role}_{key}" for key in ("image", "label", "mask") for role in ("moving", "fixed"))


class PrepareRegistrationBatch(PrepareBatch):
    """
    Turn a batch of pairs into the network's input and the loss's target, for MONAI's engines.

    The input is both images as one tensor, moving first; the target is a dictionary of the images and, where the batch
    has them, the labels and the masks.
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
                ``label`` and ``mask``, ``(B, 1, *spatial)``.
            device, non_blocking, kwargs: passed to ``Tensor.to``.

        Returns:
            tensor ``(B, 2 * C, *spatial)``, and the dictionary.
        """
        target = {
            key: torch.as_tensor(batchdata[key]).to(device=device, non_blocking=non_blocking, **kwargs)
            for key in TARGET_KEYS
            if key in batchdata
        }
        # plain tensors: the meta data of two images cannot be merged into one
        plain = {key: value.as_tensor() if hasattr(value, "as_tensor") else value for key, value in target.items()}
        return torch.cat([plain["moving_image"], plain["fixed_image"]], 1), plain
