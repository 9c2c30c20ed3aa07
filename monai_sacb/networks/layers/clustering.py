# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Deterministic, batched k-means for feature maps."""

from __future__ import annotations

import math
from numbers import Integral
from typing import NamedTuple

import torch
from torch import nn

from monai_sacb.utils import is_exported

__all__ = ["KMeans", "kmeans"]


def _scores(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Squared distances but for the points' own squares: ``(B, N, C), (B, K, C) -> (B, K, N)``."""
    # |p - s|^2 = |p|^2 - 2 p.s + |s|^2, and |p|^2 does not change the arg-min; minima over the first of two axes are
    # several times faster than over a short last one
    return torch.baddbmm(centroids.square().sum(2).unsqueeze(2), centroids, points.transpose(1, 2), alpha=-2.0)


def _is_exported() -> bool:
    if torch.jit.is_scripting():
        return False
    return is_exported()


def _chunks(points: torch.Tensor) -> list[torch.Tensor]:
    """The points in portions that stay in a CPU's cache; an export, which would unroll them, takes all at once."""
    if not points.is_cpu or _is_exported():
        return [points]
    return points.split(max(1, (1 << 20) // (points.element_size() * points.shape[2])), 1)


def _normalized(points: torch.Tensor, offset: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(-offset, points, factor)


def _nearest(points: torch.Tensor, centroids: torch.Tensor, offset: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centroid of every normalized point: ``(B, N, C), (B, K, C) -> (B, N)``."""
    return torch.cat([_scores(_normalized(part, offset, factor), centroids).min(1)[1] for part in _chunks(points)], 1)


def _means(points: torch.Tensor, centroids: torch.Tensor, offset: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Mean of the normalized points nearest to every centroid; one without points stays where it is."""
    num_clusters = centroids.shape[1]
    clusters = torch.arange(num_clusters, device=points.device).view(1, num_clusters, 1)
    counts = torch.zeros([points.shape[0], num_clusters, 1], dtype=points.dtype, device=points.device)
    sums = torch.zeros_like(centroids)
    for part in _chunks(points):
        part = _normalized(part, offset, factor)
        # a product with the one-hot labels, unlike scatter-add, gives the same bits every time on every device
        member = (_scores(part, centroids).min(1)[1].unsqueeze(1) == clusters).to(points.dtype)
        counts = counts + member.sum(2, keepdim=True)
        sums = sums + torch.bmm(member, part)
    return torch.where(counts > 0, sums / counts.clamp(min=1.0), centroids)


def _lots(num_points: int, num_starts: int, num_draws: int, device: torch.device) -> torch.Tensor:
    """Numbers in (0, 1) that look drawn by lot, the same every time: ``(num_draws, num_points, num_starts)``."""
    prime = 1048573
    index = torch.arange(num_points, device=device).view(1, -1, 1)
    start = torch.arange(num_starts, device=device).view(1, 1, -1)
    draw = torch.arange(num_draws, device=device).view(-1, 1, 1)
    state = (index * 7919 + (1009 * start + draw + 1) * 104729) % prime
    for _ in range(3):
        state = (state * state + index + 1) % prime
    return (state.float() + 0.5) / prime


def _seeds(points: torch.Tensor, num_clusters: int, num_starts: int) -> torch.Tensor:
    """
    Points to start from, ``(B, num_starts, K, C)``.

    The first start takes the point farthest from the mean, then again and again the point farthest from all seeds so
    far. The others follow k-means++ (Arthur and Vassilvitskii, SODA 2007), with lots that are always the same: a point
    is drawn with a chance in proportion to its squared distance from the seeds so far, at first from the mean.
    """
    num_points = points.shape[1]
    squares = points.square().sum(2, keepdim=True)
    # the largest of distance / exponential lot falls on each point in proportion to its distance
    lots = -1.0 / _lots(num_points, num_starts, num_clusters, points.device).log()
    # the first start takes the largest distance itself
    lots[:, :, 0] = 1.0
    lots = lots.to(points.dtype)
    # (B, N, R)
    distance = (points - points.mean(1, keepdim=True)).square().sum(2, keepdim=True).expand(-1, -1, num_starts)
    seeds: list[torch.Tensor] = []
    for draw in range(num_clusters):
        index = (distance * lots[draw]).argmax(1)
        seed = points.gather(1, index.unsqueeze(2).expand(-1, -1, points.shape[2]))
        seeds.append(seed)
        to_seed = (_scores(points, seed).transpose(1, 2) + squares).clamp(min=0.0)
        # the distance of a seed from itself is zero, not what rounding leaves of it
        to_seed = to_seed.scatter(1, index.unsqueeze(1), 0.0)
        distance = to_seed if draw == 0 else torch.minimum(distance, to_seed)
    return torch.stack(seeds, 2)


def _best_start(points: torch.Tensor, seeds: torch.Tensor, passes: int = 10) -> torch.Tensor:
    """Centroids ``(B, K, C)`` of the start that has the least inertia after some Lloyd iterations side by side."""
    batch, num_starts, num_clusters, channels = seeds.shape
    centroids = seeds.flatten(1, 2)
    clusters = torch.arange(num_clusters, device=points.device).view(1, 1, num_clusters, 1)
    for _ in range(passes):
        labels = _scores(points, centroids).unflatten(1, [num_starts, num_clusters]).min(2)[1]
        member = (labels.unsqueeze(2) == clusters).to(points.dtype).flatten(1, 2)
        counts = member.sum(2, keepdim=True)
        centroids = torch.where(counts > 0, torch.bmm(member, points) / counts.clamp(min=1.0), centroids)
    least = _scores(points, centroids).unflatten(1, [num_starts, num_clusters]).amin(2).sum(2)
    index = least.argmin(1).view(batch, 1, 1, 1).expand(-1, 1, num_clusters, channels)
    return centroids.unflatten(1, [num_starts, num_clusters]).gather(1, index).squeeze(1)


def _lloyd(
    points: torch.Tensor,
    centroids: torch.Tensor,
    passes: int,
    tol: float,
    offset: torch.Tensor,
    factor: torch.Tensor,
) -> torch.Tensor:
    """``passes`` Lloyd iterations over the normalized points; an image whose centroids stand still is left as it is.

    The number of passes is fixed and convergence is a mask per image, so the result of one image does not depend on
    the other images of the batch, and no value has to travel from the device to the host.
    """
    converged = torch.zeros([points.shape[0], 1, 1], dtype=torch.bool, device=points.device)
    for _ in range(passes):
        # nothing would change any more; to ask a GPU would stop it, and a recording has no answer
        if converged.is_cpu and not _is_exported() and bool(converged.all()):
            break
        moved = _means(points, centroids, offset, factor)
        shift = (moved - centroids).square().sum([1, 2], keepdim=True)
        centroids = torch.where(converged, centroids, moved)
        converged = converged | (shift <= tol * tol * centroids.square().sum([1, 2], keepdim=True))
    return centroids


def _every(points: torch.Tensor, size: int) -> torch.Tensor:
    """About ``size`` of the points, at equal distances."""
    num_points = points.shape[1]
    stride = max(1, num_points // size)
    # without a common factor the stride visits every column and slice of the grid, not only some of them
    while math.gcd(stride, num_points) > 1 and stride > 1:
        stride += 1
    return points[:, ::stride]


class _Settings(NamedTuple):
    """What :py:func:`kmeans` is told beside the points."""

    num_clusters: int
    num_starts: int
    subsample_size: int
    subsample_passes: int
    full_passes: int
    tol: float


def _lloyd_from_best_start(points: torch.Tensor, settings: _Settings) -> tuple[torch.Tensor, torch.Tensor]:
    num_clusters, num_starts, tol = settings.num_clusters, settings.num_starts, settings.tol
    if points.dtype != torch.float64:
        points = points.float()
    # scaled and centred, the expanded distance loses no digits and neither large nor tiny values leave the range
    largest = torch.maximum(points.amax([1, 2], keepdim=True), -points.amin([1, 2], keepdim=True))
    # to 16 rather than 1: the factor of the largest numbers is a normal one as well
    factor = (largest.clamp(min=1e-305 if points.dtype == torch.float64 else 4e-37) / 16.0).reciprocal()
    sample = _every(points, settings.subsample_size)
    offset = (sample * factor).mean(1, keepdim=True)
    sample = _normalized(sample, offset, factor).contiguous()
    # enough points for every cluster
    contest = _every(sample, min(settings.subsample_size, max(1024, 8 * num_clusters)))
    seeds = _seeds(contest, num_clusters, num_starts)
    centroids = seeds[:, 0] if num_starts == 1 else _best_start(contest, seeds)
    zero, one = torch.zeros_like(factor), torch.ones_like(factor)
    centroids = _lloyd(sample, centroids, settings.subsample_passes, tol, zero, one)
    if sample.shape[1] < points.shape[1]:
        # a whole map is normalized portion by portion, on the way through the cache
        centroids = _lloyd(points, centroids, settings.full_passes, tol, offset, factor)
    return _nearest(points, centroids, offset, factor), (centroids + offset) / factor


@torch.library.custom_op("monai_sacb::kmeans", mutates_args=())
def _opaque_kmeans(
    points: torch.Tensor,
    num_clusters: int,
    num_starts: int,
    subsample_size: int,
    subsample_passes: int,
    full_passes: int,
    tol: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One operator for the compiler, which would otherwise unroll every pass and take minutes."""
    settings = _Settings(num_clusters, num_starts, subsample_size, subsample_passes, full_passes, tol)
    # the sum over a cluster leaves the range of half precision, to which autocast would cast the products
    with torch.autocast(device_type=points.device.type, enabled=False):
        return _lloyd_from_best_start(points, settings)


@_opaque_kmeans.register_fake
def _(points: torch.Tensor, num_clusters: int, *_: float) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_points, channels = points.shape
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    return (
        points.new_empty([batch, num_points], dtype=torch.long),
        points.new_empty([batch, num_clusters, channels], dtype=dtype),
    )


def _kmeans(points: torch.Tensor, settings: _Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means without argument checks; see :py:func:`kmeans`."""
    if torch.jit.is_scripting():
        return _lloyd_from_best_start(points, settings)
    if is_exported():
        with torch.autocast(device_type=points.device.type, enabled=False):
            return _lloyd_from_best_start(points, settings)
    return _opaque_kmeans(points, *settings)


def _check_settings(settings: _Settings) -> None:
    for name, value in settings._asdict().items():
        if name != "tol" and not isinstance(value, Integral):
            raise ValueError(f"{name} must be a whole number, got {value!r}.")
        lowest = 0 if name in ("subsample_passes", "full_passes", "tol") else 1
        if not value >= lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}.")


def kmeans(
    points: torch.Tensor,
    num_clusters: int,
    num_starts: int = 16,
    subsample_size: int = 4096,
    subsample_passes: int = 20,
    full_passes: int = 2,
    tol: float = 1e-4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Euclidean k-means of every image of a batch, without a random number generator.

    Several starts, by farthest points and by k-means++ with lots that are always the same, compete on a small strided
    subsample; from the best one Lloyd's algorithm runs to convergence on a larger subsample and then over all points,
    for which a few passes are enough. The number of passes is fixed (an image that has converged is left unchanged),
    so the result of one image depends neither on the rest of the batch nor on earlier calls, and the function can be
    scripted and exported. No gradient flows through it.

    Args:
        points: ``(B, N, C)``, N points of C features for each of B images.
        num_clusters: number of clusters K. May exceed the number of distinct points; the surplus clusters are empty
            and their centroids repeat existing points.
        num_starts: number of starts; 1 is the one by farthest points.
        subsample_size: approximate number of points on which Lloyd's algorithm converges.
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
    settings = _Settings(num_clusters, num_starts, subsample_size, subsample_passes, full_passes, tol)
    _check_settings(settings)
    if not bool(torch.isfinite(points).all()):
        raise ValueError(f"points must be finite, got {int((~torch.isfinite(points)).sum())} NaN or infinite values.")
    with torch.no_grad():
        return _kmeans(points, settings)


class KMeans(nn.Module):
    """
    :py:func:`kmeans` as a module: the default clusterer of :py:class:`monai_sacb.networks.blocks.SACBlock`.

    It does not look for values that are not finite (that would stop a GPU and cannot be exported); they do not hang it.

    Args:
        num_clusters, num_starts, subsample_size, subsample_passes, full_passes, tol: as for :py:func:`kmeans`.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        num_clusters: int,
        num_starts: int = 16,
        subsample_size: int = 4096,
        subsample_passes: int = 20,
        full_passes: int = 2,
        tol: float = 1e-4,
    ) -> None:
        super().__init__()
        settings = _Settings(num_clusters, num_starts, subsample_size, subsample_passes, full_passes, tol)
        _check_settings(settings)
        # one by one: TorchScript turns a named tuple that a module holds into a plain one
        self.num_clusters = num_clusters
        self.num_starts = num_starts
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
        settings = _Settings(
            self.num_clusters,
            self.num_starts,
            self.subsample_size,
            self.subsample_passes,
            self.full_passes,
            self.tol,
        )
        return _kmeans(points.detach(), settings)
