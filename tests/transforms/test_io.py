# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai.data import MetaTensor, NibabelReader
from monai.transforms import LoadImaged

from monai_sacb.transforms import LoadVolumed

AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])


def volume(path: Path, shape: tuple[int, ...] = (9, 10, 11), seed: int = 0) -> np.ndarray:
    # noise does not compress, so that half a file is half the voxels
    array = np.random.default_rng(seed).random(shape, dtype=np.float32)
    nib.save(nib.Nifti1Image(array, AFFINE), path)
    return array


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_volume_with_its_geometry(tmp_path: Path, name: str) -> None:
    array = volume(tmp_path / name)
    loaded = LoadVolumed(["image"])({"image": str(tmp_path / name), "other": 3})
    assert loaded.keys() >= {"image", "other"} and loaded["other"] == 3
    image = loaded["image"]
    assert isinstance(image, MetaTensor)
    np.testing.assert_array_equal(image.numpy(), array)
    np.testing.assert_allclose(image.affine.numpy(), AFFINE)
    np.testing.assert_array_equal(image.meta["spatial_shape"], array.shape)
    assert image.meta["filename_or_obj"] == str(tmp_path / name)


def test_same_as_monai(tmp_path: Path) -> None:
    data = {}
    for i, key in enumerate(("image", "label", "mask")):
        volume(tmp_path / f"{key}.nii.gz", (4 + i, 5, 6), seed=i)
        data[key] = tmp_path / f"{key}.nii.gz"
    arguments = {"keys": ["image", "label"], "reader": NibabelReader, "dtype": torch.float64}
    ours, theirs = LoadVolumed(**arguments)(dict(data)), LoadImaged(**arguments)(dict(data))
    assert ours.keys() == theirs.keys()
    assert ours["mask"] == data["mask"]
    for key in ("image", "label"):
        assert torch.equal(ours[key], theirs[key])
        assert ours[key].dtype == torch.float64
        assert ours[key].meta.keys() == theirs[key].meta.keys()
        assert ours[key].meta["filename_or_obj"] == theirs[key].meta["filename_or_obj"]


def test_images_without_their_meta_data_are_not_to_be_had(tmp_path: Path) -> None:
    volume(tmp_path / "image.nii.gz")
    loaded = LoadVolumed("image", image_only=True)({"image": str(tmp_path / "image.nii.gz")})
    assert set(loaded) == {"image"}
    with pytest.raises(ValueError, match="image_only must be True, got False"):
        LoadVolumed("image", image_only=False)


def test_reader_may_be_given_with_the_call(tmp_path: Path) -> None:
    array = volume(tmp_path / "a.nii.gz")
    loaded = LoadVolumed(["image"])({"image": str(tmp_path / "a.nii.gz")}, reader=NibabelReader())
    np.testing.assert_array_equal(loaded["image"].numpy(), array)


def test_missing_keys(tmp_path: Path) -> None:
    array = volume(tmp_path / "a.nii.gz")
    data = {"image": str(tmp_path / "a.nii.gz")}
    loaded = LoadVolumed(["image", "label"], allow_missing_keys=True)(data)
    assert set(loaded) == {"image"}
    np.testing.assert_array_equal(loaded["image"].numpy(), array)
    # the input keeps its path
    assert data == {"image": str(tmp_path / "a.nii.gz")}
    with pytest.raises(KeyError, match="label"):
        LoadVolumed(["image", "label"])(data)


def test_label_maps_keep_their_values(tmp_path: Path) -> None:
    labels = np.array([0, 1, 3, 2035, 17], np.int16)[np.random.default_rng(0).integers(0, 5, (5, 6, 7))]
    nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "l.nii.gz")
    loaded = LoadVolumed(["label"])({"label": str(tmp_path / "l.nii.gz")})
    np.testing.assert_array_equal(loaded["label"].numpy(), labels)


# file name, what becomes of a whole .nii.gz file
ILL_CASES: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    "missing": ("missing.nii.gz", None),
    "missing of unknown type": ("missing.xyz", None),
    "empty": ("empty.nii.gz", lambda data: b""),
    "half": ("half.nii.gz", lambda data: data[: len(data) // 2]),
    "all but the end": ("end.nii.gz", lambda data: data[:-200]),
    "the head": ("head.nii.gz", lambda data: data[:20]),
    "half, not compressed": ("half.nii", lambda data: gzip.decompress(data)[:1000]),
    "unknown kind of voxels": (
        "kind.nii",
        lambda data: (lambda raw: raw[:70] + struct.pack("<h", -1) + raw[72:])(gzip.decompress(data)),
    ),
    "text": ("text.nii.gz", lambda data: b"not an image\nat all\n" * 50),
    "text, not compressed": ("text.nii", lambda data: b"not an image\nat all\n" * 50),
    "compressed text": ("gztext.nii.gz", lambda data: gzip.compress(b"not an image\n" * 50)),
    "text as MetaImage": ("text.mha", lambda data: b"not an image\nat all\n" * 50),
    "text as NRRD": ("text.nrrd", lambda data: b"not an image\nat all\n" * 50),
    "text as picture": ("text.png", lambda data: b"not an image\nat all\n" * 50),
    "unknown type": ("scan.xyz", lambda data: b"not an image\nat all\n" * 50),
}


@pytest.mark.parametrize("key", ["image", "fixed_label"])
@pytest.mark.parametrize(("name", "change"), ILL_CASES.values(), ids=ILL_CASES)
def test_unreadable_file_is_named_in_one_sentence(
    tmp_path: Path, name: str, change: Callable[[bytes], bytes] | None, key: str
) -> None:
    volume(tmp_path / "good.nii.gz", (17, 18, 19))
    path = tmp_path / name
    if change is not None:
        path.write_bytes(change((tmp_path / "good.nii.gz").read_bytes()))
    data = {"good": str(tmp_path / "good.nii.gz"), key: str(path)}
    with pytest.raises(ValueError) as caught:
        LoadVolumed(["good", key])(data)
    message = str(caught.value)
    assert message.startswith(f"cannot read {key} '{path}': ")
    # a reason, in one line
    assert len(message) > len(f"cannot read {key} '{path}': ") + 5
    assert "\n" not in message
    assert caught.value.__cause__ is not None
    # the same file is read alright elsewhere
    assert LoadVolumed(["good"])(data)["good"].shape == (17, 18, 19)


def test_bad_arguments_are_monais_to_refuse() -> None:
    with pytest.raises(ValueError, match="got 2 and 3"):
        LoadVolumed(["a", "b"], meta_keys=["x", "y", "z"])
