# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import locale
import logging
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from itk_oracle import GRIDS

from monai.data import MetaTensor

from monai_sacb.data.volumes import check_overlap, read_label_volume, read_mask_volume, read_volume, write_volume

SHAPE = (7, 8, 9)


def turned(spacing: tuple[float, float, float], degrees: float = 0.0, axes: str = "RAS") -> np.ndarray:
    angle = np.deg2rad(degrees)
    c, s = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    order = {"RAS": np.eye(3), "LAS": np.diag([-1.0, 1, 1]), "LPS": np.diag([-1.0, -1, 1])}
    mixed = np.array([[0.0, 0, -1], [1, 0, 0], [0, 1, 0]])
    affine[:3, :3] = turn @ order.get(axes, mixed) @ np.diag(spacing)
    affine[:3, 3] = (11, -22, 33)
    return affine


GEOMETRIES = [
    turned((1, 1, 1)),
    turned((0.9, 1.3, 1.1), axes="LAS"),
    turned((1, 2, 3), axes="LPS"),
    turned((0.8, 0.8, 2.5), 25),
    turned((1, 2, 3), -40, "ASL"),
]


def noise(dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, SHAPE).astype(dtype)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = GEOMETRIES[0], endian: str = "<") -> Path:
    header = nib.Nifti1Header(endianness=endian)
    header.set_data_dtype(array.dtype)
    nib.save(nib.Nifti1Image(array, affine, header, dtype=array.dtype), path)
    return path


def itk_affine(path: Path) -> np.ndarray:
    image = itk.imread(str(path))
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) @ np.diag(np.array(image.GetSpacing()))
    affine[:3, 3] = np.array(image.GetOrigin())
    return np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd"])
