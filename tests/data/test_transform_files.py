# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from itk_oracle import AFFINE, GRIDS, LPS, itk_composite, itk_image, itk_points, itk_resample, smooth, smooth_field

from monai.data import MetaTensor

from monai_sacb.data.displacement_files import (
    ddf_from_field,
    field_from_ddf,
    read_displacement,
    read_voxel_ddf,
    write_displacement,
    write_voxel_ddf,
)
from monai_sacb.data.spatial_mapping import Grid, PhysicalField, SpatialMapping, resample_volume
from monai_sacb.data.transform_files import mapping_from_itk, mapping_to_itk, read_transform, write_transform

SHAPE = (11, 13, 9)


def points_around(name: str, number: int = 60) -> np.ndarray:
    """Places in and beyond a grid, RAS millimetres."""
    voxels = np.random.default_rng(3).uniform(-3, np.array(SHAPE) + 2, (number, 3))
    return voxels @ GRIDS[name][:3, :3].T + GRIDS[name][:3, 3]


def mapping_of(*stages: np.ndarray | PhysicalField) -> SpatialMapping:
    return SpatialMapping([torch.from_numpy(s) if isinstance(s, np.ndarray) else s for s in stages])


def same_action(first: SpatialMapping, second: SpatialMapping, points: np.ndarray, atol: float = 1e-4) -> None:
    tensor = torch.from_numpy(points)
    torch.testing.assert_close(first.transform_points(tensor), second.transform_points(tensor), rtol=0, atol=atol)


# ---- transforms ----


@pytest.mark.parametrize("name", list(GRIDS))
def test_itk_maps_points_as_the_mapping_that_was_written(tmp_path: Path, name: str) -> None:
    field, points = smooth_field(SHAPE, GRIDS[name], 2.0), points_around(name)
    orders = {"u A": (field, AFFINE), "A u": (AFFINE, field), "u": (field,), "A": (AFFINE,), "": ()}
    results = []
    for number, stages in enumerate(orders.values()):
        path = tmp_path / "deep" / f"sub.0{number}.h5"
        mapping = mapping_of(*stages)
        write_transform(mapping, path)
        (transform,) = itk.transformread(str(path))
        expected = mapping.transform_points(torch.from_numpy(points)).numpy()
        np.testing.assert_allclose(itk_points(transform, points), expected, atol=1e-4)
        np.testing.assert_allclose(itk_points(mapping_to_itk(mapping), points), expected, atol=1e-4)
        same_action(read_transform(path), mapping, points)
        results.append(expected)
    # each of them is another mapping
    assert min(np.abs(a - b).max() for i, a in enumerate(results) for b in results[:i]) > 0.3
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == [f"sub.0{i}.h5" for i in range(5)]


@pytest.mark.parametrize("name", ["LAS anisotropic", "oblique ASL anisotropic"])
def test_itk_resamples_through_the_files(tmp_path: Path, name: str) -> None:
    field = smooth_field(SHAPE, GRIDS[name], 2.0)
    array = smooth(SHAPE, 1.0)
    volume = MetaTensor(torch.from_numpy(array)[None], affine=torch.from_numpy(GRIDS[name]))
    small = np.eye(4)
    small[:3, 3] = [1.1, -0.7, 0.4]
    write_transform(mapping_of(field, small), tmp_path / "t.h5")
    write_displacement(field, tmp_path / "d.nii.gz")
    vectors = itk.imread(str(tmp_path / "d.nii.gz"))
    double = itk.Image[itk.Vector[itk.D, 3], 3].New()
    double.SetRegions(vectors.GetLargestPossibleRegion())
    double.CopyInformation(vectors)
    double.Allocate()
    itk.array_view_from_image(double)[...] = itk.array_from_image(vectors)
    by_image = itk.DisplacementFieldTransform[itk.D, 3].New()
    by_image.SetDisplacementField(double)
    cases = ((itk.transformread(str(tmp_path / "t.h5"))[0], mapping_of(field, small)), (by_image, mapping_of(field)))
    for transform, mapping in cases:
        expected = itk_resample(itk_image(array, GRIDS[name]), transform, SHAPE, GRIDS[name])
        result = resample_volume(volume, mapping, Grid.of(volume))[0].numpy()
        # where the place is exactly on the border of the image, rounding decides
        assert np.quantile(np.abs(result - expected), 0.999) < 1e-3 * np.ptp(array)
        assert np.abs(expected - array).max() > 0.3


