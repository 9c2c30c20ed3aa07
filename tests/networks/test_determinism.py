# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The same again: bits of a process with the same settings, fields whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from monai_sacb.losses import GradientPenaltyLoss, LNCCLoss
from monai_sacb.networks.layers import warp
from monai_sacb.networks.nets import SACBNet

SIZE = (32, 36, 33)


def smooth_pair() -> torch.Tensor:
    """``(1, 2, *SIZE)``, moving and fixed image."""
    noise = torch.rand(1, 2, 9, 10, 9, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, SIZE, mode="trilinear", align_corners=True)


def trained(seed: int, dtype: torch.dtype | None, steps: int = 3) -> tuple[SACBNet, list[float]]:
    torch.manual_seed(seed)
    net, images = SACBNet(base_channels=2, num_clusters=3), smooth_pair()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            ddf = net(images)
        loss = LNCCLoss(9)(warp(images[:, :1], ddf), images[:, 1:]) + GradientPenaltyLoss()(ddf)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return net, losses


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_two_trainings_with_one_seed(dtype: torch.dtype | None) -> None:
    (one, losses), (two, again), (_, other) = (trained(seed, dtype) for seed in (0, 0, 1))
    assert losses == again and losses != other and losses[-1] < losses[0]
    states = one.state_dict(), two.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    with torch.no_grad():
        assert torch.equal(one(smooth_pair()), two(smooth_pair()))


@torch.no_grad()
def test_one_thread_or_two(check_same_field: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    """With clusters of their own."""
    torch.manual_seed(0)
    net, images = SACBNet(base_channels=2, num_clusters=3), smooth_pair()
    fields, before = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            fields.append(net(images))
    finally:
        torch.set_num_threads(before)
    check_same_field(*fields)
