# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Whatever a header or a list says: what ITK and nibabel find in it, or one sentence."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import torch

from monai_sacb.data import load_subjects, make_pairs, read_point_set, read_volume, write_point_set
from monai_sacb.data.pickle_reader import read_pickled_arrays
from monai_sacb.data.point_files import PointSet
from monai_sacb.networks.pretrained import find_model

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

# the same examples in every run
FEW = hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
SHAPE = (4, 5, 6)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def refused(read: Callable[[], Any]) -> bool:
    """Whether it ends with a sentence instead of a result."""
    try:
        read()
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error), repr(error)
        return True
    return False


def numbers(low: float, high: float) -> Any:
    return st.floats(low, high, allow_nan=False)


@st.composite
def affines(draw: Any) -> np.ndarray:
    """Any axes, turned, with voxels of up to 10:1."""
    axes = np.eye(3)[list(draw(st.permutations(range(3))))] * draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    a, b = draw(numbers(-0.7, 0.7)), draw(numbers(-0.7, 0.7))
    turn = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ axes * draw(st.tuples(*[numbers(0.3125, 3.0)] * 3))
    affine[:3, 3] = draw(st.tuples(*[numbers(-300, 300)] * 3))
    return affine


@FEW
@hypothesis.given(
    affine=affines(),
    other=st.none() | affines(),
    dtype=st.sampled_from(["u1", "i2", "u2", "i4", "f4", "f8"]),
    endian=st.sampled_from("<>"),
    frames=st.sampled_from([(), (1,), (1, 1)]),
    scaling=st.sampled_from([(1.0, 0.0), (2.5, -1024.0), (-0.5, 3.0)]),
)
def test_any_orderly_header(
    affine: np.ndarray,
    other: np.ndarray | None,
    dtype: str,
    endian: str,
    frames: tuple[int, ...],
    scaling: tuple[float, float],
) -> None:
    stored = np.random.default_rng(0).integers(0, 250, (*SHAPE, *frames)).astype(dtype)
    header = nib.Nifti1Header(endianness=endian)
    header.set_data_dtype(stored.dtype)
    image = nib.Nifti1Image(stored, affine, header)
    # the two places of a header, which may contradict each other
    image.set_sform(affine, 1)
    image.set_qform(affine if other is None else other, 1)
    image.header.set_slope_inter(*scaling)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "a.nii")
        nib.save(image, path)
        # nibabel scales to fit what it stores; the numbers themselves are what is compared
        expected = nib.load(path).get_fdata().reshape(SHAPE)
        volume = read_volume(path)
        seen = itk.imread(path, itk.F)
    np.testing.assert_allclose(volume[0].numpy(), expected, rtol=1e-6)
    found = LPS @ volume.affine.numpy()
    direction = np.asarray(itk.array_from_matrix(seen.GetDirection()))[:3, :3]
    np.testing.assert_allclose(found[:3, :3], direction * np.array(list(seen.GetSpacing())[:3]), atol=1e-4)
    np.testing.assert_allclose(found[:3, 3], list(seen.GetOrigin())[:3], atol=1e-3)


