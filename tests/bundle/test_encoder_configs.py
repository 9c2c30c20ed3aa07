# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The overlays that give the network another encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from monai.bundle import ConfigParser

from monai_sacb.networks.nets import ResNetPyramidEncoder, SACBNet, SegResNetPyramidEncoder, SwinPyramidEncoder

CONFIGS = Path(__file__).resolve().parents[2] / "bundle" / "configs"
ENCODERS = {
    "encoder_resnet": (ResNetPyramidEncoder, (8, 8, 16, 32, 64)),
    "encoder_segresnet": (SegResNetPyramidEncoder, (6, 12, 24, 48, 96)),
    "encoder_swin": (SwinPyramidEncoder, (8, 12, 24, 48, 96)),
}


def network_of(*names: str, **overrides: object) -> SACBNet:
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in names])
    for key, value in {"network_def#num_clusters": 2, **overrides}.items():
        parser[key] = value
    torch.manual_seed(0)
    network = parser.get_parsed_content("network_def")
    assert isinstance(network, SACBNet)
    return network.eval()


def test_all_are_listed() -> None:
    assert {path.stem for path in CONFIGS.glob("encoder_*.json")} == set(ENCODERS)
    for name in ENCODERS:
        overlay = json.loads((CONFIGS / f"{name}.json").read_text())
        assert list(overlay) == ["network_def#encoder", "network_def#self_similarity"]


@pytest.mark.parametrize("name", list(ENCODERS))
@torch.no_grad()
def test_network(name: str) -> None:
    """The same network in training and inference, in 2-D and of several channels as well."""
    if name == "encoder_swin":
        pytest.importorskip("einops")
    encoder, channels = ENCODERS[name]
    trained = network_of("train", "data_hippocampus", name)
    assert isinstance(trained.encoder, encoder) and trained.encoder.channels == channels
    used = network_of("inference", "data_hippocampus", name)
    x = torch.rand(1, 2, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(used(x), trained(x)) and trained(x).abs().max() > 0.1
    assert list(used.state_dict()) == list(trained.state_dict())
    flat = network_of("train", name, **{"network_def#spatial_dims": 2, "network_def#in_channels": 3})
    ddf = flat(torch.rand(1, 6, 33, 40))
    assert ddf.shape == (1, 2, 33, 40) and ddf.abs().max() > 0.1
