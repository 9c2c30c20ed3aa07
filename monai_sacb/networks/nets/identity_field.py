# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from torch import nn

__all__ = ["IdentityField"]


class IdentityField(nn.Module):
    """In the place of a registration network: no displacement. It has no weights."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """
        Args:
            image: ``(B, 2 * C, *spatial)``.

        Returns:
            DDF ``(B, d, *spatial)`` of zeros.
        """
        return image.new_zeros([image.shape[0], image.dim() - 2] + list(image.shape[2:]))
