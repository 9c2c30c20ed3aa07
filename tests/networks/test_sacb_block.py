# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from monai_sacb.networks.blocks import SACBlock
from monai_sacb.networks.layers import KMeans, kmeans

# batch, channels, clusters, spatial shape, slope of the activation
TEST_CASES = [
    (1, 4, 3, (6, 7), 0.1),
    (3, 3, 2, (5, 9), 0.0),
    (2, 4, 5, (4, 6, 5), 0.1),
    (1, 8, 7, (7, 5, 3), 0.3),
    (2, 2, 1, (3, 4, 5), 0.1),
    # short axes and fewer voxels than clusters
    (1, 3, 7, (1, 2, 2), 0.1),
    (2, 3, 4, (2, 1), 0.1),
]

ILL_CASES = [
    ({"channels": 0, "num_clusters": 3}, r"channels must be at least 1, got 0"),
    ({"channels": -4, "num_clusters": 3}, r"channels must be at least 1, got -4"),
    ({"channels": 4, "num_clusters": 0}, r"num_clusters must be at least 1, got 0"),
    ({"channels": 4, "num_clusters": -7}, r"num_clusters must be at least 1, got -7"),
    ({"channels": 4, "num_clusters": 3, "spatial_dims": 1}, r"spatial_dims must be 2 or 3, got 1"),
    ({"channels": 4, "num_clusters": 3, "spatial_dims": 4}, r"spatial_dims must be 2 or 3, got 4"),
]

Clusterer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def make_block(channels: int, clusters: int, dims: int, slope: float = 0.1) -> SACBlock:
    torch.manual_seed(channels + 10 * clusters)
    return SACBlock(channels, clusters, dims, slope)


