# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_sacb.networks.blocks import SimilarityMatching

# shape of the features, window, type
TEST_CASES = [
    ((1, 4, 6, 7), 3, torch.float32),
    ((2, 3, 5, 4, 6), 3, torch.float32),
    ((3, 2, 3, 5, 4), 3, torch.float64),
    ((2, 5, 6, 5), 5, torch.float64),
    ((1, 2, 5, 3, 4), 5, torch.float32),
    ((1, 3, 2, 1, 4), 3, torch.float64),
    ((2, 3, 4, 4), 1, torch.float32),
]

ILL_WINDOWS = [0, -1, 2, 4, -3]

# shapes of the two feature maps, message
ILL_CASES = [
    ((1, 4, 5, 5), (1, 4, 5, 6), r"\[1, 4, 5, 5\] and \[1, 4, 5, 6\]"),
    ((1, 4, 5, 5), (1, 3, 5, 5), r"\[1, 4, 5, 5\] and \[1, 3, 5, 5\]"),
    ((2, 4, 5, 5), (1, 4, 5, 5), r"\[2, 4, 5, 5\] and \[1, 4, 5, 5\]"),
    ((1, 4, 5, 5, 5), (1, 4, 5, 5), r"\[1, 4, 5, 5, 5\] and \[1, 4, 5, 5\]"),
]


