# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Pairs, caches and augmentation as the bundle's configs give them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

from monai_sacb.transforms import RefuseFieldsd

Make = Callable[..., ConfigWorkflow]


@pytest.fixture
def brains(sample: Path, tmp_path: Path) -> Path:
    """The sample as a folder of pickled subjects, one of the training subjects as the atlas."""
    content = json.loads((sample / "dataset.json").read_text())
    folder = tmp_path / "brains"
    for section, name in (("training", "Train"), ("validation", "Val")):
        for i, entry in enumerate(content[section]):
            arrays = tuple(np.asarray(nib.load(sample / entry[key]).dataobj) for key in ("image", "label"))
            path = folder / "atlas.pkl" if (section, i) == ("training", 0) else folder / name / f"subject_{i}.pkl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(pickle.dumps(arrays))
    return folder


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_training_from_an_atlas(workflow: Make, brains: Path, tmp_path: Path, cache: str) -> None:
    options = {} if cache == "memory" else {"cache_dir": str(tmp_path / "cache")}
    flow = workflow(
        "train", dataset_dir=str(brains), pairs="atlas_to_subject", label_weight=0.1, batch_size=2, **options
    )
    train, validate = (flow.parser.get_parsed_content(f"{name}#dataset") for name in ("train", "validate"))
    assert train.pairs == [(2, 0), (2, 1)] and len(validate) == 2
    flow.run()
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert summary["pairs"] == 2 and 0.2 < summary["val_dice/mean"] < 1
    assert not options or len(list((tmp_path / "cache").iterdir())) == 6


def test_pairs_of_a_csv_file(workflow: Make, sample: Path, tmp_path: Path) -> None:
    images = [str(sample / entry["image"]) for entry in json.loads((sample / "dataset.json").read_text())["training"]]
    (tmp_path / "train.csv").write_text("moving,fixed\n" + ",".join(images[:2]) + "\n")
    flow = workflow("train", pairs=str(tmp_path / "train.csv"))
    train, validate = (flow.parser.get_parsed_content(f"{name}#request") for name in ("train", "validate"))
    assert train["pairs"] == [(0, 1)] and [subject["image"] for subject in train["data"]] == images[:2]
    # the dataset knows the label maps of the two
    assert [Path(subject["label"]).name for subject in train["data"]] == [Path(image).name for image in images[:2]]
    # validation is on the dataset's own subjects
    assert len(validate["data"]) == 2 and validate["pairs"] is None


def augmented(workflow: Make, **options: Any) -> Any:
    flow = workflow("train", "augment", **options)
    # after the network's start, which draws random numbers
    dataset, reference = (flow.parser.get_parsed_content(f"{name}#dataset") for name in ("train", "validate"))
    assert len(reference.pair_transform.transforms) >= 1
    return dataset


def test_augmentation_keeps_a_pair_together(workflow: Make) -> None:
    """Where both images are one and the same, they stay so, and so do labels; the label map follows the image."""
    dataset = augmented(workflow, intensity_prob=0.0, label_weight=1.0, use_masks=True)
    dataset.pairs = [(0, 0)]
    plain = dataset.subjects[0]
    moved = 0
    for seed in range(6):
        torch.manual_seed(seed)
        item = dataset[0]
        for key in ("image", "label", "field_of_view"):
            moving, fixed = item[f"moving_{key}"], item[f"fixed_{key}"]
            assert moving.shape == plain[key].shape
            assert torch.equal(moving.as_tensor(), fixed.as_tensor())
            assert torch.equal(moving.affine, fixed.affine)
        moved += not torch.equal(item["moving_image"].as_tensor(), plain["image"].as_tensor())
        assert item["moving_label"].dtype == torch.uint8
        assert set(item["moving_label"].unique().tolist()) <= {0, 1, 2, 3}
        # brain is where the image is bright, before and after
        image, label = (item[f"moving_{key}"].as_tensor()[0] for key in ("image", "label"))
        assert image[label > 0].mean() > 5 * image[label == 0].mean()
    assert moved >= 4


def test_points_stay_on_their_anatomy(workflow: Make) -> None:
    """A landmark in millimetres is at the voxel where the augmented image shows it."""
    dataset = augmented(workflow, intensity_prob=0.0)
    pair = dataset.pair_transform.transforms[1:]
    image = dataset.subjects[0]["image"].clone()
    place = (torch.tensor(image.shape[1:]) // 2 + torch.tensor([3, -2, 1])).tolist()
    image[:] = 0
    image[(0, *place)] = 1
    image = torch.nn.functional.avg_pool3d(image[None], 3, 1, 1)[0]
    points = (image.affine @ torch.tensor([*place, 1.0], dtype=image.affine.dtype))[None, :3].float()
    item = {"moving_image": image, "fixed_image": image, "moving_points": points, "fixed_points": points}
    for seed in range(5):
        result = dict(item)
        for number, transform in enumerate(pair):
            if hasattr(transform, "set_random_state"):
                transform.set_random_state(100 * seed + number)
            result = transform(result)
        weights = result["fixed_image"].as_tensor()[0]
        grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in weights.shape), indexing="ij")).float()
        centre = (grid * weights).sum((1, 2, 3)) / weights.sum()
        torch.testing.assert_close(result["fixed_landmarks"][0], centre, atol=0.1, rtol=0)


def test_augmentation_repeats_with_the_seed(workflow: Make) -> None:
    dataset = augmented(workflow, moving_affine_prob=1.0)

    def draw() -> list[torch.Tensor]:
        set_determinism(5)
        return [dataset[i]["moving_image"].as_tensor().clone() for i in (0, 1, 0)]

    first, second = draw(), draw()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first[0], first[2])


def test_augmented_training_resumes_bit_by_bit(workflow: Make, tmp_path: Path) -> None:
    states = []
    for name, parts in (("whole", (3,)), ("broken", (1, 3))):
        for i, epochs in enumerate(parts):
            # the schedule is of the whole training, however soon it ends
            flow = workflow(
                "train",
                "augment",
                max_epochs=epochs,
                output_dir=str(tmp_path / name),
                resume=i > 0,
                **{"lr_scheduler#total_iters": 3},
            )
            flow.parser.get_parsed_content("train#trainer").run()
        states.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["network"])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_fields_are_refused() -> None:
    pair = {"moving_image": torch.zeros(1, 2, 2), "true_ddf": torch.zeros(2, 2, 2), "moving_ddf": "a path"}
    with pytest.raises(ValueError, match=r"\['true_ddf'\]"):
        RefuseFieldsd()(pair)
    del pair["true_ddf"]
    assert RefuseFieldsd()(pair) == pair
