# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Training the brain model on synthetic images, from a small folder of made-up head label maps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from monai.bundle import ConfigParser, ConfigWorkflow

CONFIGS = Path(__file__).resolve().parents[2] / "bundle" / "configs"
SKULL, SKIN = 515, 516
SIZES = {"spatial_size": [32, 40, 32], "crop_size": [32, 32, 32]}


def head(shape: tuple[int, ...], ids: list[int], seed: int) -> np.ndarray:
    """A head of two shells around regions of the given labels, of random places."""
    state = np.random.RandomState(seed)
    places = np.indices(shape).astype(float)
    radius = np.sqrt(sum(((x - (s - 1) / 2) / (0.48 * s)) ** 2 for x, s in zip(places, shape)))
    seeds = np.ones(shape, dtype=bool)
    numbers = np.zeros(shape, dtype=int)
    for number in range(3 * len(ids)):
        place = tuple(state.randint(s // 5, s - s // 5) for s in shape)
        seeds[place], numbers[place] = False, ids[number % len(ids)]
    nearest = ndimage.distance_transform_edt(seeds, return_distances=False, return_indices=True)
    label = numbers[tuple(nearest)]
    label[radius > 0.7], label[radius > 0.85], label[radius > 1] = SKULL, SKIN, 0
    return label.astype(np.int16)


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    ids = list(json.loads((CONFIGS / "brain.json").read_text())["labels"].values())
    content: dict[str, list[dict[str, str]]] = {"training": [], "validation": []}
    for number in range(4):
        section, shape, spacing = ("training", (72, 88, 72), 1.0) if number < 2 else ("validation", (32, 40, 32), 2.0)
        label = head(shape, ids, number)
        entry = {"image": f"image_{number}.nii.gz", "label": f"label_{number}.nii.gz"}
        affine = np.diag([spacing, spacing, spacing, 1.0])
        nib.save(nib.Nifti1Image(label, affine), folder / entry["label"])
        nib.save(nib.Nifti1Image((label % 37).astype(np.float32), affine), folder / entry["image"])
        content[section].append(entry)
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_training_runs_and_resumes(
    heads: Path, workflow: Callable[..., ConfigWorkflow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"dataset_dir": str(heads), "max_epochs": 1, "saved_pairs": 0, **SIZES}
    run = workflow("train", "brain", **options)
    loss = run.parser.get_parsed_content("loss")
    run.run()
    # every term took part, the similarity of images that the network does not see among them
    assert set(loss.last_terms) == {"similarity", "regularization", "label"}
    assert -1 <= float(loss.last_terms["similarity"]) < -0.01
    assert 0 < float(loss.last_terms["label"]) < 1
    assert (tmp_path / "output" / "model.pt").is_file()
    resumed = workflow("train", "brain", **{**options, "max_epochs": 2, "resume": True})
    resumed.run()
    assert resumed.parser.get_parsed_content("train#trainer").state.iteration == 4


def test_pairs_are_synthetic(heads: Path, workflow: Callable[..., ConfigWorkflow]) -> None:
    run = workflow("train", "brain", dataset_dir=str(heads), skull_strip_prob=0.0, tight_strip_prob=0.0, **SIZES)
    dataset = run.parser.get_parsed_content("train#dataset")
    torch.manual_seed(0)
    first, second = dataset[0], dataset[0]
    torch.manual_seed(0)
    again = dataset[0]
    brain = run.parser.get_parsed_content("num_brain_labels")
    for role in ("moving", "fixed"):
        image, anatomy, label = (first[f"{role}_{key}"] for key in ("image", "anatomy", "label"))
        assert image.shape == anatomy.shape == label.shape == (1, 32, 32, 32)
        assert torch.equal(image, again[f"{role}_image"])
        assert not torch.equal(image, second[f"{role}_image"])
        assert 0 <= float(image.min()) < float(image.max()) <= 1
        assert int((label > brain).sum()) > 0
        # nothing but brain is compared
        outside = torch.from_numpy(ndimage.minimum_filter(label[0].numpy(), 3) > brain)[None]
        assert int(outside.sum()) > 0
        assert not anatomy[outside].any()
    assert not torch.equal(first["moving_label"], first["fixed_label"])


def test_stripped_heads_are_brain_only(heads: Path, workflow: Callable[..., ConfigWorkflow]) -> None:
    run = workflow("train", "brain", dataset_dir=str(heads), skull_strip_prob=1.0, **SIZES)
    dataset = run.parser.get_parsed_content("train#dataset")
    inner = run.parser.get_parsed_content("num_inner_labels")
    for _ in range(3):
        pair = dataset[0]
        assert max(int(pair[f"{role}_label"].max()) for role in ("moving", "fixed")) <= inner


def test_labels_are_in_order() -> None:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / "brain.json")])
    ids = parser.get_parsed_content("all_ids")
    assert len(set(ids)) == len(ids)
    scored = parser.get_parsed_content("label_ids")
    assert ids[: len(scored)] == scored
    # a head is stripped of what comes after the brain and its fluid
    assert all(i >= 500 for i in ids[parser.get_parsed_content("num_inner_labels") :])
    assert all(i < 500 for i in ids[: parser.get_parsed_content("num_inner_labels")])
    anatomy = dict(zip([0, *ids], parser.get_parsed_content("anatomy")))
    assert anatomy[0] < anatomy[4] < anatomy[3] < anatomy[10] < anatomy[2]
    brain = parser.get_parsed_content("brain_anatomy")
    assert len(brain) == parser.get_parsed_content("num_brain_labels") + 1
    assert brain[0] == 0
    tissues = parser.get_parsed_content("tissues")
    assert [[ids[number - 1] for number in group] for group in tissues] == parser.get_parsed_content("tissue_ids")
