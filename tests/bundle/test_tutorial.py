# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The tutorial notebook: its cells run one after the other, and what it says comes true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from monai_sacb.data import read_displacement, read_transform
from monai_sacb.networks.layers import warp

NOTEBOOK = Path(__file__).resolve().parents[2] / "bundle" / "docs" / "tutorial.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == "code"]


def test_form() -> None:
    """What any reader of notebooks asks for; no outputs, which would be out of date and large."""
    assert (CONTENT["nbformat"], CONTENT["nbformat_minor"]) == (4, 5) and CONTENT["metadata"]["kernelspec"]
    assert NOTEBOOK.stat().st_size < 50_000 and len(CODE) >= 8
    ids = [cell["id"] for cell in CONTENT["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in CONTENT["cells"]:
        assert {"cell_type", "metadata", "source"} <= set(cell)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the cells leave behind."""
    pytest.importorskip("nilearn")
    folder = tmp_path_factory.mktemp("notebook")
    names: dict[str, Any] = {"__name__": "__main__", "folder_of_test": folder}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.chdir(folder)
        import matplotlib.pyplot as plt

        plt.switch_backend("agg")
        for number, code in enumerate(CODE):
            exec(compile(code, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
        plt.close("all")
    return names


def test_training(namespace: dict[str, Any]) -> None:
    assert len(namespace["losses"]) == 8
    assert namespace["losses"][-1] < namespace["losses"][0]


def test_registered_pair(namespace: dict[str, Any]) -> None:
    pair = namespace["pair"]
    moving, ddf = pair["moving_image"].as_tensor(), pair["pred"].as_tensor()
    assert ddf.abs().max() > 0.5 and namespace["folds_percent"] < 5
    assert torch.allclose(pair["warped_image"].as_tensor(), warp(moving[None], ddf[None])[0], atol=1e-5)
    assert 0 < namespace["dice_before"] < namespace["dice_after"] <= 1
    assert namespace["round_trip"].norm(dim=1).median() < 0.1


def test_files(namespace: dict[str, Any]) -> None:
    """The image that ITK makes of the file is that of the network, up to the scaling of intensities."""
    assert namespace["itk_agreement"] > 0.99
    assert namespace["read_back_error"] < 1e-3
    (field,) = read_transform(namespace["folder_of_test"] / namespace["pair"]["path"]).stages
    assert field.vectors.abs().max() > 4
    with pytest.raises(ValueError, match="cannot read"):
        read_displacement(namespace["folder_of_test"] / namespace["pair"]["path"])
    for name in ("registration.png", "clusters.png"):
        picture = (namespace["folder_of_test"] / "tutorial" / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 4_000


def test_clusters(namespace: dict[str, Any]) -> None:
    assert 1 < namespace["fixed_clusters"].max() <= 5 and namespace["fixed_clusters"].min() == 1
    assert namespace["pretrained"] is not namespace["network"]
    assert tuple(namespace["other"]["pred"].shape) == tuple(namespace["pair"]["pred"].shape)
