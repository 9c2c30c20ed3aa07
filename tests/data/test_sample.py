# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from monai.metrics import DiceMetric
from monai.transforms import Compose, EnsureChannelFirstd

from monai_sacb.data import PairDataset, load_pairs, load_subjects, sample, sample_dataset
from monai_sacb.transforms import ComposeDDFd, LoadVolumed, WarpByDDFd

pytest.importorskip("nilearn")

SMALL: dict[str, Any] = {"num_training": 2, "num_validation": 2, "spacing": 8.0}
KEYS = {"image", "label", "ddf", "inverse_ddf"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(sample_dataset(tmp_path_factory.mktemp("cohort") / "sample", **SMALL))


@pytest.fixture(scope="module")
def subjects(cohort: Path) -> list[dict[str, np.ndarray]]:
    files = load_subjects(cohort) + load_subjects(cohort, "validation")
    return [{key: np.asarray(nib.load(path).dataobj) for key, path in subject.items()} for subject in files]


def no_making(*args: Any, **kwargs: Any) -> None:
    pytest.fail("the sample was made anew")


def contents(folder: Path) -> dict[str, Any]:
    arrays = {}
    for path in sorted(folder.rglob("*.nii.gz")):
        image = nib.load(path)
        arrays[str(path.relative_to(folder))] = (np.asarray(image.dataobj), image.affine)
    return arrays


def carried(points: np.ndarray, field: np.ndarray) -> np.ndarray:
    """``p + field(p)`` for points ``(3, N)`` in voxels, sampled by scipy."""
    components = [map_coordinates(field[..., i], points, order=1, mode="nearest") for i in range(3)]
    return points + np.stack(components)


def test_folder_is_a_decathlon_dataset(cohort: Path) -> None:
    description = json.loads((cohort / "dataset.json").read_text())
    assert description["labels"] == {"0": "background", "1": "csf", "2": "grey_matter", "3": "white_matter"}
    assert description["numTraining"] == 2
    training, validation = load_subjects(cohort), load_subjects(cohort, "validation")
    assert len(training) == len(validation) == 2
    assert load_pairs(cohort, validation) is None
    files = [path for subject in training + validation for path in subject.values()]
    assert len(set(files)) == 16
    assert {str(path) for path in cohort.rglob("*.nii.gz")} == set(files)
    assert all(subject.keys() == KEYS for subject in training + validation)
    assert stat.S_IMODE(cohort.stat().st_mode) == 0o755
    # nothing beside the folder
    assert os.listdir(cohort.parent) == [cohort.name]


def test_geometry(cohort: Path, subjects: list[dict[str, np.ndarray]]) -> None:
    shape = subjects[0]["image"].shape
    assert len(shape) == 3 and min(shape) >= 20
    files = load_subjects(cohort) + load_subjects(cohort, "validation")
    for paths, subject in zip(files, subjects):
        assert {subject[key].shape for key in ("image", "label")} == {shape}
        assert {subject[key].shape for key in ("ddf", "inverse_ddf")} == {(*shape, 3)}
        headers = [nib.load(path) for path in paths.values()]
        for header in headers:
            assert nib.aff2axcodes(header.affine) == ("R", "A", "S")
            np.testing.assert_allclose(np.abs(header.affine[:3, :3]), 8.0 * np.eye(3), atol=1e-6)
            np.testing.assert_array_equal(header.affine, headers[0].affine)


def test_images_and_labels_look_like_brains(subjects: list[dict[str, np.ndarray]]) -> None:
    for subject in subjects:
        image, label = subject["image"], subject["label"]
        assert image.dtype == np.int16 and label.dtype == np.uint8
        assert set(np.unique(label)) == {0, 1, 2, 3}
        assert image.min() == 0 and image.max() > 200
        assert not image[label == 0].any()
        # T1: fluid is darker than grey matter, which is darker than white matter
        csf, grey, white = (image[label == value].mean() for value in (1, 2, 3))
        assert csf < grey < white
        # the head ends before the grid does
        for axis in range(3):
            assert not np.take(label, [0, -1], axis).any()
        # 1.1 to 2.5 litres
        assert 1.1e6 < (label > 0).sum() * 8.0**3 < 2.5e6


def test_subjects_differ(subjects: list[dict[str, np.ndarray]]) -> None:
    for i, first in enumerate(subjects):
        for second in subjects[i + 1 :]:
            assert (first["label"] != second["label"]).mean() > 0.05
            # fields of their own, not copies or multiples of one
            similarity = np.corrcoef(first["ddf"].ravel(), second["ddf"].ravel())[0, 1]
            assert abs(similarity) < 0.5
            assert first["image"].max() != second["image"].max()


@pytest.mark.parametrize("key", ["ddf", "inverse_ddf"])
def test_fields_do_not_fold(subjects: list[dict[str, np.ndarray]], key: str) -> None:
    for subject in subjects:
        field = subject[key].astype(np.float64)
        jacobian = np.stack(
            [np.stack(np.gradient(field[..., i]), -1) + np.eye(3)[i] for i in range(3)],
            -2,
        )
        determinant = np.linalg.det(jacobian)
        assert determinant.min() > 0.05
        # and are worth a registration: displacements of several mm, real growth and shrinkage
        length = 8.0 * np.linalg.norm(field, axis=-1)
        assert 2.0 < length[subject["label"] > 0].mean() < 15.0
        assert determinant.min() < 0.7 and determinant.max() > 1.4
        # nothing leaves the grid
        for axis in range(3):
            np.testing.assert_allclose(np.take(field, [0, -1], axis)[..., axis], 0.0, atol=1e-4)


@pytest.mark.parametrize("order", [("ddf", "inverse_ddf"), ("inverse_ddf", "ddf")], ids=" then ".join)
def test_fields_invert_each_other(subjects: list[dict[str, np.ndarray]], order: tuple[str, str]) -> None:
    for subject in subjects:
        inside = np.argwhere(subject["label"] > 0).T.astype(np.float64)
        there = carried(inside, subject[order[0]])
        back = carried(there, subject[order[1]])
        error = np.linalg.norm(back - inside, axis=0)
        moved = np.linalg.norm(there - inside, axis=0)
        assert error.mean() < 0.1 * moved.mean()
        assert error.max() < 0.5


def test_subject_is_the_template_at_the_field(cohort: Path, subjects: list[dict[str, np.ndarray]]) -> None:
    from nilearn import datasets

    load = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    templates = [image(resolution=1) for image in load]
    t1, grey, white = (
        gaussian_filter(np.clip(np.asarray(t.dataobj, np.float32), 0, None), 0.42 * SMALL["spacing"]) for t in templates
    )
    subject = subjects[0]
    to_world = nib.load(load_subjects(cohort)[0]["image"]).affine
    label, affine = subject["label"], np.linalg.inv(templates[0].affine) @ to_world
    inside = np.argwhere(label > 0).T
    tissues = []
    for points in (inside + subject["ddf"][tuple(inside)].T, inside):
        voxels = affine[:3, :3] @ points + affine[:3, 3:]
        g, w = (map_coordinates(t, voxels, order=1) for t in (grey, white))
        tissues.append(np.stack([1 - g - w, g, w]).argmax(0) + 1)
    assert (tissues[0] == label[tuple(inside)]).mean() > 0.999
    # not so without the field
    assert (tissues[1] == label[tuple(inside)]).mean() < 0.9
    # the brain's surface, likewise
    everywhere = np.indices(label.shape).reshape(3, -1)
    voxels = affine[:3, :3] @ (everywhere + subject["ddf"].reshape(-1, 3).T) + affine[:3, 3:]
    brain = map_coordinates(t1, voxels, order=1) > 0.1 * np.percentile(
        np.asarray(templates[0].dataobj)[np.asarray(templates[0].dataobj) > 0], 99.5
    )
    assert (brain == (label.ravel() > 0)).mean() > 0.999


def dice(cohort: Path, compose_ddf: Callable | None) -> torch.Tensor:
    """Mean Dice of each structure over all pairs of the validation subjects, moving label on fixed label."""
    keys = sorted(KEYS)
    transform = Compose(
        [
            LoadVolumed(keys),
            EnsureChannelFirstd(["image", "label"]),
            EnsureChannelFirstd(["ddf", "inverse_ddf"], channel_dim=-1),
        ]
    )
    pairs = PairDataset(load_subjects(cohort, "validation"), transform, progress=False)
    metric = DiceMetric(include_background=False, num_classes=4, reduction="mean_batch")
    warped = WarpByDDFd("moving_label", "warped_label", ddf_key="true_ddf", mode="nearest")
    for pair in pairs:
        moved = pair["moving_label"] if compose_ddf is None else warped(compose_ddf(pair))["warped_label"]
        metric(moved[None].as_tensor(), pair["fixed_label"][None].as_tensor())
    return metric.aggregate()


def test_true_field_lays_one_subject_on_another(cohort: Path) -> None:
    before = dice(cohort, None)
    after = dice(cohort, ComposeDDFd(["fixed_ddf", "moving_inverse_ddf"], "true_ddf"))
    assert (after > before + 0.12).all(), (before, after)
    assert after[1:].min() > 0.78 > 0.74 > before[1:].max()
    # neither the reverse field nor one of the two alone
    reverse = dice(cohort, ComposeDDFd(["moving_ddf", "fixed_inverse_ddf"], "true_ddf"))
    doubled = dice(cohort, ComposeDDFd(["fixed_inverse_ddf", "moving_ddf"], "true_ddf"))
    assert reverse.mean() < before.mean() + 0.05
    assert doubled.mean() < before.mean() + 0.05


def test_same_seed_same_bits(tmp_path: Path, cohort: Path) -> None:
    torch.manual_seed(123)
    np.random.seed(123)
    again = contents(Path(sample_dataset(str(tmp_path / "again"), **SMALL, seed=0)))
    first = contents(cohort)
    assert again.keys() == first.keys() and len(first) == 16
    for name, (array, affine) in first.items():
        assert again[name][0].tobytes() == array.tobytes(), name
        np.testing.assert_array_equal(again[name][1], affine)
    assert (tmp_path / "again" / "dataset.json").read_text() == (cohort / "dataset.json").read_text()


def test_other_seed_other_subjects(tmp_path: Path, cohort: Path) -> None:
    other = contents(Path(sample_dataset(tmp_path / "other", **SMALL, seed=1)))
    for name, (array, affine) in contents(cohort).items():
        assert not np.array_equal(other[name][0], array), name
        # the grid does not depend on chance
        np.testing.assert_array_equal(other[name][1], affine)


def test_global_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    sample_dataset(tmp_path / "sample", **SMALL)
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])


