# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from monai.bundle import ConfigWorkflow

pytest.importorskip("mlflow", reason="needs mlflow, the extra 'tracking'")
from mlflow import MlflowClient
from mlflow.entities import Run

Make = Callable[..., ConfigWorkflow]
SETTINGS = str(Path(__file__).resolve().parents[2] / "bundle" / "configs" / "mlflow.json")


@pytest.fixture
def tracked(workflow: Make) -> Make:
    """As ``workflow``; the config becomes a file, in which there can be no device."""
    return functools.partial(workflow, tracking=SETTINGS, device="$torch.device('cpu')")


def recorded(output: Path, experiment: str = "monai_sacb") -> tuple[MlflowClient, list[Run]]:
    """What MLflow has kept below an output folder; the oldest run first."""
    client = MlflowClient(tracking_uri=f"sqlite:///{output / 'mlruns.db'}")
    found = client.get_experiment_by_name(experiment)
    return client, client.search_runs([found.experiment_id], order_by=["attributes.start_time"])


def curve(client: MlflowClient, run: Run, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def artifact(client: MlflowClient, run: Run, name: str, folder: Path) -> str:
    return Path(client.download_artifacts(run.info.run_id, name, str(folder))).read_text()


def train(flow: ConfigWorkflow, interrupted_at: int | None = None) -> None:
    if interrupted_at is None:
        flow.run()
        flow.finalize()
        return

    def interrupt(_: Any) -> None:
        raise InterruptedError

    flow.parser.get_parsed_content("train#trainer").add_event_handler(
        Events.EPOCH_STARTED(once=interrupted_at), interrupt
    )
    with pytest.raises(RuntimeError):
        flow.run()


@pytest.mark.slow
def test_training_is_recorded(tracked: Make, tmp_path: Path) -> None:
    output = tmp_path / "output"
    train(tracked("train", learning_rate=0.002))
    client, (run,) = recorded(output)
    assert run.info.status == "FINISHED"

    # the same values as TensorBoard's, which another handler has written
    events = EventAccumulator(str(output / "tensorboard")).Reload()
    names = {"train_loss": [1, 2, 3, 4], "loss_similarity": [1, 2], "loss_regularization": [1, 2]}
    # the last validation is that of the best weights
    names |= {name: [1, 2, 2] for name in events.Tags()["scalars"] if name.startswith("val_")}
    assert {"val_dice", "val_dice_before", "val_similarity", "val_folds_percent", "val_field_error_mm"} <= set(names)
    for name, steps in names.items():
        points = curve(client, run, name)
        assert [step for step, _ in points] == steps, name
        shown = [event.value for event in events.Scalars(name)]
        assert [value for _, value in points] == pytest.approx(shown, rel=1e-6), name
    assert len({value for _, value in curve(client, run, "train_loss")}) == 4
    assert curve(client, run, "lr_group_0")[0] == (1, pytest.approx(0.002))

    expected = {"learning_rate": "0.002", "seed": "0", "batch_size": "1", "max_epochs": "2", "lncc_window": "9"}
    assert expected.items() <= run.data.params.items()
    assert int(run.data.params["network_weights"]) > 10_000

    kept = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    (config,) = (path for path in kept if path.startswith("config_"))
    assert kept == {config, "registration.png", "summary.json", "pairs.csv", "structures.csv"}
    settings = json.loads(artifact(client, run, config, tmp_path))
    assert (settings["learning_rate"], settings["output_dir"]) == (0.002, str(output))
    # those of the best weights, not of an earlier validation
    assert artifact(client, run, "summary.json", tmp_path) == (output / "summary.json").read_text()


@pytest.mark.slow
def test_interrupted_trainings(tracked: Make, tmp_path: Path) -> None:
    train(tracked("train"), interrupted_at=2)
    train(tracked("train", resume=True, regularization_weight=0.25))
    client, (run,) = recorded(tmp_path / "output")
    assert run.info.status == "FINISHED"
    assert [step for step, _ in curve(client, run, "train_loss")] == [1, 2, 3, 4]

    # another training does not go on in the run of one that was given up
    train(tracked("train", run_name="given up"), interrupted_at=2)
    train(tracked("train", max_epochs=1, learning_rate=0.002))
    client, runs = recorded(tmp_path / "output")
    assert [run.info.status for run in runs] == ["FINISHED", "RUNNING", "FINISHED"]
    assert [len(curve(client, run, "train_loss")) for run in runs] == [4, 2, 2]
    assert [run.data.params["learning_rate"] for run in runs] == ["0.001", "0.001", "0.002"]


@pytest.mark.slow
def test_extended_training(tracked: Make, tmp_path: Path) -> None:
    """A finished one that is resumed with more epochs has its settings recorded as well, in a run of its own."""
    train(tracked("train", run_name="given up"), interrupted_at=2)
    train(tracked("train", max_epochs=1, run_name="first"))
    train(tracked("train", max_epochs=2, resume=True, run_name="second"))
    client, runs = recorded(tmp_path / "output")
    found = {run.info.run_name: run for run in runs}
    assert set(found) == {"given up", "first", "second"}
    assert [step for step, _ in curve(client, found["second"], "train_loss")] == [3, 4]
    expected = {"learning_rate": "0.001", "batch_size": "1", "max_epochs": "2"}
    assert expected.items() <= found["second"].data.params.items()
    assert "val_dice" in found["second"].data.metrics and len(curve(client, found["given up"], "train_loss")) == 2


@pytest.mark.slow
def test_evaluation_is_recorded(tracked: Make, tmp_path: Path, weights: str) -> None:
    flow = tracked("train", "evaluate", workflow_type="eval", ckpt_path=weights, experiment_name="mine")
    flow.run()
    flow.finalize()
    client, (run,) = recorded(tmp_path / "output", "mine")
    assert run.info.status == "FINISHED"
    engine = flow.parser.get_parsed_content("validate#evaluator")
    assert run.data.metrics == pytest.approx({name: float(value) for name, value in engine.state.metrics.items()})
    assert {"val_dice", "val_hd95_mm", "val_sdlogj"} <= set(run.data.metrics)
    (config,) = (x.path for x in client.list_artifacts(run.info.run_id) if x.path.startswith("config_"))
    assert json.loads(artifact(client, run, config, tmp_path))["ckpt_path"] == weights


@pytest.mark.slow
def test_settings_of_monai(tracked: Make, tmp_path: Path) -> None:
    train(tracked("train", tracking="mlflow", max_epochs=1))
    client, (run,) = recorded(tmp_path / "output", "monai_experiment")
    assert [step for step, _ in curve(client, run, "train_loss")] == [1, 2]
    assert {"train_loss", "loss_similarity", "val_dice"} <= set(run.data.metrics)
