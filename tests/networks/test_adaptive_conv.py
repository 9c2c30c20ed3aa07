# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from monai_sacb.networks.layers import adaptive_conv, cluster_adaptive_conv, neighborhood

# batch, input channels, output channels, spatial shape, clusters, window, type
TEST_CASES = [
    (1, 2, 3, (5, 7), 4, 3, torch.float32),
    (3, 4, 4, (6, 5, 7), 3, 3, torch.float32),
    (2, 3, 2, (4, 3, 5), 7, 3, torch.float64),
    (2, 2, 2, (8, 9), 2, 5, torch.float64),
    (1, 3, 5, (4, 5, 6), 3, 1, torch.float32),
    (2, 1, 1, (5, 4, 3), 1, 3, torch.float32),
    # axes shorter than the window
    (2, 2, 3, (1, 2, 1), 2, 3, torch.float64),
    (1, 2, 2, (2, 1), 3, 5, torch.float32),
]


def arguments(
    batch: int,
    in_channels: int,
    out_channels: int,
    spatial: tuple[int, ...],
    clusters: int,
    kernel_size: int,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """x, weight, gates, bias and labels."""
    generator = torch.Generator().manual_seed(len(spatial) + 10 * clusters)
    taps = kernel_size ** len(spatial)
    shapes = [
        (batch, in_channels, *spatial),
        (out_channels, in_channels, taps),
        (batch, clusters, taps),
        (batch, clusters, out_channels),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    num_voxels = tensors[0][0, 0].numel()
    return [*tensors, torch.randint(0, clusters, (batch, num_voxels), generator=generator)]


def by_definition(
    x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor, kernel: int
) -> torch.Tensor:
    """K plain convolutions of every image, of which every voxel takes that of its cluster."""
    dims = x.dim() - 2
    conv = F.conv3d if dims == 3 else F.conv2d
    images = []
    for image in range(x.shape[0]):
        y = torch.zeros(weight.shape[0], *x.shape[2:], dtype=x.dtype)
        for k in range(gates.shape[1]):
            gated = (weight * gates[image, k]).view(*weight.shape[:2], *[kernel] * dims)
            plain = conv(x[image : image + 1], gated, bias[image, k], padding=kernel // 2)[0]
            y = torch.where((labels[image] == k).view(1, *x.shape[2:]), plain, y)
        images.append(y)
    return torch.stack(images)


@pytest.fixture(params=["grouped", "a few voxels at a time", "tapwise"])
def operator(request, monkeypatch) -> None:
    """Every way in which the result can be computed."""
    if request.param == "a few voxels at a time":
        monkeypatch.setattr(neighborhood, "CHUNK_ELEMENTS", 1)
    elif request.param == "tapwise":
        monkeypatch.setattr(adaptive_conv, "_grouped", adaptive_conv._tapwise)
        monkeypatch.setattr(adaptive_conv, "_grouped_backward", adaptive_conv._tapwise_backward)


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("case", TEST_CASES)
def test_definition(case: tuple, relative_error) -> None:
    args = arguments(*case)
    y = cluster_adaptive_conv(*args, kernel_size=case[5])
    assert y.shape == (case[0], case[2], *case[3]) and y.dtype == case[6]
    assert relative_error(y, by_definition(*args, case[5])) < (1e-12 if case[6] == torch.float64 else 1e-5)


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("case", TEST_CASES)
@pytest.mark.parametrize("layout", ["dense", "expanded", "transposed"])
def test_gradient_of_the_definition(case: tuple, layout: str, relative_error) -> None:
    """Also where the gradient of the output is a view in memory."""
    args = arguments(*case[:6], torch.float64)
    gradients = []
    for function in (cluster_adaptive_conv, by_definition):
        leaves = [a.clone().requires_grad_() for a in args[:4]]
        y = function(*leaves, args[4], case[5])
        seen = y.transpose(2, -1) if layout == "transposed" else y
        weights = torch.arange(y.numel(), dtype=y.dtype).view(seen.shape).cos()
        loss = y.sum() if layout == "expanded" else (seen * weights).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for actual, expected in zip(*gradients):
        assert relative_error(actual, expected) < 1e-11


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize(("spatial", "kernel"), [((3, 4), 3), ((2, 3, 2), 3), ((2, 3), 1), ((3, 2), 5)])
def test_gradcheck(spatial: tuple[int, ...], kernel: int) -> None:
    *leaves, labels = arguments(2, 2, 2, spatial, 3, kernel, torch.float64)
    leaves = [a.requires_grad_() for a in leaves]
    assert torch.autograd.gradcheck(lambda *a: cluster_adaptive_conv(*a, labels, kernel_size=kernel), leaves)


def test_gradient_of_some_arguments_only() -> None:
    x, weight, gates, bias, labels = arguments(1, 2, 2, (4, 5), 3, 3, torch.float32)
    gates.requires_grad_()
    cluster_adaptive_conv(x, weight, gates, bias, labels).square().sum().backward()
    assert gates.grad.abs().max() > 0 and x.grad is None and weight.grad is None


def test_second_derivative_is_refused() -> None:
    x, weight, gates, bias, labels = arguments(1, 2, 2, (4, 5), 3, 3, torch.float64)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(
        cluster_adaptive_conv(x, weight, gates, bias, labels).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_forward_mode_is_refused() -> None:
    """Rather than answered with a tangent of zero."""
    x, weight, gates, bias, labels = arguments(1, 2, 2, (4, 5), 3, 3, torch.float64)
    with pytest.raises(Exception, match=r"jvp|forward mode"):
        torch.func.jvp(lambda t: cluster_adaptive_conv(t, weight, gates, bias, labels), (x,), (torch.ones_like(x),))


def test_functional_gradient() -> None:
    x, weight, gates, bias, labels = arguments(1, 2, 2, (4, 5), 3, 3, torch.float64)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(cluster_adaptive_conv(x, weight, gates, bias, labels).square().sum(), x)
    gradient = torch.func.grad(lambda t: cluster_adaptive_conv(t, weight, gates, bias, labels).square().sum())
    torch.testing.assert_close(gradient(x.detach()), expected)


def test_no_voxels() -> None:
    x, weight, gates, bias, labels = arguments(1, 2, 2, (4, 5), 3, 3, torch.float32)
    y = cluster_adaptive_conv(x[:0], weight, gates[:0], bias[:0], labels[:0])
    assert y.shape == (0, 2, 4, 5)


def test_cluster_without_voxels() -> None:
    x, weight, gates, bias, labels = arguments(2, 2, 3, (5, 6), 4, 3, torch.float64)
    labels[labels == 2] = 1
    gates[:, 2], bias[:, 2] = 1e6, 1e6
    gates.requires_grad_()
    bias.requires_grad_()
    y = cluster_adaptive_conv(x, weight, gates, bias, labels)
    assert y.abs().max() < 1e3
    y.square().sum().backward()
    for grad in (gates.grad, bias.grad):
        assert (grad[:, 2] == 0).all() and (grad[:, [0, 1, 3]] != 0).all()


@pytest.mark.parametrize("spatial", [(7, 6), (4, 6, 5)])
def test_open_gates_give_a_plain_convolution(spatial: tuple[int, ...], relative_error) -> None:
    x, weight, gates, bias, labels = arguments(2, 3, 4, spatial, 3, 3, torch.float32)
    y = cluster_adaptive_conv(x, weight, torch.ones_like(gates), torch.zeros_like(bias), labels)
    conv = F.conv3d if len(spatial) == 3 else F.conv2d
    assert relative_error(y, conv(x, weight.view(4, 3, *[3] * len(spatial)), padding=1)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_types_of_labels(dtype: torch.dtype) -> None:
    args = arguments(2, 2, 2, (4, 5, 3), 5, 3, torch.float32)
    y = cluster_adaptive_conv(*args[:4], args[4].to(dtype))
    assert torch.equal(y, cluster_adaptive_conv(*args)) and y.abs().max() > 0


def test_parameters_take_the_type_of_the_image() -> None:
    args = arguments(2, 2, 2, (4, 5, 3), 5, 3, torch.float32)
    y = cluster_adaptive_conv(args[0].bfloat16(), *args[1:])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), cluster_adaptive_conv(*args), rtol=0.05, atol=0.3)


def test_autocast_changes_nothing() -> None:
    args = arguments(2, 3, 2, (4, 5, 3), 5, 3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = cluster_adaptive_conv(*args)
    assert torch.equal(y, cluster_adaptive_conv(*args)) and y.abs().max() > 0


@pytest.mark.parametrize("spatial", [(9, 7), (5, 6, 7)])
def test_batch_equals_one_by_one(spatial: tuple[int, ...]) -> None:
    x, weight, gates, bias, labels = arguments(3, 4, 4, spatial, 5, 3, torch.float32)
    y = cluster_adaptive_conv(x, weight, gates, bias, labels)
    assert torch.equal(y, cluster_adaptive_conv(x, weight, gates, bias, labels))
    for i in range(3):
        one = slice(i, i + 1)
        alone = cluster_adaptive_conv(x[one], weight, gates[one], bias[one], labels[one])
        torch.testing.assert_close(y[one], alone, rtol=1e-5, atol=1e-5)


def test_memory_layout_of_the_input() -> None:
    x, *rest = arguments(2, 4, 3, (4, 6, 5), 3, 3, torch.float32)
    strided = x.contiguous(memory_format=torch.channels_last_3d)
    assert not strided.is_contiguous()
    y = cluster_adaptive_conv(x, *rest)
    torch.testing.assert_close(cluster_adaptive_conv(strided, *rest), y, rtol=1e-5, atol=1e-5)
    assert y.abs().max() > 1


@pytest.mark.parametrize("spatial", [(6, 7), (4, 5, 6)])
def test_script(spatial: tuple[int, ...], relative_error) -> None:
    scripted = torch.jit.script(cluster_adaptive_conv)
    args = arguments(2, 3, 2, spatial, 4, 3, torch.float32)
    results = []
    for function in (scripted, cluster_adaptive_conv):
        leaves = [a.clone().requires_grad_() for a in args[:4]]
        y = function(*leaves, args[4])
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for actual, expected in zip(*results):
        assert relative_error(actual, expected) < 1e-5


# shapes of x, weight, gates, bias, labels; window; what the message names
ILL_CASES = [
    ((1, 3, 4, 4), (2, 2, 9), (1, 2, 9), (1, 2, 2), (1, 16), 3, r"x \[1, 3, 4, 4\]"),
    ((1, 2, 4, 4), (2, 2, 27), (1, 2, 9), (1, 2, 2), (1, 16), 3, r"weight \[2, 2, 27\]"),
    ((1, 2, 4, 4), (2, 18), (1, 2, 9), (1, 2, 2), (1, 16), 3, r"weight \[2, 18\]"),
    ((1, 2, 4, 4), (2, 2, 9), (1, 2, 8), (1, 2, 2), (1, 16), 3, r"gates \[1, 2, 8\]"),
    ((2, 2, 4, 4), (2, 2, 9), (1, 2, 9), (2, 2, 2), (2, 16), 3, r"gates \[1, 2, 9\]"),
    ((1, 2, 4, 4), (2, 2, 9), (1, 2, 9), (1, 3, 2), (1, 16), 3, r"bias \[1, 3, 2\]"),
    ((1, 2, 4, 4), (2, 2, 9), (1, 2, 9), (1, 2, 5), (1, 16), 3, r"bias \[1, 2, 5\]"),
    ((1, 2, 4, 4), (2, 2, 9), (1, 2, 9), (1, 2, 2), (1, 15), 3, r"labels \[1, 15\]"),
    ((1, 2, 4, 4), (2, 2, 9), (1, 2, 9), (1, 2, 2), (1, 4, 4), 3, r"labels \[1, 4, 4\]"),
    ((1, 2, 4, 4), (2, 2, 16), (1, 2, 16), (1, 2, 2), (1, 16), 4, r"kernel_size 4"),
    ((1, 2, 4, 4, 4), (2, 2, 9), (1, 2, 9), (1, 2, 2), (1, 64), 3, r"x \[1, 2, 4, 4, 4\]"),
]


@pytest.mark.parametrize(("x", "weight", "gates", "bias", "labels", "kernel", "message"), ILL_CASES)
def test_ill_shapes(
    x: tuple, weight: tuple, gates: tuple, bias: tuple, labels: tuple, kernel: int, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"shapes do not belong together: .*{message}"):
        cluster_adaptive_conv(
            *(torch.zeros(shape) for shape in (x, weight, gates, bias)), torch.zeros(labels, dtype=torch.long), kernel
        )


@pytest.mark.parametrize("label", [-1, 2])
def test_label_that_is_no_cluster(label: int) -> None:
    x, weight, gates, bias, labels = arguments(1, 2, 2, (3, 3), 2, 3, torch.float32)
    labels[0, 4] = label
    with pytest.raises(ValueError, match=rf"\[0, 2\), got {label}"):
        cluster_adaptive_conv(x, weight, gates, bias, labels)


def test_gates_of_one_dimension() -> None:
    x, weight, gates, bias, labels = arguments(1, 2, 2, (3, 3), 2, 3, torch.float32)
    with pytest.raises(ValueError, match=r"gates \[18\]"):
        cluster_adaptive_conv(x, weight, gates.flatten(), bias, labels)
