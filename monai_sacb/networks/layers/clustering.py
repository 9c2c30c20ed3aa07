# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Deterministic, batched k-means for feature maps."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["KMeans", "kmeans"]


def _nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centroid of every point: ``(B, N, C), (B, K, C) -> (B, N)``."""
    # |p - s|^2 = |p|^2 - 2 p.s + |s|^2, and |p|^2 does not change the arg-min
    scores = torch.baddbmm(centroids.square().sum(2).unsqueeze(1), points, centroids.transpose(1, 2), alpha=-2.0)
    return scores.argmin(2)


def _means(points: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Mean of the points of every cluster; a cluster without points keeps its centroid."""
    num_clusters = centroids.shape[1]
    clusters = torch.arange(num_clusters, device=points.device).view(1, num_clusters, 1)
    # a product with the one-hot labels, unlike scatter-add, gives the same bits every time on every device
    member = (labels.unsqueeze(1) == clusters).to(points.dtype)
    counts = member.sum(2, keepdim=True)
    sums = torch.bmm(member, points)
    return torch.where(counts > 0, sums / counts.clamp(min=1.0), centroids)


def _farthest_points(points: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """Seeds: the point farthest from the mean, then again and again the point farthest from all seeds so far."""
    distance = (points - points.mean(1, keepdim=True)).square().sum(2)
    index = distance.argmax(1).view(-1, 1, 1).expand(-1, 1, points.shape[2])
    seed = points.gather(1, index)
    seeds = [seed]
    distance = (points - seed).square().sum(2)
    for _ in range(num_clusters - 1):
        index = distance.argmax(1).view(-1, 1, 1).expand(-1, 1, points.shape[2])
        seed = points.gather(1, index)
        seeds.append(seed)
        distance = torch.minimum(distance, (points - seed).square().sum(2))
    return torch.cat(seeds, 1)


def _lloyd(points: torch.Tensor, centroids: torch.Tensor, passes: int, tol: float) -> torch.Tensor:
    """``passes`` Lloyd iterations; an image whose centroids have stopped moving is left as it is.

    The number of passes is fixed and convergence is a mask per image, so the result of one image does not depend on
    the other images of the batch, and no value has to travel from the device to the host.
    """
    converged = torch.zeros([points.shape[0], 1, 1], dtype=torch.bool, device=points.device)
    for _ in range(passes):
        moved = _means(points, _nearest(points, centroids), centroids)
        shift = (moved - centroids).square().sum([1, 2], keepdim=True)
        centroids = torch.where(converged, centroids, moved)
        converged = converged | (shift <= tol * tol * centroids.square().sum([1, 2], keepdim=True))
    return centroids


def _kmeans(
    points: torch.Tensor, num_clusters: int, subsample_size: int, subsample_passes: int, full_passes: int, tol: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means without argument checks; see :py:func:`kmeans`."""
    if torch.jit.is_scripting():
        return _kmeans_float32(points, num_clusters, subsample_size, subsample_passes, full_passes, tol)
    # the sum over a cluster leaves the range of half precision, to which autocast would cast the products
    with torch.autocast(device_type=points.device.type, enabled=False):
        return _kmeans_float32(points, num_clusters, subsample_size, subsample_passes, full_passes, tol)


def _kmeans_float32(
    points: torch.Tensor, num_clusters: int, subsample_size: int, subsample_passes: int, full_passes: int, tol: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if points.dtype != torch.float64:
        points = points.float()
    num_points = points.shape[1]
    # scaled and centred, the expanded distance loses no digits and neither large nor tiny values leave the range
    scale = points.abs().amax([1, 2], keepdim=True)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    points = points / scale
    offset = points.mean(1, keepdim=True)
    points = points - offset
    stride = max(1, num_points // subsample_size)
    # without a common factor the stride visits every column and slice of the grid, not only some of them
    while math.gcd(stride, num_points) > 1 and stride > 1:
        stride += 1
    sample = points[:, ::stride]
    centroids = _lloyd(sample, _farthest_points(sample, num_clusters), subsample_passes, tol)
    if stride > 1:
        centroids = _lloyd(points, centroids, full_passes, tol)
    return _nearest(points, centroids), (centroids + offset) * scale


def _check_arguments(
    num_clusters: int, subsample_size: int, subsample_passes: int, full_passes: int, tol: float
) -> None:
    for name, value, lowest in (
        ("num_clusters", num_clusters, 1),
        ("subsample_size", subsample_size, 1),
        ("subsample_passes", subsample_passes, 0),
        ("full_passes", full_passes, 0),
        ("tol", tol, 0),
    ):
        if not value >= lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}.")


def kmeans(
    points: torch.Tensor,
    num_clusters: int,
    subsample_size: int = 4096,
    subsample_passes: int = 30,
    full_passes: int = 3,
    tol: float = 1e-4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Euclidean k-means of every image of a batch, without a random number generator.

    Seeds are chosen by farthest point on a strided subsample; Lloyd's algorithm runs there to convergence and then for
    a few passes over all points. The number of passes is fixed (an image that has converged is left unchanged), so the
    result of one image depends neither on the rest of the batch nor on earlier calls, and the function can be scripted
    and exported. No gradient flows through it.

    Args:
        points: ``(B, N, C)``, N points of C features for each of B images.
        num_clusters: number of clusters K. May exceed the number of distinct points; the surplus clusters are empty
            and their centroids repeat existing points.
        subsample_size: approximate number of points on which seeds are chosen and Lloyd's algorithm converges.
        subsample_passes: Lloyd passes over the subsample.
        full_passes: Lloyd passes over all points (none are needed where the subsample is all points).
        tol: an image has converged when its centroids move less than this fraction of their norm.

    Returns:
        labels ``(B, N)``, int64 in ``[0, K)``, the index of each point's nearest centroid, and centroids ``(B, K, C)``,
        float32 (float64 for float64 points).

    Raises:
        ValueError: When ``points`` is not a non-empty floating point ``(B, N, C)`` tensor, holds a value that is not
            finite, or another argument is out of its range.

    """
    if points.dim() != 3 or not points.is_floating_point() or points.numel() == 0:
        raise ValueError(
            f"points must be a non-empty floating point tensor of shape (B, N, C), got {tuple(points.shape)} "
            f"of {points.dtype}."
        )
    _check_arguments(num_clusters, subsample_size, subsample_passes, full_passes, tol)
    if not bool(torch.isfinite(points).all()):
        raise ValueError(f"points must be finite, got {int((~torch.isfinite(points)).sum())} NaN or infinite values.")
    with torch.no_grad():
        return _kmeans(points, num_clusters, subsample_size, subsample_passes, full_passes, tol)


class KMeans(nn.Module):
    """
    :py:func:`kmeans` as a module: the default clusterer of :py:class:`monai_sacb.networks.blocks.SACBlock`.

    It does not look for values that are not finite (that would stop a GPU and cannot be exported); they do not hang it.

    Args:
        num_clusters, subsample_size, subsample_passes, full_passes, tol: as for :py:func:`kmeans`.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        num_clusters: int,
        subsample_size: int = 4096,
        subsample_passes: int = 30,
        full_passes: int = 3,
        tol: float = 1e-4,
    ) -> None:
        super().__init__()
        _check_arguments(num_clusters, subsample_size, subsample_passes, full_passes, tol)
        self.num_clusters = num_clusters
        self.subsample_size = subsample_size
        self.subsample_passes = subsample_passes
        self.full_passes = full_passes
        self.tol = tol

    def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            points: ``(B, N, C)``.

        Returns:
            labels ``(B, N)`` and centroids ``(B, K, C)``, as :py:func:`kmeans`, detached.
        """
        return _kmeans(
            points.detach(), self.num_clusters, self.subsample_size, self.subsample_passes, self.full_passes, self.tol
        )