@FEW
@hypothesis.given(
    field=st.sampled_from(["pixdim", "srow_x", "srow_y", "srow_z", "qoffset_x", "quatern_b", "dim", "vox_offset"]),
    place=st.integers(0, 3),
    value=st.sampled_from([0.0, -1.0, -2.0, math.nan, math.inf, 1e30, -1e30, 1e-30, 32767.0]),
    codes=st.sampled_from([(0, 0), (1, 0), (0, 1), (1, 1)]),
)
def test_any_broken_header(field: str, place: int, value: float, codes: tuple[int, int]) -> None:
    image = nib.Nifti1Image(np.random.default_rng(0).random(SHAPE, dtype=np.float32), np.diag([2.0, 2, 2, 1]))
    image.set_qform(image.affine, codes[0])
    image.set_sform(image.affine, codes[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.nii"
        nib.save(image, path)
        content = bytearray(path.read_bytes())
        header = nib.Nifti1Header(bytes(content[:348]), check=False)
        if header[field].ndim:
            header[field][place] = value if field != "dim" else np.int16(np.clip(np.nan_to_num(value), -3e4, 3e4))
        else:
            header[field] = value
        content[:348] = header.binaryblock
        path.write_bytes(content)
        if not refused(lambda: read_volume(path)):
            volume = read_volume(path)
            assert torch.isfinite(volume).all() and torch.isfinite(volume.affine).all()
            assert torch.linalg.det(volume.affine) != 0


@pytest.mark.parametrize("fields", [[("R", "u1"), ("G", "u1"), ("B", "u1")], None], ids=["colours", "complex"])
def test_voxels_that_are_no_numbers(tmp_path: Path, fields: list[tuple[str, str]] | None) -> None:
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, fields or "c8"), np.eye(4)), tmp_path / "a.nii")
    assert refused(lambda: read_volume(tmp_path / "a.nii"))


TEXT = st.text(max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["a.nii", "../a.nii", "/", "."]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["image", "label"]) | TEXT, inner),
    max_leaves=12,
)


@FEW
@hypothesis.given(
    content=JSON
    | st.dictionaries(
        st.sampled_from(["training", "validation", "test", "registration_val", "atlas"]), JSON, min_size=1
    )
)
def test_any_list_of_data(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.nii", "b.nii"):
            (Path(folder) / name).touch()
        (Path(folder) / "dataset.json").write_text(json.dumps(content))
        for section in ("training", "validation", "test"):
            if not refused(lambda section=section: load_subjects(folder, section)):
                assert all(Path(subject["image"]).exists() for subject in load_subjects(folder, section))
            refused(lambda section=section: make_pairs(folder, section))


@FEW
@hypothesis.given(
    positions=st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 3), min_size=1, max_size=4),
    label=TEXT.filter(lambda text: text == " ".join(text.split()) and text.isprintable()),
    suffix=st.sampled_from([".csv", ".fcsv", ".mrk.json"]),
)
def test_points_come_back(positions: list[tuple[float, ...]], label: str, suffix: str) -> None:
    points = PointSet(torch.tensor(positions, dtype=torch.float64), (label,) * len(positions))
    with tempfile.TemporaryDirectory() as folder:
        write_point_set(points, Path(folder) / f"a{suffix}")
        again = read_point_set(Path(folder) / f"a{suffix}")
    assert torch.equal(again.positions, points.positions)
    assert again.labels == points.labels


@FEW
@hypothesis.given(
    content=st.binary(max_size=60) | TEXT.map(str.encode),
    name=st.sampled_from(["a.csv", "a.fcsv", "a.mrk.json", "a.pkl", "a.nii", "a.nrrd", "a.mha"]),
)
def test_any_bytes(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        read = read_pickled_arrays if name.endswith(".pkl") else read_volume if name[2] in "nm" else read_point_set
        refused(lambda: read(path))
        assert [entry.name for entry in Path(folder).iterdir()] == [name]


PART = st.sampled_from(
    ["network_def", "thresholds", "working_grid", "_target_", "_mode_", "_requires_", "a", "imports", ""]
)


@FEW
@hypothesis.given(parts=st.lists(PART, min_size=1, max_size=4), separator=st.sampled_from(["#", "::"]), value=JSON)
def test_a_card_names_nothing_to_call(parts: list[str], separator: str, value: Any) -> None:
    key = separator.join(parts)
    with tempfile.TemporaryDirectory() as folder:
        torch.save({}, Path(folder) / "w.pt")
        (Path(folder) / "w.json").write_text(json.dumps({"settings": {key: value}}))
        if not refused(lambda: find_model(Path(folder) / "w.pt")):
            assert parts[0] in ("network_def", "thresholds", "working_grid")
            assert not any(part.startswith("_") for part in parts)
