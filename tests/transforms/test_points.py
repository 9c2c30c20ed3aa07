# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from geometries import GEOMETRIES, turned
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter, map_coordinates

from monai.data import MetaTensor
from monai.transforms import CenterSpatialCropd, Compose, EnsureChannelFirstd, Orientationd, SpatialPadd

from monai_sacb.networks.layers import unwarp_points, warp, warp_points
from monai_sacb.transforms import (
    LoadPointsd,
    LoadVolumed,
    PadPaird,
    PointsToVoxelsd,
    TransformPointsd,
    read_points,
    transform_points,
)

SHAPES: dict[str, tuple[int, ...]] = {
    "3-D": (7, 8, 9),
    "odd": (5, 11, 3),
    "one slice": (6, 7, 1),
    "2-D": (8, 9),
    "2-D odd": (5, 3),
}


def smooth_field(shape: tuple[int, ...], batch: int = 1, strength: float = 1.0) -> np.ndarray:
    """Random smooth fields ``(B, d, *shape)`` in voxels."""
    noise = np.random.default_rng(0).standard_normal((batch, len(shape), *shape))
    field = np.stack([[gaussian_filter(component, 2) for component in item] for item in noise])
    return strength * field / field.std()


# ---- transform_points ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (1, 3), (0, 3), (2, 5, 3)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_affine(geometry: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    points = torch.from_numpy(np.random.default_rng(0).uniform(-50, 50, shape)).to(dtype)
    moved = transform_points(points, torch.from_numpy(GEOMETRIES[geometry]))
    assert moved.dtype == (dtype if dtype.is_floating_point else torch.float32) and moved.shape == points.shape
    np.testing.assert_allclose(moved.double(), apply_affine(GEOMETRIES[geometry], points.double().numpy()), rtol=1e-6)
    back = transform_points(moved.double(), torch.linalg.inv(torch.from_numpy(GEOMETRIES[geometry])))
    np.testing.assert_allclose(back, points.double(), atol=1e-4)


@pytest.mark.parametrize("size", [3, 4])
def test_affine_of_a_slice(size: int) -> None:
    affine = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]])
    points = np.array([[1.0, 2.0], [-3.0, 4.5]])
    small = affine if size == 4 else affine[[0, 1, 3]][:, [0, 1, 3]]
    moved = transform_points(torch.from_numpy(points), MetaTensor(torch.from_numpy(small)))
    np.testing.assert_allclose(moved, [[1.0, -5.5], [-4.0, -11.5]])


def test_origins_far_away() -> None:
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, 3] = 1e9
    points = torch.rand(5, 3)
    there = transform_points(points.double(), affine)
    np.testing.assert_allclose(transform_points(there, torch.linalg.inv(affine)), points, atol=1e-6)


# ---- warp_points ----


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linear_interpolation_of_the_field(shape: tuple[int, ...], dtype: torch.dtype, batch: int) -> None:
    field = torch.from_numpy(smooth_field(shape, batch)).to(dtype)
    # some of them outside the grid
    points = np.random.default_rng(1).uniform(-2, np.array(shape) + 1, (batch, 40, len(shape)))
    moved = warp_points(torch.from_numpy(points), field)
    assert moved.dtype == torch.float64
    for i in range(batch):
        expected = points[i] + np.stack(
            [map_coordinates(c, points[i].T, order=1, mode="nearest") for c in field[i].double().numpy()], -1
        )
        np.testing.assert_allclose(moved[i], expected, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_whole_numbers_are_voxel_centres(shape: tuple[int, ...]) -> None:
    field = torch.from_numpy(smooth_field(shape)).float()
    voxels = torch.from_numpy(np.indices(shape).reshape(len(shape), -1).T[None]).float()
    expected = voxels + field.flatten(2).transpose(1, 2)
    torch.testing.assert_close(warp_points(voxels, field), expected, rtol=0, atol=1e-5)


def test_points_go_where_images_come_from() -> None:
    """``warped(p) = moving(p + ddf(p))``: at a point of the fixed image the warped one shows its partner's place."""
    shape = (9, 10, 11)
    field = torch.from_numpy(smooth_field(shape, strength=0.7))
    places = torch.from_numpy(np.indices(shape)[None].astype(np.float64))
    warped = warp(places, field)
    for p in [(4, 5, 6), (3, 3, 7), (5, 6, 4)]:
        moved = warp_points(torch.tensor([[p]], dtype=torch.float64), field)
        torch.testing.assert_close(moved[0, 0], warped[(0, slice(None), *p)])


def test_type_is_that_of_the_points() -> None:
    points = torch.full((1, 2, 3), 300.25)
    field = torch.ones(1, 3, 400, 2, 2, dtype=torch.bfloat16)
    assert warp_points(points, field).dtype == torch.float32
    assert (warp_points(points, field) == 301.25).all()


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6)], ids=str)
def test_gradients(shape: tuple[int, ...]) -> None:
    field = torch.from_numpy(smooth_field(shape, 2)).requires_grad_()
    points = torch.from_numpy(np.random.default_rng(2).uniform(0.1, 3.9, (2, 4, len(shape)))).requires_grad_()
    assert torch.autograd.gradcheck(warp_points, (points, field))


