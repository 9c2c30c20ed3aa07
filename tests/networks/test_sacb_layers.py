# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from monai.networks.layers import factories
from monai.networks.layers.factories import Conv, Norm
from monai.networks.nets import (
    BasicUNet,
    DenseNet,
    DynUNet,
    ResNet,
    SegResNet,
    SegResNetDS,
    UNet,
    VNet,
)
from monai.networks.utils import replace_modules

from monai_sacb.networks.blocks import SACBConv, SACBlock, SACBNorm, register_sacb_layers

# arguments beside the channels, batch, spatial shape
TEST_CASES: list[tuple[dict[str, Any], int, tuple[int, ...]]] = [
    ({}, 2, (5, 6, 7)),
    ({"kernel_size": 1, "padding": 0}, 1, (4, 3, 5)),
    ({"kernel_size": (5, 5), "padding": (2, 2)}, 2, (9, 6)),
    ({"padding": "same", "bias": False}, 1, (8, 7)),
    ({"stride": 2, "padding": 1}, 2, (7, 6, 5)),
    ({"stride": (2, 3), "kernel_size": [3, 3]}, 1, (6, 8)),
    ({"stride": (1, 2, 1), "kernel_size": 3, "dilation": 1, "groups": 1}, 1, (4, 5, 6)),
]
Net = Callable[[tuple[str, dict[str, int]]], nn.Module]
# networks of MONAI that take their norms by name, and how many they then have
NETWORKS: dict[str, tuple[Net, int]] = {
    "BasicUNet": (lambda norm: BasicUNet(2, 1, 2, (4,) * 6, norm=norm), 18),
    "UNet": (lambda norm: UNet(2, 1, 2, (4, 6, 8), (2, 2), num_res_units=1, norm=norm), 6),
    "DynUNet": (lambda norm: DynUNet(2, 1, 2, [3] * 3, [1, 2, 2], [2, 2], [4, 6, 8], norm_name=norm), 10),
    "SegResNet": (lambda norm: SegResNet(2, 4, 1, 2, norm=norm, blocks_down=(1, 1), blocks_up=(1,)), 7),
    "SegResNetDS": (lambda norm: SegResNetDS(2, 4, 1, 2, norm=norm, blocks_down=(1, 1)), 6),
    "DenseNet": (lambda norm: DenseNet(2, 1, 2, 4, 2, (1, 1), norm=norm), 7),
}


def features(batch: int, channels: int, spatial: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, channels, *spatial, generator=torch.Generator().manual_seed(seed))


