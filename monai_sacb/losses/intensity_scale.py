# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Scaling that keeps squares of intensities within their type."""

from __future__ import annotations

import torch

__all__ = ["intensity_scale"]


@torch.no_grad()
def intensity_scale(image: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """
    Powers of two that bring intensities into [-1, 1] without rounding; 1 where they are there already.

    Args:
        image: floating point.
        dims: axes over which one factor holds.

    Returns:
        the factors, with one element along each of these axes.
    """
    # several times faster than the infinity norm
    largest = torch.maximum(image.amax(dims, keepdim=True), -image.amin(dims, keepdim=True))
    exponent = torch.frexp(largest)[1].clamp(min=0)
    return torch.ldexp(torch.ones_like(largest), -exponent)