def features(batch: int, channels: int, spatial: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, channels, *spatial, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A clusterer that remembers what it was asked and answered."""

    def __init__(self, clusterer: Clusterer) -> None:
        self.clusterer = clusterer
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        labels, centroids = self.clusterer(points)
        self.calls.append((points, labels, centroids))
        return labels, centroids


def hidden(block: SACBlock, x: torch.Tensor, slope: float) -> torch.Tensor:
    conv = F.conv3d if x.dim() == 5 else F.conv2d
    h = conv(x, block.proj_in.conv.weight, block.proj_in.conv.bias, padding=1)
    axes = tuple(range(2, x.dim()))
    h = (h - h.mean(axes, keepdim=True)) / (h.var(axes, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return F.leaky_relu(h, slope)


def neighborhood_mean(h: torch.Tensor) -> torch.Tensor:
    """``(B, N, C)``: sum over the window of 3, zeros outside, divided by the full window at the border too."""
    dims, channels = h.dim() - 2, h.shape[1]
    conv = F.conv3d if dims == 3 else F.conv2d
    ones = torch.ones(channels, 1, *[3] * dims, dtype=h.dtype) / 3**dims
    return conv(h, ones, padding=1, groups=channels).flatten(2).transpose(1, 2)


def perceptron(layers: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    first, second, third = (layers[i] for i in (0, 2, 4))
    x = (x @ first.weight.t() + first.bias).clamp(min=0)
    x = (x @ second.weight.t() + second.bias).clamp(min=0)
    return x @ third.weight.t() + third.bias


def by_definition(
    block: SACBlock, x: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor, slope: float
) -> torch.Tensor:
    h, dims = hidden(block, x, slope), x.dim() - 2
    conv = F.conv3d if dims == 3 else F.conv2d
    y = torch.zeros_like(x)
    for image in range(x.shape[0]):
        for k in range(centroids.shape[1]):
            gate = 1 / (1 + torch.exp(-perceptron(block.gate_mlp, centroids[image, k])))
            bias = perceptron(block.bias_mlp, centroids[image, k])
            weight = (block.weight * gate).view(*block.weight.shape[:2], *[3] * dims)
            here = (labels[image] == k).view(1, *x.shape[2:])
            y[image] = torch.where(here, conv(h[image : image + 1], weight, bias, padding=1)[0], y[image])
    return x + F.leaky_relu(y, slope)


@pytest.mark.parametrize(("batch", "channels", "clusters", "spatial", "slope"), TEST_CASES)
def test_definition(
    batch: int, channels: int, clusters: int, spatial: tuple[int, ...], slope: float, relative_error
) -> None:
    block = make_block(channels, clusters, len(spatial), slope)
    x = features(batch, channels, spatial)
    recorder = Recorder(block.clusterer)
    block.clusterer = recorder
    output = block(x)
    assert output.shape == x.shape and output.dtype == x.dtype
    ((points, labels, centroids),) = recorder.calls
    expected_points = neighborhood_mean(hidden(block, x, slope))
    torch.testing.assert_close(points, expected_points, rtol=1e-4, atol=1e-5)
    assert labels.shape == (batch, math.prod(spatial)) and centroids.shape == (batch, clusters, channels)
    assert relative_error(output, by_definition(block, x, labels, centroids, slope)) < 1e-5
    assert (output - x).abs().max() > 1e-2


def load_recorded(recorded: dict) -> SACBlock:
    block = SACBlock(8, 5)
    names = {"w": "weight", "get_kernel": "gate_mlp", "get_bias": "bias_mlp", "proj_in": "proj_in"}
    parameters = {}
    for name, array in recorded.items():
        if name.startswith("param."):
            head, _, rest = name.removeprefix("param.").partition(".")
            parameters[".".join(filter(None, (names[head], rest)))] = torch.from_numpy(array)
    block.load_state_dict(parameters)
    return block


def test_parity(parity, relative_error) -> None:
    recorded = parity("sacb_block_mean_s")
    block = load_recorded(recorded)
    labels, centroids = torch.from_numpy(recorded["labels"])[None], torch.from_numpy(recorded["centroids"])[None]
    recorder = Recorder(lambda points: (labels.long(), centroids))
    block.clusterer = recorder
    x = torch.from_numpy(recorded["input"]).requires_grad_()
    output = block(x)
    assert relative_error(recorder.calls[0][0][0], recorded["clustered_features"]) < 1e-5
    assert relative_error(output, recorded["output"]) < 1e-5
    output.backward(torch.from_numpy(recorded["output_grad"]))
    assert relative_error(x.grad, recorded["input_grad"]) < 1e-4
    gradients = {
        "w": block.weight,
        **{f"get_kernel.{i}.{n}": getattr(block.gate_mlp[i], n) for i in (0, 2, 4) for n in ("weight", "bias")},
        **{f"get_bias.{i}.{n}": getattr(block.bias_mlp[i], n) for i in (0, 2, 4) for n in ("weight", "bias")},
        "proj_in.conv.weight": block.proj_in.conv.weight,
    }
    for name, parameter in gradients.items():
        assert relative_error(parameter.grad, recorded[f"grad.{name}"]) < 1e-4, name
    # the bias in front of the norm has no influence: its gradient is rounding
    assert set(recorded) - {f"grad.{name}" for name in gradients} >= {"grad.proj_in.conv.bias"}
    assert block.proj_in.conv.bias.grad.abs().max() < 1e-5 * block.proj_in.conv.weight.grad.abs().max()


def test_default_clusterer_reproduces_the_recording(parity) -> None:
    """Our own clustering of the recorded block: nearly every voxel comes out as recorded with another clustering."""
    recorded = parity("sacb_block_mean_s")
    output = load_recorded(recorded)(torch.from_numpy(recorded["input"]))
    expected = torch.from_numpy(recorded["output"])
    change = (expected - torch.from_numpy(recorded["input"])).abs().mean()
    assert (output - expected).abs().mean() < 0.1 * change


def test_clusterer_may_be_any_callable() -> None:
    """It is called once for a batch, with the voxels in row-major order, and its answer decides."""
    block = make_block(3, 4, 3)
    assert isinstance(block.clusterer, KMeans)
    x = features(2, 3, (4, 5, 6))
    voxel = torch.arange(4 * 5 * 6).view(1, -1).expand(2, -1)
    outputs = []
    for labels in (voxel % 2, voxel // 60, torch.zeros_like(voxel)):
        calls = []

        def clusterer(points: torch.Tensor, labels=labels, calls=calls) -> tuple[torch.Tensor, torch.Tensor]:
            calls.append(points)
            return labels.int(), points[:, :2] * 5

        block.clusterer = clusterer
        outputs.append(block(x))
        (points,) = calls
        assert points.shape == (2, 120, 3)
        expected = by_definition(block, x, labels, points[:, :2] * 5, 0.1)
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-4, atol=1e-5)
    # the first half of the slices belongs to cluster 0 in the last two cases
    torch.testing.assert_close(outputs[1][:, :, :2], outputs[2][:, :, :2])
    assert (outputs[1][:, :, 2:] - outputs[2][:, :, 2:]).abs().max() > 1e-3
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_replaced_clusterer_leaves_the_parameters() -> None:
    block = make_block(4, 3, 3)
    names = list(block.state_dict())
    block.clusterer = lambda points: kmeans(points, 2)
    assert list(block.state_dict()) == names
    block.clusterer = KMeans(5)
    assert isinstance(block.clusterer, KMeans) and block.clusterer.num_clusters == 5


@pytest.mark.parametrize(("clusterer", "name"), [(7, "int"), (None, "NoneType"), ("kmeans", "str")])
def test_ill_clusterer(clusterer: object, name: str) -> None:
    with pytest.raises(TypeError, match=f"clusterer must be callable, got {name}"):
        make_block(4, 3, 3).clusterer = clusterer


@pytest.mark.parametrize(("arguments", "message"), ILL_CASES)
def test_ill_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SACBlock(**arguments)


@pytest.mark.parametrize("shape", [(1, 3, 6, 6, 6), (1, 4, 6, 6)])
def test_ill_input(shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, RuntimeError), match="channels"):
        make_block(4, 3, 3)(torch.zeros(shape))


@pytest.mark.parametrize(("dims", "taps"), [(2, 9), (3, 27)])
def test_start_of_training(dims: int, taps: int) -> None:
    block = make_block(8, 3, dims)
    assert block.weight.shape == (8, 8, taps)
    bound = 1 / math.sqrt(taps * 8)
    assert 0.95 * bound < block.weight.abs().max() <= bound
    assert block.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    for mlp, width, outputs in ((block.gate_mlp, 128, taps), (block.bias_mlp, 64, 8)):
        linear = [(m.in_features, m.out_features) for m in mlp if isinstance(m, torch.nn.Linear)]
        assert linear == [(8, width), (width, width), (width, outputs)]


@pytest.mark.parametrize("spatial", [(7, 9), (5, 6, 7)])
def test_batch_equals_one_by_one(spatial: tuple[int, ...]) -> None:
    block = make_block(4, 3, len(spatial))
    x = torch.cat([features(2, 4, spatial), 30.0 + 0.1 * features(1, 4, spatial, seed=1)])
    with torch.no_grad():
        together = block(x)
        assert torch.equal(together, block(x))
        for i in range(3):
            torch.testing.assert_close(together[i : i + 1], block(x[i : i + 1]), rtol=1e-4, atol=1e-4)


def test_gradient_reaches_every_parameter() -> None:
    """Also the two perceptrons, whose input is data; the clustering itself passes no gradient."""
    block = make_block(4, 3, 3)
    x = features(2, 4, (5, 6, 7)).requires_grad_()
    recorder = Recorder(block.clusterer)
    block.clusterer = recorder
    output = block(x)
    assert not recorder.calls[0][2].requires_grad
    output.square().sum().backward()
    for name, parameter in block.named_parameters():
        if name != "proj_in.conv.bias":
            assert parameter.grad.abs().max() > 0, name
    # with the same clusters as constants the gradient is the same
    gradient = x.grad.clone()
    _, labels, centroids = recorder.calls[0]
    x.grad = None
    by_definition(block, x, labels, centroids, 0.1).square().sum().backward()
    torch.testing.assert_close(x.grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize("spatial", [(8, 9), (5, 6, 7)])
def test_script(spatial: tuple[int, ...], relative_error) -> None:
    block = make_block(4, 3, len(spatial)).eval()
    x = features(2, 4, spatial)
    with torch.no_grad():
        output = torch.jit.script(block)(x)
        assert relative_error(output - x, block(x) - x) < 1e-5 and not torch.equal(output, x)


def test_autocast(relative_error) -> None:
    block = make_block(8, 5, 3)
    x = features(1, 8, (8, 9, 7))
    with torch.no_grad():
        recorder = Recorder(block.clusterer)
        block.clusterer = recorder
        expected = block(x)
        _, labels, centroids = recorder.calls[0]
        block.clusterer = lambda points: (labels, centroids)
        with torch.autocast("cpu", torch.bfloat16):
            output = block(x)
    assert torch.isfinite(output).all()
    assert relative_error(output - x, expected - x) < 0.03
