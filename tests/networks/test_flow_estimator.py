# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_sacb.networks.blocks import ConvFlowEstimator, MatchingFlowEstimator
from monai_sacb.networks.layers import warp

# batch, channels, spatial shape
TEST_CASES = [(1, 4, (8, 9)), (2, 3, (5, 6, 7)), (3, 2, (6, 5)), (1, 8, (4, 7, 3))]

ILL_MATCHING = [
    ({"channels": 0, "num_clusters": 3}, r"channels must be at least 1, got 0"),
    ({"channels": 4, "num_clusters": 0}, r"num_clusters must be at least 1, got 0"),
    ({"channels": 4, "num_clusters": 3, "spatial_dims": 5}, r"spatial_dims must be 2 or 3, got 5"),
]


def maps(batch: int, channels: int, spatial: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moving features, fixed features and a field of about a voxel."""
    generator = torch.Generator().manual_seed(batch)
    moving, fixed = (torch.randn(batch, channels, *spatial, generator=generator) for _ in range(2))
    return moving, fixed, torch.randn(batch, len(spatial), *spatial, generator=generator)


def matching_estimator(channels: int, dims: int, clusters: int = 3) -> MatchingFlowEstimator:
    torch.manual_seed(channels)
    return MatchingFlowEstimator(channels, clusters, dims).eval()


def conv_estimator(channels: int, dims: int, slope: float = 0.1) -> ConvFlowEstimator:
    torch.manual_seed(channels)
    return ConvFlowEstimator(channels, dims, slope).eval()


def unit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, slope: float) -> torch.Tensor:
    conv = F.conv3d if x.dim() == 5 else F.conv2d
    return F.leaky_relu(F.instance_norm(conv(x, weight, bias, padding=1)), slope)


@pytest.mark.parametrize(("batch", "channels", "spatial"), TEST_CASES)
@torch.no_grad()
def test_matching(batch: int, channels: int, spatial: tuple[int, ...]) -> None:
    estimator = matching_estimator(channels, len(spatial))
    moving, fixed, ddf = maps(batch, channels, spatial)
    # both features are those of the shared block
    delta = estimator.matching(estimator.sacb(moving), estimator.sacb(fixed))
    assert delta.abs().max() > 0.3
    torch.testing.assert_close(estimator(moving, fixed), delta)
    # the field so far is applied to the moving features, and to the points after the new step; zeros outside
    delta = estimator.matching(estimator.sacb(warp(moving, ddf)), estimator.sacb(fixed))
    expected = warp(ddf, delta) + delta
    output = estimator(moving, fixed, ddf)
    assert output.shape == (batch, len(spatial), *spatial)
    torch.testing.assert_close(output, expected)
    assert (output - (warp(delta, ddf) + ddf)).abs().max() > 0.1


@torch.no_grad()
def test_matching_finds_what_is_left() -> None:
    """A shift of 3 voxels, of which the field so far explains 2."""
    generator = torch.Generator().manual_seed(0)
    fixed = 8.0 * F.normalize(torch.randn(1, 16, 8, 9, 20, generator=generator), dim=1)
    moving = fixed.roll(3, 4)
    estimator = matching_estimator(16, 3)
    # without the blocks' change, the features are matched as they are
    torch.nn.init.zeros_(estimator.sacb.weight)
    torch.nn.init.zeros_(estimator.sacb.bias_mlp[4].weight)
    torch.nn.init.zeros_(estimator.sacb.bias_mlp[4].bias)
    ddf = torch.zeros(1, 3, 8, 9, 20)
    ddf[:, 2] = 2.0
    output = estimator(moving, fixed, ddf)[..., 1:-1, 1:-1, 4:-4]
    expected = torch.tensor([0.0, 0.0, 3.0]).view(1, 3, 1, 1, 1).expand_as(output)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-2)


def test_matching_clusters_the_fixed_features_first() -> None:
    estimator = matching_estimator(4, 2)
    moving, fixed, ddf = maps(1, 4, (6, 7))
    seen: list[torch.Tensor] = []

    def clusterer(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(points.detach())
        return torch.zeros(points.shape[:2], dtype=torch.long), points[:, :1]

    estimator.sacb.clusterer = clusterer
    estimator(moving, fixed, ddf)
    estimator.sacb(fixed)
    estimator.sacb(warp(moving, ddf))
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(("batch", "channels", "spatial"), TEST_CASES)
@pytest.mark.parametrize("slope", [0.1, 0.0])
@torch.no_grad()
def test_convolutions(batch: int, channels: int, spatial: tuple[int, ...], slope: float) -> None:
    dims = len(spatial)
    estimator = conv_estimator(channels, dims, slope)
    weights = dict(estimator.named_parameters())
    moving, fixed, ddf = maps(batch, channels, spatial)

    def expected_delta(moving: torch.Tensor) -> torch.Tensor:
        refined = []
        for x in (fixed, moving):
            for i in range(2):
                x = unit(x, weights[f"refine.{i}.conv.weight"], weights[f"refine.{i}.conv.bias"], slope)
            refined.append(x)
        x = torch.cat(refined, 1)
        for i in range(2):
            x = unit(x, weights[f"flow.{i}.conv.weight"], weights[f"flow.{i}.conv.bias"], slope)
        conv = F.conv3d if dims == 3 else F.conv2d
        return conv(x, weights["flow.2.conv.weight"], weights["flow.2.conv.bias"], padding=1)

    delta = expected_delta(moving)
    assert delta.abs().max() > 0.1
    torch.testing.assert_close(estimator(moving, fixed), delta, rtol=1e-4, atol=1e-4)
    delta = expected_delta(warp(moving, ddf))
    torch.testing.assert_close(estimator(moving, fixed, ddf), warp(ddf, delta) + delta, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_convolutions_that_answer_zero_keep_the_field() -> None:
    estimator = conv_estimator(4, 3)
    for parameter in estimator.flow[2].parameters():
        torch.nn.init.zeros_(parameter)
    moving, fixed, ddf = maps(2, 4, (5, 6, 7))
    torch.testing.assert_close(estimator(moving, fixed, ddf), ddf, rtol=0, atol=1e-5)
    assert estimator(moving, fixed).abs().max() == 0


@pytest.mark.parametrize("kind", ["matching", "conv"])
@pytest.mark.parametrize("spatial", [(6, 7), (4, 5, 6)])
def test_batch_gradient_and_order(kind: str, spatial: tuple[int, ...]) -> None:
    estimator = (matching_estimator if kind == "matching" else conv_estimator)(4, len(spatial))
    moving, fixed, ddf = maps(2, 4, spatial)
    output = estimator(moving, fixed, ddf)
    assert torch.equal(output, estimator(moving, fixed, ddf))
    assert (output - estimator(fixed, moving, ddf)).abs().max() > 0.05
    for i in range(2):
        alone = estimator(moving[i : i + 1], fixed[i : i + 1], ddf[i : i + 1])
        torch.testing.assert_close(output[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    output.square().sum().backward()
    in_front_of_norm = ("proj_in.conv.bias", "refine.0.conv.bias", "refine.1.conv.bias", "flow.0.conv.bias", "flow.1")
    for name, parameter in estimator.named_parameters():
        if not (name.endswith("bias") and any(part in name for part in in_front_of_norm)):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["matching", "conv"])
@torch.no_grad()
def test_script(kind: str, relative_error) -> None:
    estimator = (matching_estimator if kind == "matching" else conv_estimator)(4, 3)
    moving, fixed, ddf = maps(2, 4, (4, 5, 6))
    scripted = torch.jit.script(estimator)
    assert relative_error(scripted(moving, fixed), estimator(moving, fixed)) < 1e-5
    assert relative_error(scripted(moving, fixed, ddf), estimator(moving, fixed, ddf)) < 1e-5


@pytest.mark.parametrize(("arguments", "message"), ILL_MATCHING)
def test_ill_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatchingFlowEstimator(**arguments)


@pytest.mark.parametrize("kind", ["matching", "conv"])
def test_ill_field(kind: str) -> None:
    estimator = (matching_estimator if kind == "matching" else conv_estimator)(4, 3)
    moving, fixed, _ = maps(1, 4, (4, 5, 6))
    with pytest.raises(ValueError, match=r"\[1, 4, 4, 5, 6\] and \[1, 2, 4, 5, 6\]"):
        estimator(moving, fixed, torch.zeros(1, 2, 4, 5, 6))


def test_ill_features() -> None:
    with pytest.raises(ValueError, match=r"must have one shape .*, got \[1, 4, 6, 6\] and \[1, 4, 6, 5\]"):
        matching_estimator(4, 2)(torch.rand(1, 4, 6, 6), torch.rand(1, 4, 6, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"channels": 0}, "channels .*0"), ({"channels": 4, "spatial_dims": 4}, "spatial_dims .*4")],
)
def test_ill_convolutions(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvFlowEstimator(**arguments)
