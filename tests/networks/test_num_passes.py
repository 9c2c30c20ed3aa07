# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""The network once more on the moving image that its own field has warped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from monai.networks import copy_model_state

from monai_sacb.networks.layers import compose, reference_grid, warp
from monai_sacb.networks.nets import SACBNet


def make_net(**arguments: Any) -> SACBNet:
    torch.manual_seed(3)
    return SACBNet(
        **{"spatial_dims": 2, "base_channels": 2, "num_clusters": 3, "scaled_matching": True, **arguments}
    ).eval()


def images(*spatial: int, batch: int = 1, channels: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(batch, 2 * channels, *(-(-size // 4) for size in spatial), generator=generator)
    return F.interpolate(coarse, size=spatial, mode="trilinear" if len(spatial) == 3 else "bilinear").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spatial", [(32, 48), (64, 32), (32, 48, 32)])
@torch.no_grad()
def test_definition(spatial: tuple[int, ...], dtype: torch.dtype) -> None:
    """On sizes that need no padding, by the network of one pass, warp and compose."""
    arguments = {"spatial_dims": len(spatial)}
    one, x = make_net(**arguments).to(dtype), images(*spatial, batch=2, dtype=dtype)
    moving, fixed = x.chunk(2, 1)
    expected = one(x)
    for number in (2, 3):
        expected = compose(one(torch.cat([warp(moving, expected), fixed], 1)), expected)
        found = make_net(**arguments, num_passes=number).to(dtype)(x)
        assert found.dtype == dtype and (found - one(x)).abs().max() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("spatial", [(5, 7), (33, 50), (17, 20, 35)])
@torch.no_grad()
def test_any_size_and_batch(spatial: tuple[int, ...], channels: int) -> None:
    """Batch equals one by one; the same input gives the same bits."""
    # random networks magnify roundings from pass to pass
    net = make_net(spatial_dims=len(spatial), in_channels=channels, num_passes=2).double()
    x = images(*spatial, batch=3, channels=channels, dtype=torch.float64)
    found = net(x)
    assert found.shape == (3, len(spatial), *spatial) and bool(torch.isfinite(found).all())
    assert torch.equal(net(x), found)
    for single, expected in zip(x.split(1), found.split(1)):
        torch.testing.assert_close(net(single), expected, atol=1e-6, rtol=0)


class Shift(torch.nn.Module):
    """An estimator that goes half the way to a field of one value."""

    def __init__(self, half_way: bool) -> None:
        super().__init__()
        self.half_way, self.calls = half_way, 0

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor, ddf: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        if ddf is None:
            ddf = torch.zeros(len(moving), 2, *moving.shape[2:])
        return ddf + 0.5**self.calls * 8 if self.half_way else ddf


@torch.no_grad()
def test_fields_add_up() -> None:
    """Shifts of 4, 2 and 1 voxels are one of 7: the second pass does not begin anew."""
    net = make_net(num_passes=3)
    net.estimators = torch.nn.ModuleList([Shift(half_way=False) for _ in range(4)])
    net.finest_estimator = Shift(half_way=True)
    assert torch.allclose(net(images(32, 48)), torch.full((1, 2, 32, 48), 7.0))
    assert net.finest_estimator.calls == 3


@torch.no_grad()
def test_order_of_the_fields() -> None:
    """The image under the whole field is that under the first field, seen through the second one."""
    x = images(64, 64, dtype=torch.float64)
    # on a smooth image, which loses little by being interpolated twice
    moving, fixed = torch.sin(reference_grid([64, 64], x.device).sum(0) / 8).to(x)[None, None], x[:, 1:]
    net = make_net(num_passes=2).double()
    fields: list[torch.Tensor] = []
    net.finest_estimator.register_forward_hook(lambda _, __, ddf: fields.append(ddf))
    found = warp(moving, net(torch.cat([moving, fixed], 1)))
    first, second = fields
    inner = (..., slice(16, -16), slice(16, -16))
    expected, swapped = warp(warp(moving, first), second)[inner], warp(warp(moving, second), first)[inner]
    assert (found[inner] - expected).abs().mean() < 0.2 * (swapped - expected).abs().mean()


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_gradients_go_through_all_passes(use_checkpoint: bool) -> None:
    x = images(32, 48, dtype=torch.float64)
    moving, fixed = x.chunk(2, 1)
    one = make_net().double().train()
    ddf = one(x)
    compose(one(torch.cat([warp(moving, ddf), fixed], 1)), ddf).square().mean().backward()
    two = make_net(num_passes=2, use_checkpoint=use_checkpoint).double().train()
    two(x).square().mean().backward()
    for (name, expected), found in zip(one.named_parameters(), two.parameters()):
        assert (expected.grad is None) == (found.grad is None), name
        if expected.grad is not None and found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-6, atol=1e-9, msg=name)


@torch.no_grad()
def test_autocast_keeps_the_field_in_single_precision() -> None:
    net, x = make_net(num_passes=2), images(32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        ddf = net(x)
    assert ddf.dtype == torch.float32 and bool(torch.isfinite(ddf).all())
    # nor has it been in half precision on the way
    assert not torch.equal(ddf, ddf.bfloat16().float())


@torch.no_grad()
def test_weights_raise_it() -> None:
    x, one, two = images(32, 48), make_net(), make_net(num_passes=2)
    expected = {net.num_passes: net(x) for net in (one, two)}
    older = {name: value for name, value in one.state_dict().items() if name != "num_passes"}
    other = make_net()
    other.load_state_dict(two.state_dict())
    assert other.num_passes == 2 and torch.equal(other(x), expected[2])
    # no fewer than asked for: so weights of one pass are trained on
    for state in (one.state_dict(), older):
        two.load_state_dict(state)
        assert two.num_passes == 2 and torch.equal(two(x), expected[2])
    one.load_state_dict(older)
    assert one.num_passes == 1 and torch.equal(one(x), expected[1])
    # a part of a state says nothing, MONAI's way of copying all
    one.load_state_dict({k: v for k, v in two.state_dict().items() if k.startswith("encoder")}, strict=False)
    assert one.num_passes == 1
    copy_model_state(one, two)
    assert one.num_passes == 2
    # what has been loaded before does not count
    for state in (make_net().state_dict(), older):
        one.load_state_dict(two.state_dict())
        one.load_state_dict(state)
        assert one.num_passes == 1 and torch.equal(one(x), expected[1])
    with pytest.raises(ValueError, match="num_passes must be a whole number of at least 1, got 0"):
        one.load_state_dict({**older, "num_passes": torch.tensor(0)})


@torch.no_grad()
def test_scripted() -> None:
    net, x = make_net(num_passes=2).double(), images(32, 48, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(net)(x), net(x), atol=1e-6, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_exported() -> None:
    net, x = make_net(num_passes=2).double(), images(32, 32, dtype=torch.float64)
    exported = torch.export.export(net, (x,)).module()
    for pair in (x, x.flip(1)):
        torch.testing.assert_close(exported(pair), net(pair), atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_ill_formed(value: Any) -> None:
    with pytest.raises(ValueError, match="num_passes must be a whole number of at least 1"):
        SACBNet(num_passes=value)