def test_what_is_written_is_double(tmp_path: Path) -> None:
    exact = AFFINE + np.pi * 1e-9
    exact[3] = [0, 0, 0, 1]
    for name in ("a.h5", "a.tfm", "a.txt"):
        write_transform(mapping_of(exact), tmp_path / name)
        (affine,) = read_transform(tmp_path / name).stages
        assert isinstance(affine, torch.Tensor)
        np.testing.assert_allclose(affine, exact, atol=1e-12)
    assert "AffineTransform_double_3_3" in (tmp_path / "a.tfm").read_text()
    write_transform(mapping_of(AFFINE, exact), tmp_path / "two.tfm")
    np.testing.assert_allclose(read_transform(tmp_path / "two.tfm").stages[0], exact @ AFFINE, atol=1e-9)


def linear_transforms() -> dict[str, Any]:
    """ITK's linear transforms of all kinds, with a centre where they have one."""
    d, shift = itk.D, [3.0, -2.0, 1.5]
    made: dict[str, Any] = {
        "identity": itk.IdentityTransform[d, 3].New(),
        "translation": itk.TranslationTransform[d, 3].New(Offset=shift),
        "Euler": itk.Euler3DTransform[d].New(),
        "versor": itk.VersorRigid3DTransform[d].New(),
        "similarity": itk.Similarity3DTransform[d].New(),
        "scale": itk.ScaleTransform[d, 3].New(Scale=[1.1, 0.9, 1.3]),
        "affine": itk.AffineTransform[d, 3].New(),
        "scale, skew": itk.ScaleSkewVersor3DTransform[d].New(),
    }
    made["Euler"].SetRotation(0.1, -0.2, 0.3)
    for name in ("versor", "similarity"):
        made[name].SetRotation([0.0, 0.6, 0.8], 0.4)
    made["similarity"].SetScale(1.2)
    made["affine"].SetMatrix(itk.matrix_from_array(np.ascontiguousarray(AFFINE[:3, :3])))
    made["scale, skew"].SetScale([1.1, 1.0, 0.9])
    made["scale, skew"].SetSkew([0.05, 0.0, 0.02, 0.0, 0.03, 0.0])
    for transform in made.values():
        if hasattr(transform, "SetCenter"):
            transform.SetCenter([10.0, 20.0, -30.0])
        if hasattr(transform, "SetTranslation"):
            transform.SetTranslation(shift)
    return made


def test_linear_transforms_of_all_kinds(tmp_path: Path) -> None:
    points = points_around("LAS")
    transforms = linear_transforms()
    for name, transform in transforms.items():
        expected = itk_points(transform, points)
        for suffix in (".h5", ".tfm", ".txt", ".mat"):
            path = str(tmp_path / f"t{suffix}")
            itk.transformwrite([transform], path)
            moved = read_transform(path).transform_points(torch.from_numpy(points))
            np.testing.assert_allclose(moved, expected, atol=1e-6, err_msg=f"{name}{suffix}")
        if name != "identity":
            assert np.abs(expected - points).max() > 1
    composite = itk.CompositeTransform[itk.D, 3].New()
    inner = itk.CompositeTransform[itk.D, 3].New()
    for target, names in ((inner, ("Euler", "scale")), (composite, ("affine",))):
        for name in names:
            target.AddTransform(transforms[name])
    composite.AddTransform(inner)
    composite.AddTransform(itk_composite(smooth_field(SHAPE, GRIDS["LAS"])))
    composite.AddTransform(transforms["translation"])
    moved = mapping_from_itk(composite).transform_points(torch.from_numpy(points))
    np.testing.assert_allclose(moved, itk_points(composite, points), atol=1e-4)