def test_no_points() -> None:
    for function in (warp_points, unwarp_points):
        assert tuple(function(torch.zeros(1, 0, 3), torch.zeros(1, 3, 4, 5, 6)).shape) == (1, 0, 3)


# ---- unwarp_points ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_there_and_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # no more than half a voxel from one to the next
    field = torch.from_numpy(smooth_field(shape, 2))
    steepest = max(float(field.diff(dim=axis).abs().max()) for axis in range(2, field.dim()) if field.shape[axis] > 1)
    field = 0.3 * field / steepest
    # some of them outside the grid
    points = torch.from_numpy(np.random.default_rng(1).uniform(-2, np.array(shape) + 1, (2, 40, len(shape)))).to(dtype)
    there = warp_points(points, field)
    assert (there - points).norm(dim=2).mean() > 0.05
    back = unwarp_points(there, field)
    assert back.dtype == dtype
    torch.testing.assert_close(back, points, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize(("rows", "steps"), [([[1.1, 0.2], [-0.3, 0.8]], 60), ([[3.5, 0.2], [-0.3, 0.6]], 100)])
def test_linear_map_is_undone_at_points(rows: list[list[float]], steps: int) -> None:
    matrix = torch.tensor(rows, dtype=torch.float64)
    voxels = torch.from_numpy(np.indices((30, 30))).double()
    field = (torch.einsum("ij,jhw->ihw", matrix, voxels) - voxels)[None]
    points = torch.from_numpy(np.random.default_rng(1).uniform(5, 20, (1, 20, 2)))
    found = unwarp_points(points @ matrix.T, field, num_steps=steps)
    torch.testing.assert_close(found, points, rtol=0, atol=1e-6)
    assert (unwarp_points(points @ matrix.T, field, num_steps=1) - points).abs().max() > 0.1


ILL_ARGUMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "one axis": (lambda: transform_points(torch.zeros(4, 1), torch.eye(2)), r"\[4, 1\]"),
    "four axes": (lambda: transform_points(torch.zeros(4, 4), torch.eye(5)), r"\[4, 4\]"),
    "one point without its axis": (lambda: transform_points(torch.zeros(3), torch.eye(4)), r"\[3\]"),
    "affine of a slice": (lambda: transform_points(torch.zeros(4, 3), torch.eye(3)), r"\(4, 4\).*got \[3, 3\]"),
    "no affine": (lambda: transform_points(torch.zeros(4, 3), torch.zeros(3, 4)), r"\(4, 4\).*got \[3, 4\]"),
    "affines": (lambda: transform_points(torch.zeros(1, 4, 3), torch.zeros(1, 4, 4)), r"\[1, 4, 4\]"),
    "points without batch": (lambda: warp_points(torch.zeros(4, 3), torch.zeros(1, 3, 4, 5, 6)), r"\[4, 3\]"),
    "points of a slice": (lambda: warp_points(torch.zeros(1, 4, 2), torch.zeros(1, 3, 4, 5, 6)), r"\[1, 4, 2\]"),
    "batches": (lambda: warp_points(torch.zeros(2, 4, 3), torch.zeros(1, 3, 4, 5, 6)), r"\[2, 4, 3\]"),
    "field of other channels": (lambda: warp_points(torch.zeros(1, 4, 3), torch.zeros(1, 2, 4, 5, 6)), r"\[1, 2, 4, 5"),
    "field without batch": (lambda: warp_points(torch.zeros(1, 4, 3), torch.zeros(3, 4, 5, 6)), r"\[3, 4, 5, 6\]"),
    "batches back": (lambda: unwarp_points(torch.zeros(2, 4, 3), torch.zeros(1, 3, 4, 5, 6)), r"\[2, 4, 3\]"),
    "no steps back": (lambda: unwarp_points(torch.zeros(1, 4, 3), torch.zeros(1, 3, 4, 5, 6), 0), r"got 0"),
    "inverse": (lambda: TransformPointsd(inverse="yes"), r"inverse must be True or False, got 'yes'"),
    "no steps": (lambda: TransformPointsd(num_steps=0), r"num_steps must be a whole number of at least 1, got 0"),
    "half a step": (lambda: TransformPointsd(num_steps=0.5), r"got 0\.5"),
    "dimensions": (lambda: read_points("x.csv", 4), r"spatial_dims must be 2 or 3, got 4"),
    "outputs": (lambda: TransformPointsd(["a", "b"], "c"), r"one output key"),
    "voxel outputs": (lambda: PointsToVoxelsd("a", "b", ["c", "d"]), r"one output key"),
    "voxel references": (lambda: PointsToVoxelsd(["a", "b"], "b", ["c", "d"]), r"one reference key"),
}


