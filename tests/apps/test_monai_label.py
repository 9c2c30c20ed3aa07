# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""A label bundle in MONAI Label's own code, the very class that its server runs for each request."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from label_task import LabelTask
from synthetic_pair import Pair

from monai_sacb.apps import label_bundle

Infer = Callable[[str | Path, str], tuple[np.ndarray, np.ndarray, dict[str, Any]]]


def import_torchvision() -> None:
    """Its wheel on PyPI cannot load its operators beside a torch for CPUs; MONAI Label needs but their names."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_torchvision.library = library  # type: ignore[attr-defined]
        importlib.import_module("torchvision")


@pytest.fixture(scope="module")
def infer() -> Iterator[Infer]:
    """``infer(bundle, image)``: label map, affine and JSON of the answer."""
    if importlib.util.find_spec("monailabel") is None:
        pytest.skip("monailabel is not installed; .ci/monailabel.txt says how, without its 3 GB of dependencies")
    import_torchvision()
    from monailabel.tasks.infer.bundle import BundleInferTask

    tasks: dict[str, Any] = {}

    def ask(bundle: str | Path, image: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        task = tasks.setdefault(str(bundle), None) or BundleInferTask(str(bundle), {})
        tasks[str(bundle)] = task
        assert task.is_valid()
        file, answer = task({"device": "cpu", "image": image, "model": "atlas"})
        try:
            written = nib.load(file)
            return np.asarray(written.dataobj), written.affine, {**answer, "info": task.info()}
        finally:
            os.unlink(file)

    yield ask


def test_dice_of_the_server_benchmark() -> None:
    """A structure that the answer has lost counts as 0; one that the atlas or the subject lacks is left out."""
    pytest.importorskip("requests")
    functions = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "label_server.py"))
    truth, answer = np.array([0, 3, 3, 5, 5, 8]), np.array([0, 3, 9, 3, 0, 3])
    found = functions["dice"](answer, truth, [3, 5, 9, 77])
    assert found == {3: pytest.approx(2 * 1 / (3 + 2)), 5: 0.0}
    assert functions["scores"](found, {"lost": {5}, "neither": {8}}) == "all 0.2000, lost 0.0000, neither none"


def test_answer(infer: Infer, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps({"3": "Outer", "1021": "inner"}))
    bundle = label_bundle(
        str(tmp_path / "atlas"),
        pair.moving,
        pair.moving_label,
        names=str(tmp_path / "names.json"),
        affine=False,
        refine=20,
    )
    labels, affine, answer = infer(bundle, pair.fixed)
    expected, _ = LabelTask(bundle)(pair.fixed)
    assert np.array_equal(labels, expected) and set(np.unique(labels)) == {0, 3, 1021}
    assert np.array_equal(affine, nib.load(pair.fixed).affine)
    assert answer["label_names"] == {"outer": 3, "inner": 1021} == answer["info"]["labels"]
    assert answer["info"]["type"] == "segmentation" and answer["info"]["dimension"] == 3
    assert answer["registration"][0]["similarity"] > answer["registration"][0]["similarity_affine"]
    truth = np.asarray(nib.load(pair.fixed_label).dataobj)
    inner = labels == 1021
    assert 2 * (inner & (truth == 1021)).sum() / (inner.sum() + (truth == 1021).sum()) > 0.9


def test_oblique_subject(infer: Infer, make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    """MONAI Label writes by ITK, which rounds oblique axes to 32-bit numbers once more."""
    turn = nib.eulerangles.euler2mat(0.3, -0.2, 0.1)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[0, 0, -2.5], [1.9, 0, 0], [0, 2.2, 0]])
    subject = make_pair(fixed_affine=affine)
    bundle = label_bundle(
        str(tmp_path / "atlas"), subject.moving, subject.moving_label, affine=False, refine=0, renumber=True
    )
    labels, written, answer = infer(bundle, subject.fixed)
    assert labels.shape == nib.load(subject.fixed).shape
    assert np.allclose(written, nib.load(subject.fixed).affine, rtol=1e-6, atol=1e-6)
    assert answer["label_names"] == {"3": 1, "1021": 2} and set(np.unique(labels)) == {0, 1, 2}
    assert labels.dtype == np.uint8


def test_network_in_the_bundle(infer: Infer, pair: Pair, tmp_path: Path) -> None:
    bundle = label_bundle(
        str(tmp_path / "atlas"),
        pair.moving,
        pair.moving_label,
        model="hippocampus_unsupervised",
        affine=False,
        refine=0,
    )
    labels, _, _ = infer(bundle, pair.fixed)
    assert np.array_equal(labels, LabelTask(bundle)(pair.fixed)[0])
    assert not np.array_equal(labels, np.asarray(nib.load(pair.moving_label).dataobj))
