# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What the Model Zoo's checker asks of a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from monai.bundle import ckpt_export, verify_net_in_out
from monai.bundle import load as load_bundle

from monai_sacb.networks.nets import SACBNet
from monai_sacb.version import __version__

BUNDLE = Path(__file__).resolve().parents[2] / "bundle"
METADATA = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
REQUIRED = [
    "schema",
    "version",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "required_packages_version",
    "task",
    "description",
    "authors",
    "copyright",
    "network_data_format",
    "changelog",
    "name",
]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    torch.save(SACBNet().state_dict(), path)
    return path


def test_files() -> None:
    for name in ("LICENSE", "configs/train.json", "configs/inference.json", "configs/evaluate.json", "docs/README.md"):
        assert (BUNDLE / name).stat().st_size > 0, name
    assert (BUNDLE / "docs" / "data_license.txt").stat().st_size > 0


def test_metadata() -> None:
    assert [key for key in REQUIRED if key not in METADATA] == []
    assert METADATA["version"] == __version__
    assert METADATA["version"] in METADATA["changelog"]
    assert METADATA["schema"].endswith("meta_schema_20240725.json")
    for tensor in (
        METADATA["network_data_format"]["inputs"]["image"],
        METADATA["network_data_format"]["outputs"]["pred"],
    ):
        required = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data"}
        assert required <= tensor.keys()
        assert len(tensor["channel_def"]) == tensor["num_channels"]


def test_network_input_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BUNDLE)
    verify_net_in_out(
        net_id="network_def",
        meta_file="configs/metadata.json",
        config_file="configs/inference.json",
        device="cpu",
        n=1,
        p=1,
        any=1,
    )


def test_export_to_torchscript(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_same_field
) -> None:
    monkeypatch.chdir(BUNDLE)
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(weights),
        meta_file="configs/metadata.json",
        config_file="configs/inference.json",
        key_in_ckpt="",
    )
    net = SACBNet()
    net.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.rand(1, 2, 33, 40, 36)
    with torch.no_grad():
        check_same_field(torch.jit.load(tmp_path / "model.ts")(x), net(x))


def test_load_returns_the_network(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "zoo" / "sacb"
    from monai_sacb.apps import bundle

    bundle(target)
    (target / "models" / "model.pt").unlink(missing_ok=True)
    weights.rename(target / "models" / "model.pt")
    net = load_bundle(name="sacb", bundle_dir=str(target.parent), source="monaihosting", workflow_type="inference")
    network = net["model"] if isinstance(net, dict) else net
    x = torch.rand(1, 2, 32, 32, 32)
    reference = SACBNet()
    reference.load_state_dict(torch.load(target / "models" / "model.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(network(x), reference(x))
