# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from monai.data import DataLoader, MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Lambdad,
    Orientationd,
    RandFlipd,
    ScaleIntensityd,
    ScaleIntensityRanged,
)
from monai.utils import set_determinism

from monai_sacb.data import DiskCacheDataset, PairDataset
from monai_sacb.transforms import LoadVolumed, SelectLabelsd

AFFINE = np.diag([-2.0, 1.0, 3.0, 1.0])
KEYS = ["image", "label"]


def subjects(folder: Path, number: int = 3) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    data = []
    for i in range(number):
        files = {"image": str(folder / f"image_{i}.nii.gz"), "label": str(folder / f"label_{i}.nii.gz")}
        nib.save(nib.Nifti1Image(rng.random((4, 5, 6), dtype=np.float32), AFFINE), files["image"])
        nib.save(nib.Nifti1Image(rng.integers(0, 3, (4, 5, 6), dtype=np.uint8), AFFINE), files["label"])
        data.append(files)
    return data


def transform(scale: float = 1.0, *more: Any) -> Compose:
    return Compose(
        [
            LoadVolumed(KEYS),
            EnsureChannelFirstd(KEYS),
            Orientationd(KEYS, axcodes="RAS", labels=None),
            ScaleIntensityRanged("image", 0, 1, 0, scale),
            SelectLabelsd("label", [2, 1]),
            *more,
        ]
    )


def equal(a: Any, b: Any) -> bool:
    """Whether two values of meta data are the same, NaN included, as array, tensor or number."""
    first, second = np.asarray(a), np.asarray(b)
    return first.shape == second.shape and bool(((first == second) | ((first != first) & (second != second))).all())


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(
        isinstance(a[key], MetaTensor)
        and a[key].dtype == b[key].dtype
        and torch.equal(a[key].as_tensor(), b[key].as_tensor())
        and torch.equal(a[key].affine, b[key].affine)
        and {str(k) for k in a[key].meta} == {str(k) for k in b[key].meta}
        and all(equal(value, b[key].meta[str(name)]) for name, value in a[key].meta.items())
        and len(a[key].applied_operations) == len(b[key].applied_operations)
        for key in a
    )


def test_what_is_read_is_what_was_made(tmp_path: Path) -> None:
    data = subjects(tmp_path)
    plain = [transform()(subject) for subject in data]
    for _ in range(2):
        # each with new transforms, as a later run has them
        dataset = DiskCacheDataset(data, transform(), tmp_path / "cache")
        assert all(same(dataset[i], plain[i]) for i in (2, 0, 1))
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_batches_of_made_and_read_subjects(tmp_path: Path) -> None:
    data = subjects(tmp_path)
    DiskCacheDataset(data, transform(), tmp_path / "cache")[1]
    dataset = DiskCacheDataset(data, transform(), tmp_path / "cache")
    batch = next(iter(DataLoader(dataset, batch_size=3)))
    assert batch["image"].shape == (3, 1, 4, 5, 6) and batch["image"].meta["affine"].shape == (3, 4, 4)


def test_lazy_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = subjects(tmp_path)
    read: list[str] = []
    load = nib.load
    monkeypatch.setattr(nib, "load", lambda path, *a, **k: (read.append(Path(path).name), load(path, *a, **k))[1])
    dataset = PairDataset(data, transform(), cache_dir=tmp_path / "cache")
    assert read == []
    assert [dataset[0]["moving_image"].shape, len(read)] == [(1, 4, 5, 6), 4]
    for i in range(len(dataset)):
        assert dataset[i]["fixed_label"].meta["label_ids"] == "0 1 2"
    assert sorted(read) == sorted(Path(path).name for subject in data for path in subject.values())


def test_changed_settings_and_files_are_seen(tmp_path: Path) -> None:
    data = subjects(tmp_path)
    cache = tmp_path / "cache"
    one = DiskCacheDataset(data, transform(1.0), cache)[0]["image"]
    two = DiskCacheDataset(data, transform(2.0), cache)[0]["image"]
    torch.testing.assert_close(two.as_tensor(), 2 * one.as_tensor())
    nib.save(nib.Nifti1Image(np.full((4, 5, 6), 0.5, np.float32), AFFINE), data[0]["image"])
    os.utime(data[0]["image"], ns=(1, 1))
    assert (DiskCacheDataset(data, transform(1.0), cache)[0]["image"] == 0.5).all()


@pytest.mark.parametrize("damage", ["half", "empty", "text", "other", "code"])
def test_file_that_cannot_be_read_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.chdir(tmp_path)
    data = subjects(tmp_path)
    expected = DiskCacheDataset(data, transform(), tmp_path / "cache")[1]
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    if damage == "other":
        torch.save({"image": torch.zeros(3)}, path)
    else:
        code = pickle.dumps(Attack())
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"x" * 99, "code": code}[damage])
    assert same(DiskCacheDataset(data, transform(), tmp_path / "cache")[1], expected)
    assert same(DiskCacheDataset(data, transform(), tmp_path / "cache")[1], expected)
    assert len(list((tmp_path / "cache").iterdir())) == 1 and not (tmp_path / "pwned").exists()


class Attack:
    def __reduce__(self) -> Any:
        return exec, ("open('pwned', 'w')",)


def test_stopped_in_the_middle_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = subjects(tmp_path)

    def stop(content: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            DiskCacheDataset(data, transform(), tmp_path / "cache")[0]
    assert list((tmp_path / "cache").iterdir()) == []


def test_random_transforms_come_after(tmp_path: Path) -> None:
    data = subjects(tmp_path)
    flip = RandFlipd(KEYS, prob=0.5, spatial_axis=0)
    dataset = PairDataset(data, transform(1.0, flip), pairs=[(0, 1)] * 20, cache_dir=tmp_path / "cache")

    def draw() -> list[float]:
        set_determinism(3)
        return [float(item["moving_image"][0, 0, 0, 0]) for item in dataset]

    first = draw()
    assert len(set(first)) == 2 and draw() == first
    set_determinism(None)


def test_ill_formed(tmp_path: Path) -> None:
    data = subjects(tmp_path)
    with pytest.raises(ValueError, match="must be a folder"):
        DiskCacheDataset(data, transform(), data[0]["image"])
    with pytest.raises(ValueError, match="pickle can write"):
        DiskCacheDataset(data, transform(1.0, Lambdad("image", lambda x: x)), tmp_path / "cache")
    with pytest.raises(ValueError, match="cache_dir"):
        PairDataset(DiskCacheDataset(data, transform(), tmp_path / "cache"), cache_dir=tmp_path)
    for rate in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"got {rate}"):
            PairDataset(data, ScaleIntensityd("image"), cache_rate=rate)


def test_what_is_missing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        PairDataset([{"image": 0, "label": 1}, {"image": 1}, {"image": 2}], cache_rate=0.0)
    assert "Of 3 subjects 1 have 'label'" in caplog.text