def test_numbers_and_spacing(tmp_path: Path, cohort: Path) -> None:
    folder = sample_dataset(tmp_path / "deep" / "sample", num_training=3, num_validation=2, spacing=7)
    assert folder == str(tmp_path / "deep" / "sample")
    assert [len(load_subjects(folder, section)) for section in ("training", "validation")] == [3, 2]
    image = nib.load(load_subjects(folder)[0]["image"])
    np.testing.assert_allclose(image.header.get_zooms(), 7.0)
    coarse = nib.load(load_subjects(cohort)[0]["image"])
    # the same part of the world, up to a voxel
    extents = [np.array(i.shape) * i.header.get_zooms() for i in (image, coarse)]
    np.testing.assert_allclose(extents[0], extents[1], atol=9.0)


def test_existing_sample_is_used(tmp_path: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in cohort.rglob("*")}
    monkeypatch.setattr(sample, "_write_sample", no_making)
    assert sample_dataset(cohort, **SMALL) == str(cohort)
    # whatever the number type
    assert sample_dataset(str(cohort), num_training=2, num_validation=2, spacing=8, seed=0) == str(cohort)
    assert {path: path.stat().st_mtime_ns for path in cohort.rglob("*")} == before


@pytest.mark.parametrize(
    "other", [{"seed": 3}, {"num_training": 3}, {"num_validation": 5}, {"spacing": 6.5}], ids=lambda o: next(iter(o))
)
def test_sample_of_other_arguments_is_refused(cohort: Path, other: dict[str, Any]) -> None:
    ((name, value),) = other.items()
    with pytest.raises(ValueError, match=rf"{cohort.name}' exists and .*'{name}': {value}"):
        sample_dataset(cohort, **{**SMALL, **other})


