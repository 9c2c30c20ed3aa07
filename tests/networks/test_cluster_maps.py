# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from monai_sacb.networks import ClusterRecorder, cluster_labels
from monai_sacb.networks.blocks import SACBNorm
from monai_sacb.networks.nets import BackbonePyramid, ResNetPyramidEncoder, SACBNet


@pytest.mark.parametrize("shape", [(33, 48), (20, 32, 37)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_labels_are_those_of_the_clusterers(shape: tuple[int, ...], wrapped: bool) -> None:
    """Recorded by clusterers of our own, level by level and voxel by voxel."""
    dims = len(shape)
    # of two clusters, one may be the padding's, none of which is seen
    torch.manual_seed(0)
    net = SACBNet(spatial_dims=dims, base_channels=2, num_clusters=[2, 3, 4, 5])
    recorded: dict[int, list[torch.Tensor]] = {level: [] for level in (2, 3, 4, 5)}
    for level, estimator in zip((5, 4, 3, 2), net.estimators):
        original = estimator.sacb.clusterer

        def clusterer(points: torch.Tensor, level: int = level, original: nn.Module = original) -> tuple:
            labels, centroids = original(points)
            recorded[level].append(labels)
            return labels, centroids

        estimator.sacb.clusterer = clusterer
    images = torch.rand(2, 2, *shape)
    moving, fixed = cluster_labels(nn.Sequential(net) if wrapped else net, images)
    assert moving.shape == fixed.shape == (2, 4, *shape)
    padded = [max(32, -(-size // 16) * 16) for size in shape]
    generator = torch.Generator().manual_seed(0)
    for channel, level in enumerate((2, 3, 4, 5)):
        step = 2 ** (level - 1)
        coarse = [labels.view(2, *[size // step for size in padded]) for labels in recorded[level]]
        # the block sees the fixed image first
        for labels, found in zip(coarse, (fixed, moving)):
            for _ in range(50):
                place = [int(torch.randint(size, (), generator=generator)) for size in shape]
                expected = labels[(slice(None), *[p // step for p in place])] + 1
                assert torch.equal(found[(slice(None), channel, *place)].long(), expected)
            # some of few voxels may be nobody's
            assert 1 == found[:, channel].min() < found[:, channel].max() <= level
    assert not any(estimator.sacb.clusterer._forward_hooks for estimator in net.estimators)


def test_another_encoder() -> None:
    """Of which images are padded to multiples of 32, and which has blocks of its own."""
    torch.manual_seed(0)
    encoder = BackbonePyramid(ResNetPyramidEncoder(2), (8, 8, 16, 32, 64), 2, divisor=32)
    encoder.backbone.backbone.bn1 = SACBNorm(8, num_clusters=2, spatial_dims=2)
    net = SACBNet(2, encoder=encoder, num_clusters=3)
    moving, fixed = cluster_labels(net, torch.rand(1, 2, 40, 70))
    assert moving.shape == fixed.shape == (1, 4, 40, 70)
    # the coarsest voxels of the padded 64x96 pixels
    assert torch.equal(fixed[0, 3, ::16, ::16].repeat_interleave(16, 0).repeat_interleave(16, 1)[:40, :70], fixed[0, 3])
    assert 1 == fixed.min() < fixed.max() == 3
    assert not ClusterRecorder.fits(SACBNet(2, encoder=ResNetPyramidEncoder(2, channels=(8, 8), layers=(1, 1))))


def test_an_edge_in_the_image_is_one_in_the_map() -> None:
    """Two halves of different texture fall into different clusters of the finest level."""
    image = torch.rand(1, 1, 64, 64)
    image[..., 32:] *= 0.02
    torch.manual_seed(0)
    net = SACBNet(spatial_dims=2, num_clusters=2)
    _, fixed = cluster_labels(net, torch.cat([image, image], 1))
    left, right = fixed[0, 0, :, 2:28].float(), fixed[0, 0, :, 36:62].float()
    assert abs(left.mean() - right.mean()) > 0.6


def test_the_field_is_the_same() -> None:
    net, images = SACBNet(spatial_dims=2, base_channels=2), torch.rand(1, 2, 32, 32)
    with torch.no_grad():
        expected = net(images)
        with ClusterRecorder(net) as recorder:
            assert torch.equal(net(images), expected)
            net(images.flip(2))
    assert torch.equal(recorder.maps((32, 32))[1], cluster_labels(net, images.flip(2))[1])


def test_ill_formed() -> None:
    other = nn.Conv2d(2, 2, 3, padding=1)
    assert not ClusterRecorder.fits(other)
    with pytest.raises(ValueError, match="those of a SACBNet with 5 levels, got Conv2d"):
        cluster_labels(other, torch.rand(1, 2, 32, 32))
    with pytest.raises(ValueError, match="no clusters have been recorded"):
        ClusterRecorder(SACBNet(spatial_dims=2)).maps((32, 32))