def features(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    moving, fixed = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return moving, fixed


def by_definition(moving: np.ndarray, fixed: np.ndarray, window: int) -> np.ndarray:
    """Voxel by voxel, offset by offset."""
    radius, spatial = window // 2, fixed.shape[2:]
    offsets = list(itertools.product(range(-radius, radius + 1), repeat=len(spatial)))
    flow = np.zeros((fixed.shape[0], len(spatial), *spatial))
    for image in range(fixed.shape[0]):
        for p in np.ndindex(*spatial):
            scores = []
            for q in offsets:
                at = tuple(a + b for a, b in zip(p, q))
                inside = all(0 <= a < n for a, n in zip(at, spatial))
                here = fixed[(image, slice(None), *p)]
                scores.append(here @ moving[(image, slice(None), *at)] if inside else 0.0)
            weights = np.exp(np.array(scores) - max(scores))
            flow[(image, slice(None), *p)] = weights / weights.sum() @ np.array(offsets)
    return flow


@pytest.mark.parametrize(("shape", "window", "dtype"), TEST_CASES)
def test_definition(shape: tuple[int, ...], window: int, dtype: torch.dtype) -> None:
    moving, fixed = features(shape, dtype)
    flow = SimilarityMatching(window)(moving, fixed)
    assert flow.shape == (shape[0], len(shape) - 2, *shape[2:]) and flow.dtype == dtype
    expected = by_definition(moving.double().numpy(), fixed.double().numpy(), window)
    np.testing.assert_allclose(flow.numpy(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("scale", [0.25, 8])
def test_scale(scale: float) -> None:
    moving, fixed = features((2, 4, 5, 6, 7), torch.float64)
    flow = SimilarityMatching(scale=scale)(moving, fixed)
    expected = by_definition(moving.numpy(), scale * fixed.numpy(), 3)
    np.testing.assert_allclose(flow.numpy(), expected, rtol=0, atol=1e-12)
    assert (flow - SimilarityMatching()(moving, fixed)).abs().max() > 0.1


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan")])
def test_ill_scale(scale: float) -> None:
    with pytest.raises(ValueError, match=f"scale must be a positive number, got {scale}"):
        SimilarityMatching(scale=scale)


def test_unfold() -> None:
    """In 2-D, PyTorch itself gathers the neighbours."""
    moving, fixed = features((2, 6, 9, 8), torch.float32)
    neighbors = F.unfold(moving, 3, padding=1).view(2, 6, 9, 9, 8)
    weights = torch.einsum("bchw,bcthw->bthw", fixed, neighbors).softmax(1)
    rows = torch.tensor([-1.0, -1, -1, 0, 0, 0, 1, 1, 1]).view(1, 9, 1, 1)
    columns = torch.tensor([-1.0, 0, 1] * 3).view(1, 9, 1, 1)
    expected = torch.stack([(weights * rows).sum(1), (weights * columns).sum(1)], 1)
    torch.testing.assert_close(SimilarityMatching()(moving, fixed), expected, rtol=0, atol=1e-5)


def test_parity(parity, relative_error) -> None:
    recorded = {name: torch.from_numpy(array) for name, array in parity("similarity_matching").items()}
    moving, fixed = recorded["moving"].requires_grad_(), recorded["fixed"].requires_grad_()
    flow = SimilarityMatching()(moving, fixed)
    assert relative_error(flow, recorded["flow"]) < 1e-5
    flow.backward(recorded["flow_grad"])
    assert relative_error(moving.grad, recorded["moving_grad"]) < 1e-4
    assert relative_error(fixed.grad, recorded["fixed_grad"]) < 1e-4


@pytest.mark.parametrize("shift", [(1, 0, -1), (-1, 1, 1), (0, 0, 0), (0, -1, 0)])
def test_finds_a_shift(shift: tuple[int, ...]) -> None:
    """Where moving(p + shift) = fixed(p), pull-back, the field is the shift."""
    fixed = F.normalize(features((1, 32, 6, 7, 8), torch.float32)[0], dim=1) * 20.0
    moving = fixed.roll(shift, (2, 3, 4))
    flow = SimilarityMatching()(moving, fixed)[..., 1:-1, 1:-1, 1:-1]
    expected = torch.tensor(shift, dtype=torch.float32).view(1, 3, 1, 1, 1).expand_as(flow)
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("window", [3, 5])
def test_bounded_and_zero_without_evidence(window: int) -> None:
    moving, fixed = features((2, 4, 6, 5, 7), torch.float32)
    matching = SimilarityMatching(window)
    large = matching(100.0 * moving, 100.0 * fixed)
    assert torch.isfinite(large).all() and large.abs().max() <= window // 2 + 1e-5
    assert large.abs().max() > window // 2 - 1e-3
    assert matching(torch.zeros_like(moving), fixed).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(3, 4, 6, 7), (3, 2, 5, 4, 6)])
def test_batch_equals_one_by_one(shape: tuple[int, ...]) -> None:
    moving, fixed = features(shape, torch.float32)
    flow = SimilarityMatching()(moving, fixed)
    assert torch.equal(flow, SimilarityMatching()(moving, fixed))
    for i in range(3):
        alone = SimilarityMatching()(moving[i : i + 1], fixed[i : i + 1])
        torch.testing.assert_close(flow[i : i + 1], alone, rtol=0, atol=1e-6)


def test_sharp_features_decide_in_half_precision() -> None:
    """The softmax does not overflow half precision, and its result is that of single precision."""
    moving, fixed = features((1, 8, 6, 7), torch.float16)
    flow = SimilarityMatching()(moving, fixed)
    expected = SimilarityMatching()(moving.float(), fixed.float())
    torch.testing.assert_close(flow.float(), expected, rtol=0, atol=2e-2)
    assert expected.abs().max() > 0.5


def test_autocast() -> None:
    moving, fixed = features((1, 8, 6, 7, 5), torch.float32)
    expected = SimilarityMatching()(moving, fixed)
    with torch.autocast("cpu", torch.bfloat16):
        flow = SimilarityMatching()(moving, fixed)
    torch.testing.assert_close(flow.float(), expected, rtol=0, atol=2e-2)
    assert expected.abs().max() > 0.5


def test_autocast_keeps_precision() -> None:
    moving, fixed = features((1, 8, 6, 7, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        flow = SimilarityMatching()(moving, fixed)
    assert flow.dtype == torch.float32
    torch.testing.assert_close(flow, SimilarityMatching()(moving, fixed), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (1, 2, 2, 3, 2)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    moving, fixed = (f.requires_grad_() for f in features(shape, torch.float64))
    assert torch.autograd.gradcheck(SimilarityMatching(), (moving, fixed))


@pytest.mark.parametrize(("shape", "window"), [((2, 3, 5, 6), 3), ((1, 2, 4, 5, 3), 3), ((1, 2, 6, 6), 5)])
def test_script(shape: tuple[int, ...], window: int, relative_error) -> None:
    moving, fixed = features(shape, torch.float32)
    matching = SimilarityMatching(window)
    flow = torch.jit.script(matching)(moving, fixed)
    assert relative_error(flow, matching(moving, fixed)) < 1e-5 and flow.abs().max() > 0


@pytest.mark.parametrize("window", ILL_WINDOWS)
def test_ill_window(window: int) -> None:
    with pytest.raises(ValueError, match=f"window must be a positive odd number, got {window}"):
        SimilarityMatching(window)


@pytest.mark.parametrize(("moving", "fixed", "message"), ILL_CASES)
def test_ill_shapes(moving: tuple[int, ...], fixed: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"must have one shape .*, got {message}"):
        SimilarityMatching()(torch.zeros(moving), torch.zeros(fixed))


def test_forward_mode_is_refused() -> None:
    """Rather than answered with a tangent of zero."""
    x = torch.randn(1, 3, 4, 5)
    with pytest.raises(Exception, match=r"jvp|forward mode|setup_context"):
        torch.func.jvp(lambda t: SimilarityMatching()(t, t.flip(2)), (x,), (torch.ones_like(x),))


def test_backward_within_autocast(relative_error) -> None:
    x = torch.randn(1, 8, 6, 7, 5, requires_grad=True)
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients += torch.autograd.grad(SimilarityMatching()(x, x.flip(2)).square().sum(), x)
    assert relative_error(gradients[1], gradients[0]) < 1e-5
