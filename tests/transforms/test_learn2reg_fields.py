# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from geometries import GEOMETRIES
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, Orientationd, SpatialPadd

from monai_sacb.transforms import (
    DDFToDisplacementd,
    LoadVolumed,
    PadPaird,
    RestoreGridd,
    SaveLearn2Regd,
    WarpByDDFd,
    ddf_to_displacement,
    displacement_to_ddf,
    load_learn2reg_field,
    save_learn2reg_field,
)

# geometries and sizes of the moving and the fixed file, size that the working grid is padded to
PAIRS: dict[str, tuple[str, tuple[int, ...], str, tuple[int, ...], int]] = {
    "RAS": ("RAS", (18, 20, 16), "RAS", (18, 20, 16), -1),
    "LIA": ("LIA", (18, 20, 16), "LIA", (18, 20, 16), -1),
    "RPS": ("RPS", (18, 20, 16), "RPS", (18, 20, 16), -1),
    "oblique": ("oblique", (18, 20, 16), "oblique", (18, 20, 16), -1),
    "oblique ASL": ("oblique ASL", (18, 20, 16), "oblique ASL", (18, 20, 16), -1),
    "padded": ("LIA", (18, 20, 16), "LIA", (18, 20, 16), 25),
    "LIA to RPS, sizes": ("LIA", (17, 20, 18), "RPS", (20, 18, 15), -1),
    "RPS to oblique, sizes, padded": ("RPS", (17, 20, 18), "oblique", (20, 18, 15), 23),
    "oblique ASL to LIA, sizes, padded": ("oblique ASL", (17, 20, 18), "LIA", (19, 16, 21), 24),
}


def smooth(shape: tuple[int, ...], sigma: float, seed: int) -> np.ndarray:
    """Random and smooth, of mean 0 and standard deviation 1."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return (noise - noise.mean()) / noise.std()


def field_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.stack([1.2 * smooth(shape, 3.0, seed) for seed in (11, 12, 13)])).float()


# ---- the whole way: from two files to the file of the challenge ----


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_the_challenge_warps_as_we_do(tmp_path: Path, pair: Any) -> None:
    """As Learn2Reg's script does it: arrays of the files, and the identity plus the field; no affine anywhere."""
    moving_geometry, moving_shape, fixed_geometry, fixed_shape, spatial_size = pair
    data: dict[str, Any] = {}
    steps = [
        LoadVolumed("image"),
        EnsureChannelFirstd("image"),
        Orientationd("image", "RAS", labels=None),
        SpatialPadd("image", [spatial_size] * 3),
    ]
    for role, geometry, shape, seed in (
        ("moving", moving_geometry, moving_shape, 1),
        ("fixed", fixed_geometry, fixed_shape, 2),
    ):
        path = tmp_path / f"Task_000{seed}_0000.nii.gz"
        nib.save(nib.Nifti1Image(smooth(shape, 1.0, seed).astype(np.float32), GEOMETRIES[geometry]), path)
        data[f"{role}_image"] = Compose(steps)({"image": str(path)})["image"]
    data = PadPaird(["image"])(data)
    data["pred"] = field_of(tuple(data["fixed_image"].shape[1:]))
    Compose(
        [
            WarpByDDFd("moving_image", "warped"),
            DDFToDisplacementd(),
            RestoreGridd(["warped", "displacement"], padding_mode=["zeros", "border"]),
            found := Found(),
            SaveLearn2Regd(tmp_path / "out"),
        ]
    )(data)
    assert os.listdir(tmp_path / "out") == ["disp_0002_0001.nii.gz"]
    written = nib.load(tmp_path / "out" / "disp_0002_0001.nii.gz")
    assert written.shape == (*fixed_shape, 3) and written.get_data_dtype() == np.float32
    moving = nib.load(tmp_path / "Task_0001_0000.nii.gz").get_fdata()
    places = np.indices(fixed_shape) + written.get_fdata().transpose(3, 0, 1, 2)
    by_challenge = map_coordinates(moving, places, order=1)
    last = np.array(moving_shape).reshape(3, 1, 1, 1) - 1
    inside = ((places > 0.01) & (places < last - 0.01)).all(0)
    assert inside.mean() > 0.35
    warped = found.data["warped"].numpy()[0]
    np.testing.assert_allclose(warped[inside], by_challenge[inside], atol=2e-3)
    # the images have texture: a field with an axis or a sign wrong would not do
    assert warped[inside].std() > 0.5
    assert np.abs(np.diff(moving, axis=0)).mean() > 0.3


