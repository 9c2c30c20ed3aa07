# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""How the network doubles the size of a level's field: by corners, as the paper does, or by the areas of voxels."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from monai.networks import copy_model_state

from monai_sacb.handlers import LoadWeights
from monai_sacb.networks.nets import SACBNet

# of a field u(x) = A x + b
SLOPES = [[0.03, -0.02, 0.01], [0.01, 0.05, 0.02], [-0.04, 0.02, -0.03]]
# how many voxels of the finest level see, through four doublings, beyond the border of the coarsest
RIM = 15


def make_net(**arguments) -> SACBNet:
    torch.manual_seed(5)
    return SACBNet(**{"spatial_dims": 2, "base_channels": 2, **arguments}).eval()


def images(*spatial: int) -> torch.Tensor:
    coarse = torch.rand(1, 2, *(size // 4 for size in spatial), generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size=spatial, mode="trilinear" if len(spatial) == 3 else "bilinear")


class Start(torch.nn.Module):
    def __init__(self, ddf: torch.Tensor) -> None:
        super().__init__()
        self.ddf = ddf

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor | None = None) -> torch.Tensor:
        return self.ddf


class Passes(torch.nn.Module):
    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
        return ddf


@pytest.mark.parametrize("spatial", [(96, 128), (48, 64, 80)])
@torch.no_grad()
def test_coarse_field_stays_where_it_was(spatial: tuple[int, ...]) -> None:
    """The coarsest level has a linear field as average pooling gives it; what arrives at the finest is compared."""
    dims = len(spatial)
    points = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in spatial), indexing="ij"))
    slopes = torch.tensor(SLOPES)[:dims, :dims]
    expected = (
        torch.einsum("ij,j...->i...", slopes, points) + torch.tensor([1.0, -2.0, 0.5][:dims]).view(-1, *[1] * dims)
    )[None]
    pool = F.avg_pool3d if dims == 3 else F.avg_pool2d
    inside = (slice(None), slice(None), *[slice(RIM, -RIM)] * dims)
    errors = {}
    for align_corners in (False, True):
        net = make_net(spatial_dims=dims, align_corners=align_corners)
        net.estimators = torch.nn.ModuleList([Start(pool(expected, 16) / 16), *(Passes() for _ in range(3))])
        net.finest_estimator = Passes()
        errors[align_corners] = (net(images(*spatial)) - expected)[inside].abs().max().item()
    assert errors[False] < 1e-4 and errors[True] > 0.2


@torch.no_grad()
def test_default_is_the_paper() -> None:
    x = images(48, 64)
    expected = make_net()(x)
    assert torch.equal(make_net(align_corners=True)(x), expected)
    assert (make_net(align_corners=False)(x) - expected).abs().max() > 0.1


@torch.no_grad()
def test_weights_bring_it_along(caplog: pytest.LogCaptureFixture) -> None:
    x, paper, areas, other = images(32, 48), make_net(), make_net(align_corners=False), make_net()
    expected, paper_state = paper(x), dict(paper.state_dict())
    paper.load_state_dict(areas.state_dict())
    assert torch.equal(paper(x), areas(x)) and paper.align_corners is False
    # MONAI's way, which takes only what both have
    copy_model_state(other, areas)
    assert torch.equal(other(x), areas(x)) and "corners" not in caplog.text
    # a part of a state says nothing about it
    areas.load_state_dict({k: v for k, v in paper_state.items() if k.startswith("encoder")}, strict=False)
    assert areas.align_corners is False
    # weights without it, as of an older version, are of the paper's network
    older = {name: value for name, value in paper_state.items() if name != "align_corners"}
    assert len(older) == len(paper_state) - 1
    for net, state in ((areas, paper_state), (paper, older)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            net.load_state_dict(state)
        assert torch.equal(net(x), expected) and net.align_corners is True
        assert "doubles fields with corners aligned" in caplog.text
    # inside another module, and beside the other setting
    outer = torch.nn.Sequential(paper)
    outer.load_state_dict(torch.nn.Sequential(make_net(align_corners=False, diffeomorphic=True)).state_dict())
    assert (paper.align_corners, paper.integration_steps) == (False, 7)


def test_files_of_weights(tmp_path: Path) -> None:
    state = make_net(align_corners=False).state_dict()
    torch.save(state, tmp_path / "new.pt")
    torch.save({name: value for name, value in state.items() if name != "align_corners"}, tmp_path / "old.pt")
    network = make_net()
    LoadWeights(tmp_path / "new.pt", network)()
    assert network.align_corners is False
    LoadWeights(tmp_path / "old.pt", network)()
    assert network.align_corners is True


@pytest.mark.parametrize("spatial", [(40, 32), (32, 33, 20)])
@torch.no_grad()
def test_script(spatial: tuple[int, ...], check_same_field) -> None:
    net = make_net(spatial_dims=len(spatial), num_clusters=3, align_corners=False)
    x = images(*spatial)
    check_same_field(torch.jit.script(net)(x), net(x))


@pytest.mark.parametrize("value", [None, 0, "false"])
def test_ill_argument(value: object) -> None:
    with pytest.raises(ValueError, match=f"align_corners must be True or False, got {value!r}"):
        SACBNet(align_corners=value)
