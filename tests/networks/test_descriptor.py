# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from monai_sacb.losses import mind_ssc
from monai_sacb.networks.layers import self_similarity
from monai_sacb.networks.nets import SACBNet


def image(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(2, 1, 20, 24, 17), (1, 2, 30, 21), (3, 1, 7, 9)])
@pytest.mark.parametrize(("radius", "dilation"), [(0, 1), (1, 1), (1, 2), (2, 2)])
def test_is_the_descriptor_of_the_loss(shape: tuple[int, ...], radius: int, dilation: int) -> None:
    """Two implementations, one of them with its own gradient and memory."""
    described = self_similarity(image(*shape), radius, dilation)
    assert described.shape == (shape[0], 12 if len(shape) == 5 else 4, *shape[2:])
    torch.testing.assert_close(described, mind_ssc(image(*shape), radius, dilation), atol=1e-5, rtol=0)


def test_by_its_definition() -> None:
    """At a voxel of a 2-D image: mean squared differences of the patches beside it."""
    picture = image(1, 1, 12, 12).double()
    patches = {(i, j): picture[0, 0, 5 + i : 8 + i, 5 + j : 8 + j] for i, j in ((-2, 0), (2, 0), (0, -2), (0, 2))}
    pairs = [((0, -2), (-2, 0)), ((0, 2), (2, 0)), ((0, -2), (2, 0)), ((0, 2), (-2, 0))]
    distances = torch.stack([(patches[a] - patches[b]).square().mean() for a, b in pairs])
    expected = torch.exp((distances.min() - distances) / distances.mean())
    found = self_similarity(picture)[0, :, 6, 6]
    torch.testing.assert_close(found.sort().values, expected.sort().values, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.7), (-1.0, 1.0), (-3.0, 0.2), (0.2, 0.0)])
def test_contrast_does_not_matter(scale: float, offset: float) -> None:
    picture = image(1, 1, 16, 18, 14)
    torch.testing.assert_close(self_similarity(picture), self_similarity(scale * picture + offset), atol=1e-3, rtol=0)
    assert self_similarity(picture).std() > 0.1


def test_without_contrast() -> None:
    assert torch.equal(self_similarity(torch.full((1, 1, 8, 8, 8), 3.0)), torch.ones(1, 12, 8, 8, 8))


def test_scripted() -> None:
    picture = image(2, 1, 10, 12, 9)
    scripted = torch.jit.script(self_similarity)
    assert torch.equal(scripted(picture), self_similarity(picture))


@pytest.mark.parametrize("shape", [(2, 1, 10, 12, 9), (1, 1, 11, 8)])
def test_traced_and_exported(shape: tuple[int, ...]) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self_similarity(x)

    picture = image(*shape)
    traced = torch.jit.trace(Layer(), (picture,))
    exported = torch.export.export(Layer(), (picture,)).module()
    for recorded in (traced, exported):
        assert torch.equal(recorded(picture), self_similarity(picture))


@pytest.mark.parametrize("shape", [(1, 1, 33, 40, 32), (2, 1, 40, 36)])
@torch.no_grad()
def test_network_sees_no_contrast(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = SACBNet(len(shape) - 2, base_channels=2, num_clusters=2, self_similarity=True).eval()
    moving, fixed = image(*shape), image(*shape).flip(2)
    ddf = network(torch.cat([moving, fixed], 1))
    inside = tuple(slice(None, size // 16 * 16) for size in shape[2:])
    # sizes are padded with zeros, whose edge differs between contrasts: whole multiples of 16 have none
    cut = torch.cat([moving, fixed], 1)[(..., *inside)]
    other = torch.cat([1 - moving, fixed], 1)[(..., *inside)]
    torch.testing.assert_close(network(cut), network(other), atol=0.05, rtol=0)
    assert ddf.shape == (shape[0], len(shape) - 2, *shape[2:]) and ddf.abs().max() > 0.1
    scripted = torch.jit.script(network)
    torch.testing.assert_close(scripted(cut), network(cut), atol=0.05, rtol=0)


def test_state_says_what_the_network_saw() -> None:
    state = SACBNet(2, base_channels=2, num_clusters=2, self_similarity=True).state_dict()
    assert bool(state["self_similarity"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        SACBNet(2, base_channels=2, num_clusters=2).load_state_dict(state)
    with pytest.raises(ValueError, match="self_similarity must be True or False, got 1"):
        SACBNet(2, self_similarity=1)
