# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_sacb.networks.layers import KMeans, kmeans

# batch, points, channels, clusters, type
TEST_CASES = [
    (1, 50, 3, 4, torch.float32),
    (3, 77, 1, 2, torch.float32),
    (2, 333, 8, 7, torch.float64),
    (1, 4097, 4, 7, torch.float32),
    (2, 8192, 5, 3, torch.float32),
    (2, 101, 6, 1, torch.float32),
    (2, 64, 4, 3, torch.float16),
    (2, 64, 4, 3, torch.bfloat16),
]

# arguments beside points, exception, message
ILL_CASES = [
    ({"num_clusters": 0}, ValueError, r"num_clusters must be at least 1, got 0"),
    ({"num_clusters": -3}, ValueError, r"num_clusters must be at least 1, got -3"),
    ({"num_clusters": 3.0}, ValueError, r"num_clusters must be a whole number, got 3\.0"),
    ({"num_clusters": 2, "subsample_size": 1e3}, ValueError, r"subsample_size must be a whole number, got 1000\.0"),
    ({"num_clusters": 2, "num_starts": 0}, ValueError, r"num_starts must be at least 1, got 0"),
    ({"num_clusters": 2, "subsample_size": 0}, ValueError, r"subsample_size must be at least 1, got 0"),
    ({"num_clusters": 2, "subsample_passes": -1}, ValueError, r"subsample_passes must be at least 0, got -1"),
    ({"num_clusters": 2, "full_passes": -2}, ValueError, r"full_passes must be at least 0, got -2"),
    ({"num_clusters": 2, "tol": -0.5}, ValueError, r"tol must be at least 0, got -0\.5"),
    ({"num_clusters": 2, "tol": float("nan")}, ValueError, r"tol must be at least 0, got nan"),
]

# points, message
ILL_POINTS = [
    (torch.zeros(5, 2), r"\(5, 2\)"),
    (torch.zeros(1, 2, 5, 2), r"\(1, 2, 5, 2\)"),
    (torch.zeros(1, 0, 2), r"\(1, 0, 2\)"),
    (torch.zeros(0, 5, 2), r"\(0, 5, 2\)"),
    (torch.zeros(1, 5, 0), r"\(1, 5, 0\)"),
    (torch.zeros(1, 5, 2, dtype=torch.int64), r"torch\.int64"),
    (torch.zeros(1, 5, 2, dtype=torch.complex64), r"torch\.complex64"),
]


def random_points(batch: int, num: int, channels: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, num, channels, generator=torch.Generator().manual_seed(seed))


