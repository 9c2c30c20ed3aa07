# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from monai.networks.nets import EfficientNetBNFeatures, ResNet, ResNetFeatures
from monai.networks.nets.segresnet_ds import SegResEncoder
from monai.networks.nets.swin_unetr import SwinTransformer

from monai_sacb.networks.nets import (
    BackbonePyramid,
    FeaturePyramidEncoder,
    ResNetPyramidEncoder,
    SACBNet,
    SegResNetPyramidEncoder,
    SwinPyramidEncoder,
)

SWIN = {"stem_channels": 4, "embed_dim": 4, "window_size": 3}
# encoder, arguments, channels of its levels
TEST_CASES: list[tuple[type[BackbonePyramid], dict[str, Any], list[int]]] = [
    (SwinPyramidEncoder, {**SWIN, "depths": (2, 1, 1), "num_heads": (1, 2, 4)}, [4, 4, 8, 16, 32]),
    (SwinPyramidEncoder, {**SWIN, "depths": (2,), "num_heads": (2,), "use_v2": True}, [4, 4, 8]),
    (SwinPyramidEncoder, {**SWIN, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}, [4, 4, 8, 16, 32, 64]),
    (ResNetPyramidEncoder, {"channels": (4, 6, 8, 10)}, [4, 4, 6, 8, 10]),
    (ResNetPyramidEncoder, {"channels": (3, 5), "layers": (2, 1), "block": "bottleneck"}, [3, 12, 20]),
    (ResNetPyramidEncoder, {"channels": (4,), "layers": (1,), "first_kernel": 5}, [4, 4]),
    (SegResNetPyramidEncoder, {"init_filters": 3}, [3, 6, 12, 24, 48]),
    (SegResNetPyramidEncoder, {"init_filters": 4, "blocks_down": (1, 2, 1)}, [4, 8, 16]),
]
THREE = [TEST_CASES[0], TEST_CASES[3], TEST_CASES[6]]


def make(encoder: type[BackbonePyramid], dims: int, **arguments: Any) -> BackbonePyramid:
    if encoder is SwinPyramidEncoder:
        pytest.importorskip("einops")
    torch.manual_seed(3)
    return encoder(spatial_dims=dims, **arguments)


