# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_sacb.networks import load_official_checkpoint
from monai_sacb.networks.nets import FeaturePyramidEncoder

# spatial dimensions, image channels, base width, slope, batch, spatial shape
TEST_CASES = [
    (3, 1, 4, 0.1, 1, (32, 48, 32)),
    (3, 2, 2, 0.1, 2, (32, 32, 48)),
    (2, 1, 4, 0.1, 3, (48, 32)),
    (2, 3, 3, 0.0, 1, (32, 80)),
    # a size that is no multiple of 16 is rounded down level by level
    (2, 1, 2, 0.2, 1, (39, 50)),
]


def image_of(batch: int, channels: int, spatial: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(batch, channels, *spatial, generator=torch.Generator().manual_seed(5))


def make_encoder(dims: int, in_channels: int = 1, base: int = 4, slope: float = 0.1) -> FeaturePyramidEncoder:
    torch.manual_seed(dims)
    return FeaturePyramidEncoder(dims, in_channels, base, slope).eval()


def by_definition(encoder: FeaturePyramidEncoder, x: torch.Tensor, slope: float) -> list[torch.Tensor]:
    """Three units, then four times pooling and two units; a unit is convolution, norm, activation."""
    weights, dims = dict(encoder.named_parameters()), x.dim() - 2
    conv, pool = (F.conv3d, F.avg_pool3d) if dims == 3 else (F.conv2d, F.avg_pool2d)
    features = []
    for level, units in enumerate([(0, 1, 2), *[(1, 2)] * 4]):
        x = pool(x, 2) if level else x
        for i in units:
            x = conv(x, weights[f"levels.{level}.{i}.conv.weight"], weights[f"levels.{level}.{i}.conv.bias"], padding=1)
            axes = tuple(range(2, dims + 2))
            x = (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = torch.where(x > 0, x, slope * x)
        features.append(x)
    return features


@pytest.mark.parametrize(("dims", "in_channels", "base", "slope", "batch", "spatial"), TEST_CASES)
@torch.no_grad()
def test_definition(
    dims: int, in_channels: int, base: int, slope: float, batch: int, spatial: tuple[int, ...], relative_error
) -> None:
    encoder = make_encoder(dims, in_channels, base, slope)
    assert encoder.channels == (2 * base, 4 * base, 8 * base, 16 * base, 16 * base)
    image = image_of(batch, in_channels, spatial)
    features = encoder(image)
    assert len(features) == 5
    for level, (feature, expected) in enumerate(zip(features, by_definition(encoder, image, slope))):
        assert feature.shape == (batch, encoder.channels[level], *(size // 2**level for size in spatial))
        assert relative_error(feature, expected) < 1e-5
        assert feature.std() > 0.3


@torch.no_grad()
def test_parity(shared_parity, relative_error) -> None:
    encoder = load_official_checkpoint(shared_parity / "sacb_net_official_layout.pth.tar").encoder
    with np.load(shared_parity / "sacb_net.npz") as recorded:
        features = encoder(torch.from_numpy(recorded["moving"]))
        for level, feature in enumerate(features, start=1):
            assert relative_error(feature, recorded[f"encoder_moving.level{level}"]) < 1e-5


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_batch_equals_one_by_one(dims: int) -> None:
    """Instance norm: an image of another range in the batch changes nothing."""
    encoder, image = make_encoder(dims), image_of(2, 1, (32,) * dims)
    image[1] = 1000.0 * image[1] - 300.0
    features = encoder(image)
    assert all(torch.equal(a, b) for a, b in zip(features, encoder(image)))
    for i in range(2):
        for together, alone in zip(features, encoder(image[i : i + 1])):
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_brightness_and_contrast_do_not_matter() -> None:
    """Away from the border, where the zeros outside are seen, an affine change of the values is normalised away."""
    encoder, image = make_encoder(2), image_of(1, 1, (64, 64))
    torch.testing.assert_close(encoder(7.0 * image)[0], encoder(image)[0], rtol=1e-2, atol=1e-2)
    assert (encoder(image.flip(2))[0] - encoder(image)[0]).abs().max() > 0.5


@torch.no_grad()
def test_constant_image_stays_finite() -> None:
    for feature in make_encoder(3)(torch.full((1, 1, 32, 32, 32), 3.0)):
        assert torch.isfinite(feature).all()


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_script(dims: int, relative_error) -> None:
    encoder, image = make_encoder(dims), image_of(2, 1, (32,) * dims)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(torch.jit.script(encoder)(image), encoder(image)))


def test_gradient_reaches_every_level() -> None:
    encoder = make_encoder(2)
    features = encoder(image_of(1, 1, (32, 48)))
    features[4].square().cos().sum().backward()
    for name, parameter in encoder.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad.abs().max() > 0, name


def test_wrong_number_of_channels() -> None:
    with pytest.raises(RuntimeError, match="to have 1 channels, but got 2 channels"):
        make_encoder(3)(image_of(1, 2, (32, 32, 32)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 4}, "spatial_dims .*4"),
        ({"in_channels": 0}, "in_channels .*0"),
        ({"base_channels": 0}, "base_channels .*0"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_ill_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeaturePyramidEncoder(**arguments)