def test_affines_of_ants(tmp_path: Path) -> None:
    """In the name of a class that ITK does not make by itself, and in single precision."""
    centre, shift = np.array([5.0, 6.0, 7.0]), np.array([1.0, 2.0, 3.0])
    matrix = AFFINE[:3, :3]
    offset = shift + centre - matrix @ centre
    expected = np.eye(4)
    expected[:3, :3], expected[:3, 3] = matrix, offset
    parameters = np.concatenate([matrix.ravel(), shift])
    for kind in ("MatrixOffsetTransformBase_double_3_3", "AffineTransform_double_3_3", "AffineTransform_float_3_3"):
        for order in "<>":
            blocks = []
            for name, values in ((kind, parameters), ("fixed", centre)):
                machine = 1000 if order == ">" else 0
                head = struct.pack(f"{order}5i", machine, len(values), 1, 0, len(name) + 1)
                blocks.append(head + name.encode() + b"\0" + values.astype(f"{order}f8").tobytes())
            (tmp_path / "0GenericAffine.mat").write_bytes(b"".join(blocks))
            (affine,) = read_transform(tmp_path / "0GenericAffine.mat").stages
            np.testing.assert_allclose(affine, LPS @ expected @ LPS, atol=1e-9)
        numbers = [" ".join(map(repr, vector.tolist())) for vector in (parameters, centre)]
        (tmp_path / "a.txt").write_text(
            f"#Insight Transform File V1.0\n#Transform 0\nTransform: {kind}\nParameters: {numbers[0]}\n"
            f"FixedParameters: {numbers[1]}\n"
        )
        (affine,) = read_transform(str(tmp_path / "a.txt")).stages
        np.testing.assert_allclose(affine, LPS @ expected @ LPS, atol=1e-9)


def test_fields_that_were_smoothed_on_the_way(tmp_path: Path) -> None:
    field = smooth_field(SHAPE, GRIDS["oblique"])
    plain = itk_composite(field).GetNthTransform(0)
    smoothed = itk.GaussianSmoothingOnUpdateDisplacementFieldTransform[itk.D, 3].New()
    smoothed.SetDisplacementField(itk.down_cast(plain).GetDisplacementField())
    itk.transformwrite([smoothed], str(tmp_path / "t.h5"))
    same_action(read_transform(tmp_path / "t.h5"), mapping_of(field), points_around("oblique"))


def test_other_transforms_are_refused(tmp_path: Path) -> None:
    polar = itk.AzimuthElevationToCartesianTransform[itk.D, 3].New()
    spline = itk.CompositeTransform[itk.D, 3].New()
    spline.AddTransform(itk.BSplineTransform[itk.D, 3, 3].New())
    cases = {
        "holds a BSplineTransform; only linear transforms and displacement fields can be read": spline,
        "holds a AzimuthElevationToCartesianTransform": polar,
        "Euler2DTransform is 2-D instead of 3-D": itk.Euler2DTransform[itk.D].New(),
        "DisplacementFieldTransform holds no field": itk.DisplacementFieldTransform[itk.D, 3].New(),
    }
    for message, transform in cases.items():
        with pytest.raises(ValueError, match=message):
            mapping_from_itk(transform)
        if "no field" not in message:
            itk.transformwrite([transform], str(tmp_path / "t.h5"))
            with pytest.raises(ValueError, match=rf"^cannot read the transform '.*': .*{message}.*\.$") as caught:
                read_transform(tmp_path / "t.h5")
            assert "\n" not in str(caught.value)


