# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from monai.bundle import ConfigWorkflow

Make = Callable[..., ConfigWorkflow]


def test_mlflow_keeps_curves(workflow: Make, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow, the extra 'tracking'")
    flow = workflow("train", tracking="mlflow", max_epochs=1)
    flow.run()
    flow.finalize()
    (database,) = (tmp_path / "output").glob("mlruns*")
    uri = f"sqlite:///{database}" if database.is_file() else database.as_uri()
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    metrics = {name for run in runs for name in run.data.metrics}
    assert {"train_loss", "loss_similarity", "val_dice"} <= metrics