def halves(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two clusters: the first and the second half of the voxels, whose first and last voxels are their centroids."""
    batch, num = points.shape[:2]
    return (2 * torch.arange(num) // num).expand(batch, num), points[:, :: num - 1]


@pytest.mark.parametrize(("arguments", "batch", "spatial"), TEST_CASES)
def test_conv_is_a_convolution_in_each_cluster(arguments: dict, batch: int, spatial: tuple[int, ...]) -> None:
    """By PyTorch's convolution with the gated weights, and its arguments, for each cluster of each image."""
    dims, given = len(spatial), {"kernel_size": 3, "stride": 1, "bias": True, **arguments}
    torch.manual_seed(1)
    layer = Conv["sacb", dims](4, 6, **arguments)
    layer.clusterer = halves
    x = features(batch, 4, spatial).requires_grad_()
    y = layer(x)
    conv, pool = ((F.conv2d, F.avg_pool2d), (F.conv3d, F.avg_pool3d))[dims - 2]
    kernel = given["kernel_size"] if isinstance(given["kernel_size"], int) else given["kernel_size"][0]
    mean = pool(x, 3, 1, 1).flatten(2)
    member = (2 * torch.arange(mean.shape[2]) // mean.shape[2]).view(1, *spatial)
    for i in range(batch):
        expected = torch.zeros_like(y[i])
        for cluster in range(2):
            centroid = mean[i, :, -cluster]
            weight = layer.weight * torch.sigmoid(layer.gate_mlp(centroid))
            bias = layer.bias_mlp(centroid) if given["bias"] else None
            weight = weight.unflatten(2, [kernel] * dims)
            answer = conv(x[i : i + 1], weight, bias, given["stride"], kernel // 2)[0]
            steps = given["stride"] if isinstance(given["stride"], tuple) else (given["stride"],) * dims
            inside = member[(slice(None), *(slice(None, None, step) for step in steps))] == cluster
            expected = torch.where(inside, answer, expected)
        assert expected.std() > 0.1
        torch.testing.assert_close(y[i], expected, rtol=1e-4, atol=1e-5)
    y.square().mean().backward()
    for name, value in (("x", x), *layer.named_parameters()):
        assert value.grad is not None and value.grad.abs().max() > 0, name


@pytest.mark.parametrize(("dims", "arguments"), [(2, {"stride": 2, "bias": False}), (3, {"kernel_size": 5})])
@torch.no_grad()
def test_conv_script(dims: int, arguments: dict) -> None:
    layer, x = SACBConv(3, 5, spatial_dims=dims, num_clusters=2, **arguments), features(2, 3, (8, 6, 7)[:dims])
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x), rtol=1e-4, atol=1e-5)
    for i in range(2):
        torch.testing.assert_close(layer(x)[i : i + 1], layer(x[i : i + 1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels .* got 0"),
        ({"out_channels": -1}, "out_channels .* got -1"),
        ({"kernel_size": 2}, "kernel_size must be one odd number for all axes, got 2"),
        ({"kernel_size": (3, 3, 1)}, r"kernel_size must be one odd number for all axes, got \(3, 3, 1\)"),
        ({"kernel_size": 0}, "kernel_size .* got 0"),
        ({"stride": 0}, "stride .* got 0"),
        ({"stride": (1, 1.5, 1)}, r"stride .* got 1\.5"),
        ({"padding": 0}, "padding must be 1 for a kernel_size of 3, got 0"),
        ({"padding": "valid"}, "padding must be 1 for a kernel_size of 3, got 'valid'"),
        ({"dilation": 2}, "dilation and groups must be 1, got 2 and 1"),
        ({"groups": 2}, "dilation and groups must be 1, got 1 and 2"),
        ({"num_clusters": 0}, "num_clusters must be at least 1, got 0"),
        ({"spatial_dims": 1}, "spatial_dims must be 2 or 3, got 1"),
    ],
)
def test_ill_conv(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SACBConv(**{"in_channels": 4, "out_channels": 4, **arguments})


@pytest.mark.parametrize(("dims", "affine"), [(2, True), (3, False)])
@torch.no_grad()
def test_norm_is_instance_norm_and_block(dims: int, affine: bool) -> None:
    layer = Norm["sacb", dims](num_features=4, num_clusters=3, affine=affine, eps=1e-3, negative_slope=0.2)
    theirs = Norm["instance", dims](4, eps=1e-3, affine=affine)
    block = SACBlock(4, 3, dims, 0.2)
    block.load_state_dict(layer.block.state_dict())
    if affine:
        layer.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        layer.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
        theirs.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = 5 * features(2, 4, (6, 7, 5)[:dims]) - 3
    assert layer(x).std() > 0.5 and (layer(x) - theirs(x)).abs().max() > 0.1
    torch.testing.assert_close(layer(x), block(theirs(x)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3, got 1"):
        Norm["sacb", 1](4)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_network_of_monai_by_name(name: str) -> None:
    """Trained for a few steps; every weight learns."""
    make, count = NETWORKS[name]
    torch.manual_seed(0)
    network = make(("sacb", {"num_clusters": 2}))
    assert sum(isinstance(module, SACBNorm) for module in network.modules()) == count
    assert not any(isinstance(m, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) for m in network.modules())
    x = features(2, 1, (32, 32))
    target = (F.avg_pool2d(x, 5, 1, 2) > 0).float()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        y = network(x)
        if y.dim() == 2:
            loss = F.cross_entropy(y, torch.arange(2))
        else:
            loss = F.binary_cross_entropy_with_logits(y[:, :1], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    for part in (module for module in network.modules() if isinstance(module, SACBNorm)):
        for key, parameter in part.named_parameters():
            if key != "block.proj_in.conv.bias":
                assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


def test_where_the_names_do_not_reach() -> None:
    """A ResNet of MONAI hands its norm to its first convolution alone, and a VNet takes none."""
    norm = ("sacb", {"num_clusters": 2})
    network = ResNet("basic", [1] * 4, [4] * 4, 2, 1, norm=norm, num_classes=2)
    assert sum(isinstance(module, SACBNorm) for module in network.modules()) == 1
    assert network(features(2, 1, (32, 32))).shape == (2, 2)
    with pytest.raises(TypeError, match="norm"):
        VNet(2, norm=norm)


def test_convolution_in_place_of_one_of_monais() -> None:
    torch.manual_seed(0)
    network = BasicUNet(2, 1, 2, (4,) * 6)
    x = features(1, 1, (32, 32))
    before = network(x)
    name = "upcat_1.convs.conv_1.conv"
    old = dict(network.named_modules())[name]
    replace_modules(network, name, Conv["sacb", 2](old.in_channels, old.out_channels, padding=1, num_clusters=3))
    after = network(x)
    assert after.shape == before.shape and (after - before).abs().max() > 0.01
    after.square().mean().backward()
    assert dict(network.named_modules())[name].gate_mlp[0].weight.grad.abs().max() > 0
    assert network.conv_0.conv_0.conv.weight.grad.abs().max() > 0
    torch.testing.assert_close(torch.jit.script(network)(x), after, rtol=1e-3, atol=1e-3)


def test_nothing_else_is_registered() -> None:
    """Importing this package adds one name to two factories, and leaves all others to MONAI."""
    ours = {}
    for name in factories.__all__:
        store = getattr(factories, name)
        if isinstance(store, factories.LayerFactory):
            origins = {key: component.value.__module__.split(".")[0] for key, component in store.components.items()}
            assert "monai" in origins.values()
            ours[name] = {key for key, origin in origins.items() if origin != "monai"}
    assert {name: keys for name, keys in ours.items() if keys} == {"Conv": {"SACB"}, "Norm": {"SACB"}}
    assert len(ours) == 7 and Conv["conv", 3] is nn.Conv3d and Norm["instance", 2] is nn.InstanceNorm2d


def test_register_twice(caplog: pytest.LogCaptureFixture) -> None:
    before = [(dict(factory.components), factory.__doc__) for factory in (Conv, Norm)]
    with caplog.at_level(logging.WARNING):
        register_sacb_layers()
    assert [(factory.components, factory.__doc__) for factory in (Conv, Norm)] == before
    assert caplog.text == "" and "``SACB``" in str(before[0][1])


def test_a_name_of_monais_own_stays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    theirs = Conv.components["CONV"]
    monkeypatch.setitem(Conv.components, "SACB", theirs)
    with caplog.at_level(logging.WARNING):
        register_sacb_layers()
    assert Conv.components["SACB"] is theirs and Conv["sacb", 2] is nn.Conv2d
    assert "MONAI's factory of convolution layers has a 'SACB' already, which stays" in caplog.text
