# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Each mistake of a user ends in one sentence that says what is wrong, and nothing is left behind."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai.bundle import ConfigWorkflow

from monai_sacb.networks.nets import SACBNet

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., ConfigWorkflow]


def write(path: Path, array: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Good and bad image files by name."""
    rng = np.random.default_rng(0)
    volume = rng.random((33, 34, 35), dtype=np.float32)
    nan, infinite = volume.copy(), volume.copy()
    nan[3, 4, 5] = np.nan
    infinite[3, 4, 5] = np.inf
    result = {
        "good": write(tmp_path / "good.nii.gz", volume),
        "flat": write(tmp_path / "flat.nii.gz", volume[0]),
        "slice": write(tmp_path / "slice.nii.gz", volume[:, :, :1]),
        "channels": write(tmp_path / "channels.nii.gz", np.stack([volume, volume], -1)),
        "nan": write(tmp_path / "nan.nii.gz", nan),
        "infinite": write(tmp_path / "infinite.nii.gz", infinite),
        "missing": str(tmp_path / "missing.nii.gz"),
        "text": str(tmp_path / "text.nii.gz"),
        "truncated": str(tmp_path / "truncated.nii.gz"),
        "short": str(tmp_path / "short.nii.gz"),
    }
    Path(result["text"]).write_text("this is not an image")
    whole = Path(result["good"]).read_bytes()
    Path(result["truncated"]).write_bytes(whole[: len(whole) // 2])
    # a whole gzip stream of half a volume
    Path(result["short"]).write_bytes(gzip.compress(gzip.decompress(whole)[:20000]))
    return result


def message_of(error: BaseException | None) -> str:
    """The messages of an exception and of all that it was raised from."""
    messages = []
    while error is not None:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(messages)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "weights.pt"
    torch.save(SACBNet(base_channels=2, num_clusters=3).state_dict(), path)
    return str(path)


PAIR_CASES = [
    ("missing", "good", "missing.nii.gz' does not exist"),
    ("good", "missing", "missing.nii.gz' does not exist"),
    ("text", "good", "cannot read image '.*text.nii.gz'"),
    ("good", "truncated", "cannot read image '.*truncated.nii.gz'"),
    ("short", "good", "cannot read image '.*short.nii.gz'"),
    ("flat", "good", r"flat.nii.gz' is a 2-D image of size .*needs 3-D images"),
    ("slice", "good", r"slice.nii.gz' is a 2-D image of size .*needs 3-D images"),
    ("channels", "good", "channels.nii.gz' has 2 channels; the network needs 1"),
    ("good", "nan", "nan.nii.gz' has 1 NaN or infinite voxels"),
    ("infinite", "good", "infinite.nii.gz' has 1 NaN or infinite voxels"),
]


@pytest.mark.parametrize("moving, fixed, sentence", PAIR_CASES)
def test_bad_pair(
    workflow: Make, files: dict[str, str], weights: str, tmp_path: Path, moving: str, fixed: str, sentence: str
) -> None:
    flow = workflow(
        "inference",
        workflow_type="infer",
        moving_image=files[moving],
        fixed_image=files[fixed],
        ckpt_path=weights,
    )
    with pytest.raises(Exception) as caught:
        flow.run()
    assert re.search(sentence, message_of(caught.value)), message_of(caught.value)
    assert not list((tmp_path / "output").rglob("*.nii.gz"))


def dataset(folder: Path, content: object) -> str:
    folder.mkdir()
    (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


DATASET_CASES = [
    ("{not json", "dataset.json' is not a JSON file"),
    ([1, 2], "is not a dataset description"),
    ({"name": "x"}, "has no list 'training'"),
    ({"training": []}, "lists 0 training subjects"),
    ({"training": [{"image": "./nowhere.nii.gz"}]}, "training.0.: image '.*nowhere.nii.gz' does not exist"),
    ({"training": [{"label": "./a.nii.gz"}]}, "must be a path or an object with a path 'image'"),
]


@pytest.mark.parametrize("content, sentence", DATASET_CASES)
def test_bad_dataset(workflow: Make, tmp_path: Path, content: object, sentence: str) -> None:
    flow = workflow("train", dataset_dir=dataset(tmp_path / "data", content))
    with pytest.raises(Exception) as caught:
        flow.run()
    assert re.search(sentence, message_of(caught.value)), message_of(caught.value)
    assert not (tmp_path / "output" / "model.pt").exists()


def test_missing_dataset(workflow: Make, tmp_path: Path) -> None:
    flow = workflow("train", dataset_dir=str(tmp_path / "nowhere"))
    with pytest.raises(Exception) as caught:
        flow.run()
    assert "no dataset.json at" in message_of(caught.value)


def test_label_id_that_no_subject_has(workflow: Make) -> None:
    flow = workflow("train", labels={"csf": 1, "tumour": 9}, label_weight=1.0)
    with pytest.raises(Exception) as caught:
        flow.run()
    assert "label ids [9] are configured, but none of the" in message_of(caught.value)


def test_supervision_without_labels(workflow: Make, sample: Path, tmp_path: Path) -> None:
    content = json.loads((sample / "dataset.json").read_text())
    for section in ("training", "validation"):
        content[section] = [{"image": str(sample / entry["image"])} for entry in content[section]]
    flow = workflow("train", dataset_dir=dataset(tmp_path / "data", content), label_weight=1.0)
    with pytest.raises(Exception) as caught:
        flow.run()
    assert "the training needs the entry 'label', but less than two of its subjects have it" in message_of(caught.value)


def test_weights_of_another_network(workflow: Make, files: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    torch.save(SACBNet(base_channels=3).state_dict(), other)
    for path, sentence in (
        (other, "holds the weights of another network"),
        (files["text"], "is not a readable checkpoint"),
    ):
        flow = workflow(
            "inference",
            workflow_type="infer",
            moving_image=files["good"],
            fixed_image=files["good"],
            ckpt_path=str(path),
        )
        with pytest.raises(Exception) as caught:
            flow.run()
        assert sentence in message_of(caught.value)


def test_exit_code_of_the_command(files: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "bundle/configs/inference.json"]
    command += ["--moving_image", files["good"], "--output_dir", str(tmp_path / "output")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert "registration needs both moving_image and fixed_image, got only moving_image." in result.stderr
