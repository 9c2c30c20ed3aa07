# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai.data import MetaTensor

from monai_sacb.metrics import FoldsMetric
from monai_sacb.networks.layers import reference_grid
from monai_sacb.transforms import (
    LabelsToImaged,
    RandDiffeomorphism,
    RandDiffeomorphismd,
    RandFieldOfView,
    RandFieldOfViewd,
    RandKeepLabelsd,
    RandLabelsToImage,
    RandLabelsToImaged,
    labels_to_image,
    random_diffeomorphism,
    sample_labels,
)

SHAPES = {"2-D": (40, 36), "3-D": (32, 28, 36), "odd": (31, 29, 33)}


def blocks(shape: tuple[int, ...]) -> torch.Tensor:
    """A map of labels 0 to 4: nested boxes, every label there."""
    label = torch.zeros([1, *shape], dtype=torch.uint8)
    for value in range(1, 5):
        label[0][tuple(slice(3 * value, size - 3 * value) for size in shape)] = value
    return label


# --- intensities of labels ---


def test_every_label_has_its_intensity() -> None:
    label = blocks((32, 28, 36))
    image = labels_to_image(label, torch.tensor([0.0, 0.2, 0.9, 0.4, 0.7]))
    assert image.dtype == torch.float32
    assert image.shape == label.shape
    np.testing.assert_allclose(image.numpy(), np.array([0, 0.2, 0.9, 0.4, 0.7], dtype=np.float32)[label.numpy()])


def test_labels_beyond_the_table_count_as_background() -> None:
    image = labels_to_image(torch.tensor([[[0, 1, 2, 7, -1]]]), torch.tensor([0.3, 0.6, 0.9]))
    np.testing.assert_allclose(image[0, 0].numpy(), [0.3, 0.6, 0.9, 0.3, 0.3], rtol=1e-6)


def test_places_of_a_voxel_are_averaged() -> None:
    label = torch.tensor([[[0, 1]], [[1, 1]], [[1, 1]], [[1, 0]]])
    torch.testing.assert_close(labels_to_image(label, torch.tensor([0.0, 0.8])), torch.tensor([[[0.6, 0.6]]]))


