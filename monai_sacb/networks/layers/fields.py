# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Sampling, composing, inverting and integrating dense displacement fields.

A dense displacement field (DDF) is ``(B, d, *spatial)``, in voxels of the grid it lies on, channel i along array axis
i, and pulls back: ``warped(p) = image(p + ddf(p))``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["compose", "exponential", "invert", "reference_grid", "unwarp_points", "warp", "warp_points"]


def reference_grid(spatial_shape: list[int], device: torch.device) -> torch.Tensor:
    """Voxel coordinates ``(d, *spatial)`` of a grid, float32: half precision cannot count to 300."""
    axes = [torch.arange(size, dtype=torch.float32, device=device) for size in spatial_shape]
    return torch.stack(torch.meshgrid(axes, indexing="ij"))


def warp(image: torch.Tensor, ddf: torch.Tensor, mode: str = "bilinear", padding_mode: str = "zeros") -> torch.Tensor:
    """
    Sample an image at ``p + ddf(p)`` for every voxel p of the field's grid.

    The coordinates are computed in float32 (float64 for a float64 field) whatever the type of the inputs. The image
    may have another size than the field; index 0 of both grids is the same place. Along an axis of a single voxel
    nothing is displaced.

    Args:
        image: ``(B, C, *spatial)``, moving image; 2-D or 3-D.
        ddf: ``(B, d, *spatial)``, displacement in voxels, pull-back, channel i along array axis i.
        mode: ``"bilinear"`` (linear along each axis) or ``"nearest"``.
        padding_mode: what lies outside the image, ``"zeros"``, ``"border"`` or ``"reflection"``.

    Returns:
        ``(B, C, *spatial of ddf)``. The type of the image, except that an integer image sampled linearly becomes
        float32.

    Raises:
        ValueError: When the shapes do not belong together or an option is unknown.

    """
    dims = image.dim() - 2
    if dims < 2 or dims > 3 or ddf.dim() != image.dim() or ddf.shape[1] != dims or ddf.shape[0] != image.shape[0]:
        raise ValueError(
            f"warp needs an image (B, C, *spatial) and a ddf (B, d, *spatial) of as many spatial dimensions d = 2 or "
            f"3, got {list(image.shape)} and {list(ddf.shape)}."
        )
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f"mode must be 'bilinear' or 'nearest', got '{mode}'.")
    if padding_mode not in ("zeros", "border", "reflection"):
        raise ValueError(f"padding_mode must be 'zeros', 'border' or 'reflection', got '{padding_mode}'.")
    dtype = torch.float64 if ddf.dtype == torch.float64 or image.dtype == torch.float64 else torch.float32
    points = reference_grid(list(ddf.shape[2:]), ddf.device).to(dtype) + ddf.to(dtype)
    # grid_sample wants coordinates in [-1, 1], last axis first
    normalized = [2.0 * points[:, i] / max(image.shape[i + 2] - 1, 1) - 1.0 for i in range(dims)]
    normalized.reverse()
    warped = F.grid_sample(
        image.to(dtype), torch.stack(normalized, -1), mode=mode, padding_mode=padding_mode, align_corners=True
    )
    if image.is_floating_point() or mode == "nearest":
        return warped.to(image.dtype)
    return warped