TEXT = "#Insight Transform File V1.0\n#Transform 0\n"
GOOD = f"{TEXT}Transform: AffineTransform_double_3_3\nParameters: 1 0 0 0 1 0 0 0 1 0 0 0\nFixedParameters: 0 0 0\n"
BAD_TRANSFORMS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("a.h5", None, "there is no such file"),
    "name": ("a.xfm", b"x", "does not end in .h5"),
    "empty": ("a.h5", b"", "no HDF5 file"),
    "junk": ("a.h5", b"\x00\x01" * 999, "no HDF5 file"),
    "truncated": ("a.h5", b"\x89HDF\r\n\x1a\n" + b"\x00" * 999, "."),
    "text": ("a.tfm", b"1 0 0 0\n0 1 0 0\n", "does not start with '#Insight"),
    "binary text": ("a.txt", b"\xff\xfe\x00", "codec can't decode"),
    "only a start": ("a.txt", b"#Insight Transform File V1.0\n", "0 transforms instead of one"),
    "two": ("a.tfm", (GOOD + GOOD.replace(TEXT, "#Transform 1\n")).encode(), "2 transforms instead of one"),
    "unknown": ("a.tfm", GOOD.replace("Affine", "Fancy").encode(), "FancyTransform_double_3_3"),
    "half a name": ("a.tfm", GOOD[: GOOD.index("Aff") + 3].encode(), "holds 'Aff', which is no transform of ITK"),
    "long name": ("a.tfm", GOOD.replace("Affine", "a" * 5000).encode(), "holds 'a{100}', which is no transform"),
    "indented": ("a.tfm", (GOOD + " Transform: Aff\nParameters: 1\n").encode(), "."),
    "few numbers": ("a.tfm", GOOD.replace("1 0 0 0 1", "1").encode(), "."),
    "words": ("a.tfm", GOOD.replace("1 0 0 0 1", "one two").encode(), "."),
    "NaN": ("a.tfm", GOOD.replace("1 0 0 0 1", "nan 0 0 0 1").encode(), "."),
    "infinite": ("a.tfm", GOOD.replace("1 0 0 0 1", "1e999 0 0 0 1").encode(), "."),
    "empty mat": ("a.mat", b"", "no MATLAB file"),
    "short mat": ("a.mat", b"\0" * 11, "ends too early"),
    "huge mat": ("a.mat", struct.pack("<5i", 0, 2**31 - 1, 1, 0, 4) + b"abc\0" + b"\0" * 64, "ends too early"),
    "matrix": ("a.mat", struct.pack("<5i", 0, 3, 3, 0, 2) + b"a\0" + b"\0" * 72, "no MATLAB file of level 4"),
    "level 5": ("a.mat", b"MATLAB 5.0 MAT-file".ljust(200), "no MATLAB file of level 4"),
    "other mat": (
        "a.mat",
        b"".join(struct.pack("<5i", 0, 1, 1, 0, 6) + n + b"\0" * 8 for n in (b"fixed\0", b"other\0")),
        "holds 'other', which is no transform",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_TRANSFORMS.values(), ids=BAD_TRANSFORMS)
