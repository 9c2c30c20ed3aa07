# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The operators as PyTorch's compiler sees them, and a compiled network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

# importing the modules registers their operators
from monai_sacb.networks.blocks import SACBlock, SimilarityMatching
from monai_sacb.networks.nets import SACBNet

SHAPES = [(2, 3, 5, 4), (1, 4, 4, 6, 5)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def maps(shape: tuple[int, ...], seed: int, dense: bool) -> torch.Tensor:
    """Feature maps, contiguous or channels-last."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x if dense else x.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_custom_operators(shape: tuple[int, ...], dense: bool) -> None:
    """PyTorch's own check: schema, shapes, types and layout that the compiler is told, gradients."""
    batch, channels, clusters, num_taps = shape[0], shape[1], 3, 3 ** (len(shape) - 2)
    x, other = maps(shape, 0, dense), maps(shape, 1, dense)
    labels = torch.arange(x[0, 0].numel()).expand(batch, -1).contiguous() % clusters
    weight, gates = torch.randn(6, channels, num_taps), torch.rand(batch, clusters, num_taps)
    bias = torch.randn(batch, clusters, 6)
    leaves = [t.requires_grad_() for t in (x, weight, gates, bias)]
    ops = torch.ops.monai_sacb
    torch.library.opcheck(ops.cluster_adaptive_conv.default, (*leaves, labels, 3))
    # a result of the layout of its own, whatever that of the operands
    turned = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (weight, gates)]
    torch.library.opcheck(
        ops.cluster_adaptive_conv_backward.default,
        (maps((batch, 6, *shape[2:]), 2, dense), x.detach(), *turned, labels, 3),
    )
    torch.library.opcheck(ops.expected_offset.default, (x, other.requires_grad_(), 3))
    points = x.detach().flatten(2).transpose(1, 2)
    torch.library.opcheck(ops.kmeans.default, (points, clusters, 4, 16, 3, 1, 1e-4))
    torch.library.opcheck(ops.kmeans.default, (points.double(), 40, 1, 1000, 3, 1, 0.0))


@pytest.mark.parametrize("spatial", [(9, 8), (5, 6, 7)])
def test_compiled_block_in_one_graph(spatial: tuple[int, ...], relative_error) -> None:
    torch.manual_seed(0)
    block = SACBlock(4, 3, len(spatial))
    x = torch.randn(2, 4, *spatial, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = block(x)
        return SimilarityMatching()(y, y.flip(2))

    expected = function(x)
    weight = torch.randn_like(expected)
    leaves = [x, *block.parameters()]
    expected_grads = torch.autograd.grad((expected * weight).sum(), leaves)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    result = compiled(x)
    assert relative_error(result, expected) < 1e-5
    for grad, expected_grad in zip(torch.autograd.grad((result * weight).sum(), leaves), expected_grads):
        assert relative_error(grad, expected_grad) < 1e-4 or expected_grad.abs().max() < 1e-5
    # another batch
    assert relative_error(compiled(x[:1]), function(x[:1])) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_network(check_same_field) -> None:
    """To machine code, in one graph, forward and backward."""
    torch.manual_seed(0)
    net = SACBNet(base_channels=2, num_clusters=3)
    x = torch.rand(1, 2, 32, 33, 40)
    expected, ddf = net(x), torch.compile(net, fullgraph=True)(x)
    check_same_field(ddf, expected)
    last = net.finest_estimator.flow[-1].conv.weight
    (expected_grad,) = torch.autograd.grad(expected.square().mean(), last)
    (grad,) = torch.autograd.grad(ddf.square().mean(), last)
    assert (grad - expected_grad).abs().max() < 0.02 * expected_grad.abs().max()