def warp_points(points: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
    """
    Carry points of the fixed image to their places in the moving image, ``p -> p + ddf(p)``.

    The field is interpolated linearly between voxels, whose centres are at whole numbers; outside the grid it is what
    it is at the border. Differentiable in both arguments.

    Args:
        points: ``(B, N, d)``, voxels of the fixed grid.
        ddf: ``(B, d, *spatial)`` in voxels of the fixed grid, pull-back, channel i along array axis i.

    Returns:
        ``(B, N, d)``, voxels of the moving grid, of the type of the points.

    Raises:
        ValueError: When the shapes do not belong together.
    """
    dims = ddf.dim() - 2
    if dims not in (2, 3) or ddf.shape[1] != dims or points.dim() != 3 or points.shape[::2] != ddf.shape[:2]:
        raise ValueError(
            f"warp_points needs points (B, N, d) and a ddf (B, d, *spatial) of as many spatial dimensions d = 2 or 3, "
            f"got {list(points.shape)} and {list(ddf.shape)}."
        )
    # half precision cannot tell neighbouring points apart
    dtype = torch.float64 if torch.float64 in (points.dtype, ddf.dtype) else torch.float32
    places = points.to(dtype)
    # grid_sample wants coordinates in [-1, 1], last axis first
    last = torch.tensor([max(size - 1, 1) for size in ddf.shape[2:]], dtype=dtype, device=points.device)
    grid = (2.0 * places / last - 1.0).flip(-1)
    grid = grid.view(*grid.shape[:2], *[1] * (dims - 1), dims)
    moved = F.grid_sample(ddf.to(dtype), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return (places + moved.flatten(2).transpose(1, 2)).to(points.dtype)


def unwarp_points(points: torch.Tensor, ddf: torch.Tensor, num_steps: int = 100) -> torch.Tensor:
    """
    Carry points of the moving image to their places in the fixed image: the p with ``p + ddf(p) = point``.

    By the fixed-point iteration ``p <- point - ddf(p)``, with a step that is halved at each point that it would lead
    farther away, as where the field stretches more than twofold. The field between and outside voxels is as for
    :py:func:`warp_points`; where it folds, the result is the nearest place that was met.

    Args:
        points: ``(B, N, d)``, voxels of the moving grid.
        ddf: ``(B, d, *spatial)`` in voxels of the fixed grid, pull-back, channel i along array axis i.
        num_steps: number of iterations.

    Returns:
        ``(B, N, d)``, voxels of the fixed grid, of the type of the points.

    Raises:
        ValueError: When the shapes do not belong together or ``num_steps`` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    # half precision cannot tell neighbouring points apart
    targets = points if points.dtype == torch.float64 else points.float()
    places = targets
    residual = warp_points(places, ddf) - targets
    relaxation = torch.ones_like(targets[..., :1])
    for _ in range(num_steps):
        tried = places - relaxation * residual
        remaining = warp_points(tried, ddf) - targets
        nearer = remaining.square().sum(-1, keepdim=True) < residual.square().sum(-1, keepdim=True)
        places, residual = torch.where(nearer, tried, places), torch.where(nearer, remaining, residual)
        relaxation = torch.where(nearer, relaxation, 0.5 * relaxation)
    return places.to(points.dtype)


def compose(first: torch.Tensor, second: torch.Tensor, padding_mode: str = "border") -> torch.Tensor:
    """
    One displacement field that does what two do in turn: ``p -> q = p + first(p) -> q + second(q)``.

    Warping an image with the result equals warping it with ``second`` and then with ``first`` (but interpolates once).

    Args:
        first: ``(B, d, *spatial)`` in voxels, applied to the points first.
        second: ``(B, d, *spatial)`` in voxels, on the same grid.
        padding_mode: what ``second`` is outside its grid, as in :py:func:`warp`.

    Returns:
        ``(B, d, *spatial)`` in voxels.

    Raises:
        ValueError: When the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"both fields must have one shape, got {list(first.shape)} and {list(second.shape)}.")
    return warp(second, first, padding_mode=padding_mode) + first


def invert(ddf: torch.Tensor, num_steps: int = 30) -> torch.Tensor:
    """
    Displacement field of the inverse mapping, by the fixed-point iteration ``u_inv(p) <- -u(p + u_inv(p))``.

    The step is halved at each voxel that it would lead farther away, as where the field stretches more than twofold.
    Where the field folds there is no inverse; the result is what came nearest to one.

    Args:
        ddf: ``(B, d, *spatial)`` in voxels, pull-back.
        num_steps: number of iterations.

    Returns:
        ``(B, d, *spatial)`` in voxels on the same grid, with ``compose(ddf, invert(ddf))`` about zero.

    Raises:
        ValueError: When ``num_steps`` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    inverse = -ddf
    residual = compose(inverse, ddf)
    relaxation = torch.ones_like(ddf[:, :1])
    for _ in range(num_steps):
        tried = inverse - relaxation * residual
        remaining = compose(tried, ddf)
        nearer = remaining.square().sum(1, keepdim=True) < residual.square().sum(1, keepdim=True)
        inverse, residual = torch.where(nearer, tried, inverse), torch.where(nearer, remaining, residual)
        relaxation = torch.where(nearer, relaxation, 0.5 * relaxation)
    return inverse


def exponential(velocity: torch.Tensor, num_steps: int = 7) -> torch.Tensor:
    """
    Displacement field of the flow of a stationary velocity field at time 1, by scaling and squaring.

    Args:
        velocity: ``(B, d, *spatial)`` in voxels per unit of time.
        num_steps: number of squarings; the field is divided by ``2 ** num_steps`` first.

    Returns:
        ``(B, d, *spatial)`` in voxels. Its inverse is ``exponential(-velocity)``.

    Raises:
        ValueError: When ``num_steps`` is negative.

    Source: Arsigny et al., A log-Euclidean framework for statistics on diffeomorphisms, MICCAI 2006.
    """
    if num_steps < 0:
        raise ValueError(f"num_steps must not be negative, got {num_steps}.")
    ddf = velocity / 2**num_steps
    for _ in range(num_steps):
        ddf = compose(ddf, ddf)
    return ddf
