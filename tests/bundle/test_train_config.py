# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from scipy.ndimage import map_coordinates

from monai.bundle import ConfigWorkflow

from monai_sacb.handlers import LossWeightSchedule
from monai_sacb.networks.nets import SACBNet

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., ConfigWorkflow]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def test_properties(workflow: Make) -> None:
    assert workflow("train").check_properties() == []


def test_training_writes_everything_below_output_dir(
    workflow: Make, tmp_path: Path, sample: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = files_of(ROOT / "bundle"), files_of(sample)
    with caplog.at_level(logging.INFO):
        workflow("train", saved_pairs=2).run()
    assert (files_of(ROOT / "bundle"), files_of(sample)) == before
    output = tmp_path / "output"
    assert {"model.pt", "checkpoint.pt", "pairs.csv", "summary.json", "registration.png", "registered"} <= {
        path.name for path in output.iterdir()
    }
    net = SACBNet(base_channels=2, num_clusters=3)
    net.load_state_dict(state_of(output / "model.pt"))
    with open(output / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["moving"], row["fixed"]) for row in rows] == [("brain_03", "brain_04"), ("brain_04", "brain_03")]
    summary = json.loads((output / "summary.json").read_text())
    # two heads under different deformations overlap in part, and registering leaves some overlap
    assert 0.2 < summary["val_dice_before/mean"] < 0.9
    assert 0.2 < summary["val_dice/mean"] < 1.0
    assert summary["val_field_error_before_mm"] > 2.0
    assert "grey_matter" in caplog.text and "dice_before" in caplog.text
    pairs = sorted(path.name for path in (output / "registered").iterdir())
    assert pairs == ["brain_03_to_brain_04", "brain_04_to_brain_03"]
    fixed = nib.load(sample / "images" / "brain_04.nii.gz")
    for name in ("warped.nii.gz", "warped_label.nii.gz", "displacement.nii.gz"):
        image = nib.load(output / "registered" / "brain_03_to_brain_04" / name)
        assert image.shape[:3] == fixed.shape
        np.testing.assert_allclose(image.affine, fixed.affine)


def test_training_lowers_the_loss(workflow: Make) -> None:
    flow = workflow("train", max_epochs=5, pairs_per_epoch=6)
    losses: list[float] = []
    trainer = flow.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.output[0]["loss"])))
    trainer.run()
    assert len(losses) == 30 and np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.02


@pytest.mark.parametrize("interval, epochs", [(5, 2), (2, 3)])
def test_last_epoch_is_validated(workflow: Make, tmp_path: Path, interval: int, epochs: int) -> None:
    """However few the epochs, a training ends with weights and numbers of its own."""
    flow = workflow("train", max_epochs=epochs, pairs_per_epoch=1, val_interval=interval)
    flow.run()
    assert flow.parser.get_parsed_content("validate#evaluator").state.best_metric > 0
    assert (tmp_path / "output" / "model.pt").is_file() and (tmp_path / "output" / "summary.json").is_file()


def test_data_without_labels(workflow: Make, sample: Path, tmp_path: Path) -> None:
    content = json.loads((sample / "dataset.json").read_text())
    for section in ("training", "validation"):
        content[section] = [{"image": str(sample / entry["image"])} for entry in content[section]]
    folder = tmp_path / "unlabelled"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(content))
    workflow("train", dataset_dir=str(folder)).run()
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert summary.keys() == {"pairs", "val_folds_percent", "val_similarity"}
    assert 0.01 < summary["val_similarity"] < 1
    assert (tmp_path / "output" / "model.pt").is_file()


def test_data_with_points(workflow: Make, sample: Path, tmp_path: Path) -> None:
    """Key points in voxels of the files: places of the template, found in every subject by its own true field."""
    content = json.loads((sample / "dataset.json").read_text())
    folder = tmp_path / "points"
    folder.mkdir()
    template = np.random.default_rng(0).uniform(6, 12, (30, 3))
    for section in ("training", "validation"):
        for i, entry in enumerate(content[section]):
            entry.update({key: str(sample / path) for key, path in entry.items()})
            inverse = nib.load(entry["inverse_ddf"]).get_fdata()
            shifts = [map_coordinates(inverse[..., axis], template.T, order=1) for axis in range(3)]
            entry["keypoints"] = f"{section}_{i}.csv"
            np.savetxt(folder / entry["keypoints"], template + np.stack(shifts, -1), delimiter=",")
    (folder / "dataset.json").write_text(json.dumps(content))
    flow = workflow("train", dataset_dir=str(folder), max_epochs=1)
    flow.run()
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert 2.0 < summary["val_tre_before_mm"] < 40.0
    assert 0.0 < summary["val_tre_mm"] != summary["val_tre_before_mm"]
    # the true field in the place of the network's
    parsed = flow.parser.get_parsed_content
    pair = parsed("validate#dataset")[0]
    pair = parsed("validate#postprocessing")({**pair, "pred": torch.nan_to_num(pair["true_ddf"].as_tensor())})
    before, after = (
        (pair[key] - pair["moving_points"]).norm(dim=1).median() for key in ("unregistered_points", "warped_points")
    )
    assert after < 0.2 * before
    # training needs no points by itself
    assert not {"moving_points", "moving_landmarks", "moving_label"} & set(parsed("train#dataset")[0])
    # and can have them together with labels
    losses = {}
    for weight in (0.0, 0.1):
        given = {"dataset_dir": str(folder), "label_weight": 1.0, "landmark_weight": weight, "max_epochs": 1}
        both = workflow("train", **given, output_dir=str(tmp_path / str(weight)))
        trainer = both.parser.get_parsed_content("train#trainer")
        trainer.run()
        pair = both.parser.get_parsed_content("train#dataset")[0]
        assert "moving_label" in pair and ("moving_points" in pair) == (weight > 0)
        losses[weight] = {name for name in trainer.state.metrics if name.startswith("loss_")}
    assert losses[0.1] - losses[0.0] == {"loss_landmarks"} and "loss_label" in losses[0.0]


