# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai.losses import BendingEnergyLoss

from monai_sacb.inferers import RegistrationInferer, refine_ddf
from monai_sacb.losses import LNCCLoss
from monai_sacb.networks.layers import warp
from monai_sacb.networks.nets import SACBNet

# spatial shape, batch, channels, type
TEST_CASES = [
    ((24, 26), 1, 1, torch.float32),
    ((21, 25), 3, 2, torch.float64),
    ((18, 17, 20), 1, 1, torch.float32),
    ((15, 16, 19), 2, 2, torch.float32),
]

ILL_ARGUMENTS = [
    ({"iterations": -1}, "iterations must be a whole number of at least 0, got -1"),
    ({"iterations": 2.5}, r"iterations must be a whole number of at least 0, got 2\.5"),
    ({"iterations": "many"}, "iterations must be a whole number of at least 0, got 'many'"),
    ({"iterations": None}, "iterations must be a whole number of at least 0, got None"),
    ({"iterations": True}, "iterations must be a whole number of at least 0, got True"),
    ({"spacing": 0}, "spacing must be a whole number of at least 1, got 0"),
    ({"spacing": 2.5}, r"spacing must be a whole number of at least 1, got 2\.5"),
    ({"patience": 0}, "patience must be a whole number of at least 1, got 0"),
    ({"regularization_weight": -0.5}, r"regularization_weight must be a finite number of at least 0, got -0\.5"),
    ({"regularization_weight": float("nan")}, "regularization_weight must be a finite number of at least 0, got nan"),
    ({"learning_rate": float("inf")}, "learning_rate must be a finite number of at least 0, got inf"),
    ({"learning_rate": "fast"}, "learning_rate must be a finite number of at least 0, got 'fast'"),
]

# shapes of moving, fixed and ddf, message
ILL_SHAPES = [
    ((1, 1, 8, 8), (1, 1, 8, 9), (1, 2, 8, 9), r"\[1, 1, 8, 8\], \[1, 1, 8, 9\] and \[1, 2, 8, 9\]"),
    ((1, 1, 8, 8), (1, 1, 8, 8), (1, 3, 8, 8), r"\[1, 3, 8, 8\]"),
    ((2, 1, 8, 8), (2, 1, 8, 8), (1, 2, 8, 8), r"\[1, 2, 8, 8\]"),
    ((1, 1, 8), (1, 1, 8), (1, 1, 8), r"\[1, 1, 8\]"),
    ((1, 1, 8, 4), (1, 1, 8, 4), (1, 2, 8, 4), r"at least 5 voxels along every axis, got shape \[1, 1, 8, 4\]"),
]