FOREIGN: dict[str, str | None] = {
    "empty folder": None,
    "other dataset": '{"training": []}',
    "JSON list": "[1, 2]",
    "not JSON": "training:",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    monkeypatch.setattr(sample, "_write_sample", no_making)
    folder = tmp_path / "mine"
    folder.mkdir()
    if content is not None:
        (folder / "dataset.json").write_text(content)
        (folder / "scan.nii.gz").write_bytes(b"precious")
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match=r"mine' exists and is not a sample"):
        sample_dataset(folder, **SMALL)
    assert sorted(os.listdir(folder)) == before
    assert os.listdir(tmp_path) == ["mine"]


def test_file_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match=r"mine' exists and is not a sample"):
        sample_dataset(tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    make = sample._subject
    made: list[int] = []

    def failing(*args: Any) -> Any:
        if len(made) == 2:
            # two subjects are on disk by now, under a name that is not the sample's
            assert len(list(tmp_path.rglob("*.nii.gz"))) == 8
            assert not (tmp_path / "sample").exists()
            raise error
        made.append(1)
        return make(*args)

    monkeypatch.setattr(sample, "_subject", failing)
    with pytest.raises(type(error)):
        sample_dataset(tmp_path / "sample", **SMALL)
    assert len(made) == 2
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    # and the next try works
    assert len(load_subjects(sample_dataset(tmp_path / "sample", **SMALL))) == 2


def test_without_nilearn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "optional_import", lambda name: (None, False))
    with pytest.raises(ModuleNotFoundError, match=r"nilearn.*dataset_dir"):
        sample_dataset(tmp_path / "sample", **SMALL)
    assert os.listdir(tmp_path) == []