def test_resume_is_bit_equal(workflow: Make, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    workflow("train", max_epochs=4, output_dir=str(whole)).run()
    flow = workflow("train", max_epochs=4, output_dir=str(broken))
    trainer = flow.parser.get_parsed_content("train#trainer")

    def stop(engine: Any) -> None:
        raise KeyboardInterrupt

    # comes after the checkpoint of the second epoch, in the middle of the third
    trainer.add_event_handler(Events.ITERATION_STARTED(once=6), stop)
    with pytest.raises(KeyboardInterrupt):
        flow.run()
    assert state_of(broken / "checkpoint.pt")["epoch"] == 2
    # as the command line gives it
    workflow("train", max_epochs=4, output_dir=str(broken), resume="true").run()
    states = [state_of(folder / "checkpoint.pt") for folder in (whole, broken)]
    assert states[0]["epoch"] == states[1]["epoch"] == 4
    assert states[0]["best_metric"] == states[1]["best_metric"]
    for name, value in states[0]["network"].items():
        assert torch.equal(value, states[1]["network"][name]), name
    for index, moments in states[0]["optimizer"]["state"].items():
        assert torch.equal(moments["exp_avg"], states[1]["optimizer"]["state"][index]["exp_avg"])
    for name, value in state_of(whole / "model.pt").items():
        assert torch.equal(value, state_of(broken / "model.pt")[name]), name


@pytest.mark.parametrize("text, resumes", [("false", False), ("False", False), ("true", True), (True, True)])
def test_resume_given_as_text(workflow: Make, text: Any, resumes: bool) -> None:
    flow = workflow("train", resume=text)
    handlers = flow.parser.get_parsed_content("train#handlers")
    assert handlers[-1].resume is resumes


def test_two_trainings_have_the_same_bits(workflow: Make, tmp_path: Path) -> None:
    for name in ("one", "two"):
        workflow("train", output_dir=str(tmp_path / name)).run()
    one, two = (state_of(tmp_path / name / "checkpoint.pt")["network"] for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    "override",
    [
        {"label_weight": 1.0},
        {"loss#similarity": {"_target_": "LocalNormalizedCrossCorrelationLoss", "kernel_size": 9}},
        {"loss#similarity": {"_target_": "GlobalMutualInformationLoss"}},
        {"loss#regularization": {"_target_": "BendingEnergyLoss"}},
        {"loss#regularization": {"_target_": "DiffusionLoss"}},
        {"batch_size": 2},
        {"spatial_size": [40, 32, 48]},
        {"network_def#num_clusters": [2, 3, 4, 5]},
    ],
)
def test_overrides(workflow: Make, override: dict[str, Any]) -> None:
    flow = workflow("train", max_epochs=1, **override)
    network = flow.parser.get_parsed_content("network")
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    flow.parser.get_parsed_content("train#trainer").run()
    changed = [name for name, value in network.named_parameters() if not torch.equal(value, before[name])]
    assert len(changed) == len(before)
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def test_label_term_changes_the_training(workflow: Make, tmp_path: Path) -> None:
    states = []
    for weight in (0.0, 1.0):
        flow = workflow("train", max_epochs=1, label_weight=weight, output_dir=str(tmp_path / str(weight)))
        flow.parser.get_parsed_content("train#trainer").run()
        states.append(state_of(tmp_path / str(weight) / "checkpoint.pt")["network"])
    assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_evaluate_overlay_repeats_the_numbers_of_training(workflow: Make, tmp_path: Path) -> None:
    workflow("train").run()
    trained = json.loads((tmp_path / "output" / "summary.json").read_text())
    weights = (tmp_path / "output" / "model.pt").read_bytes()
    other = tmp_path / "evaluation"
    flow = workflow("train", "evaluate", output_dir=str(other), ckpt_path=str(tmp_path / "output" / "model.pt"))
    flow.run_id = "evaluating"
    flow.run()
    evaluated = json.loads((other / "summary.json").read_text())
    assert {name: evaluated[name] for name in trained} == trained
    # an evaluation by itself measures more
    more = {"val_hd95_mm/mean", "val_surface_dice/grey_matter", "val_ndv_percent", "val_sdlogj", "seconds"}
    assert more | {"val_dice/mean_low95", "val_dice/mean_high95"} <= evaluated.keys()
    assert {"pairs.csv", "structures.csv", "structures.png"} <= {path.name for path in other.iterdir()}
    assert not (other / "pairs.jsonl").exists()
    assert (tmp_path / "output" / "model.pt").read_bytes() == weights
    assert not (other / "model.pt").exists() and not (other / "checkpoint.pt").exists()


def test_evaluate_with_refinement(workflow: Make, tmp_path: Path) -> None:
    flow = workflow("train")
    weights = str(tmp_path / "weights.pt")
    torch.save(flow.parser.get_parsed_content("network").state_dict(), weights)
    dice = []
    for refine in (0, 20):
        output = tmp_path / f"refined_{refine}"
        flow = workflow("train", "evaluate", output_dir=str(output), ckpt_path=weights, refine=refine)
        flow.run_id = "evaluating"
        flow.run()
        dice.append(json.loads((output / "summary.json").read_text())["val_dice/mean"])
    assert dice[1] > dice[0] + 0.02


def test_diverging_training_ends_with_a_sentence(workflow: Make, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        workflow("train", learning_rate=1e30, pairs_per_epoch=4).run()
    assert "the training has diverged: the loss of step" in str(caught.value) + str(caught.value.__cause__)
    assert not (tmp_path / "output" / "model.pt").exists()


def test_nearly_empty_images_are_scaled(workflow: Make, tmp_path: Path) -> None:
    """Where the two percentiles coincide too, intensities come to lie between 0 and 1."""
    array = np.zeros((20, 21, 22), dtype=np.float32)
    array[4:6, 5:7, 6:8] = 3000
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "sparse.nii.gz")
    for name, kind in (("train", "train"), ("inference", "infer")):
        flow = workflow(name, workflow_type=kind)
        key = "train#preprocessing" if name == "train" else "preprocessing"
        image = flow.parser.get_parsed_content(key)({"image": str(tmp_path / "sparse.nii.gz")})["image"]
        assert image.min() == 0 and image.max() == 1 and (image == 1).sum() == 8


@pytest.mark.parametrize(("label_weight", "gradient", "bending"), [(0.0, 0.1, 1.0), (2.0, 0.5, 0.0)])
def test_hippocampus_overlay(workflow: Make, label_weight: float, gradient: float, bending: float) -> None:
    """On the sample, whose labels stand in for those of the hippocampus."""
    flow = workflow(
        "train",
        "data_hippocampus",
        max_epochs=1,
        label_weight=label_weight,
        spatial_size=[-1, -1, -1],
        pairs_per_epoch=1,
    )
    trainer, loss = (flow.parser.get_parsed_content(name) for name in ("train#trainer", "loss"))
    seen = []

    @trainer.on(Events.ITERATION_STARTED)
    def note(engine: Engine) -> None:
        seen.append(dict(loss.weights))

    for handler in flow.parser.get_parsed_content("loss_schedules"):
        if isinstance(handler, LossWeightSchedule):
            handler(SimpleNamespace(state=SimpleNamespace(iteration=2)))
            seen.append(dict(loss.weights))
            break
    trainer.run()
    assert [weights["bending"] for weights in seen] == [bending, 0.0]
    assert all(weights["gradient"] == gradient and weights["label"] == label_weight for weights in seen)
    assert all(estimator.matching.scale < 1 for estimator in flow.parser.get_parsed_content("network").estimators)


@pytest.mark.parametrize(("max_epochs", "batch_size"), [(75, 1), (4, 3), (1, 1)])
def test_bending_grows_with_the_length_of_the_training(workflow: Make, max_epochs: int, batch_size: int) -> None:
    options = {"max_epochs": max_epochs, "batch_size": batch_size, "pairs_per_epoch": 20, "bending_weight": 0.4}
    flow = workflow("train", "data_hippocampus", regularization_weight=0.3, **options)
    assert flow.parser.get_parsed_content("loss").weights["gradient"] == 0.3
    (schedule,) = flow.parser.get_parsed_content("loss_schedules")
    total = max_epochs * {1: 20, 3: 7}[batch_size]
    weights = []
    for iteration in (1, total // 15, max(2, total * 8 // 15), max(2, total)):
        schedule(SimpleNamespace(state=SimpleNamespace(iteration=iteration)))
        weights.append(schedule.loss.weights["bending"])
    assert weights == pytest.approx([0, 0, 0.4, 0.4])


@pytest.mark.parametrize("folder", [".", "bundle"])
def test_bundle_root(workflow: Make, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    flow = workflow("train")
    monkeypatch.chdir(ROOT / folder)
    root = Path(flow.parser.get_parsed_content("bundle_root"))
    assert (root / "configs" / "metadata.json").is_file()
    given = workflow("train", bundle_root="elsewhere")
    assert given.parser.get_parsed_content("bundle_root") == "elsewhere"