@pytest.mark.parametrize(("call", "message"), ILL_ARGUMENTS.values(), ids=ILL_ARGUMENTS)
def test_ill_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "transform", [LoadPointsd(), PointsToVoxelsd(), TransformPointsd()], ids=lambda t: type(t).__name__
)
def test_missing_keys(transform: Any) -> None:
    with pytest.raises(KeyError, match="points"):
        transform({"image": 1})
    transform.allow_missing_keys = True
    assert transform({"image": 1}) == {"image": 1}


# ---- read_points ----

POINTS = [[1.5, -2.0, 3.0], [40.0, 5.25, -0.5]]
# content -> whether in voxels; the points are always the same
FILES: dict[str, tuple[str, bool]] = {
    "Learn2Reg": ("1.50000,-2.00000,3.00000\n40.00000,5.25000,-0.50000\n", True),
    "Learn2Reg, blanks": ("1.5 -2.0 3.0\n40  5.25\t-0.5", True),
    "one line feed too many": ("\n1.5,-2,3\n\n4e1,5.25,-.5\n\n", True),
    "Windows": ("1.5, -2, 3\r\n40, 5.25, -0.5\r\n", True),
    "commented": ("# key points\n1.5,-2,3\n40,5.25,-0.5", True),
    "byte order mark": ("\ufeff1.5,-2,3\n40,5.25,-0.5", True),
    "header": ("x,y,z\n1.5,-2,3\n40,5.25,-0.5\n", False),
    "header and mark": ("\ufeffx,y,z\n1.5,-2,3\n40,5.25,-0.5\n", False),
    "labels": ("x,y,z,label\n1.5,-2,3,tip of the nose\n40,5.25,-0.5,\n", False),
    "other order": ("label, Z, Y, X\n1, 3, -2, 1.5\n2, -0.5, 5.25, 40\n", False),
    "RAS comment": ("# frame: RAS\nx,y,z\n1.5,-2,3\n40,5.25,-0.5\n", False),
    "RAS columns": ("x_ras,y_ras,z_ras\n1.5,-2,3\n40,5.25,-0.5\n", False),
    "LPS comment": ("# LPS\nx,y,z\n-1.5,2,3\n-40,-5.25,-0.5\n", False),
    "LPS in a later comment": ("x,y,z\n-1.5,2,3\n# coordinates=LPS, mm\n-40,-5.25,-0.5\n", False),
    "LPS columns": ("x_lps,y_lps,z_lps,label\n-1.5,2,3,1\n-40,-5.25,-0.5,2\n", False),
    "LPS in brackets": ("X (LPS),Y (LPS),Z (LPS)\n-1.5,2,3\n-40,-5.25,-0.5\n", False),
    "a word that has the letters": ("# collapsed lung, frasier\nx,y,z\n1.5,-2,3\n40,5.25,-0.5\n", False),
}


@pytest.mark.parametrize(("content", "in_voxels"), FILES.values(), ids=FILES)
def test_files(tmp_path: Path, content: str, in_voxels: bool) -> None:
    path = tmp_path / "points.csv"
    path.write_bytes(content.encode())
    points, found = read_points(path)
    assert found is in_voxels and points.dtype == torch.float64
    assert points.tolist() == POINTS