def upsampled(shape: tuple[int, ...], spatial: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    coarse = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    return F.interpolate(coarse, size=spatial, mode=mode, align_corners=True).to(dtype)


def make_pair(
    spatial: tuple[int, ...], batch: int = 1, channels: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.Tensor]:
    """Moving image, fixed image, and the field by which the second was made from the first."""
    dims = len(spatial)
    true = 0.8 * upsampled((batch, dims, *[4] * dims), spatial, seed + 1, dtype)
    moving = upsampled((batch, channels, *[9] * dims), spatial, seed, dtype).sigmoid()
    return [moving, warp(moving, true), true]


def inner_error(ddf: torch.Tensor, true: torch.Tensor) -> float:
    """Mean length of the error where the images are known."""
    inside = (slice(None), *[slice(3, -3)] * (ddf.dim() - 2))
    return (ddf - true).norm(dim=1)[inside].mean().item()


@pytest.mark.parametrize(("spatial", "batch", "channels", "dtype"), TEST_CASES)
def test_finds_a_known_field(spatial: tuple[int, ...], batch: int, channels: int, dtype: torch.dtype) -> None:
    moving, fixed, true = make_pair(spatial, batch, channels, dtype)
    start = torch.zeros_like(true)
    ddf = refine_ddf(moving, fixed, start, regularization_weight=0.1)
    assert ddf.shape == true.shape and ddf.dtype == dtype and not ddf.requires_grad
    assert inner_error(start, true) > 0.5
    assert inner_error(ddf, true) < 0.4 * inner_error(start, true)
    assert (start == 0).all()


def test_batch_equals_one_by_one_and_repeats() -> None:
    moving, fixed, true = make_pair((16, 18, 15), batch=2)
    together = refine_ddf(moving, fixed, 0 * true, iterations=8)
    alone = [refine_ddf(*(t[i : i + 1] for t in (moving, fixed, 0 * true)), iterations=8) for i in range(2)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together, refine_ddf(moving, fixed, 0 * true, iterations=8)) and together.abs().max() > 0.1


@pytest.mark.parametrize("spacing", [1, 2, 3, 7])
@pytest.mark.parametrize("weight", [0.0, 1.0, 30.0])
def test_never_worse_than_the_start(spacing: int, weight: float) -> None:
    moving, fixed, true = make_pair((18, 17, 20))

    def objective(ddf: torch.Tensor) -> float:
        return (LNCCLoss(5)(warp(moving, ddf), fixed) + weight * BendingEnergyLoss()(ddf)).item()

    noise = 0.3 * torch.randn(true.shape, generator=torch.Generator().manual_seed(5))
    for start in (true, 0 * true, true + noise):
        for learning_rate in (0.1, 50.0):
            ddf = refine_ddf(
                moving, fixed, start, regularization_weight=weight, iterations=6, spacing=spacing,
                learning_rate=learning_rate,
            )  # fmt: skip
            assert objective(ddf) <= objective(start)


def test_the_best_start_is_returned_untouched() -> None:
    """Nothing is better than the truth where nothing has to be smooth and steps are far too long."""
    moving, fixed, true = make_pair((20, 22))
    ddf = refine_ddf(moving, fixed, true, regularization_weight=0, learning_rate=100.0, iterations=5)
    assert torch.equal(ddf, true)
    assert torch.equal(refine_ddf(moving, fixed, true, iterations=0), true)


def test_patience_stops() -> None:
    moving, fixed, true = make_pair((20, 22))
    calls = []

    def similarity(warped: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return (warped - fixed).square().mean() + len(calls)

    refine_ddf(moving, fixed, 0 * true, similarity=similarity, iterations=40, patience=4)
    # the start, and then the first to the fifth field, none of which is better
    assert len(calls) == 6


def test_objective_that_is_not_finite_stops() -> None:
    moving, fixed, true = make_pair((20, 22))
    values = iter([1.0, 0.5, float("nan"), 0.0])
    ddf = refine_ddf(moving, fixed, 0 * true, similarity=lambda warped, fixed: 0 * warped.sum() + next(values))
    # the start, the first field, and the second, after which there is no more
    assert next(values) == 0.0
    assert torch.equal(ddf, 0 * true)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_a_start_that_is_not_finite(value: float) -> None:
    moving, fixed, true = make_pair((20, 22))
    moving[0, 0, 3, 4] = value
    with pytest.raises(ValueError, match="the objective of the field to be refined must be finite, got nan"):
        refine_ddf(moving, fixed, true)


def test_parameters_of_the_similarity_are_left_alone() -> None:
    moving, fixed, true = make_pair((20, 22))
    features = torch.nn.Conv2d(1, 2, 3)
    ddf = refine_ddf(
        moving, fixed, 0 * true, lambda a, b: (features(a) - features(b)).square().mean(), regularization_weight=0.0
    )
    assert features.weight.grad is None and ddf.abs().max() > 0.05


def test_own_terms_and_weight() -> None:
    moving, fixed, true = make_pair((20, 22))
    free = refine_ddf(moving, fixed, 0 * true, regularization_weight=0.0)
    stiff = refine_ddf(
        moving, fixed, 0 * true, regularization=lambda ddf: ddf.square().mean(), regularization_weight=100.0
    )
    assert stiff.abs().max() < 0.1 * free.abs().max()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around(context: Any) -> None:
    """As evaluation engines call it."""
    moving, fixed, true = make_pair((16, 18, 15))
    expected = refine_ddf(moving, fixed, 0 * true, iterations=5)
    with context():
        images = [t.clone() for t in (moving, fixed, 0 * true)]
        assert torch.equal(refine_ddf(*images, iterations=5), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(refine_ddf(moving, fixed, 0 * true, iterations=5), expected)


@pytest.mark.parametrize(("arguments", "message"), ILL_ARGUMENTS)
def test_ill_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refine_ddf(*make_pair((8, 9)), **arguments)
    with pytest.raises(ValueError, match=message):
        RegistrationInferer(**arguments)


@pytest.mark.parametrize(("moving", "fixed", "ddf", "message"), ILL_SHAPES)
def test_ill_shapes(moving: tuple[int, ...], fixed: tuple[int, ...], ddf: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refine_ddf(torch.zeros(moving), torch.zeros(fixed), torch.zeros(ddf))


def test_inferer() -> None:
    moving, fixed, true = make_pair((16, 18, 15), batch=2)
    inputs = torch.cat([moving, fixed], 1)
    seen = []

    def network(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        seen.append(x)
        return factor * true

    with torch.no_grad():
        assert torch.equal(RegistrationInferer()(inputs, network, factor=0.5), 0.5 * true)
        refined = RegistrationInferer(iterations=4, spacing=3)(inputs, network, 0.5)
    assert len(seen) == 2 and all(x is inputs for x in seen)
    assert torch.equal(refined, refine_ddf(moving, fixed, 0.5 * true, iterations=4, spacing=3))
    assert (refined - 0.5 * true).abs().max() > 0.05


@pytest.mark.parametrize("iterations", [0, 3])
def test_inferer_in_half_precision(iterations: int) -> None:
    """The network works in bfloat16, on a CPU as well; its field and the refinement do not."""
    torch.manual_seed(0)
    net = SACBNet(spatial_dims=2, base_channels=2, num_clusters=3)
    inputs = torch.cat(make_pair((32, 48), batch=2)[:2], 1)
    types = []
    net.finest_estimator.refine.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    with torch.no_grad():
        expected = RegistrationInferer(iterations)(inputs, net)
        ddf = RegistrationInferer(iterations, amp=True)(inputs, net)
    assert types == [torch.float32, torch.bfloat16]
    assert ddf.dtype == torch.float32 and not torch.equal(ddf, expected)
    assert (ddf - expected).abs().median() < 0.1 * expected.abs().median()


def test_inferer_leaves_the_callers_precision() -> None:
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return x[:, :2].float()

    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            RegistrationInferer()(torch.rand(1, 2, 8, 9), network)
    assert seen == [False, True]


def test_training_in_half_precision() -> None:
    torch.manual_seed(0)
    net = SACBNet(spatial_dims=2, base_channels=2, num_clusters=3)
    moving, fixed, _ = make_pair((32, 48))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        ddf = RegistrationInferer(amp=True)(torch.cat([moving, fixed], 1), net)
        loss = LNCCLoss(5)(warp(moving, ddf), fixed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters())
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("amp", ["true", 1, None])
def test_ill_amp(amp: Any) -> None:
    with pytest.raises(ValueError, match=f"amp must be True or False, got {amp!r}"):
        RegistrationInferer(amp=amp)


def test_inferer_takes_whole_numbers_of_numpy() -> None:
    assert RegistrationInferer(np.int64(3), spacing=np.int32(2)).iterations == 3
