# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""With ITK as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from itk_oracle import AFFINE, GRIDS, itk_composite, itk_image, itk_points, itk_resample, smooth, smooth_field

from monai.data import MetaTensor

from monai_sacb.data import spatial_mapping
from monai_sacb.data.spatial_mapping import (
    Grid,
    InverseMapping,
    PhysicalField,
    SpatialMapping,
    invert_mapping,
    resample_volume,
    sample_volume,
)

MOVING, FIXED, FIELD = (20, 18, 15), (17, 19, 14), (15, 16, 13)
NAMES = list(GRIDS)
# each orientation with another one
PAIRS = [(moving, NAMES[(i + 3) % len(NAMES)]) for i, moving in enumerate(NAMES)] + [(name, name) for name in NAMES[:2]]


def grid(shape: tuple[int, int, int], affine: np.ndarray) -> Grid:
    return Grid(shape, torch.from_numpy(affine))


def middle(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return affine[:3, :3] @ (np.array(shape) - 1) / 2 + affine[:3, 3]


def overlapping(moving: str, fixed: str) -> tuple[np.ndarray, np.ndarray]:
    """Two geometries whose volumes have one middle."""
    affines = GRIDS[moving].copy(), GRIDS[fixed].copy()
    affines[0][:3, 3] += middle(affines[1], FIXED) - middle(affines[0], MOVING)
    return affines


def stages(fixed: np.ndarray) -> tuple[PhysicalField, np.ndarray]:
    """A field on a smaller grid, with no voxel on its very border, and an affine about the middle."""
    field_affine = fixed.copy()
    field_affine[:3, 3] += fixed[:3, :3] @ [1, 1.4, 0.6]
    centre = np.eye(4)
    centre[:3, 3] = middle(fixed, FIXED)
    return smooth_field(FIELD, field_affine, 1.2), centre @ AFFINE @ np.linalg.inv(centre)


@pytest.mark.parametrize(("moving", "fixed"), PAIRS, ids=lambda name: name)
def test_resampling_is_itks(moving: str, fixed: str) -> None:
    moving_affine, fixed_affine = overlapping(moving, fixed)
    field, affine = stages(fixed_affine)
    image, label = smooth(MOVING, 1.0), np.digitize(smooth(MOVING, 1.5, 1), [-0.5, 0.5]).astype(np.uint8) + 1
    mapping = SpatialMapping([field, torch.from_numpy(affine)])
    composite = itk_composite(field, affine)
    for array, mode in ((image, "linear"), (label, "nearest")):
        volume = MetaTensor(torch.from_numpy(array)[None], affine=torch.from_numpy(moving_affine))
        result = resample_volume(volume, mapping, grid(FIXED, fixed_affine), mode)
        expected = itk_resample(itk_image(array, moving_affine), composite, FIXED, fixed_affine, mode == "nearest")
        assert result.shape == (1, *FIXED) and result.dtype == volume.dtype
        np.testing.assert_array_equal(result.affine, fixed_affine)
        # some of it lies outside, most inside
        assert 0.02 < (expected == 0).mean() < 0.9
        difference = np.abs(result[0].numpy().astype(np.float64) - expected)
        if mode == "linear":
            assert difference.max() < 1e-3 * np.ptp(image)
        else:
            # where rounding decides between two voxels
            assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_points_are_itks(name: str) -> None:
    field, affine = stages(GRIDS[name])
    # also beyond the grid of the field, where there is no displacement
    voxels = np.random.default_rng(0).uniform(-4, np.array(FIXED) + 4, (200, 3))
    points = voxels @ GRIDS[name][:3, :3].T + GRIDS[name][:3, 3]
    for order in ((field, affine), (affine, field), (field,), (affine,), (affine, field, affine, field), ()):
        mapping = SpatialMapping([torch.from_numpy(s) if isinstance(s, np.ndarray) else s for s in order])
        moved = mapping.transform_points(torch.from_numpy(points))
        assert moved.dtype == torch.float64
        expected = itk_points(itk_composite(*order), points) if order else points
        np.testing.assert_allclose(moved, expected, atol=1e-4)
        flat = mapping.flatten(grid(FIXED, GRIDS[name]))
        places = torch.cat([place for _, place in flat.grid.places()])
        np.testing.assert_allclose(flat.vectors.flatten(1).T + places, mapping.transform_points(places), atol=1e-5)


# along an axis of 4 voxels -> inside by ITK's rule
BORDERS = {-0.5: True, -0.5001: False, -0.25: True, 0.0: True, 3.0: True, 3.4999: True, 3.5: False, 3.6: False}


@pytest.mark.parametrize("mode", ["linear", "nearest", "label"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_inside(axis: int, mode: str) -> None:
    volume = np.arange(1, 65, dtype=np.float32).reshape(4, 4, 4)
    image = itk_image(volume, np.diag([-1.0, -1.0, 1.0, 1.0]))
    for place, inside in BORDERS.items():
        point = [1.0, 2.0, 1.0]
        point[axis] = place
        shift = np.eye(4)
        shift[:3, 3] = [-point[0], -point[1], point[2]]
        value = float(sample_volume(torch.from_numpy(volume)[None], torch.tensor([point]).double(), mode, -7.0))
        assert (value != -7) is inside, place
        expected = itk_resample(image, itk_composite(shift), (1, 1, 1), np.eye(4), mode == "nearest")
        assert (float(expected.item()) != 0) is inside, place
        if mode != "label" and inside:
            assert value == pytest.approx(float(expected.item()), abs=1e-3)


def test_nearest_rounds_halves_up_as_itk() -> None:
    volume = np.arange(4, dtype=np.int16).reshape(4, 1, 1)
    places = torch.tensor([[-0.5, 0, 0], [0.5, 0, 0], [1.5, 0, 0], [2.49, 0, 0], [2.5, 0, 0]]).double()
    assert sample_volume(torch.from_numpy(volume)[None], places, "nearest", -1).tolist() == [[0, 1, 2, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("num_labels", [2, 5, 60])
def test_label_is_the_largest_of_the_maps_of_each(num_labels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_labels)
    # all its neighbours differ
    labels = torch.randint(0, num_labels, (1, 7, 6, 5), generator=generator)
    places = torch.rand(3000, 3, generator=generator).double() * torch.tensor([8.0, 7.0, 6.0]) - 1
    maps = torch.stack([(labels[0] == value).double() for value in range(num_labels)])
    weights = sample_volume(maps, places, "linear", None)
    found = sample_volume((labels * 3).to(dtype), places, "label", None)
    assert found.dtype == dtype
    best = weights.amax(0)
    chosen = weights.gather(0, found.long() // 3)[0]
    torch.testing.assert_close(chosen, best, rtol=0, atol=1e-6)
    # apart from ties it is that very label
    second = weights.topk(2, 0).values[1]
    clear = best - second > 1e-6
    assert clear.float().mean() > 0.5
    assert (found[0].long() == 3 * weights.argmax(0))[clear].all()


def test_label_of_a_tie_is_the_smallest() -> None:
    labels = torch.tensor([9, 4, 4, 9]).view(1, 4, 1, 1)
    places = torch.tensor([[0.5, 0, 0], [2.5, 0, 0], [1.5, 0, 0], [0.49, 0, 0]]).double()
    assert sample_volume(labels, places, "label").tolist() == [[4, 4, 4, 9]]


@pytest.mark.parametrize("mode", ["linear", "nearest", "label"])
@pytest.mark.parametrize("name", NAMES)
def test_identity(name: str, mode: str) -> None:
    array = smooth(FIXED, 0.5) if mode == "linear" else np.random.default_rng(0).integers(0, 9, FIXED)
    volume = MetaTensor(torch.from_numpy(array)[None], affine=torch.from_numpy(GRIDS[name]))
    for mapping in (SpatialMapping(), SpatialMapping([torch.eye(4)])):
        result = resample_volume(volume, mapping, Grid.of(volume), mode, -99)
        np.testing.assert_allclose(result, volume, atol=1e-5 if mode == "linear" else 0)


@pytest.mark.parametrize("shape", [(1, 8, 9), (8, 1, 9), (8, 9, 1), (1, 1, 1)], ids=str)
def test_thin_volumes(shape: tuple[int, int, int]) -> None:
    array = np.random.default_rng(1).random(shape, dtype=np.float32) + 1
    volume = MetaTensor(torch.from_numpy(array)[None], affine=torch.from_numpy(GRIDS["oblique"]))
    result = resample_volume(volume, SpatialMapping(), Grid.of(volume))
    np.testing.assert_allclose(result, volume, atol=1e-5)


def test_pieces_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    field, affine = stages(GRIDS["oblique"])
    mapping = SpatialMapping([field, torch.from_numpy(affine)])
    volume = MetaTensor(torch.from_numpy(smooth(FIXED))[None], affine=torch.from_numpy(GRIDS["oblique"]))

    def results() -> list[torch.Tensor]:
        target = Grid.of(volume)
        warped = [resample_volume(volume, mapping, target, mode) for mode in ("linear", "nearest", "label")]
        inverse, errors = invert_mapping(field, torch.from_numpy(affine), target)
        return [*(w.as_tensor() for w in warped), inverse.vectors, errors, mapping.flatten(target).vectors]

    whole = results()
    # every slice by itself, and several of which the last is smaller
    for chunk in (1, 5 * FIXED[1] * FIXED[2]):
        monkeypatch.setattr(spatial_mapping, "CHUNK", chunk)
        for one, other in zip(results(), whole):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5, equal_nan=True)
    assert len(list(Grid.of(volume).places())) == 4


@pytest.mark.parametrize("name", ["RAS", "LPS anisotropic", "oblique ASL anisotropic"])
def test_inverse(name: str) -> None:
    shape = (28, 26, 24)
    field = smooth_field(shape, GRIDS[name], 1.0, 5.0)
    affine = torch.from_numpy(AFFINE)
    moving = Grid(shape, affine @ torch.from_numpy(GRIDS[name]))
    inverse, errors = invert_mapping(field, affine, moving, num_steps=200, tolerance=1e-4)
    forward = SpatialMapping([field, affine])
    backward = SpatialMapping([inverse, torch.linalg.inv(affine)])
    places = torch.cat([place for _, place in moving.places()])
    there = backward.transform_points(places)
    voxels = (there - field.affine[:3, 3]) @ torch.linalg.inv(field.affine)[:3, :3].T
    inside = ((voxels > 0) & (voxels < torch.tensor(shape) - 1)).all(1)
    assert inside.float().mean() > 0.5
    off = (forward.transform_points(there) - places).norm(dim=1)[inside]
    assert off.max() < 0.01
    # and it does something
    assert (there - places @ torch.linalg.inv(affine)[:3, :3].T).norm(dim=1).median() > 0.3
    # what it says of itself is so, in the fixed space
    assert float(errors.flatten()[inside].max()) <= 1.01e-4
    back = (backward.transform_points(forward.transform_points(places)) - places).norm(dim=1)
    assert back.median() < 0.1


def test_errors_are_honest_where_the_field_folds() -> None:
    shape = (20, 20, 20)
    field = smooth_field(shape, np.eye(4), 4.0, 1.5)
    affine = torch.from_numpy(AFFINE)
    inverse, errors = invert_mapping(field, affine, Grid(shape, torch.eye(4).double()))
    assert torch.isfinite(inverse.vectors).all()
    known = torch.isfinite(errors).flatten()
    assert 0.2 < known.float().mean() < 1
    places = torch.cat([place for _, place in field.grid.places()])
    there = SpatialMapping([inverse, torch.linalg.inv(affine)]).transform_points(places)
    # sampled as the function itself does, whose field goes on beyond its border
    values = sample_volume(field.vectors, there, "linear", None).T
    back = torch.linalg.inv(affine)
    off = (there + values - (places @ back[:3, :3].T + back[:3, 3])).norm(dim=1)
    torch.testing.assert_close(errors.flatten()[known].double(), off[known], rtol=1e-3, atol=1e-3)
    assert float(errors.flatten()[known].max()) > 0.1
    points = InverseMapping(SpatialMapping([field, affine])).transform_points(places)
    assert torch.isfinite(points).all()


def test_inverse_of_points() -> None:
    field = smooth_field((28, 26, 24), GRIDS["oblique"], 1.0, 5.0)
    mapping = SpatialMapping([torch.from_numpy(AFFINE), field, torch.from_numpy(AFFINE)])
    voxels = np.random.default_rng(0).uniform(5, 18, (50, 3))
    points = torch.from_numpy(voxels @ GRIDS["oblique"][:3, :3].T + GRIDS["oblique"][:3, 3])
    back = InverseMapping(mapping).transform_points(mapping.transform_points(points))
    assert (back - points).norm(dim=1).max() < 1e-3
    assert InverseMapping(mapping).transform_points(torch.zeros(0, 3)).shape == (0, 3)


def test_field_on_another_grid() -> None:
    field = smooth_field(FIELD, GRIDS["LAS"])
    np.testing.assert_allclose(field.resampled(field.grid).vectors, field.vectors, atol=1e-4)
    # one voxel more on each side, where the border goes on
    larger = GRIDS["LAS"].copy()
    larger[:3, 3] -= larger[:3, :3] @ np.ones(3)
    around = field.resampled(Grid((17, 18, 15), torch.from_numpy(larger)))
    expected = np.pad(field.vectors, ((0, 0), (1, 1), (1, 1), (1, 1)), mode="edge")
    np.testing.assert_allclose(around.vectors, expected, atol=1e-4)


EYE = torch.eye(4)
VECTORS = torch.zeros(3, 4, 5, 6)
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "affine of 3": (lambda: SpatialMapping([torch.eye(3)]), r"finite and \(4, 4\)"),
    "NaN affine": (lambda: SpatialMapping([EYE * float("nan")]), r"finite and \(4, 4\)"),
    "NaN field": (lambda: SpatialMapping([PhysicalField(VECTORS / 0, EYE)]), "360 NaN or infinite"),
    "field of slices": (lambda: SpatialMapping([PhysicalField(VECTORS[0], EYE)]), r"\(3, D, H, W\)"),
    "points": (lambda: SpatialMapping().transform_points(torch.zeros(3)), r"\(N, 3\), got \[3\]"),
    "mode": (lambda: sample_volume(VECTORS, torch.zeros(1, 3), "cubic"), "got 'cubic'"),
    "no meta data": (lambda: Grid.of(VECTORS), "meta data is needed, got Tensor"),
    "steps": (lambda: invert_mapping(PhysicalField(VECTORS, EYE), EYE, grid(FIXED, np.eye(4)), 0), "got 0"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_inverse_of_a_field_that_stretches_and_shrinks_strongly() -> None:
    """By 1.9 and to 0.1 along an axis, where the fixed-point iteration alone is slow or does not converge."""
    size = 32
    wave = 4 * np.pi / (size - 1)
    axis = torch.arange(size, dtype=torch.float64)
    places = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    vectors = 0.9 / wave * torch.sin(wave * places)
    vectors[2] = 0
    identity = torch.eye(4, dtype=torch.float64)
    field = PhysicalField(vectors.float(), identity)
    inverse, _ = invert_mapping(field, identity, Grid((size, size, size), identity))
    points = places.view(3, -1).T
    there = SpatialMapping([inverse]).transform_points(points)
    assert float((there - points).norm(dim=1).max()) > 2
    assert float((SpatialMapping([field]).transform_points(there) - points).norm(dim=1).max()) < 0.01
    # for points alone, where the field ends at the edge of its grid
    inner = points[((points > 1) & (points < size - 2)).all(1)]
    alone = SpatialMapping([field]).inverse_transform_points(inner)
    assert float((SpatialMapping([field]).transform_points(alone) - inner).norm(dim=1).max()) < 0.01
