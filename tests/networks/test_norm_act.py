# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_sacb.networks.layers import instance_norm_leaky_relu

SHAPES = [(1, 3, 5, 7), (2, 4, 6, 5, 3), (3, 1, 4, 4), (1, 70, 3, 2, 4), (2, 2, 1, 9), (1, 2, 1, 1, 8)]
LAYOUTS = ["contiguous", "channels last", "strided"]


def maps(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> torch.Tensor:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64) + 5
    if layout == "channels last":
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        return x.to(dtype).contiguous(memory_format=last)
    return x.to(dtype) if layout == "contiguous" else x.to(dtype).repeat_interleave(2, -1)[..., ::2]


def by_definition(x: torch.Tensor, slope: float = 0.1) -> torch.Tensor:
    return F.leaky_relu(F.instance_norm(x), slope)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_definition(shape: tuple[int, ...], layout: str, dtype: torch.dtype, relative_error) -> None:
    x = maps(shape, layout, dtype)
    expected = by_definition(x.double())
    y = instance_norm_leaky_relu(x)
    assert y.dtype == dtype and y.shape == shape
    assert relative_error(y, expected) < {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slope", [0.1, 0.0, 1.5])
def test_gradient(shape: tuple[int, ...], layout: str, slope: float, relative_error) -> None:
    weights = torch.arange(maps(shape, layout, torch.float64).numel(), dtype=torch.float64).view(shape).cos()
    gradients = []
    for function in (instance_norm_leaky_relu, by_definition):
        x = maps(shape, layout, torch.float64).requires_grad_()
        # an operation in front of it, whose result it may overwrite
        y = function(x * 2.0, slope)
        gradients.append(torch.autograd.grad((y * weights).sum(), x)[0])
    assert relative_error(*gradients) < 1e-10


def test_gradcheck() -> None:
    x = maps((2, 2, 3, 2, 3), "contiguous", torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: instance_norm_leaky_relu(t * 1.0), x)


def test_gradient_of_a_million_voxels_keeps_its_digits() -> None:
    """An error of the mean is the same at all voxels: it adds up in a sum over them, in which the gradient cancels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((1, 8, 100, 100, 100), generator=generator).contiguous(memory_format=torch.channels_last_3d)
    weights = torch.rand(x.shape, generator=generator)
    sums = []
    for function, dtype in ((instance_norm_leaky_relu, torch.float32), (by_definition, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad((function(leaf * 1.0) * weights.to(dtype)).sum(), leaf)
        # both sums would be zero exactly
        sums.append((gradient.double() * leaf.double()).sum([2, 3, 4]) / (gradient.double() * leaf.double()).norm())
    assert (sums[0] - sums[1]).abs().max() < 1e-4


def test_a_leaf_is_left_alone() -> None:
    x = torch.randn(1, 2, 4, 4).requires_grad_()
    before = x.detach().clone()
    instance_norm_leaky_relu(x).sum().backward()
    assert torch.equal(x.detach(), before) and x.grad is not None


def test_constant_maps() -> None:
    assert torch.equal(instance_norm_leaky_relu(torch.full((1, 2, 4, 5, 6), 3.7)), torch.zeros(1, 2, 4, 5, 6))


def test_batch_equals_one_by_one() -> None:
    x = maps((3, 4, 6, 5, 3), "contiguous", torch.float32)
    single = torch.cat([instance_norm_leaky_relu(x[i : i + 1].clone()) for i in range(3)])
    assert torch.equal(instance_norm_leaky_relu(x.clone()), single)


def test_script(relative_error) -> None:
    x = maps((2, 4, 6, 5, 3), "contiguous", torch.float32)
    scripted = torch.jit.script(instance_norm_leaky_relu)(x.clone())
    assert relative_error(scripted, instance_norm_leaky_relu(x.clone())) < 1e-5