# (arguments, message)
ILL_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "one to train on": ({"num_training": 1}, r"got 1, 4"),
    "nobody to train on": ({"num_training": 0}, r"got 0, 4"),
    "one to evaluate on": ({"num_validation": 1}, r"got 12, 1"),
    "negative number": ({"num_training": -2, "num_validation": 3}, r"got -2, 3"),
    "too fine": ({"spacing": 0.5}, r"got 0\.5"),
    "too coarse": ({"spacing": 8.5}, r"got 8\.5"),
    "negative spacing": ({"spacing": -4.0}, r"got -4\.0"),
    "NaN": ({"spacing": float("nan")}, r"got nan"),
}


@pytest.mark.parametrize(("arguments", "message"), ILL_CASES.values(), ids=ILL_CASES)
def test_ill_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(sample, "_write_sample", no_making)
    with pytest.raises(ValueError, match=message):
        sample_dataset(tmp_path / "sample", **arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("shape", [(60, 64), (28, 32, 36)], ids=str)
def test_random_velocity(shape: tuple[int, ...]) -> None:
    from monai_sacb.data.sample import random_velocity

    smooth, rough = (
        random_velocity(shape, ((sigma, 2.0),), np.random.default_rng(0))[0].numpy() for sigma in (5.0, 1.0)
    )
    for velocity in (smooth, rough):
        assert velocity.shape == (len(shape), *shape)
        for axis in range(len(shape)):
            np.testing.assert_allclose(np.take(velocity, [0, -1], axis + 1), 0.0, atol=1e-6)
    # the strength is the root mean square of each component before it tapers off
    inner = rough[(slice(None), *[slice(4, -4)] * len(shape))].reshape(len(shape), -1)
    np.testing.assert_allclose(np.sqrt((inner**2).mean(1)), 2.0, rtol=0.25)
    # rougher by its own measure
    slope = [np.sqrt((np.diff(v[:, 6:-6, 6:-6], axis=1) ** 2).mean()) for v in (smooth, rough)]
    assert slope[1] > 2.5 * slope[0]
    # components of their own, in proportion to the strength
    assert abs(np.corrcoef(smooth[0].ravel(), smooth[1].ravel())[0, 1]) < 0.9
    double = random_velocity(shape, ((5.0, 4.0),), np.random.default_rng(0))[0].numpy()
    np.testing.assert_allclose(double, 2 * smooth, rtol=1e-5, atol=1e-6)
