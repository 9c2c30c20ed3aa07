# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from monai.transforms import Transform

__all__ = ["RefuseFieldsd"]


class RefuseFieldsd(Transform):
    """
    Refuse pairs with loaded displacement fields; to come before transforms that move images.

    MONAI's random spatial transforms move a field's components as if they were channels of an image, but do not turn
    the vectors. Images, label maps and masks that are listed in such a transform are moved alike; points in millimetres
    stay on their anatomy, since the transform changes the affine of the image with it.

    Raises:
        ValueError: When an entry whose key ends in ``ddf`` is a tensor.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        fields = sorted(str(k) for k, v in data.items() if str(k).endswith("ddf") and isinstance(v, torch.Tensor))
        if fields:
            raise ValueError(f"augmentation cannot turn displacement fields, but the pair has {fields}.")
        return dict(data)
