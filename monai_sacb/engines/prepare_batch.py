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


def _both_directions(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every pair, and behind them every pair with its images exchanged."""
    result: dict[str, torch.Tensor] = {}
    for entry in ENTRIES:
        moving, fixed = f"moving_{entry}", f"fixed_{entry}"
        # without images there is no pair, which is said where it is noticed
        if entry == "image" or (moving in target and fixed in target):
            result[moving] = torch.cat([target[moving], target[fixed]])
            result[fixed] = torch.cat([target[fixed], target[moving]])
    image = target["moving_image"]
    result["reverse"] = torch.arange(2 * len(image), device=image.device).roll(len(image))
    return result


class PrepareRegistrationBatch(PrepareBatch):
    """
    Turn a batch of pairs into the network's input and the loss's target, for MONAI's engines.

    The input is both images as one tensor, moving first; the target is a dictionary of the images and, where the batch
    has them, the labels, the fields of view, the landmarks and the images of the anatomy that the loss compares.

    Args:
        symmetric: register every pair in both directions. The batch is then twice as large: all pairs, and behind them
            all pairs again with moving and fixed exchanged in every entry. An entry that only one of the two has is
            left out. The target's ``reverse``, ``(2 * B,)``, says for each pair which one is its other direction.

    Raises:
        ValueError: When ``symmetric`` is not True or False.
    """

    def __init__(self, symmetric: bool = False) -> None:
        if not isinstance(symmetric, bool):
            raise ValueError(f"symmetric must be True or False, got {symmetric!r}.")
        self.symmetric = symmetric

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
            tensor ``(B, 2 * C, *spatial)``, or ``(2 * B, 2 * C, *spatial)`` where ``symmetric``; and the dictionary.
        """
        # plain tensors: the meta data of two images cannot be merged into one
        target = {
            key: plain_tensor(batchdata[key]).to(device=device, non_blocking=non_blocking, **kwargs)
            for key in TARGET_KEYS
            if key in batchdata
        }
        if self.symmetric:
            target = _both_directions(target)
        return torch.cat([target["moving_image"], target["fixed_image"]], 1), target
