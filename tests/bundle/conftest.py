# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

from monai_sacb.networks.nets import SACBNet

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "bundle" / "configs"
# what makes a training last seconds
QUICK = {
    "max_epochs": 2,
    "pairs_per_epoch": 2,
    "val_interval": 1,
    "network_def#base_channels": 2,
    "network_def#num_clusters": 3,
    "device": torch.device("cpu"),
}


@pytest.fixture(autouse=True)
def _random_state() -> Iterator[None]:
    """The workflows seed the global generators; give them back as they were."""
    yield
    set_determinism(None)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in sample, coarse and small."""
    pytest.importorskip("nilearn")
    from monai_sacb.data import sample_dataset

    folder = tmp_path_factory.mktemp("data") / "sample"
    return Path(sample_dataset(folder, num_training=3, num_validation=2, spacing=8.0))


@pytest.fixture
def workflow(sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ConfigWorkflow]:
    """Make an initialized workflow from config files of the bundle, as ``monai.bundle run`` does."""

    def make(*names: str, workflow_type: str = "train", **overrides: Any) -> ConfigWorkflow:
        monkeypatch.chdir(ROOT)
        given = {"dataset_dir": str(sample), "output_dir": str(tmp_path / "output")}
        quick = QUICK if workflow_type == "train" else {k: v for k, v in QUICK.items() if "#" in k or k == "device"}
        result = ConfigWorkflow(
            config_file=[str(CONFIGS / f"{name}.json") for name in names],
            workflow_type=workflow_type,
            logging_file=False,
            **{**given, **quick, **overrides},
        )
        result.initialize()
        return result

    return make


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """File with the untrained weights of a small network."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pt"
    torch.save(SACBNet(base_channels=2, num_clusters=3).state_dict(), path)
    return str(path)
