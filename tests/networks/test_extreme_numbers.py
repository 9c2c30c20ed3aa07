# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Field, loss and gradient of intensities, sizes and voxels that are far from ordinary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from monai.bundle import ConfigParser
from monai.data import MetaTensor

from monai_sacb.losses import GradientPenaltyLoss, LNCCLoss, MINDSSCLoss
from monai_sacb.networks.blocks.conv_norm_act import SameConv
from monai_sacb.networks.layers import warp
from monai_sacb.networks.nets import SACBNet

CONFIG = Path(__file__).resolve().parents[2] / "bundle" / "configs" / "train.json"
SIZE = (20, 17, 24)


def noise(size: tuple[int, ...] = SIZE) -> torch.Tensor:
    """A moving and a fixed image, ``(2, 1, *size)``."""
    return torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))


def one_voxel() -> torch.Tensor:
    image = torch.zeros(2, 1, *SIZE)
    image[:, :, 10, 8, 12] = 1
    return image


# what comes out of a scanner, or of a mistake
IMAGES = {
    "constant": torch.full((2, 1, *SIZE), 3.0),
    "empty": torch.zeros(2, 1, *SIZE),
    "one voxel": one_voxel(),
    "1e-30": noise() * 1e-30,
    "denormal": noise() * 1e-42,
    "1e6": noise() * 1e6,
    "offset of 3000": noise() + 3000,
    "one voxel above 3000": one_voxel() + 3000,
    "negative": -1000 * noise() - 5,
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def net() -> SACBNet:
    torch.manual_seed(0)
    return SACBNet(base_channels=2, num_clusters=3)


def check_step(net: nn.Module, images: torch.Tensor, similarity: nn.Module, dtype: torch.dtype | None) -> None:
    """A step of training as the bundle does it: network in some precision, the rest in single precision."""
    moving, fixed = images[:1], images[1:]
    net.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        ddf = net(torch.cat([moving, fixed], 1))
    assert ddf.dtype == torch.float32 and torch.isfinite(ddf).all() and ddf.abs().max() > 0
    loss = similarity(warp(moving, ddf), fixed) + GradientPenaltyLoss()(ddf)
    assert torch.isfinite(loss)
    loss.backward()
    broken = [name for name, value in net.named_parameters() if not torch.isfinite(value.grad).all()]
    assert not broken


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", IMAGES)
def test_intensities(net: SACBNet, kind: str, precision: str) -> None:
    check_step(net, IMAGES[kind], LNCCLoss(9), PRECISIONS[precision])


@pytest.mark.parametrize("kind", ["empty", "one voxel", "1e6", "negative"])
def test_intensities_and_self_similarity(net: SACBNet, kind: str) -> None:
    check_step(net, IMAGES[kind], MINDSSCLoss(), None)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [(32, 32, 32), (33, 16, 47), (40, 40, 4), (5, 4, 3)], ids=str)
def test_sizes(net: SACBNet, size: tuple[int, ...], precision: str) -> None:
    check_step(net, noise(size), LNCCLoss(9), PRECISIONS[precision])


def test_a_single_slice_is_refused(net: SACBNet) -> None:
    with pytest.raises(ValueError, match="at least 2 voxels along each"):
        check_step(net, noise((1, 40, 40)), LNCCLoss(9), None)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "weights too"])
@pytest.mark.parametrize("channels", [4, 32])
@pytest.mark.parametrize("size", [(2, 2, 2), (2, 5, 4), (3, 2, 2)], ids=str)
def test_gradient_of_few_slices_in_half_precision(size: tuple[int, ...], channels: int, autocast: bool) -> None:
    """PyTorch's own is arbitrary, on a CPU, where the first axis has two voxels."""
    torch.manual_seed(0)
    conv, plain = SameConv(3, channels, channels), nn.Conv3d(channels, channels, 3, padding=1)
    with torch.no_grad():
        for value in conv.parameters():
            value.copy_(value.bfloat16())
    plain.load_state_dict(conv.conv.state_dict())
    x = torch.randn(2, channels, *size).bfloat16()
    plain(x.float()).square().sum().backward()
    if not autocast:
        conv.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = conv(x)
    y.float().square().sum().backward()
    for value, expected in zip(conv.conv.parameters(), plain.parameters()):
        assert (value.grad.float() - expected.grad).abs().max() < 0.03 * expected.grad.abs().max()


@pytest.mark.parametrize("kind", ["one voxel", "negative"])
@torch.no_grad()
def test_half_precision(net: SACBNet, kind: str) -> None:
    with torch.autocast("cpu", torch.float16):
        ddf = net(torch.cat([*IMAGES[kind].split(1)], 1))
    assert ddf.dtype == torch.float32 and torch.isfinite(ddf).all() and ddf.abs().max() > 0


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("offset", [0.0, 3.0, -1e3])
def test_the_preprocessing_makes_ordinary_images_of_any(factor: float, offset: float) -> None:
    parser = ConfigParser(ConfigParser.load_config_file(CONFIG))
    scale = parser.get_parsed_content("scale_intensity")
    image = scale({"image": MetaTensor((noise()[0] + offset) * factor)})["image"]
    assert torch.isfinite(image).all()
    assert float(image.min()) == pytest.approx(0, abs=1e-6) and float(image.max()) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@torch.inference_mode()
def test_large_volume() -> None:
    torch.manual_seed(0)
    ddf = SACBNet()(torch.cat([*noise((224, 224, 224)).split(1)], 1))
    assert ddf.shape == (1, 3, 224, 224, 224) and torch.isfinite(ddf).all() and ddf.abs().max() > 0