def test_bad_transforms(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^cannot read the transform '.*{name}': .*{message}.*\.$") as caught:
        read_transform(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_damaged_files_end_in_a_sentence(tmp_path: Path) -> None:
    write_transform(mapping_of(smooth_field((4, 5, 3), np.eye(4)), AFFINE), tmp_path / "t.h5")
    good = (tmp_path / "t.h5").read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / "t.h5").write_bytes(good[: int(share * len(good))])
        with pytest.raises(ValueError, match=r"^cannot read the transform"):
            read_transform(tmp_path / "t.h5")


@pytest.mark.parametrize("end", ["crash", "loop", "wait"])
def test_crash_of_hdf5_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    write_transform(mapping_of(), tmp_path / "t.h5")
    here = os.getpid()

    def crash(path: str) -> None:
        assert os.getpid() != here
        while end == "loop":
            pass
        if end == "wait":
            threading.Event().wait()
        os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr(itk, "transformread", crash)
    monkeypatch.setattr("monai_sacb.data.transform_files.BASE_SECONDS", 1)
    monkeypatch.setattr("monai_sacb.data.transform_files.WAIT_FACTOR", 2)
    with pytest.raises(
        ValueError, match=r"^cannot read the transform '.*t\.h5': HDF5 crashes on it, or comes to no end\.$"
    ):
        read_transform(tmp_path / "t.h5")


def test_flipped_bits_of_hdf5(tmp_path: Path) -> None:
    write_transform(mapping_of(smooth_field((4, 5, 3), np.eye(4)), AFFINE), tmp_path / "t.h5")
    good = np.fromfile(tmp_path / "t.h5", np.uint8)
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        bad = good.copy()
        # in the tables at the start, where there are places and sizes
        bad[random.integers(0, 3000, 5)] ^= 1 << random.integers(0, 8, 5, dtype=np.uint8)
        bad.tofile(tmp_path / "t.h5")
        try:
            mapping = read_transform(tmp_path / "t.h5")
        except ValueError as error:
            assert str(error).startswith("cannot read the transform") and "\n" not in str(error)
            refused += 1
        else:
            assert isinstance(mapping, SpatialMapping)
    assert 0 < refused < 60


def test_bad_writing(tmp_path: Path) -> None:
    field = smooth_field(SHAPE, np.eye(4))
    flat = PhysicalField(field.vectors, torch.diag(torch.tensor([1.0, 0, 1, 1])).double())
    cases: dict[str, Callable[[], None]] = {
        r"must end in .h5, .hdf5, .tfm, .txt, got 't.mat'": lambda: write_transform(mapping_of(), tmp_path / "t.mat"),
        r"can be written to .h5 only, got 't.tfm'": lambda: write_transform(mapping_of(field), tmp_path / "t.tfm"),
        r"must have a volume": lambda: write_transform(mapping_of(flat), tmp_path / "t.h5"),
        r"must end in .nii or .nii.gz, got 'd.mha'": lambda: write_displacement(field, tmp_path / "d.mha"),
        r"must end in .nii or .nii.gz, got 'd.npz'": lambda: write_voxel_ddf(field, tmp_path / "d.npz"),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["t.h5", "d.nii.gz", "v.nii"])
def test_full_disk_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    field = smooth_field((20, 20, 20), np.eye(4))
    (tmp_path / name).write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError):
            if name == "t.h5":
                write_transform(mapping_of(field), tmp_path / name)
            else:
                (write_displacement if name == "d.nii.gz" else write_voxel_ddf)(field, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"old"


def test_process_ends_well_after_a_full_disk(tmp_path: Path) -> None:
    """HDF5 crashes at the end of a process in which it could not write a file to its end."""
    program = """
import resource, sys, torch
from monai_sacb.data import PhysicalField, SpatialMapping, write_transform
mapping = SpatialMapping([PhysicalField(torch.rand(3, 20, 20, 20), torch.eye(4).double())])
write_transform(mapping, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    write_transform(mapping, sys.argv[1])
except OSError as error:
    print(error.strerror)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "t.h5")], capture_output=True, text=True, timeout=300
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, "File too large"), ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["t.h5"]
    assert read_transform(tmp_path / "t.h5").stages[0].vectors.shape == (3, 20, 20, 20)


# ---- displacement images ----


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".nhdr", ".mhd"])
@pytest.mark.parametrize("name", ["LPS anisotropic", "oblique ASL anisotropic"])
def test_displacement_images(tmp_path: Path, name: str, suffix: str) -> None:
    field = smooth_field(SHAPE, GRIDS[name])
    path = tmp_path / f"d{suffix}"
    if suffix.startswith(".nii"):
        write_displacement(field, path)
        header = nib.load(path).header
        assert header.get_intent()[0] == "vector" and header.get_data_shape() == (*SHAPE, 1, 3)
    else:
        vectors = np.moveaxis(field.vectors.numpy(), 0, -1) * [-1, -1, 1]
        image = itk_image(vectors, GRIDS[name], vector=True)
        single = itk.Image[itk.Vector[itk.F, 3], 3].New()
        single.SetRegions(image.GetLargestPossibleRegion())
        single.CopyInformation(image)
        single.Allocate()
        itk.array_view_from_image(single)[...] = itk.array_from_image(image)
        itk.imwrite(single, str(path))
    found = read_displacement(path)
    torch.testing.assert_close(found.vectors, field.vectors)
    torch.testing.assert_close(found.affine, field.affine, rtol=1e-6, atol=1e-5)
    same_action(read_transform(str(path)), mapping_of(field), points_around(name))


def nifti(shape: tuple[int, ...], intent: str = "none", dtype: Any = np.float32, **header: Any) -> bytes:
    image = nib.Nifti1Image(np.zeros(shape, dtype=dtype), np.eye(4))
    image.header.set_intent(intent, name=header.get("name", ""))
    if "unit" in header:
        image.header.set_xyzt_units(header["unit"])
    return bytes(image.to_bytes())


HUGE = bytearray(nifti((4, 4, 4, 1, 3), "vector"))
HUGE[40:56] = struct.pack("<8h", 5, 32767, 32767, 32767, 1, 3, 1, 1)
NAN = nifti((2, 2, 2, 1, 3), "vector")[:-4] + struct.pack("<f", float("nan"))
BAD_IMAGES: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("d.nii.gz", None, "there is no such file"),
    "name": ("d.png", b"x", "does not end in .nii, .nii.gz, .nrrd"),
    "empty": ("d.nii", b"", "."),
    "junk": ("d.nii.gz", b"junk" * 99, "."),
    "scalar": ("d.nii", nifti((4, 5, 6)), r"shape \(4, 5, 6\) and intent 0"),
    "in voxels": ("d.nii", nifti((4, 5, 6, 3)), "may be a field in voxels"),
    "time series": ("d.nii", nifti((4, 5, 6, 9)), "are not those of a vector image"),
    "other intent": ("d.nii", nifti((4, 5, 6, 1, 3), "displacement vector"), "intent 1006"),
    "two components": ("d.nii", nifti((4, 5, 6, 1, 2), "vector"), r"\(4, 5, 6, 1, 2\)"),
    "NiftyReg": ("d.nii", nifti((4, 5, 6, 1, 3), "vector", name="NREG_TRANS"), "NiftyReg"),
    "metres": ("d.nii", nifti((4, 5, 6, 1, 3), "vector", unit="meter"), "unit 'meter' instead of mm"),
    "complex": ("d.nii", nifti((4, 5, 6, 1, 3), "vector", np.complex64), "type complex64"),
    "truncated": ("d.nii", nifti((4, 5, 6, 1, 3), "vector")[:-100], "."),
    "truncated gz": ("d.nii.gz", gzip.compress(nifti((9, 9, 9, 1, 3), "vector"))[:60], "."),
    "larger than said": ("d.nii", bytes(HUGE), "."),
    "NaN": ("d.nii", NAN, "1 NaN or infinite"),
    "MGH": ("d.nrrd", b"NRRD0004\n", "."),
    "no MHA": ("d.mha", b"ObjectType = Image\n", "."),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_displacement_images(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^cannot read the displacement image '.*{name}': .*{message}.*\.$"
    ) as caught:
        read_displacement(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_scalar_images_of_itk_are_refused(tmp_path: Path) -> None:
    itk.imwrite(itk_image(np.zeros((4, 5, 6), np.float32), np.eye(4)), str(tmp_path / "a.nrrd"))
    with pytest.raises(ValueError, match="3-D with 1 components of type float instead"):
        read_displacement(tmp_path / "a.nrrd")


# ---- fields in voxels ----


@pytest.mark.parametrize("moving", [None, "LAS", "oblique ASL anisotropic"])
def test_fields_in_voxels(tmp_path: Path, moving: str | None) -> None:
    field = smooth_field(SHAPE, GRIDS["oblique"], 2.0)
    moving_grid = None if moving is None else Grid((5, 6, 7), torch.from_numpy(GRIDS[moving]))
    write_voxel_ddf(field, tmp_path / "v.nii.gz", moving_grid)
    image = nib.load(tmp_path / "v.nii.gz")
    array = np.asarray(image.dataobj)
    assert array.shape == (*SHAPE, 3) and array.dtype == np.float32
    # partner by hand: the voxel of the moving grid, at its place
    voxel = np.array([3, 7, 2])
    affine = GRIDS[moving or "oblique"]
    partner = affine @ [*(voxel + array[tuple(voxel)]), 1]
    expected = GRIDS["oblique"] @ [*voxel, 1] + [*field.vectors[:, 3, 7, 2].tolist(), 0]
    np.testing.assert_allclose(partner, expected, atol=1e-4)
    back = read_voxel_ddf(tmp_path / "v.nii.gz", moving_grid=moving_grid)
    torch.testing.assert_close(back.vectors, field.vectors, rtol=0, atol=1e-4)
    other = read_voxel_ddf(tmp_path / "v.nii.gz", Grid(SHAPE, torch.from_numpy(GRIDS["RAS"])))
    np.testing.assert_array_equal(other.affine, GRIDS["RAS"])
    ddf = ddf_from_field(field, moving_grid)
    np.testing.assert_array_equal(ddf, np.moveaxis(array, -1, 0))
    torch.testing.assert_close(field_from_ddf(ddf, field.grid, moving_grid).vectors, back.vectors, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (nifti((4, 5, 6)), r"shape \(4, 5, 6\) is not \(D, H, W, 3\)"),
        (nifti((4, 5, 6, 1, 3), "vector"), r"is not \(D, H, W, 3\)"),
        (nifti((4, 5, 6, 3)), r"grid \(1, 2, 3\) must have shape"),
        (b"junk", "."),
    ],
)
def test_bad_fields_in_voxels(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "v.nii").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^cannot read the field in voxels '.*v.nii': .*{message}.*\.$"):
        read_voxel_ddf(tmp_path / "v.nii", Grid((1, 2, 3), torch.eye(4).double()))


# ---- another reader ----


def test_simpleitk_reads_and_resamples(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    name = "oblique ASL anisotropic"
    field, array = smooth_field(SHAPE, GRIDS[name], 2.0), smooth(SHAPE, 1.0)
    nib.save(nib.Nifti1Image(array, GRIDS[name]), tmp_path / "image.nii.gz")
    write_transform(mapping_of(field, AFFINE), tmp_path / "t.h5")
    write_displacement(field, tmp_path / "d.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "image.nii.gz"))
    displacement = sitk.ReadImage(str(tmp_path / "d.nii.gz"), sitk.sitkVectorFloat64)
    volume = MetaTensor(torch.from_numpy(array)[None], affine=torch.from_numpy(GRIDS[name]))
    for transform, mapping in (
        (sitk.ReadTransform(str(tmp_path / "t.h5")), mapping_of(field, AFFINE)),
        (sitk.DisplacementFieldTransform(displacement), mapping_of(field)),
    ):
        expected = sitk.GetArrayFromImage(sitk.Resample(image, image, transform, sitk.sitkLinear, 0.0)).T
        result = resample_volume(volume, mapping, Grid.of(volume))[0].numpy()
        assert np.quantile(np.abs(result - expected), 0.999) < 1e-3 * np.ptp(array)