def image_of(batch: int, *spatial: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(batch, channels, *spatial, generator=torch.Generator().manual_seed(len(spatial)))


def normalized(x: torch.Tensor) -> torch.Tensor:
    axes = tuple(range(2, x.dim()))
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("encoder", "arguments", "channels"), TEST_CASES)
@torch.no_grad()
def test_levels(encoder: type[BackbonePyramid], arguments: dict, channels: list[int], dims: int) -> None:
    """Each of half the size, as wide as said, normalized, each image of a batch by itself."""
    pyramid = make(encoder, dims, in_channels=2, **arguments)
    divisor = 2 ** (len(channels) - 1)
    if dims == 3 and divisor > 16:
        pytest.skip("large, and as in 2-D")
    assert list(pyramid.channels) == channels and pyramid.divisor == divisor
    image = image_of(2, *(2 * divisor, 3 * divisor, 2 * divisor)[:dims], channels=2)
    image[1] = 100 * image[1] - 30
    for mode in (True, False):
        features = pyramid.train(mode)(image)
        assert len(features) == len(channels)
        for level, (feature, width) in enumerate(zip(features, channels)):
            assert list(feature.shape) == [2, width, *(size // 2**level for size in image.shape[2:])]
            assert feature.std() > 0.3 and torch.isfinite(feature).all()
        for i in range(2):
            for together, alone in zip(features, pyramid(image[i : i + 1])):
                torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_swin_is_monais(dims: int) -> None:
    """With a last stage, as MONAI's always has, whose map is not used."""
    pyramid = make(SwinPyramidEncoder, dims, **TEST_CASES[0][1]).eval()
    theirs = SwinTransformer(1, 4, (3,) * dims, (2,) * dims, (2, 1, 1, 1), (1, 2, 4, 1), spatial_dims=dims).eval()
    missing = theirs.load_state_dict(pyramid.backbone.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and all(name.startswith("layers4") for name in missing.missing_keys)
    image = image_of(1, *(64, 32, 32)[:dims])
    for actual, expected in zip(pyramid(image)[1:], theirs(image)):
        torch.testing.assert_close(actual, normalized(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_resnet_is_monais(dims: int) -> None:
    """Batch norms of one image that are being trained are instance norms."""
    channels = [4, 6, 8, 10]
    pyramid = make(ResNetPyramidEncoder, dims, channels=channels)
    theirs = ResNet("basic", [1] * 4, channels, dims, 1, 3, feed_forward=False).train()
    missing = theirs.load_state_dict(pyramid.backbone.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and {name.rsplit(".", 1)[1] for name in missing.missing_keys} == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    seen: list[torch.Tensor] = []
    for name in ("act", "layer1", "layer2", "layer3", "layer4"):
        getattr(theirs, name).register_forward_hook(lambda *call: seen.append(call[2].clone()))
    image = image_of(1, *(64, 32, 48)[:dims])
    theirs(image)
    assert len(seen) == 5
    for actual, expected in zip(pyramid(image), seen):
        torch.testing.assert_close(actual, normalized(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_segresnet_is_monais(dims: int) -> None:
    pyramid = make(SegResNetPyramidEncoder, dims, init_filters=3)
    theirs = SegResEncoder(dims, 3, 1, norm="batch", blocks_down=(1,) * 5).train()
    assert theirs.load_state_dict(pyramid.backbone.state_dict(), strict=False).unexpected_keys == []
    image = image_of(1, *(64, 32, 32)[:dims])
    for actual, expected in zip(pyramid(image), theirs(image)):
        torch.testing.assert_close(actual, normalized(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_other_backbones() -> None:
    """As MONAI gives them, to a network that takes a part of their maps."""
    resnet = ResNetFeatures("resnet10", pretrained=False, spatial_dims=2)
    efficient = EfficientNetBNFeatures("efficientnet-b0", pretrained=False, spatial_dims=2, in_channels=1)
    for backbone, channels in ((resnet, (64, 64, 128)), (efficient, (16, 24, 40))):
        pyramid = BackbonePyramid(backbone, channels, 2, stem_channels=4, divisor=32)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in pyramid.modules())
        net = SACBNet(2, num_clusters=2, encoder=pyramid)
        # padded to the divisor of the backbone
        seen: list[torch.Size] = []
        pyramid.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape))
        ddf = net(image_of(1, 40, 70, channels=2))
        assert ddf.shape == (1, 2, 40, 70) and ddf.abs().max() > 0.1 and seen == [(2, 1, 64, 96)]


@torch.no_grad()
def test_own_encoder_is_the_default() -> None:
    x = image_of(1, 40, 33, channels=2)
    torch.manual_seed(0)
    expected = SACBNet(2, base_channels=2, num_clusters=3)
    torch.manual_seed(0)
    net = SACBNet(2, num_clusters=3, encoder=FeaturePyramidEncoder(2, 1, 2))
    assert torch.equal(net(x), expected(x)) and expected(x).abs().max() > 0.1
    assert list(net.state_dict()) == list(expected.state_dict())


@pytest.mark.parametrize(("dims", "spatial"), [(2, (45, 20)), (3, (17, 34, 5))])
@pytest.mark.parametrize(("encoder", "arguments", "channels"), TEST_CASES)
def test_network(
    encoder: type[BackbonePyramid], arguments: dict, channels: list[int], dims: int, spatial: tuple[int, ...]
) -> None:
    """Any number of levels and any size; a batch is its images one by one; every weight learns."""
    if dims == 3 and len(channels) > 5:
        pytest.skip("large, and as in 2-D")
    net = SACBNet(dims, num_clusters=2, scaled_matching=True, encoder=make(encoder, dims, **arguments))
    assert len(net.estimators) == len(channels) - 1
    x = image_of(2, *spatial, channels=2)
    ddf = net(x)
    assert ddf.shape == (2, dims, *spatial) and ddf.abs().max() > 0.1
    torch.testing.assert_close(ddf[1:], net(x[1:]), rtol=1e-2, atol=1e-2)
    ddf.square().mean().backward()
    # shifts in front of a norm change nothing, and all else counts
    idle = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert [name for name in idle if not name.endswith("bias")] == []


@pytest.mark.parametrize(("encoder", "arguments", "channels"), THREE)
def test_learns(encoder: type[BackbonePyramid], arguments: dict, channels: list[int]) -> None:
    """The shift of a smooth image, from a few steps on that pair."""
    pyramid = make(encoder, 2, **arguments)
    net = SACBNet(2, num_clusters=2, scaled_matching=True, encoder=pyramid)
    image = F.interpolate(image_of(1, 8, 8), size=(40, 40), mode="bicubic")
    moving, fixed = image[..., 4:36, 4:36], image[..., 6:38, 3:35]
    truth = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    errors = []
    for _ in range(25):
        ddf = net(torch.cat([moving, fixed], 1))
        loss = (ddf - truth)[..., 6:-6, 6:-6].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.5 and errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize(("encoder", "dims"), [(ResNetPyramidEncoder, 2), (SegResNetPyramidEncoder, 3)])
@torch.no_grad()
def test_script(encoder: type[BackbonePyramid], dims: int, check_same_field) -> None:
    """But not MONAI's SwinTransformer, which TorchScript does not know."""
    net = SACBNet(dims, num_clusters=2, encoder=make(encoder, dims)).eval()
    x = image_of(2, *(40, 33, 32)[:dims], channels=2)
    check_same_field(torch.jit.script(net)(x), net(x))


@torch.no_grad()
def test_state_dict() -> None:
    x, (encoder, arguments, _) = image_of(1, 32, 32, channels=2), TEST_CASES[3]
    nets = []
    for seed in range(2):
        pyramid = make(encoder, 2, **arguments)
        torch.manual_seed(seed)
        nets.append(SACBNet(2, encoder=pyramid))
    assert not torch.equal(nets[0](x), nets[1](x))
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(nets[0](x), nets[1](x))


class Wrong(nn.Module):
    """An encoder that keeps its word, but for what it is told to do to its maps."""

    def __init__(self, change: Any = None, **attributes: Any) -> None:
        super().__init__()
        self.channels: Any = (2, 3, 4)
        self.change = change
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, image: torch.Tensor) -> Any:
        maps = [
            image.new_ones(len(image), width, *(size // 2**level for size in image.shape[2:]))
            for level, width in enumerate((2, 3, 4))
        ]
        return maps if self.change is None else self.change(maps)


@pytest.mark.parametrize(
    ("change", "shapes"),
    [
        (lambda maps: maps[:2], r"\[\[2, 2, 8, 8\], \[2, 3, 4, 4\]\]"),
        (lambda maps: [*maps, maps[-1]], r"\[2, 4, 2, 2\], \[2, 4, 2, 2\]\]"),
        (lambda maps: maps[::-1], r"\[\[2, 4, 2, 2\], \[2, 3, 4, 4\], \[2, 2, 8, 8\]\]"),
        (lambda maps: [maps[0], maps[1][:, :2], maps[2]], r"\[2, 2, 4, 4\]"),
        (lambda maps: [m[..., ::2, ::2] for m in maps], r"\[\[2, 2, 4, 4\]"),
        (lambda maps: [m[:1] for m in maps], r"\[\[1, 2, 8, 8\]"),
    ],
)
def test_wrong_maps(change: Any, shapes: str) -> None:
    message = r"for images \[2, 1, 8, 8\], the encoder must return maps with \[2, 3, 4\] channels, each of half the .*"
    with pytest.raises(ValueError, match=message + shapes):
        SACBNet(2, encoder=Wrong(change))(torch.zeros(1, 2, 7, 5))


def test_tuple_of_maps() -> None:
    assert SACBNet(2, num_clusters=2, encoder=Wrong(tuple))(torch.zeros(1, 2, 7, 5)).shape == (1, 2, 7, 5)


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        (nn.Identity(), TypeError, "encoder must be a module whose attribute channels .* Identity with channels None"),
        ("swin", TypeError, "encoder must be a module .* str with channels None"),
        (Wrong(channels="ab"), TypeError, "channels 'ab'"),
        (Wrong(channels=3), TypeError, "channels 3"),
        (Wrong(channels=(4,)), ValueError, r"encoder must have at least two levels, got channels \[4\]"),
        (Wrong(channels=(4, 0)), ValueError, "the encoder's channels must be a whole number of at least 1, got 0"),
        (Wrong(divisor=6), ValueError, "divisor must be a multiple of 4 for 3 levels, got 6"),
        (Wrong(divisor=0), ValueError, "divisor must be a whole number of at least 1, got 0"),
    ],
)
def test_ill_encoder(encoder: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SACBNet(2, encoder=encoder)


def test_clusters_for_each_level() -> None:
    net = SACBNet(2, encoder=Wrong(), num_clusters=(5, 2))
    assert [estimator.sacb.clusterer.num_clusters for estimator in net.estimators] == [2, 5]
    with pytest.raises(ValueError, match="length 2, got 4"):
        SACBNet(2, encoder=Wrong(), num_clusters=(7, 7, 7, 7))


@pytest.mark.parametrize(
    ("encoder", "arguments", "message"),
    [
        (BackbonePyramid, {"backbone": Wrong(), "channels": (4,)}, r"at least two levels, got channels \[4\]"),
        (BackbonePyramid, {"backbone": Wrong(), "channels": (), "stem_channels": 4}, "at least two levels"),
        (BackbonePyramid, {"backbone": Wrong(), "channels": (4, 2.5)}, "each number of channels .* got 2.5"),
        (BackbonePyramid, {"backbone": Wrong(), "channels": (4, 8), "stem_channels": 0}, "channels .* got 0"),
        (BackbonePyramid, {"backbone": Wrong(), "channels": (4, 8), "spatial_dims": 1}, "spatial_dims .* got 1"),
        (BackbonePyramid, {"backbone": Wrong(), "channels": (4, 8), "in_channels": 0}, "in_channels .* got 0"),
        (BackbonePyramid, {"backbone": Wrong(), "channels": (4, 8), "divisor": 0}, "divisor .* got 0"),
        (SwinPyramidEncoder, {"depths": ()}, r"depths must have one to 4 entries, one for each stage, got \[\]"),
        (SwinPyramidEncoder, {"depths": (1,) * 5}, "depths must have one to 4 entries"),
        (SwinPyramidEncoder, {"num_heads": (2, 4)}, r"num_heads must have 3 entries as depths has, got \[2, 4\]"),
        (SwinPyramidEncoder, {"num_heads": (2, 5, 8)}, "must divide the channels of its stage, 24, got 5"),
        (SwinPyramidEncoder, {"embed_dim": 0}, "embed_dim .* got 0"),
        (SwinPyramidEncoder, {"spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
        (ResNetPyramidEncoder, {"spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
        (SegResNetPyramidEncoder, {"spatial_dims": 4}, "spatial_dims must be 2 or 3, got 4"),
        (ResNetPyramidEncoder, {"in_channels": 0}, "in_channels .* got 0"),
        (ResNetPyramidEncoder, {"channels": ()}, "channels must have one to 4 entries"),
        (ResNetPyramidEncoder, {"layers": (1, 1)}, r"layers must have 4 entries as channels has, got \[1, 1\]"),
        (ResNetPyramidEncoder, {"channels": (8, 0, 8, 8)}, "channels and layers .* got 0"),
        (ResNetPyramidEncoder, {"block": "wide"}, "block must be 'basic' or 'bottleneck', got 'wide'"),
        (ResNetPyramidEncoder, {"first_kernel": 4}, "first_kernel must be a positive odd number, got 4"),
        (SegResNetPyramidEncoder, {"init_filters": 0}, "init_filters .* got 0"),
        (SegResNetPyramidEncoder, {"blocks_down": (1, 0)}, "blocks_down .* got 0"),
        (SegResNetPyramidEncoder, {"blocks_down": (1,)}, "at least two levels"),
    ],
)
def test_ill_arguments(encoder: type[BackbonePyramid], arguments: dict, message: str) -> None:
    if encoder is SwinPyramidEncoder:
        pytest.importorskip("einops")
    with pytest.raises(ValueError, match=message):
        encoder(**arguments)


def test_without_einops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_sacb.networks.nets.backbone_pyramid.optional_import", lambda name: (None, False))
    with pytest.raises(ModuleNotFoundError, match="needs the package einops: pip install einops"):
        SwinPyramidEncoder()
    assert ResNetPyramidEncoder().divisor == 16