@pytest.mark.parametrize(
    ("content", "expected"),
    [("1,2\n3,4.5", [[1, 2], [3, 4.5]]), ("label,x,y\na,1,2", [[1, 2]]), ("#LPS\nx,y\n1,2", [[-1, -2]])],
)
def test_points_of_slices(tmp_path: Path, content: str, expected: list[list[float]]) -> None:
    (tmp_path / "points.csv").write_text(content)
    assert read_points(str(tmp_path / "points.csv"), 2)[0].tolist() == expected


BAD_FILES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, r"No such file or directory\.$"),
    "empty": (b"", r"it holds no points\.$"),
    "blank": (b"\n \n", r"it holds no points"),
    "comments only": (b"# x,y,z\n", r"it holds no points"),
    "header only": (b"x,y,z\n", r"it holds no points"),
    "ragged": (b"1,2,3\n4,5\n", r"line 2 has 2 columns instead of 3"),
    "ragged under a header": (b"x,y,z,label\n1,2,3,4\n\n4,5,6\n", r"line 4 has 3 columns instead of 4"),
    "comma too many": (b"1,2,3,\n", r"neither columns of numbers only nor a header 'x,y,z': '1,2,3,'"),
    "two columns": (b"1,2\n3,4\n", r"line 1 has 2 columns instead of 3"),
    "four columns": (b"1,2,3,4\n", r"line 1 has 4 columns instead of 3"),
    "not numeric": (b"1,2,3\n4,five,6\n", r"line 2 is not numeric: '4,five,6'"),
    "not numeric under a header": (b"x,y,z\n4,five,6\n", r"line 2 is not numeric: '4,five,6'"),
    "gap": (b"1,2,3\n4,,6\n", r"line 2 is not numeric: '4,,6'"),
    "NaN": (b"1,2,3\n4,nan,6\n", r"line 2 has a value that is not finite: '4,nan,6'"),
    "infinite": (b"x,y,z\n1,-inf,3", r"line 2 has a value that is not finite: '1,-inf,3'"),
    "too large": (b"1,2,1e999", r"line 1 has a value that is not finite"),
    "other header": (b"a,b,c\n1,2,3\n", r"nor a header 'x,y,z': 'a,b,c'"),
    "header without z": (b"x,y,label\n1,2,3\n", r"nor a header 'x,y,z': 'x,y,label'"),
    "header with two x": (b"x,x,y,z\n1,1,2,3\n", r"nor a header 'x,y,z'"),
    "comma decimals": (b"1,5;2,5;3,5\n", r"nor a header 'x,y,z'"),
    "LPS voxels": (b"# LPS\n1,2,3\n", r"a comment says LPS, but voxels are meant where there is no header 'x,y,z'"),
    "two frames": (b"# from RAS to LPS\nx,y,z\n1,2,3\n", r"it names both LPS and RAS"),
    "comment and columns": (b"# RAS\nx_lps,y_lps,z_lps\n1,2,3\n", r"it names both LPS and RAS"),
    "binary": (b"\x1f\x8b\x08\x00\xff\xfe\x00", r"'utf-8' codec can't decode"),
    "page of HTML": (b"<html>\n<body>404</body>\n</html>", r"nor a header 'x,y,z': '<html>'"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "points.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        LoadPointsd()({"points": str(path), "image": MetaTensor(torch.zeros(1, 4, 5, 6))})
    assert str(caught.value).startswith(f"cannot read points '{path}': ") and "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read points '.*': Is a directory\.$"):
        read_points(tmp_path)