def blobs(num_blobs: int = 5, per_blob: int = 40, channels: int = 3, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Well separated groups of points in mixed order, and the group of each point."""
    rng = np.random.default_rng(seed)
    centers = 10.0 * rng.permutation(num_blobs)[:, None] + rng.uniform(-1, 1, (num_blobs, channels))
    group = rng.permutation(np.repeat(np.arange(num_blobs), per_blob))
    points = centers[group] + 0.3 * rng.uniform(-1, 1, (group.size, channels))
    return torch.from_numpy(points.astype(np.float32))[None], group


def structured_map(shape: tuple[int, ...], channels: int, regions: int, seed: int) -> np.ndarray:
    """Points ``(N, C)`` of a feature map as a network makes it: regions of their own mean with smooth borders."""
    rng = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), 3.0) for _ in range(regions)])
    means = rng.standard_normal((regions, channels))
    features = means[fields.argmax(0)]
    noise = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), 2.0) for _ in range(channels)], -1)
    features = features + 0.5 * noise / noise.std()
    smooth = ndimage.uniform_filter(features, (3,) * len(shape) + (1,), mode="constant")
    return smooth.reshape(-1, channels).astype(np.float32)


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """``(N, K)`` in float64, differences first: no digit is lost."""
    return np.stack([((points.astype(np.float64) - c) ** 2).sum(1) for c in centroids.astype(np.float64)], 1)


def inertia(points: np.ndarray, centroids: np.ndarray) -> float:
    return float(squared_distances(points, centroids).min(1).sum())


def converged_lloyd(points: np.ndarray, seeds: np.ndarray) -> float:
    """Inertia of Lloyd's algorithm from the given seeds, run until no label changes."""
    centroids, labels = seeds.astype(np.float64), None
    for _ in range(1000):
        before, labels = labels, squared_distances(points, centroids).argmin(1)
        if before is not None and (before == labels).all():
            return inertia(points, centroids)
        for k in np.unique(labels):
            centroids[k] = points[labels == k].astype(np.float64).mean(0)
    raise RuntimeError("Lloyd's algorithm did not converge.")


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labelings are equal up to the names of the clusters."""
    pairs = {(int(x), int(y)) for x, y in zip(a, b)}
    return len(pairs) == len({x for x, _ in pairs}) == len({y for _, y in pairs})


@pytest.mark.parametrize(("batch", "num", "channels", "clusters", "dtype"), TEST_CASES)
def test_shapes_types_and_nearest_centroid(
    batch: int, num: int, channels: int, clusters: int, dtype: torch.dtype
) -> None:
    points = (random_points(batch, num, channels) + 2.0).to(dtype)
    before = points.clone()
    labels, centroids = kmeans(points, clusters)
    assert labels.shape == (batch, num) and labels.dtype == torch.int64
    assert centroids.shape == (batch, clusters, channels)
    assert centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(points, before), "the input was changed"
    for image in range(batch):
        distances = squared_distances(points[image].double().numpy(), centroids[image].numpy())
        chosen = distances[np.arange(num), labels[image].numpy()]
        np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-4, atol=1e-5)
        # random points fill every cluster
        assert set(labels[image].tolist()) == set(range(clusters))


@pytest.mark.parametrize("num", [60, 1000])
def test_centroids_are_means_of_their_points(num: int) -> None:
    """Where the subsample is all points, Lloyd's algorithm has converged: its fixed point is known."""
    points = random_points(2, num, 4)
    labels, centroids = kmeans(points, 5, subsample_passes=200, tol=0.0)
    for image in range(2):
        for k in range(5):
            mean = points[image][labels[image] == k].double().mean(0)
            torch.testing.assert_close(centroids[image, k].double(), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_finds_separated_groups(seed: int) -> None:
    points, group = blobs(seed=seed)
    labels, centroids = kmeans(points, 5)
    assert same_partition(labels[0].numpy(), group)
    for k in range(5):
        of_group = points[0].numpy()[group == group[labels[0].numpy() == k][0]]
        np.testing.assert_allclose(centroids[0, k].numpy(), of_group.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num", [500, 9001])
def test_same_bits_again_and_alone(num: int) -> None:
    points = torch.cat([random_points(2, num, 6), 100.0 + 1e-3 * random_points(1, num, 6, seed=1)])
    labels, centroids = kmeans(points, 7)
    # the generator of random numbers plays no part
    torch.manual_seed(num)
    again = kmeans(points, 7)
    assert torch.equal(labels, again[0]) and torch.equal(centroids, again[1])
    for image in range(3):
        alone = kmeans(points[image : image + 1], 7)
        assert torch.equal(labels[image : image + 1], alone[0])
        # a matrix product rounds differently at another place of a batch
        torch.testing.assert_close(centroids[image : image + 1], alone[1], rtol=1e-5, atol=1e-6)
    assert not torch.equal(labels[0], labels[1])


def test_order_of_points_does_not_matter_for_one_start() -> None:
    points = random_points(1, 800, 4)
    order = torch.randperm(800, generator=torch.Generator().manual_seed(3))
    labels, centroids = kmeans(points, 6, num_starts=1)
    shuffled_labels, shuffled_centroids = kmeans(points[:, order], 6, num_starts=1)
    assert torch.equal(shuffled_labels, labels[:, order])
    torch.testing.assert_close(shuffled_centroids, centroids, rtol=1e-4, atol=1e-5)


def test_order_of_points_hardly_matters_for_a_subsample() -> None:
    points = structured_map((20, 24, 28), 6, regions=7, seed=4)
    order = np.random.default_rng(0).permutation(len(points))
    results = [kmeans(torch.from_numpy(p)[None], 7)[1][0].numpy() for p in (points, points[order])]
    assert inertia(points, results[1]) == pytest.approx(inertia(points, results[0]), rel=0.02)


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e-3, 1e3, 1e8, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_of_points(scale: float, dtype: torch.dtype) -> None:
    points = random_points(2, 400, 5).to(dtype)
    labels, centroids = kmeans(points, 6)
    scaled_labels, scaled_centroids = kmeans(points * scale, 6)
    assert torch.equal(scaled_labels, labels)
    torch.testing.assert_close(scaled_centroids.double() / scale, centroids.double(), rtol=1e-4, atol=1e-5)


def test_scale_of_points_without_denormal_numbers() -> None:
    """Some processors, and some options, take the smallest numbers for zero."""
    points = random_points(1, 400, 5).clamp(-3, 3)
    labels, _ = kmeans(points, 6)
    try:
        torch.set_flush_denormal(True)
        for scale in (1e38, 1e-36):
            scaled_labels, centroids = kmeans(points * scale, 6)
            assert torch.isfinite(centroids).all() and (scaled_labels == labels).float().mean() > 0.99
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("offset", [1e2, -1e3, 1e4, 1e5])
def test_points_far_from_the_origin(offset: float) -> None:
    """The expanded distance |p|² - 2ps + |s|² would lose every digit here."""
    points, group = blobs()
    labels, centroids = kmeans(points + offset, 5)
    assert same_partition(labels[0].numpy(), group)
    means = np.stack([points[0].numpy()[labels[0].numpy() == k].mean(0) for k in range(5)])
    np.testing.assert_allclose(centroids[0].numpy(), means + offset, rtol=3e-7, atol=1e-4)


def test_one_image_of_a_batch_scales_alone() -> None:
    """A huge image beside a tiny one leaves both as they are."""
    points = random_points(1, 300, 3)
    labels, centroids = kmeans(torch.cat([points * 1e15, points * 1e-15]), 4)
    alone = kmeans(points, 4)
    assert torch.equal(labels[0], alone[0][0]) and torch.equal(labels[1], alone[0][0])
    torch.testing.assert_close(centroids[1].double() * 1e15, alone[1][0].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, -3.5, 1e6])
@pytest.mark.parametrize("clusters", [1, 4])
def test_constant_points(value: float, clusters: int) -> None:
    labels, centroids = kmeans(torch.full((2, 30, 3), value), clusters)
    assert labels.unique(dim=1).shape[1] == 1
    torch.testing.assert_close(centroids, torch.full((2, clusters, 3), value))


@pytest.mark.parametrize(("distinct", "num", "clusters"), [(2, 40, 5), (3, 9, 7), (1, 1, 4), (4, 4, 9), (5, 6000, 7)])
def test_fewer_distinct_points_than_clusters(distinct: int, num: int, clusters: int) -> None:
    """Surplus clusters are empty, and their centroids repeat points: none falls to the origin."""
    values = 100.0 + torch.arange(distinct * 3, dtype=torch.float32).view(distinct, 3)
    points = values[torch.arange(num) % distinct].unsqueeze(0)
    labels, centroids = kmeans(points, clusters)
    assert labels.unique().numel() == distinct
    torch.testing.assert_close(centroids[0][labels[0]], points[0])
    to_nearest_point = squared_distances(centroids[0].numpy(), values.numpy()).min(1)
    np.testing.assert_allclose(to_nearest_point, 0, atol=1e-6)


@pytest.mark.parametrize("offset", [-50.0, 1000.0])
def test_centroids_stay_among_the_points(offset: float) -> None:
    """Many clusters on few points, some of which empty: every centroid lies in the bounding box of the points."""
    rng = np.random.default_rng(7)
    empty = 0
    for _ in range(20):
        points = torch.from_numpy(rng.integers(0, 3, (1, 14, 2)).astype(np.float32)) + offset
        labels, centroids = kmeans(points, 10)
        empty += 10 - labels.unique().numel()
        assert (centroids >= points.amin(1, keepdim=True) - 1e-3).all()
        assert (centroids <= points.amax(1, keepdim=True) + 1e-3).all()
    assert empty > 0


# shape, channels, regions, seed, clusters
FEATURE_MAPS = [
    ((24, 28, 20), 8, 9, 0, 7),
    ((17, 21, 19), 16, 6, 1, 7),
    ((90, 70), 8, 8, 2, 5),
    ((10, 12, 10), 32, 7, 3, 7),
]


@pytest.mark.parametrize(("shape", "channels", "regions", "seed", "clusters"), FEATURE_MAPS)
def test_inertia_of_full_convergence(
    shape: tuple[int, ...], channels: int, regions: int, seed: int, clusters: int
) -> None:
    points = structured_map(shape, channels, regions, seed)
    batch = torch.from_numpy(points)[None]
    _, seeds = kmeans(batch, clusters, subsample_passes=0, full_passes=0)
    labels, centroids = kmeans(batch, clusters)
    best = converged_lloyd(points, seeds[0].numpy())
    assert inertia(points, centroids[0].numpy()) <= 1.005 * best
    chosen = squared_distances(points, centroids[0].numpy())[np.arange(len(points)), labels[0].numpy()].sum()
    assert chosen <= 1.005 * best


def excess_over_ten_random_starts(points: np.ndarray, clusters: int) -> float:
    cluster = pytest.importorskip("sklearn.cluster")
    peer = cluster.KMeans(clusters, init="k-means++", n_init=10, random_state=0).fit(points.astype(np.float64))
    _, centroids = kmeans(torch.from_numpy(points)[None], clusters)
    return inertia(points, centroids[0].numpy()) / peer.inertia_ - 1


@pytest.mark.parametrize(("shape", "channels", "regions", "seed", "clusters"), FEATURE_MAPS)
def test_inertia_of_ten_random_starts(
    shape: tuple[int, ...], channels: int, regions: int, seed: int, clusters: int
) -> None:
    assert excess_over_ten_random_starts(structured_map(shape, channels, regions, seed), clusters) <= 0.02


def test_inertia_of_ten_random_starts_always() -> None:
    """Maps of as many regions as clusters, on some of which a single start ends in a poor local optimum."""
    excess = [excess_over_ten_random_starts(structured_map((8, 12, 8), 32, 7, seed), 7) for seed in range(100, 115)]
    assert max(excess) <= 0.02


def test_more_clusters_than_the_contest_has_points() -> None:
    points = random_points(1, 5000, 3)
    labels, centroids = kmeans(points, 1500, num_starts=2)
    assert labels.unique().numel() > 1400
    assert inertia(points[0].numpy(), centroids[0].numpy()) < 0.01 * float(points.square().sum())


def test_starts_compete() -> None:
    by_seed = [
        [inertia(p, kmeans(torch.from_numpy(p)[None], 7, num_starts=number)[1][0].numpy()) for number in (1, 8)]
        for p in (structured_map((8, 12, 8), 32, 7, seed) for seed in range(100, 110))
    ]
    gains = [first / best - 1 for first, best in by_seed]
    assert min(gains) > -0.002 and max(gains) > 0.02


def test_inertia_of_the_recorded_block(parity) -> None:
    recorded = parity("sacb_block_mean_s")
    points, theirs = recorded["clustered_features"], recorded["centroids"]
    _, centroids = kmeans(torch.from_numpy(points)[None], len(theirs))
    assert inertia(points, centroids[0].numpy()) <= 1.005 * inertia(points, theirs)


@pytest.mark.parametrize("call", range(8))
def test_inertia_of_the_recorded_network(shared_parity, call: int) -> None:
    """Features of the original network: no worse than its own clustering, close to the best of ten random starts."""
    with np.load(shared_parity / "sacb_net.npz") as recorded:
        points, theirs = recorded[f"cluster{call}.features"], recorded[f"cluster{call}.centroids"]
    labels, centroids = kmeans(torch.from_numpy(points)[None], len(theirs))
    spread = float(((points - points.mean(0)) ** 2).sum())
    assert inertia(points, centroids[0].numpy()) <= 1.02 * inertia(points, theirs) + 1e-10 * spread
    if call >= 2:
        assert excess_over_ten_random_starts(points, len(theirs)) <= 0.02
    else:
        # fewer distinct points than clusters: the original left the surplus centroids at the origin
        assert (theirs == 0).all(1).any() and labels.unique().numel() < len(theirs)
        np.testing.assert_allclose(squared_distances(centroids[0].numpy(), points).min(1), 0, atol=1e-10 * spread)


def test_tolerance_freezes_a_converged_image() -> None:
    """With a tolerance that every step meets, the centroids stay where the first pass has put them."""
    points = random_points(2, 400, 3)
    _, after_one = kmeans(points, 5, num_starts=1, subsample_passes=1)
    _, frozen = kmeans(points, 5, num_starts=1, subsample_passes=30, tol=1e6)
    _, converged = kmeans(points, 5, num_starts=1, subsample_passes=30)
    assert torch.equal(frozen, after_one)
    assert (converged - after_one).abs().max() > 0.05


def test_subsample_sees_every_column() -> None:
    """A stride that divides the row length would sample one column only and find one of the two values."""
    columns = torch.arange(32).expand(32, 32, 32).reshape(1, -1, 1)
    points = (columns % 2).float()
    labels, centroids = kmeans(points, 2, subsample_size=4096, full_passes=0)
    torch.testing.assert_close(centroids.flatten().sort().values, torch.tensor([0.0, 1.0]))
    assert same_partition(labels[0].numpy(), (columns % 2)[0, :, 0].numpy())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_values_that_are_not_finite(value: float) -> None:
    points = random_points(2, 20, 3)
    points[1, 4, 2] = value
    points[0, 0, 0] = value
    with pytest.raises(ValueError, match="points must be finite, got 2 NaN or infinite values"):
        kmeans(points, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_module_returns_on_values_that_are_not_finite(value: float) -> None:
    points = random_points(2, 5000, 3)
    points[1, 4, 2] = value
    labels, centroids = KMeans(4)(points)
    assert labels.min() >= 0 and labels.max() < 4
    # the other image of the batch is none the worse
    alone = kmeans(points[:1], 4)
    assert torch.equal(labels[:1], alone[0]) and torch.equal(centroids[:1], alone[1])


@pytest.mark.parametrize(("arguments", "exception", "message"), ILL_CASES)
def test_ill_arguments(arguments: dict, exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        kmeans(random_points(1, 10, 2), **arguments)


@pytest.mark.parametrize(("points", "message"), ILL_POINTS)
def test_ill_points(points: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=r"points must be a non-empty floating point tensor.*" + message):
        kmeans(points, 2)


def test_ill_module() -> None:
    with pytest.raises(ValueError, match="num_clusters must be at least 1, got -1"):
        KMeans(-1)


def test_no_gradient_flows() -> None:
    points = random_points(1, 30, 3).requires_grad_()
    for labels, centroids in (kmeans(points, 3), KMeans(3)(points)):
        assert not labels.requires_grad and not centroids.requires_grad


@pytest.mark.parametrize("num", [300, 9000])
def test_module_equals_function_and_script(num: int) -> None:
    points = random_points(2, num, 5)
    expected = kmeans(points, 6, subsample_size=1000, subsample_passes=11, full_passes=2, tol=1e-3)
    module = KMeans(6, subsample_size=1000, subsample_passes=11, full_passes=2, tol=1e-3)
    for variant in (module, torch.jit.script(module)):
        labels, centroids = variant(points)
        assert torch.equal(labels, expected[0]) and torch.equal(centroids, expected[1])


def test_export() -> None:
    points = random_points(2, 700, 3)
    module = KMeans(4, subsample_size=200, subsample_passes=2, full_passes=1)
    labels, centroids = torch.export.export(module, (points,)).module()(points)
    expected = module(points)
    assert torch.equal(labels, expected[0]) and torch.equal(centroids, expected[1])


def test_autocast_changes_nothing() -> None:
    points = random_points(2, 500, 5) + 3.0
    labels, centroids = kmeans(points, 6)
    with torch.autocast("cpu", torch.bfloat16):
        under = KMeans(6)(points)
    assert torch.equal(under[0], labels) and torch.equal(under[1], centroids)


def test_values_near_the_largest_float() -> None:
    _, centroids = kmeans(random_points(1, 400, 3).abs() * 1e37, 3)
    assert torch.isfinite(centroids).all()


@pytest.mark.parametrize("name", ["subsample_size", "subsample_passes", "full_passes", "tol"])
def test_ill_module_arguments(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least \d, got -1"):
        KMeans(3, **{name: -1})