@pytest.mark.parametrize("affine", GEOMETRIES)
def test_geometry_and_values_are_those_that_itk_reads(tmp_path: Path, affine: np.ndarray, suffix: str) -> None:
    source = nifti(tmp_path / "source.nii", noise(), affine)
    path = tmp_path / f"image{suffix}"
    itk.imwrite(itk.imread(str(source)), str(path))
    image = read_volume(path, "moving image")
    assert isinstance(image, MetaTensor) and image.shape == (1, *SHAPE) and image.dtype == torch.float32
    np.testing.assert_array_equal(image[0].numpy(), itk.array_from_image(itk.imread(str(path))).transpose(2, 1, 0))
    np.testing.assert_array_equal(image[0].numpy(), noise())
    assert image.affine.dtype == torch.float64
    np.testing.assert_allclose(image.affine.numpy(), itk_affine(path), atol=1e-9)
    np.testing.assert_allclose(image.affine.numpy(), affine, atol=1e-4)
    assert image.meta["filename_or_obj"] == str(path)


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"]
)
@pytest.mark.parametrize("endian", ["<", ">"])
def test_types_of_storage(tmp_path: Path, dtype: str, endian: str) -> None:
    array = noise("uint8").astype(np.dtype(dtype).newbyteorder(endian)) // (2 if dtype == "int8" else 1)
    image = read_volume(nifti(tmp_path / "a.nii.gz", array, endian=endian))
    np.testing.assert_array_equal(image[0].numpy(), array.astype(np.float32))
    assert image.meta["original_dtype"] == dtype
    label = read_label_volume(tmp_path / "a.nii.gz")
    assert label.dtype == torch.int32
    np.testing.assert_array_equal(label[0].numpy(), array.astype(np.int32))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_types_of_storage_of_itk(tmp_path: Path, dtype: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    itk.imwrite(itk.image_from_array(noise(dtype)), str(path))
    assert read_volume(path).meta["original_dtype"] == dtype
    np.testing.assert_array_equal(read_label_volume(path)[0].numpy(), noise("int32").transpose(2, 1, 0))


def test_scaled_integers(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise() * 0.5 - 3, GEOMETRIES[1])
    image.set_data_dtype("int16")
    nib.save(image, tmp_path / "scaled.nii.gz")
    read = read_volume(tmp_path / "scaled.nii.gz")
    np.testing.assert_allclose(read[0].numpy(), noise() * 0.5 - 3, atol=0.01)
    np.testing.assert_allclose(
        read[0].numpy(), itk.array_from_image(itk.imread(str(tmp_path / "scaled.nii.gz"))).transpose(2, 1, 0), atol=1e-4
    )
    # whole numbers cannot keep them
    assert read.meta["original_dtype"] == "float32"


def test_axes_of_length_one_at_the_end(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz", noise()[..., None])
    itk.imwrite(itk.image_from_array(noise().transpose(2, 1, 0)[None].copy()), str(tmp_path / "a.nrrd"))
    for name in ("a.nii.gz", "a.nrrd"):
        np.testing.assert_array_equal(read_volume(tmp_path / name)[0].numpy(), noise())


def test_files_that_itk_does_not_know(tmp_path: Path) -> None:
    nib.save(nib.MGHImage(noise(), GEOMETRIES[3].astype(np.float32)), tmp_path / "a.mgz")
    nib.save(nib.Nifti2Image(noise(), GEOMETRIES[3]), tmp_path / "a.nii")
    for name in ("a.mgz", "a.nii"):
        image = read_volume(tmp_path / name)
        np.testing.assert_array_equal(image[0].numpy(), noise())
        np.testing.assert_allclose(image.affine.numpy(), GEOMETRIES[3], atol=1e-4)


# codes of qform and sform; whether ITK takes the sform
@pytest.mark.parametrize(("qform", "sform"), [(0, 1), (1, 0), (1, 1), (1, 2), (2, 4), (4, 1), (0, 0)])
def test_two_geometries_in_one_header(tmp_path: Path, qform: int, sform: int, caplog: pytest.LogCaptureFixture) -> None:
    image = nib.Nifti1Image(noise(), None)
    image.set_qform(turned((1, 2, 3), 10), qform)
    image.set_sform(turned((1, 2, 3), 30), sform)
    image.header.set_zooms((1, 2, 3))
    path = tmp_path / "a.nii"
    nib.save(image, path)
    with caplog.at_level(logging.WARNING):
        read = read_volume(path, "fixed image")
    expected = itk_affine(path)
    np.testing.assert_allclose(read.affine.numpy(), expected, atol=1e-9)
    theirs = nib.load(path).affine
    if np.allclose(theirs, expected, atol=1e-3):
        assert not caplog.records
    else:
        assert "places its voxels in two ways" in caplog.text and f"fixed image '{path}'" in caplog.text
    assert np.allclose(theirs, expected, atol=1e-3) == ((qform, sform) in [(0, 1), (1, 0), (1, 1), (4, 1)])


def test_voxel_sizes_that_the_sform_contradicts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = nib.Nifti1Image(noise(), turned((1.5, 2, 3), 30))
    image.header["pixdim"][1] = 1
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_allclose(
        read_volume(tmp_path / "a.nii").affine.numpy(), itk_affine(tmp_path / "a.nii"), atol=1e-9
    )
    assert "places its voxels in two ways" in caplog.text


def _patched(offset: int, value: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        data = bytearray(nifti(folder / "whole.nii", noise()).read_bytes())
        data[offset : offset + len(value)] = value
        (folder / "bad.nii").write_bytes(data)
        return folder / "bad.nii"

    return make


def _cut(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        array = np.random.default_rng(0).random((20, 21, 22), np.float32)
        itk.imwrite(itk.image_from_array(array), str(folder / f"whole{suffix}"))
        data = (folder / f"whole{suffix}").read_bytes()
        (folder / f"bad{suffix}").write_bytes(data[: len(data) // 2])
        return folder / f"bad{suffix}"

    return make


def _text(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        text = b"not an image\nat all\n" * 50
        (folder / name).write_bytes(gzip.compress(text) if name.startswith("gz") else text)
        return folder / name

    return make


def _array(array: np.ndarray, affine: np.ndarray = GEOMETRIES[0]) -> Callable[[Path], Path]:
    return lambda folder: nifti(folder / "bad.nii.gz", array, affine)


def _sheared(affine: np.ndarray, step: float = 0.1) -> np.ndarray:
    bent = affine.copy()
    bent[:3, 1] += step * bent[:3, 0]
    return bent


def _sheared_sform(folder: Path) -> Path:
    image = nib.Nifti1Image(noise(), None)
    image.set_qform(None, 0)
    image.set_sform(_sheared(GEOMETRIES[3]), 1)
    nib.save(image, folder / "bad.nii")
    return folder / "bad.nii"


def _sheared_nrrd(folder: Path) -> Path:
    itk.imwrite(itk.image_from_array(noise()), str(folder / "whole.nrrd"))
    data = (folder / "whole.nrrd").read_bytes()
    (folder / "bad.nrrd").write_bytes(data.replace(b"(1,0,0)", b"(1,0.2,0)", 1))
    return folder / "bad.nrrd"


def _meta_spacing(value: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        itk.imwrite(itk.image_from_array(noise()), str(folder / "whole.mha"))
        data = (folder / "whole.mha").read_bytes()
        (folder / "bad.mha").write_bytes(data.replace(b"ElementSpacing = 1 1 1", b"ElementSpacing = " + value, 1))
        return folder / "bad.mha"

    return make


def _colour(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        colours = np.random.default_rng(0).integers(0, 255, (6, 7, 8, 3)).astype(np.uint8)
        itk.imwrite(itk.image_from_array(colours, is_vector=True), str(folder / name))
        return folder / name

    return make


def _picture(folder: Path) -> Path:
    itk.imwrite(itk.image_from_array(noise("uint8")[0].copy()), str(folder / "bad.png"))
    return folder / "bad.png"


def _folder(folder: Path) -> Path:
    (folder / "scans").mkdir()
    (folder / "scans" / "notes.txt").write_text("none")
    return folder / "scans"


def _holes(value: float) -> np.ndarray:
    array = noise()
    array[1, 2, 3:5] = value
    return array


ILL_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "half .nii.gz": (_cut(".nii.gz"), "cannot read .*damaged or truncated"),
    "half .nii": (_cut(".nii"), "cannot read .*damaged or truncated"),
    "half .nrrd": (_cut(".nrrd"), "cannot read .*damaged or truncated"),
    "half .mha": (_cut(".mha"), "cannot read .*damaged or truncated"),
    "text .nii": (_text("a.nii"), "not an image"),
    "text .nii.gz": (_text("gz.nii.gz"), "not an image"),
    "text .nrrd": (_text("a.nrrd"), "not an image"),
    "text .mha": (_text("a.mha"), "not an image"),
    "text .xyz": (_text("a.xyz"), "not an image"),
    "two frames": (_array(np.stack([noise()] * 2, -1)), "4-D image of size .*, 2 volumes in one"),
    "three components": (_array(np.stack([noise()] * 3, -1)[:, :, :, None]), "5-D image of size .*, 3 volumes"),
    "colour .nii": (_colour("bad.nii"), "(3 volumes in one|a colour image)"),
    "colour .nrrd": (_colour("bad.nrrd"), "a colour image, with 3 values a voxel"),
    "complex": (_array(noise("complex64")), "voxels of type complex64"),
    "single slice": (_array(noise()[:, :, :1]), r"single slice or less, of size \(7, 8, 1\)"),
    "sagittal slice": (_array(noise()[:1]), r"single slice or less, of size \(1, 8, 9\)"),
    "2-D": (_array(noise()[0]), "single slice or less"),
    "picture": (_picture, r"single slice or less, of size \(9, 8\)"),
    "zero spacing": (_patched(80, struct.pack("<f", 0)), r"voxels of \[0\.0, 1\.0, 1\.0\] mm"),
    "negative spacing": (_patched(84, struct.pack("<f", -2)), r"voxels of \[1\.0, -2\.0, 1\.0\] mm"),
    "NaN spacing": (_patched(88, struct.pack("<f", np.nan)), r"voxels of \[1\.0, 1\.0, nan\] mm"),
    "NaN affine": (_patched(280, struct.pack("<f", np.nan)), "NaN or infinite numbers in its header: srow_x"),
    "zero spacing .mha": (_meta_spacing(b"0 1 1"), r"voxels of \[0\.0, 1\.0, 1\.0\] mm"),
    "negative spacing .mha": (_meta_spacing(b"1 -1 1"), r"voxels of \[1\.0, -1\.0, 1\.0\] mm"),
    "sheared .nii": (_sheared_sform, "sheared header"),
    "sheared .nrrd": (_sheared_nrrd, "sheared header"),
    "NaN voxels": (_array(_holes(np.nan)), "has 2 NaN or infinite voxels"),
    "infinite voxels": (_array(_holes(-np.inf)), "has 2 NaN or infinite voxels"),
    "constant": (_array(np.full(SHAPE, 7, np.int16)), "is constant, 7 everywhere"),
    "folder": (_folder, "folder without DICOM images"),
}


@pytest.mark.parametrize(("make", "message"), ILL_FILES.values(), ids=ILL_FILES)
def test_bad_file_is_named_in_one_sentence(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_volume(path, "moving image")
    sentence = str(caught.value)
    assert f"moving image '{path}'" in sentence and "\n" not in sentence and len(sentence) < 600


def test_missing_file(tmp_path: Path) -> None:
    for read in (read_volume, read_label_volume, read_mask_volume):
        with pytest.raises(FileNotFoundError, match=f"the role '{tmp_path}/none.nii.gz' does not exist"):
            read(tmp_path / "none.nii.gz", "the role")


def test_rounding_of_a_header_is_no_shear(tmp_path: Path) -> None:
    affine = _sheared(GEOMETRIES[3], 5e-5)
    np.testing.assert_allclose(
        read_volume(nifti(tmp_path / "a.nii", noise(), affine)).affine.numpy(), affine, atol=1e-4
    )


def test_constant_image_where_it_is_allowed(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", np.full(SHAPE, 7, np.int16))
    assert read_volume(path, allow_constant=True).unique().tolist() == [7]


def write_series(folder: Path, uid: str, positions: list[float], seed: int = 0) -> np.ndarray:
    array = np.random.default_rng(seed).integers(-1000, 1000, (len(positions), 8, 9)).astype(np.int16)
    folder.mkdir(exist_ok=True)
    writer_io = itk.GDCMImageIO.New(KeepOriginalUID=True)
    for index, position in enumerate(positions):
        image = itk.image_from_array(array[index : index + 1].copy())
        image.SetSpacing([0.7, 0.8, 2.0])
        image.SetOrigin([-5, 6, position])
        tags = {
            "0008|0060": "CT",
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
            "0020|000d": "1.2.3",
            "0020|000e": uid,
            "0020|0013": str(index + 1),
            "0008|0018": f"{uid}.{index + 1}",
            "0020|0032": f"-5\\6\\{position}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for key, value in tags.items():
            image[key] = value
        writer = itk.ImageFileWriter[type(image)].New(
            Input=image, FileName=str(folder / f"{uid}_{9 - index}.dcm"), ImageIO=writer_io
        )
        writer.UseInputMetaDataDictionaryOn()
        writer.Update()
    return array


@pytest.fixture
def _own_locale() -> Iterator[None]:
    """ITK's writer of DICOM changes the locale of the process."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.mark.usefixtures("_own_locale")
def test_folder_of_dicom_files(tmp_path: Path) -> None:
    before = locale.setlocale(locale.LC_ALL)
    array = write_series(tmp_path / "scan", "1.2.3.4", [10.0, 12.0, 14.0, 16.0])
    locale.setlocale(locale.LC_ALL, before)
    image = read_volume(tmp_path / "scan")
    # ITK's reader would change the encoding of text files that are opened later
    assert locale.setlocale(locale.LC_ALL) == before
    np.testing.assert_array_equal(image[0].numpy(), array.transpose(2, 1, 0))
    expected = np.diag([-0.7, -0.8, 2.0, 1.0])
    expected[:3, 3] = (5, -6, 10)
    np.testing.assert_allclose(image.affine.numpy(), expected, atol=1e-6)
    assert image.meta["original_dtype"] == "int16" and image.meta["filename_or_obj"] == str(tmp_path / "scan")


@pytest.mark.usefixtures("_own_locale")
def test_bad_dicom_folders(tmp_path: Path) -> None:
    write_series(tmp_path / "gap", "1.2.3.4", [10.0, 12.0, 14.0, 20.0])
    with pytest.raises(ValueError, match=r"slices up to .* mm off their even places; some may be missing"):
        read_volume(tmp_path / "gap")
    write_series(tmp_path / "one", "1.2.3.4", [10.0])
    with pytest.raises(ValueError, match="single DICOM slice"):
        read_volume(tmp_path / "one")
    write_series(tmp_path / "two", "1.2.3.4", [10.0, 12.0])
    write_series(tmp_path / "two", "1.2.3.5", [10.0, 12.0, 14.0])
    with pytest.raises(ValueError, match=r"2 DICOM series: '1\.2\.3\.4.*\(2 files\), '1\.2\.3\.5.*\(3 files\)"):
        read_volume(tmp_path / "two", "fixed image")


def test_label_maps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = np.array([0, 1, 2035, 17, -3])[np.random.default_rng(0).integers(0, 5, SHAPE)].astype(np.float32)
    label = read_label_volume(nifti(tmp_path / "a.nii.gz", labels), "moving label")
    assert label.dtype == torch.int32 and label.meta["original_dtype"] == "float32"
    np.testing.assert_array_equal(label[0].numpy(), labels)
    assert not caplog.records
    read_label_volume(nifti(tmp_path / "b.nii.gz", np.zeros(SHAPE, np.uint8)), "moving label")
    assert f"moving label '{tmp_path}/b.nii.gz' is empty" in caplog.text
    labels[2, 3, 4:7] += 0.25
    with pytest.raises(ValueError, match=r"3 voxels hold no whole number, such as -?\d+\.[27]5; it may"):
        read_label_volume(nifti(tmp_path / "c.nii.gz", labels), "moving label")
    with pytest.raises(ValueError, match=r"labels from 0 to 1e\+10, which 32-bit integers cannot hold"):
        read_label_volume(nifti(tmp_path / "d.nii.gz", np.where(labels == 1, 1e10, 0.0)))


def test_masks(tmp_path: Path) -> None:
    array = noise() - 100
    mask = read_mask_volume(nifti(tmp_path / "a.nii.gz", array * (array > 20)))
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask[0].numpy(), array > 20)
    with pytest.raises(ValueError, match=r"fixed mask '.*b\.nii\.gz' is empty"):
        read_mask_volume(nifti(tmp_path / "b.nii.gz", np.zeros(SHAPE, np.uint8)), "fixed mask")


def grid(shape: tuple[int, int, int], origin: tuple[float, float, float], spacing: float = 1.0) -> MetaTensor:
    affine = torch.diag(torch.tensor([spacing, spacing, spacing, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor(origin)
    return MetaTensor(torch.zeros(1, *shape), affine=affine)


@pytest.mark.parametrize(
    ("moving", "fixed", "share"),
    [
        (grid((20, 20, 20), (0, 0, 0)), grid((20, 20, 20), (0, 0, 0)), 1.0),
        (grid((10, 10, 10), (0.5, 0.5, 0.5), 2.0), grid((20, 20, 20), (0, 0, 0)), 1.0),
        (grid((20, 20, 20), (10, 0, 0)), grid((20, 20, 20), (0, 0, 0)), 0.5),
        (grid((20, 20, 20), (0, 0, 0)), grid((40, 40, 20), (0, 0, 0)), 0.25),
    ],
)
def test_share_of_the_field_of_view(moving: MetaTensor, fixed: MetaTensor, share: float) -> None:
    assert check_overlap(moving, fixed) == pytest.approx(share, abs=0.02)


def test_fields_of_view_apart() -> None:
    moving, fixed = grid((20, 20, 20), (0, 0, 0)), grid((20, 20, 20), (0, 30, 40))
    moving.meta["filename_or_obj"] = "/data/m.nii.gz"
    with pytest.raises(ValueError, match=r"moving image '/data/m\.nii\.gz' and the fixed image do not .* 50 mm apart"):
        check_overlap(moving, fixed)
    # one voxel of a large image
    assert 0 < check_overlap(grid((2, 2, 2), (33.3, 33.3, 33.3), 0.1), grid((90, 90, 90), (0, 0, 0))) < 0.01


@pytest.mark.parametrize("affine", GEOMETRIES)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_written_volume_lies_where_it_should(tmp_path: Path, affine: np.ndarray, suffix: str) -> None:
    image = MetaTensor(torch.from_numpy(noise())[None], affine=torch.from_numpy(affine))
    path = tmp_path / "new" / f"a{suffix}"
    write_volume(image, path)
    np.testing.assert_allclose(itk_affine(path), affine, atol=1e-4)
    written = nib.load(path)
    np.testing.assert_array_equal(written.get_fdata(), noise())
    for form, code in (written.get_sform(coded=True), written.get_qform(coded=True)):
        np.testing.assert_allclose(form, affine, atol=1e-4)
        assert code == 1
    assert written.header.get_xyzt_units()[0] == "mm" and written.get_data_dtype() == np.float32
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    np.testing.assert_array_equal(read_volume(path)[0].numpy(), noise())


def test_types_of_written_volumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = torch.tensor([-3.0, 1.4, 1.6, 300.0, 0.0, 2.0, 3.0, 4.0]).view(1, 2, 2, 2)
    image = MetaTensor(values, affine=torch.eye(4, dtype=torch.float64))
    path = tmp_path / "a.nii.gz"
    for tensor, dtype, expected in [
        (image, None, "float32"),
        (image.double(), None, "float64"),
        (image.half(), None, "float32"),
        (image > 1, None, "uint8"),
        (image.long(), None, "int32"),
        (image, np.int16, "int16"),
    ]:
        write_volume(tensor, path, dtype)
        written = nib.load(path)
        assert written.get_data_dtype() == np.dtype(expected) and np.asarray(written.dataobj).dtype == expected
    np.testing.assert_array_equal(written.get_fdata().ravel(), [-3, 1, 2, 300, 0, 2, 3, 4])
    assert not caplog.records
    write_volume(image, path, "uint8")
    np.testing.assert_array_equal(nib.load(path).get_fdata().ravel(), [0, 1, 2, 255, 0, 2, 3, 4])
    assert "2 voxels are cut to the range of uint8" in caplog.text


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"])
def test_written_by_itk(tmp_path: Path, suffix: str, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 200, (1, 5, 7, 6)).astype(np.float64)
    affine = torch.from_numpy(GRIDS["oblique"])
    write_volume(MetaTensor(torch.from_numpy(values), affine=affine), tmp_path / f"a{suffix}", dtype)
    found = read_volume(tmp_path / f"a{suffix}")
    assert found.meta["original_dtype"] == dtype
    np.testing.assert_array_equal(found.numpy(), values)
    torch.testing.assert_close(found.affine, affine, rtol=0, atol=1e-6)
    written = itk.imread(str(tmp_path / f"a{suffix}"))
    np.testing.assert_array_equal(itk.array_from_image(written), values[0].T)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.nii.gz"])
def test_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write '.*a\.(nrrd|mha)': |File too large"):
            write_volume(MetaTensor(torch.rand(1, 30, 30, 30), affine=torch.eye(4).double()), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"old"
    assert capfd.readouterr().err == ""


def test_what_is_not_written(tmp_path: Path) -> None:
    image = MetaTensor(torch.rand(1, 3, 4, 5), affine=torch.eye(4, dtype=torch.float64))
    for bad, name, dtype, message in [
        (torch.rand(1, 3, 4, 5), "a.nii", None, r"got Tensor \[1, 3, 4, 5\]"),
        (MetaTensor(torch.rand(2, 3, 4, 5)), "a.nii", None, r"got MetaTensor \[2, 3, 4, 5\]"),
        (image, "a.mgz", None, "must be named .nii, .nii.gz, .nrrd, .mha"),
        (image, "a.MHA", None, "must be named .nii, .nii.gz, .nrrd, .mha, got '.*a.MHA'"),
        (image, "a.nii", "complex64", "got complex64"),
        (image, "a.nrrd", "int8", "must be of one of the types uint8, int16, .*, got int8"),
        (image / 0, "a.nii", None, "must be finite, got 60 NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_volume(bad, tmp_path / name, dtype)
    assert list(tmp_path.iterdir()) == []