class Found:
    """Keeps what it sees."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        self.data = data
        return data


@pytest.mark.parametrize("moving", GEOMETRIES)
@pytest.mark.parametrize("fixed", GEOMETRIES)
def test_millimetres_and_back(fixed: str, moving: str) -> None:
    ddf = field_of((5, 6, 7))
    affines = [torch.from_numpy(GEOMETRIES[name]) for name in (fixed, moving)]
    displacement = ddf_to_displacement(ddf, *affines)
    found = displacement_to_ddf(displacement, *affines)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, ddf, atol=3e-4)
    # by hand: where the voxel's partner lies, as an index of the moving array
    places = np.moveaxis(np.indices((5, 6, 7)), 0, -1)
    world = apply_affine(GEOMETRIES[fixed], places) + np.moveaxis(displacement.numpy(), 0, -1) * [-1, -1, 1]
    expected = apply_affine(np.linalg.inv(GEOMETRIES[moving]), world) - places
    np.testing.assert_allclose(np.moveaxis(found.numpy(), 0, -1), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (3, 4, 5), (1, 3, 4, 5, 6), (4, 5, 6, 3)], ids=str)
def test_ill_formed_displacements(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        displacement_to_ddf(torch.zeros(shape), torch.eye(4), torch.eye(4))
    assert str(list(shape)) in str(caught.value)


# ---- files ----

FORMS = {"nii": ("disp.nii.gz", False), "npz": ("disp.npz", False), "half": ("disp.npz", True)}


@pytest.mark.parametrize(("name", "half"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", [(16, 18, 20), (17, 12, 13)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_what_is_written_is_read(
    tmp_path: Path, name: str, half: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if half:
        shape = (16, 12, 14)
    ddf = (5 * field_of(shape)).to(dtype).requires_grad_()
    save_learn2reg_field(ddf, tmp_path / "deep" / name, half_resolution=half)
    assert os.listdir(tmp_path / "deep") == [name]
    found = load_learn2reg_field(str(tmp_path / "deep" / name))
    assert found.dtype == torch.float32 and found.shape == ddf.shape and found.is_contiguous()
    expected = ddf.detach().float()
    if half:
        # as far as the coarser grid holds it; the corners are kept
        assert (found - expected).square().mean().sqrt() < 0.03 * expected.std()
        torch.testing.assert_close(found[:, ::15, ::11, ::13], expected[:, ::15, ::11, ::13], rtol=0, atol=2**-6)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0.0 if "nii" in name else 2**-6)
    assert expected.std() > 5


def test_forms_as_the_challenge_reads_them(tmp_path: Path) -> None:
    ddf = field_of((12, 14, 16))
    save_learn2reg_field(ddf, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(nib.load(tmp_path / "a.nii.gz").get_fdata().transpose(3, 0, 1, 2), ddf)
    np.testing.assert_array_equal(nib.load(tmp_path / "a.nii.gz").affine, np.eye(4))
    save_learn2reg_field(ddf, tmp_path / "a.npz")
    array = np.load(tmp_path / "a.npz")["arr_0"]
    assert array.shape == (12, 14, 16, 3) and array.dtype == np.float16
    np.testing.assert_allclose(array.transpose(3, 0, 1, 2), ddf, atol=4e-3)
    # the editions of 2020 and 2021
    save_learn2reg_field(ddf, tmp_path / "b.npz", half_resolution=True)
    array = np.load(tmp_path / "b.npz")["arr_0"]
    assert array.shape == (3, 6, 7, 8) and array.dtype == np.float16
    doubled = np.array([zoom(array[i].astype(np.float32), 2, order=2) for i in range(3)])
    np.testing.assert_allclose(doubled, ddf, atol=0.2)
    np.testing.assert_allclose(load_learn2reg_field(tmp_path / "b.npz"), doubled, atol=1e-6)


def test_a_constant_field_is_the_same_in_half_resolution(tmp_path: Path) -> None:
    """Displacements are in voxels of the full grid, whatever the grid they are given on."""
    ddf = torch.tensor([1.5, -2.0, 8.25]).view(3, 1, 1, 1).expand(3, 8, 10, 12)
    save_learn2reg_field(ddf, tmp_path / "a.npz", half_resolution=True)
    torch.testing.assert_close(load_learn2reg_field(tmp_path / "a.npz"), ddf.contiguous(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("key", ["arr_0", "disp"])
def test_files_of_others(tmp_path: Path, key: str, dtype: type) -> None:
    ddf = field_of((6, 7, 8)).numpy()
    np.savez(tmp_path / "a.npz", **{key: np.moveaxis(ddf, 0, -1).astype(dtype)})
    np.testing.assert_allclose(load_learn2reg_field(tmp_path / "a.npz"), ddf, atol=4e-3)
    if dtype is not np.float16:
        nib.save(nib.Nifti1Image(np.moveaxis(ddf, 0, -1).astype(dtype), np.diag([2, 2, 2, 1])), tmp_path / "a.nii.gz")
        np.testing.assert_allclose(load_learn2reg_field(tmp_path / "a.nii.gz"), ddf, atol=1e-6)


@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "old"])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.npz"])
def test_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, old: bytes | None
) -> None:
    if old is not None:
        (tmp_path / name).write_bytes(old)

    def failing(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", failing)
    monkeypatch.setattr(np, "savez_compressed", failing)
    with pytest.raises(OSError, match="disk full"):
        save_learn2reg_field(torch.zeros(3, 2, 2, 2), tmp_path / name)
    assert os.listdir(tmp_path) == ([] if old is None else [name])
    assert old is None or (tmp_path / name).read_bytes() == old


ZEROS = torch.zeros(3, 4, 6, 8)
ILL_FIELDS: dict[str, tuple[torch.Tensor, str, bool, str]] = {
    "batch": (ZEROS[None], "a.nii.gz", False, r"ddf must have shape .*\[1, 3, 4, 6, 8\]"),
    "channels last": (ZEROS.moveaxis(0, -1), "a.nii.gz", False, r"\[4, 6, 8, 3\]"),
    "slice": (torch.zeros(2, 4, 6), "a.nii.gz", False, r"\[2, 4, 6\]"),
    "extension": (ZEROS, "a.nii", False, r"must end in \.nii\.gz or \.npz, got 'a\.nii'"),
    "other extension": (ZEROS, "a.npy", True, r"got 'a\.npy'"),
    "halved NIfTI": (ZEROS, "a.nii.gz", True, r"half resolution are \.npz files, got 'a\.nii\.gz'"),
    "odd": (torch.zeros(3, 4, 5, 6), "a.npz", True, r"half resolution needs even sizes, got \(4, 5, 6\)"),
    "NaN": (ZEROS + torch.nan, "a.nii.gz", False, r"ddf must be finite, got 576 NaN or infinite values"),
    "NaN, halved": (ZEROS + torch.nan, "a.npz", True, r"ddf must be finite"),
    "too large for half precision": (ZEROS + 1e5, "a.npz", False, r"ddf must be finite, got 576"),
}


@pytest.mark.parametrize(("ddf", "name", "half", "message"), ILL_FIELDS.values(), ids=ILL_FIELDS)
def test_ill_fields(tmp_path: Path, ddf: torch.Tensor, name: str, half: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_learn2reg_field(ddf, tmp_path / "out" / name, half_resolution=half)
    assert os.listdir(tmp_path) == []


def write_two(path: Path) -> None:
    np.savez(path, a=np.zeros((4, 5, 6, 3)), b=np.zeros((4, 5, 6, 3)))


def cut(path: Path, ddf: torch.Tensor, part: int) -> None:
    save_learn2reg_field(ddf, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // part])


BAD_FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("a.nii.gz", lambda p: None, r"cannot read the field '.*a\.nii\.gz': No such file"),
    "missing npz": ("a.npz", lambda p: None, r"cannot read the field '.*a\.npz': .*No such file or directory"),
    "extension": ("a.mha", lambda p: None, r"must end in \.nii\.gz or \.npz, got 'a\.mha'"),
    "text": (
        "a.npz",
        lambda p: p.write_text("none"),
        r"cannot read the field '.*a\.npz': it is no archive of arrays\.$",
    ),
    "truncated npz": ("a.npz", lambda p: cut(p, ZEROS, 3), r"cannot read the field '.*a\.npz': "),
    "truncated": (
        "a.nii.gz",
        lambda p: cut(p, ZEROS + torch.rand(3, 4, 6, 8), 2),
        r"cannot read the field '.*a\.nii\.gz': ",
    ),
    "no image": ("a.nii.gz", lambda p: p.write_text("none"), r"cannot read the field '.*a\.nii\.gz': "),
    "empty": ("a.npz", lambda p: p.write_bytes(b""), r"cannot read the field '.*a\.npz': "),
    "two arrays": ("a.npz", write_two, r"it holds 2 arrays instead of one"),
    "objects": ("a.npz", lambda p: np.savez(p, np.array([{}, None])), r"cannot read the field '.*a\.npz': "),
    "shape": ("a.npz", lambda p: np.savez(p, np.zeros((4, 5, 6))), r"its shape \(4, 5, 6\) is neither"),
    "channels": ("a.npz", lambda p: np.savez(p, np.zeros((4, 5, 6, 2))), r"its shape \(4, 5, 6, 2\) is neither"),
    "volume": (
        "a.nii.gz",
        lambda p: nib.save(nib.Nifti1Image(np.zeros((4, 5, 6)), np.eye(4)), p),
        r"its shape \(4, 5, 6\) is neither",
    ),
    "five axes": (
        "a.nii.gz",
        lambda p: nib.save(nib.Nifti1Image(np.zeros((4, 5, 6, 1, 3)), np.eye(4)), p),
        r"its shape \(4, 5, 6, 1, 3\) is neither",
    ),
    "NaN": ("a.npz", lambda p: np.savez(p, np.full((4, 5, 6, 3), np.nan)), r"it has 360 NaN or infinite values"),
}


@pytest.mark.parametrize(("name", "write", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path: Path, name: str, write: Callable[[Path], Any], message: str) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_learn2reg_field(tmp_path / name)
    assert "\n" not in str(caught.value)


# ---- SaveLearn2Regd ----


def pair(moving: str, fixed: str) -> dict[str, Any]:
    files = {"moving": moving, "fixed": fixed}
    data: dict[str, Any] = {
        f"{role}_image": MetaTensor(
            torch.zeros(1, 4, 4, 8), meta={"filename_or_obj": name, "original_affine": np.diag([2.0, 2.0, 2.0, 1.0])}
        )
        for role, name in files.items()
    }
    vectors = torch.tensor([-2.0, -4.0, 6.0]).view(3, 1, 1, 1).expand(3, 4, 4, 8)
    data["displacement"] = MetaTensor(vectors, affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    return data


NAMES: dict[str, tuple[str, str, str, str]] = {
    "subjects": (
        "/d/AbdomenCTCT_0004_0000.nii.gz",
        "/d/AbdomenCTCT_0001_0000.nii.gz",
        "disp_0001_0004",
        "disp_0001_0000_0004_0000",
    ),
    "modalities": ("LungCT_0003_0001.nii.gz", "LungCT_0003_0000.nii.gz", "disp_0003_0003", "disp_0003_0000_0003_0001"),
    "other modalities": (
        "ThoraxCBCT_0011_0000.nii.gz",
        "ThoraxCBCT_0011_0002.nii.gz",
        "disp_0011_0002_0011_0000",
        "disp_0011_0002_0011_0000",
    ),
    "Decathlon": ("hippocampus_367.nii.gz", "hippocampus_003.nii.gz", "disp_0003_0367", "disp_0003_0000_0367_0000"),
    "sample": ("brain_14.nii", "/d/7/brain_15.nii", "disp_0015_0014", "disp_0015_0000_0014_0000"),
    "early editions": ("img0021.nii.gz", "img0022.nii.gz", "disp_0022_0021", "disp_0022_0000_0021_0000"),
    "long numbers": ("s12345.mha", "s54321.mha", "disp_54321_12345", "disp_54321_0000_12345_0000"),
}


@pytest.mark.parametrize(("moving", "fixed", "short", "long"), NAMES.values(), ids=NAMES)
def test_names(tmp_path: Path, moving: str, fixed: str, short: str, long: str) -> None:
    data = pair(moving, fixed)
    result = SaveLearn2Regd(tmp_path)(data)
    assert result.keys() == data.keys()
    SaveLearn2Regd(str(tmp_path / "long"), long_names=True)(data)
    SaveLearn2Regd(tmp_path / "npz", extension=".npz")(data)
    SaveLearn2Regd(tmp_path / "half", half_resolution=True)(data)
    # an evaluation may come by more than once
    again = SaveLearn2Regd(tmp_path)
    again(again(data))
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert written == sorted([f"{short}.nii.gz", f"long/{long}.nii.gz", f"npz/{short}.npz", f"half/{short}.npz"])
    for path in written:
        found = load_learn2reg_field(tmp_path / path)
        # LPS millimetres to voxels of 2 mm along R, A and S
        expected = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 4, 4, 8)
        torch.testing.assert_close(found, expected.contiguous(), rtol=0, atol=2e-3)


def test_the_affine_is_that_of_the_moving_file(tmp_path: Path) -> None:
    """Not that of the working grid, turned and padded."""
    data = pair("a_0001_0000.nii.gz", "a_0002_0000.nii.gz")
    data["moving_image"].affine = torch.diag(torch.tensor([-7.0, 5.0, 3.0, 1.0], dtype=torch.float64))
    SaveLearn2Regd(tmp_path)(data)
    assert load_learn2reg_field(tmp_path / "disp_0002_0001.nii.gz")[:, 1, 2, 3].tolist() == [1, 2, 3]


def without_meta() -> dict[str, Any]:
    data = pair("a_0001.nii.gz", "a_0002.nii.gz")
    return {**data, "moving_image": data["moving_image"].as_tensor()}


ILL_PAIRS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "extension": (lambda p: SaveLearn2Regd(p, extension=".nii"), r"extension must be one of .*got '\.nii'"),
    "no number": (
        lambda p: SaveLearn2Regd(p)(pair("/d/anna.nii.gz", "/d/b_0002.nii.gz")),
        r"moving_image '/d/anna\.nii\.gz' has no number in its name",
    ),
    "no file": (lambda p: SaveLearn2Regd(p)(without_meta()), r"moving_image must carry the meta data of its file"),
}


@pytest.mark.parametrize(("call", "message"), ILL_PAIRS.values(), ids=ILL_PAIRS)
def test_ill_pairs(tmp_path: Path, call: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path)
    assert os.listdir(tmp_path) == []


def test_two_pairs_of_one_name(tmp_path: Path) -> None:
    save = SaveLearn2Regd(tmp_path)
    save(pair("/d/a_01.nii.gz", "/d/a_02.nii.gz"))
    before = (tmp_path / "disp_0002_0001.nii.gz").read_bytes()
    with pytest.raises(ValueError, match=r"/e/a_01\.nii\.gz.* would be written to 'disp_0002_0001', as .*/d/a_01"):
        save(pair("/e/a_01.nii.gz", "/d/a_02.nii.gz"))
    assert (tmp_path / "disp_0002_0001.nii.gz").read_bytes() == before


def test_names_are_looked_at_beforehand(tmp_path: Path) -> None:
    save = SaveLearn2Regd(tmp_path)
    files = ["/d/a_01.nii.gz", "/d/a_02.nii.gz", "/e/a_01.nii.gz"]
    data = [{"image": name} for name in files]
    request: dict[str, Any]
    for pairs, name in (([(0, 1), (2, 1)], "disp_0002_0001"), (None, "disp_0001_0002")):
        with pytest.raises(ValueError, match=rf"/e/a_01\.nii\.gz'.* would be written to '{name}', as .*/d/a_01"):
            save.checked({"data": data, "pairs": pairs})
    for request in (
        # one pair may be listed twice
        {"data": data, "pairs": [(0, 1), (1, 2), (0, 1)]},
        {"data": data[:2], "pairs": None},
    ):
        assert save.checked(request) is request
    with pytest.raises(ValueError, match=r"fixed_image 'anna\.nii\.gz' has no number in its name"):
        save.checked({"data": [*data, {"image": "anna.nii.gz"}], "pairs": [(1, 0), (0, 3)]})
    # what was looked at is not what was written
    save(pair("/e/a_01.nii.gz", "/d/a_02.nii.gz"))