@pytest.mark.parametrize("content", [b"1,2,3\n", b"x,y,z\n1,2,3\n"], ids=["voxels", "mm"])
def test_points_of_a_volume_do_not_fit_a_slice(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "points.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"columns instead of 2|nor a header 'x,y'"):
        read_points(tmp_path / "points.csv", 2)


def test_the_image_must_know_its_file(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("1,2,3\n")
    for image in (torch.zeros(1, 4, 5, 6), MetaTensor(torch.zeros(1, 4, 5, 6))):
        with pytest.raises(ValueError, match="image must carry the affine of its file"):
            LoadPointsd()({"points": str(tmp_path / "points.csv"), "image": image})
    # which is not needed for millimetres
    (tmp_path / "points.csv").write_text("x,y,z\n1,2,3\n")
    loaded = LoadPointsd()({"points": str(tmp_path / "points.csv"), "image": torch.zeros(1, 4, 5, 6)})
    assert loaded["points"].tolist() == [[1, 2, 3]]


# ---- from files to errors in millimetres ----

STEPS: dict[str, list[Callable]] = {
    "nothing": [],
    "turned": [Orientationd("image", "RAS", labels=None)],
    "padded": [SpatialPadd("image", (17, 16, 19))],
    "turned and padded": [Orientationd("image", "RAS", labels=None), SpatialPadd("image", (17, 17, 19))],
    "cropped": [Orientationd("image", "PIL", labels=None), CenterSpatialCropd("image", (9, 9, 9))],
}
NATIVE = (12, 11, 10)


def subject(
    folder: Path, name: str, affine: np.ndarray, shape: tuple[int, ...], points: np.ndarray, header: str = ""
) -> dict[str, str]:
    array = np.random.default_rng(len(name)).random(shape, dtype=np.float32) + 1
    paths = {"image": str(folder / f"{name}.nii.gz"), "points": str(folder / f"{name}.csv")}
    nib.save(nib.Nifti1Image(array, affine), paths["image"])
    np.savetxt(paths["points"], points, delimiter=",", header=header, comments="", fmt="%.9f")
    return paths


def load(paths: dict[str, str], steps: Sequence[Callable]) -> dict[str, Any]:
    return Compose([LoadVolumed("image"), EnsureChannelFirstd("image"), *steps, LoadPointsd()])(paths)


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_points_stay_on_their_voxels(tmp_path: Path, geometry: str, steps: list[Callable]) -> None:
    """Whatever preprocessing did to the image: what it shows at a point is what its file showed there."""
    voxels = np.random.default_rng(5).integers(3, 8, (20, 3))
    loaded = load(subject(tmp_path, "a", GEOMETRIES[geometry], NATIVE, voxels), steps)
    assert loaded["points"].dtype == torch.float32 and type(loaded["points"]) is torch.Tensor
    np.testing.assert_allclose(loaded["points"], apply_affine(GEOMETRIES[geometry], voxels), rtol=1e-6, atol=1e-5)
    working = PointsToVoxelsd("points", "image", "landmarks")(loaded)["landmarks"].numpy()
    np.testing.assert_allclose(working, working.round(), atol=1e-3)
    original = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj)[tuple(voxels.T)]
    np.testing.assert_array_equal(loaded["image"][0].numpy()[tuple(working.round().astype(int).T)], original)
    assert np.unique(original).size > 10


def test_millimetres_are_those_of_the_file(tmp_path: Path) -> None:
    mm = np.array([[10.0, -20.0, 30.0]])
    for header, signs in (("x,y,z", 1), ("x_lps,y_lps,z_lps", np.array([-1, -1, 1]))):
        loaded = load(subject(tmp_path, "a", GEOMETRIES["LIA"], NATIVE, mm, header), STEPS["turned and padded"])
        np.testing.assert_allclose(loaded["points"], mm * signs)


@pytest.mark.parametrize("geometry", ["identity", "turned"])
def test_slices(tmp_path: Path, geometry: str) -> None:
    affine = np.eye(4) if geometry == "identity" else turned([[0, -2, 0], [1.5, 0, 0], [0, 0, 1]], (5, -7, 0))
    voxels = np.array([[1, 2], [4, 6]])
    loaded = load(subject(tmp_path, "a", affine, (6, 9), voxels), [SpatialPadd("image", (10, 12))])
    np.testing.assert_allclose(
        loaded["points"], apply_affine(affine, np.pad(voxels, ((0, 0), (0, 1))))[:, :2], atol=1e-5
    )
    working = PointsToVoxelsd("points", "image", "landmarks")(loaded)["landmarks"]
    np.testing.assert_allclose(working, voxels + [2, 1], atol=1e-5)


PAIRS = [("RAS", "RAS"), ("LIA", "LIA"), ("RPS", "oblique"), ("oblique ASL", "LIA"), ("RAS", "RPS")]


@pytest.mark.parametrize("steps", [STEPS["nothing"], STEPS["padded"]], ids=["nothing", "padded"])
@pytest.mark.parametrize(("moving", "fixed"), PAIRS)
def test_error_is_that_of_the_challenge(tmp_path: Path, moving: str, fixed: str, steps: list[Callable]) -> None:
    """As Learn2Reg computes it: in voxels of the arrays, times the voxel size of the moving image."""
    rng = np.random.default_rng(3)
    fixed_voxels, moving_voxels = rng.uniform(1, 8, (15, 3)), rng.uniform(1, 8, (15, 3))
    data = {}
    for role, geometry, voxels in (("moving", moving, moving_voxels), ("fixed", fixed, fixed_voxels)):
        loaded = load(subject(tmp_path, role, GEOMETRIES[geometry], NATIVE, voxels), steps)
        data.update({f"{role}_{key}": value for key, value in loaded.items()})
    offset = (np.array(data["fixed_image"].shape[1:]) - NATIVE) // 2
    field = smooth_field(tuple(data["fixed_image"].shape[1:]))[0]
    data["pred"] = torch.from_numpy(field).float()
    data = TransformPointsd(output_keys="before", ddf_key=None)(TransformPointsd()(PointsToVoxelsd()(data)))
    native = field[(slice(None), *(slice(o, o + n) for o, n in zip(offset, NATIVE)))]
    shifts = np.stack([map_coordinates(c, fixed_voxels.T, order=1) for c in native], -1)
    spacing = np.linalg.norm(GEOMETRIES[moving][:3, :3], axis=0)
    for key, displaced in (("warped_points", fixed_voxels + shifts), ("before", fixed_voxels)):
        expected = np.linalg.norm((displaced - moving_voxels) * spacing, axis=1)
        error = (data[key] - data["moving_points"]).norm(dim=1)
        assert data[key].dtype == torch.float32
        np.testing.assert_allclose(error, expected, atol=1e-3)
    assert np.abs(shifts).max() > 0.5
    # and in voxels, as a loss takes them
    np.testing.assert_allclose(data["fixed_landmarks"], fixed_voxels + offset, atol=1e-3)
    np.testing.assert_allclose(data["moving_landmarks"], moving_voxels + offset, atol=1e-3)
    moved = warp_points(data["fixed_landmarks"][None], data["pred"][None])[0]
    in_voxels = ((moved - data["moving_landmarks"]) * torch.from_numpy(spacing)).norm(dim=1)
    np.testing.assert_allclose(in_voxels, (data["warped_points"] - data["moving_points"]).norm(dim=1), atol=1e-3)


def test_true_field_leaves_no_error(tmp_path: Path) -> None:
    """Two images of different orientation and size, and the affine mapping that relates their voxels."""
    rng = np.random.default_rng(4)
    matrix, shift = np.eye(3) + rng.normal(0, 0.05, (3, 3)), np.array([1.0, -0.5, 0.8])
    fixed_voxels = rng.uniform(2, 8, (10, 3))
    shapes = {"moving": (12, 9, 14), "fixed": (9, 13, 10)}
    data: dict[str, Any] = {}
    for role, geometry in (("moving", "RPS"), ("fixed", "oblique")):
        loaded = load(subject(tmp_path, role, GEOMETRIES[geometry], shapes[role], fixed_voxels), [])
        data.update({f"{role}_{key}": value for key, value in loaded.items()})
    data = PadPaird(["image"])(data)
    assert data["moving_image"].shape == data["fixed_image"].shape == (1, 12, 13, 14)
    places = np.indices((12, 13, 14)).reshape(3, -1)
    data["pred"] = torch.from_numpy((matrix @ places + shift[:, None] - places).reshape(3, 12, 13, 14))
    data = PointsToVoxelsd()(data)
    partners = data["fixed_landmarks"].double().numpy() @ matrix.T + shift
    data["moving_points"] = transform_points(torch.from_numpy(partners), data["moving_image"].affine)
    data = TransformPointsd(output_keys="before", ddf_key=None)(TransformPointsd()(data))
    assert (data["warped_points"] - data["moving_points"]).norm(dim=1).max() < 1e-3
    assert (data["before"] - data["moving_points"]).norm(dim=1).min() > 0.5


def test_points_that_are_not_loaded_are_passed_over() -> None:
    data = {"moving_points": "/d/a.csv", "fixed_points": ["/d/b.csv"], "pred": torch.zeros(3, 4, 5, 6)}
    assert PointsToVoxelsd()(data) == data
    assert TransformPointsd()(data) == data
    assert TransformPointsd(inverse=True)(data) == data


# ---- TransformPointsd, both directions ----


def known_pair(shape: tuple[int, ...], fixed: str, moving: str) -> dict[str, Any]:
    """A smooth field, not steep, between grids that lie differently; points of the fixed image and their partners."""
    dims = len(shape)
    noise = np.random.default_rng(0).standard_normal((dims, *shape))
    field = np.stack([gaussian_filter(component, 4) for component in noise])
    field *= 0.8 / field.std()
    affines = {name: GEOMETRIES[geometry] for name, geometry in (("fixed", fixed), ("moving", moving))}
    data: dict[str, Any] = {"pred": torch.from_numpy(field).float()}
    for name, affine in affines.items():
        data[f"{name}_image"] = MetaTensor(torch.zeros(1, *shape), affine=torch.from_numpy(affine))
    voxels = np.random.default_rng(3).uniform(2, np.array(shape) - 3, (30, dims))
    partners = voxels + np.stack([map_coordinates(c, voxels.T, order=1) for c in field], -1)
    for name, places in (("fixed", voxels), ("moving", partners)):
        data[f"{name}_points"] = transform_points(torch.from_numpy(places), torch.from_numpy(affines[name])).float()
    return data


PAIRS_OF_GRIDS = [("RAS", "RAS"), ("LIA", "oblique ASL"), ("oblique", "RPS")]


@pytest.mark.parametrize(("fixed", "moving"), PAIRS_OF_GRIDS)
def test_both_directions(fixed: str, moving: str, caplog: pytest.LogCaptureFixture) -> None:
    data = known_pair((16, 15, 17), fixed, moving)
    forth = TransformPointsd()(data)["warped_points"]
    np.testing.assert_allclose(forth, data["moving_points"], atol=2e-3)
    back = TransformPointsd("moving_points", "back", inverse=True)(data)["back"]
    np.testing.assert_allclose(back, data["fixed_points"], atol=5e-3)
    assert back.dtype == forth.dtype == torch.float32 and not caplog.records
    # neither direction is the other
    wrong = TransformPointsd("moving_points", "w", inverse=False)(data)["w"]
    assert (wrong - data["fixed_points"]).norm(dim=1).min() > 0.3
    # without a field the voxels stay, whatever the direction
    start = TransformPointsd("moving_points", "start", ddf_key=None, inverse=True)(data)["start"]
    matrix = GEOMETRIES[fixed] @ np.linalg.inv(GEOMETRIES[moving])
    np.testing.assert_allclose(start, apply_affine(matrix, data["moving_points"].double().numpy()), atol=2e-3)


def test_points_travel_with_the_image_content() -> None:
    """A bright spot of the moving image lies, in the warped image, where its point is carried to by the inverse."""
    shape = (18, 17, 19)
    data = known_pair(shape, "LIA", "oblique ASL")
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    for spot in ([6.0, 9.0, 8.0], [11.0, 7.0, 12.0]):
        distance = ((voxels - np.array(spot)) ** 2).sum(-1)
        blob = MetaTensor(torch.from_numpy(np.exp(-distance / 3))[None].float(), affine=data["moving_image"].affine)
        places = transform_points(torch.tensor([spot]).double(), data["moving_image"].affine)
        result = TransformPointsd("p", "q", inverse=True)({**data, "p": places})
        warped = warp(blob.as_tensor()[None], data["pred"][None])[0, 0].numpy()
        centre = (warped[..., None] * voxels).sum((0, 1, 2)) / warped.sum()
        found = transform_points(result["q"], torch.linalg.inv(data["fixed_image"].affine))[0].numpy()
        # the spot is deformed, too
        assert np.linalg.norm(found - centre) < 0.25
        assert np.linalg.norm(np.array(spot) - centre) > 0.5


def test_slices_both_directions() -> None:
    data = known_pair((20, 18), "RAS", "RAS")
    back = TransformPointsd("moving_points", "back", inverse=True)(data)["back"]
    np.testing.assert_allclose(back, data["fixed_points"], atol=1e-3)


def test_points_without_a_partner_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    data = known_pair((16, 15, 17), "RAS", "RAS")
    # it folds: steps of several voxels up and down
    data["pred"] = 4 * torch.sin(2 * torch.arange(17.0)).expand(3, 16, 15, 17)
    TransformPointsd("moving_points", "back", inverse=True)(data)
    assert "of 30 moving_points have no partner within 0.1 voxel; the worst is off by" in caplog.text
