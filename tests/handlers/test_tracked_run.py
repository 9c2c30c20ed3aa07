# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ignite.engine import Engine, Events

pytest.importorskip("mlflow", reason="needs mlflow, the extra 'tracking'")
from mlflow import MlflowClient

from monai_sacb.handlers import TrackedRunHandler


def work(folder: Path, name: str, stop: bool = False, epochs: int = 2, **given: Any) -> None:
    """A training of some epochs, which may be interrupted in the last one."""
    engine = Engine(lambda engine, batch: [{"loss": float(batch)}])
    if stop:

        def interrupt() -> None:
            raise InterruptedError

        engine.add_event_handler(Events.EPOCH_STARTED(once=epochs), interrupt)
    handler = TrackedRunHandler(
        tracking_uri=f"sqlite:///{folder / 'runs.db'}",
        experiment_name="one",
        output_transform=lambda output: output[0]["loss"],
        close_on_complete=True,
        **{"work": "training in /a", **given},
        run_name=name,
    )
    handler.attach(engine)
    try:
        engine.run([3.0], max_epochs=epochs)
    except InterruptedError:
        # what a killed process does not say
        handler.cur_run = None


def recorded(folder: Path) -> dict[str, tuple[str, dict[str, str], int]]:
    """State, parameters and number of steps of each run, by name."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs.db'}")
    runs = client.search_runs([client.get_experiment_by_name("one").experiment_id])
    return {
        run.info.run_name: (
            run.info.status,
            {key: run.data.params[key] for key in ("rate", "max_epochs") if key in run.data.params},
            len(client.get_metric_history(run.info.run_id, "Loss")),
        )
        for run in runs
    }


def test_resumed_work_finds_its_run(tmp_path: Path) -> None:
    """Among runs of other folders and older ones of its own."""
    work(tmp_path, "given up", stop=True, experiment_param={"rate": 1})
    work(tmp_path, "elsewhere", stop=True, experiment_param={"rate": 2}, work="training in /b")
    work(tmp_path, "mine", stop=True, experiment_param={"rate": 3})
    work(tmp_path, "later", stop=True, experiment_param={"rate": 4}, work="training in /b")
    # with a setting that is another one now
    work(tmp_path, "not needed", resume=True, experiment_param={"rate": 5})
    assert recorded(tmp_path) == {
        "given up": ("RUNNING", {"rate": "1", "max_epochs": "2"}, 1),
        "elsewhere": ("RUNNING", {"rate": "2", "max_epochs": "2"}, 1),
        "mine": ("FINISHED", {"rate": "3", "max_epochs": "2"}, 3),
        "later": ("RUNNING", {"rate": "4", "max_epochs": "2"}, 1),
    }


def test_finished_work_goes_on_in_a_new_run(tmp_path: Path) -> None:
    work(tmp_path, "given up", stop=True, experiment_param={"rate": 9})
    work(tmp_path, "first", experiment_param={"rate": 1})
    work(tmp_path, "second", epochs=5, resume=True, experiment_param={"rate": 1})
    assert recorded(tmp_path) == {
        "given up": ("RUNNING", {"rate": "9", "max_epochs": "2"}, 1),
        "first": ("FINISHED", {"rate": "1", "max_epochs": "2"}, 2),
        "second": ("FINISHED", {"rate": "1", "max_epochs": "5"}, 5),
    }


def test_new_work_does_not_go_on(tmp_path: Path) -> None:
    work(tmp_path, "first", stop=True, experiment_param={"rate": 1})
    work(tmp_path, "second", experiment_param={"rate": 2})
    found = recorded(tmp_path)
    assert found["first"][0] == "RUNNING" and found["second"] == ("FINISHED", {"rate": "2", "max_epochs": "2"}, 2)
