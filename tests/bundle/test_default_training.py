# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The training that the README begins with, whole."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from monai.bundle import ConfigWorkflow

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_default_training_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("nilearn")
    # as in the README: no option at all, and the results in the folder "output" below the current one
    monkeypatch.chdir(tmp_path)
    flow = ConfigWorkflow(
        config_file=str(ROOT / "bundle" / "configs" / "train.json"), workflow_type="train", logging_file=False
    )
    flow.run_id = "training"
    flow.initialize()
    with caplog.at_level(logging.INFO):
        flow.run()
    summary = json.loads((tmp_path / "output" / "summary.json").read_text())
    assert summary["pairs"] == 12
    assert summary["val_dice/mean"] > summary["val_dice_before/mean"] + 0.12
    assert summary["val_field_error_mm"] < 0.8 * summary["val_field_error_before_mm"]
    assert summary["val_folds_percent"] < 1.0
    # the table, for people to read: both Dice columns, the structures and the mean
    table = caplog.text[caplog.text.index("12 pairs") :]
    assert re.search(r"12 pairs +dice_before +dice\b", table)
    before, after = (f"{summary[f'val_{name}/mean']:.4f}" for name in ("dice_before", "dice"))
    assert re.search(rf"mean +{before} +{after}\b", table)
    assert "grey_matter" in table
    assert (tmp_path / "output" / "registered" / "brain_12_to_brain_13" / "warped.nii.gz").is_file()
    assert np.std(imread(tmp_path / "output" / "registration.png")[..., :3]) > 0.05
    assert all(
        torch.isfinite(v).all() for v in torch.load(tmp_path / "output" / "model.pt", weights_only=True).values()
    )
