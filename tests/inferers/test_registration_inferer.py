# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monai_sacb.inferers import InstanceOptimization, RegistrationInferer, refine_ddf
from monai_sacb.losses import LNCCLoss
from monai_sacb.networks.layers import warp
from monai_sacb.networks.nets import SACBNet


def make_pair(spatial: tuple[int, ...], batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moving image, fixed image, and the field by which the second was made from the first."""
    generator = torch.Generator().manual_seed(0)
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    true, moving = (
        F.interpolate(torch.randn(batch, channels, *[size] * len(spatial), generator=generator), spatial, mode=mode)
        for channels, size in ((len(spatial), 4), (1, 9))
    )
    return moving.sigmoid(), warp(moving.sigmoid(), 0.8 * true), 0.8 * true


def test_refined_in_whole_steps() -> None:
    moving, fixed, true = make_pair((16, 18, 15), batch=2)
    inputs = torch.cat([moving, fixed], 1)
    seen = []

    def network(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        seen.append(x)
        return factor * true

    with torch.no_grad():
        assert torch.equal(RegistrationInferer()(inputs, network, factor=0.5), 0.5 * true)
        refined = RegistrationInferer(np.int64(12), InstanceOptimization(spacing=3))(inputs, network, 0.5)
        default = RegistrationInferer(iterations=12)(inputs, network, 0.5)
    assert len(seen) == 3 and all(x is inputs for x in seen)
    assert torch.equal(refined, refine_ddf(moving, fixed, 0.5 * true, iterations=12, spacing=3))
    assert torch.equal(default, refine_ddf(moving, fixed, 0.5 * true, iterations=12))
    assert (refined - 0.5 * true).abs().max() > 0.05 and not torch.equal(refined, default)


def test_steps_of_the_refinement_where_none_are_given() -> None:
    assert RegistrationInferer().iterations == 0
    assert RegistrationInferer(refinement=InstanceOptimization(iterations=7)).iterations == 7
    assert RegistrationInferer(0, InstanceOptimization(iterations=7)).iterations == 0


@pytest.mark.parametrize("iterations", [-1, 2.5, "many", True])
def test_ill_iterations(iterations: Any) -> None:
    with pytest.raises(ValueError, match=f"iterations must be a whole number of at least 0, got {iterations!r}"):
        RegistrationInferer(iterations)


def test_ill_refinement() -> None:
    with pytest.raises(ValueError, match="refinement must be an InstanceOptimization, got 50"):
        RegistrationInferer(refinement=50)


@pytest.mark.parametrize("iterations", [0, 3])
def test_network_in_half_precision(iterations: int) -> None:
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
    # steps of a start that is a little different lead a little further apart
    assert (ddf - expected).abs().median() < (0.2 if iterations else 0.1) * expected.abs().median()


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