def test_noise_has_the_deviation_of_its_label() -> None:
    torch.manual_seed(0)
    label = blocks((40, 40, 40))
    stds = torch.tensor([0.0, 0.1, 0.02, 0.3, 0.05])
    image = labels_to_image(label, torch.zeros(5), stds, torch.randn(1, 40, 40, 40))
    for value, std in enumerate(stds):
        assert float(image[label == value].std()) == pytest.approx(float(std), rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4, 4), torch.zeros(2)), r"\(S, \*spatial\)"),
        ((torch.zeros(0, 4, 4), torch.zeros(2)), r"\(S, \*spatial\)"),
        ((torch.zeros(1, 4, 4), torch.zeros(0)), "means"),
        ((torch.zeros(1, 4, 4), torch.zeros(2), torch.zeros(3), torch.zeros(1, 4, 4)), r"\[2\] and \[3\]"),
        ((torch.zeros(1, 4, 4), torch.zeros(2), torch.zeros(2)), "noise"),
        ((torch.zeros(1, 4, 4), torch.zeros(2), torch.zeros(2), torch.zeros(1, 4, 5)), "noise"),
    ],
)
def test_ill_formed_tables(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels_to_image(*arguments)


def test_contrasts_differ_between_draws_and_repeat_with_a_seed() -> None:
    label = blocks((32, 28, 36))
    transform = RandLabelsToImage(num_labels=4)
    images = [transform.set_random_state(seed=seed)(label) for seed in (1, 2, 1)]
    assert torch.equal(images[0], images[2])
    first, second = ([float(image[label == value].mean()) for value in range(1, 5)] for image in images[:2])
    assert np.abs(np.subtract(first, second)).max() > 0.1
    assert float(images[0].std()) > 0.05


def test_labels_of_a_group_are_alike() -> None:
    transform = RandLabelsToImage(num_labels=6, groups=[[1, 2, 3], [4, 5]], spread=0.05).set_random_state(seed=0)
    within, between = [], []
    for _ in range(50):
        transform.randomize()
        contrast = transform.contrast
        within.append(np.ptp(contrast[[1, 2, 3]]))
        between.append(abs(contrast[1] - contrast[4]))
    assert max(within) <= 0.1 + 1e-9
    assert np.mean(between) > 0.2


def test_given_intensities_are_kept_within_the_spread() -> None:
    means = [0.0, 0.2, 0.9, 0.5]
    transform = RandLabelsToImage(3, groups=[[1, 2]], means=means, spread=0.1, background=0.0).set_random_state(seed=0)
    draws = []
    for _ in range(30):
        transform.randomize()
        draws.append(transform.contrast)
    assert np.abs(np.array(draws) - means).max() <= 0.2 + 1e-9
    assert np.std(draws, axis=0)[1:].min() > 0.01
    assert not np.array(draws)[:, 0].any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_labels": 0},
        {"num_labels": 3, "groups": [[1, 2], [2]]},
        {"num_labels": 3, "groups": [[4]]},
        {"num_labels": 3, "means": [0.0, 0.1]},
        {"num_labels": 3, "spread": -0.1},
        {"num_labels": 3, "std": math.nan},
        {"num_labels": 3, "background": 1.5},
    ],
    ids=str,
)
def test_ill_formed_contrasts(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        RandLabelsToImage(**arguments)


# --- deformation ---


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_random_deformations_are_invertible(shape: tuple[int, ...]) -> None:
    state = np.random.RandomState(0)
    for _ in range(5):
        ddf = random_diffeomorphism(shape, 2.0, random_state=state)
        assert ddf.shape == (1, len(shape), *shape)
        metric = FoldsMetric()
        metric(ddf)
        assert float(metric.aggregate()) == 0
        assert 0.5 < float(ddf.square().mean().sqrt()) < 4.0


def test_deformation_follows_its_seed() -> None:
    first, second, other = (random_diffeomorphism((20, 24), 2.0, (8,), np.random.RandomState(i)) for i in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "arguments", [((20,), 1.0), ((1, 8), 1.0), ((20, 20), -1.0), ((20, 20), math.nan), ((20, 20), 1.0, (2,))], ids=str
)
def test_ill_formed_deformations(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        random_diffeomorphism(*arguments)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_nearest_labels_are_those_of_scipy(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    label = torch.randint(1, 5, (1, *shape), dtype=torch.uint8)
    points = reference_grid(list(shape), label.device) + 8 * torch.rand(len(shape), *shape) - 4
    expected = ndimage.map_coordinates(label[0].numpy(), points.numpy(), order=0, mode="grid-constant", cval=0)
    inside = (points.round() == points.round().clamp(min=0)).all(0)
    for axis, size in enumerate(shape):
        inside &= points[axis].round() <= size - 1
    result = sample_labels(label, points[None])
    assert result.dtype == label.dtype
    assert torch.equal(result[0][inside], torch.from_numpy(expected)[inside])
    assert not result[0][~inside].any()


def test_ill_formed_points() -> None:
    with pytest.raises(ValueError, match="points"):
        sample_labels(torch.zeros(1, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="label"):
        sample_labels(torch.zeros(2, 4, 4), torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_limits_nothing_is_deformed(shape: tuple[int, ...]) -> None:
    label = blocks(shape)
    assert torch.equal(RandDiffeomorphism(prob=0.0)(label), label)
    assert torch.equal(RandDiffeomorphism(amplitude=0.0)(label), label)


def test_coarser_grid_lies_in_the_middle_and_says_where() -> None:
    label = MetaTensor(blocks((40, 36, 44)), affine=torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0])).double())
    coarse = RandDiffeomorphism(prob=0.0, spatial_size=(15, 13, 17), voxel_size=2.0)(label)
    assert coarse.shape == (1, 15, 13, 17)
    # voxel 0 of the new grid, in voxels of the old one
    first = [(size - 1) / 2 - (number - 1) for size, number in zip((40, 36, 44), (15, 13, 17))]
    expected = np.diag([2.0, 4.0, 2.0, 1.0])
    expected[:3, 3] = np.array([1.0, 2.0, 1.0]) * first
    np.testing.assert_allclose(coarse.affine.numpy(), expected)
    points = torch.tensor(first).view(3, 1, 1, 1) + 2 * reference_grid([15, 13, 17], label.device)
    assert torch.equal(coarse.as_tensor(), sample_labels(label.as_tensor(), points[None]))


def test_affine_part_is_within_its_limits_and_around_the_middle() -> None:
    size = (33, 33, 33)
    # three labels that say where voxels come from
    axes = [reference_grid(list(size), torch.device("cpu"))[i : i + 1] for i in range(3)]
    transform = RandDiffeomorphism(amplitude=0.0, rotation=0.2, scaling=0.1, translation=0.0).set_random_state(seed=1)
    angles = []
    for _ in range(5):
        transform.randomize(size)
        places = torch.stack([transform(axis, randomize=False)[0] for axis in axes])
        assert places[:, 16, 16, 16].tolist() == [16, 16, 16]
        linear = transform.linear
        lengths = np.linalg.norm(linear, axis=0)
        assert np.all((lengths > 0.9 - 1e-9) & (lengths < 1.1 + 1e-9))
        expected = 16 + linear @ np.array([5.0, -4.0, 3.0])
        assert np.abs(places[:, 21, 12, 19].numpy() - expected).max() <= 0.5 + 1e-4
        angles.append(np.abs(linear - np.diag(lengths)).max())
    assert max(angles) > 0.05


def test_places_within_a_voxel_blur_borders_only() -> None:
    label = blocks((40, 40, 40))
    transform = RandDiffeomorphism(spatial_size=(20, 20, 20), voxel_size=2.0, subsamples=True).set_random_state(seed=0)
    labels = transform(label)
    assert labels.shape == (5, 20, 20, 20)
    # the first is the middle of the voxel
    transform.subsamples = False
    assert torch.equal(transform(label, randomize=False), labels[:1])
    differ = (labels != labels[:1]).any(0)
    inner = torch.from_numpy(
        ndimage.minimum_filter(labels[0].numpy(), 5) == ndimage.maximum_filter(labels[0].numpy(), 5)
    )
    assert 0.02 < float(differ.float().mean()) < 0.6
    assert not differ[inner].any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"amplitude": -1.0},
        {"rotation": math.inf},
        {"scaling": 1.0},
        {"translation": "much"},
        {"voxel_size": 0.0},
        {"spatial_size": (8,)},
        {"scales": ()},
    ],
    ids=str,
)
def test_ill_formed_limits(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        RandDiffeomorphism(**arguments)


def test_label_maps_of_other_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 axes"):
        RandDiffeomorphism(spatial_size=(8, 8))(torch.zeros(1, 8, 8, 8))


# --- field of view ---


def test_lost_ends_are_black_and_the_rest_is_kept() -> None:
    image = torch.ones(1, 20, 20, 20)
    transform = RandFieldOfView(cut=1.0, prob=1.0, fraction=0.4).set_random_state(seed=0)
    cut = transform(image)
    assert torch.equal(image, torch.ones_like(image))
    kept = [20 - sum(round(float(part) * 20) for part in transform.lost[axis]) for axis in range(3)]
    assert float(cut.sum()) == math.prod(kept) < 8000
    # a box
    places = torch.nonzero(cut[0])
    assert (places.amax(0) - places.amin(0) + 1).tolist() == kept


def test_field_of_view_is_mostly_whole() -> None:
    image = torch.ones(1, 16, 16)
    transform = RandFieldOfView(cut=0.25, prob=1.0, fraction=0.4).set_random_state(seed=0)
    changed = [bool((transform(image) != image).any()) for _ in range(200)]
    assert 0.15 < np.mean(changed) < 0.35


@pytest.mark.parametrize("arguments", [{"cut": 1.5}, {"prob": -0.1}, {"fraction": 0.5}], ids=str)
def test_ill_formed_field_of_view(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="fraction below"):
        RandFieldOfView(**arguments)


# --- dictionaries ---


def test_skull_strip_keeps_the_first_labels() -> None:
    label = blocks((32, 28, 36))
    data = {"moving_label": label, "fixed_label": label.clone()}
    kept = RandKeepLabelsd(["moving_label", "fixed_label"], num_kept=2, prob=1.0)(data)
    for value in kept.values():
        assert torch.equal(torch.unique(value), torch.tensor([0, 1, 2], dtype=torch.uint8))
        assert value.dtype == label.dtype
        assert torch.equal(value[label <= 2], label[label <= 2])
    assert RandKeepLabelsd("moving_label", num_kept=2, prob=0.0)(data)["moving_label"] is label
    with pytest.raises(ValueError, match="num_kept"):
        RandKeepLabelsd("moving_label", num_kept=0)


DRAWS: dict[str, Callable[..., Any]] = {
    "deformation": lambda keys: RandDiffeomorphismd(keys, amplitude=3.0),
    "field of view": lambda keys: RandFieldOfViewd(keys, cut=1.0, prob=1.0, fraction=0.4),
    "contrast": lambda keys: RandLabelsToImaged(keys, [f"{key}_image" for key in keys], num_labels=4, std=0.0),
}


@pytest.mark.parametrize("make", DRAWS.values(), ids=DRAWS)
def test_keys_share_one_draw(make: Callable[..., Any]) -> None:
    label = blocks((32, 28, 36))
    data = {"a": label, "b": label.clone()}
    transform = make(["a", "b"]).set_random_state(seed=5)
    first, second = transform(data), transform(data)
    last = sorted(first)[-2:] if len(first) == 2 else ["a_image", "b_image"]
    assert torch.equal(first[last[0]], first[last[1]])
    assert not torch.equal(first[last[0]], second[last[0]])
    again = make(["a", "b"]).set_random_state(seed=5)(data)
    assert torch.equal(again[last[0]], first[last[0]])
    assert torch.equal(data["a"], label)


def test_given_contrast() -> None:
    label = MetaTensor(blocks((32, 28, 36)), affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])).double())
    data = LabelsToImaged(["label"], ["image"], means=[0.0, 1.0, 0.5])({"label": label})
    assert float(data["image"][label == 2].mean()) == 0.5
    # labels without an intensity
    assert float(data["image"][label > 2].sum()) == 0
    assert torch.equal(data["image"].affine, label.affine)
    with pytest.raises(ValueError, match="output key"):
        LabelsToImaged(["label"], ["image", "other"], means=[0.0])
    with pytest.raises(ValueError, match="means"):
        LabelsToImaged(["label"], ["image"], means=[])
