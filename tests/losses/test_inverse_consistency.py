# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.losses import InverseConsistencyLoss, RegistrationLoss

SHAPES = [(1, 10, 12), (2, 8, 9, 7), (3, 1, 6)]

# shapes of both fields and of the mask, message
ILL_CASES = [
    ((1, 2, 8, 8), (1, 2, 8, 9), None, r"one shape .* got \[1, 2, 8, 8\] and \[1, 2, 8, 9\]"),
    ((1, 3, 8, 8), (1, 3, 8, 8), None, r"got \[1, 3, 8, 8\]"),
    ((1, 1, 8), (1, 1, 8), None, r"got \[1, 1, 8\]"),
    ((2, 2, 8, 8), (1, 2, 8, 8), None, r"got \[2, 2, 8, 8\] and \[1, 2, 8, 8\]"),
    ((1, 2, 8, 8), (1, 2, 8, 8), (1, 2, 8, 8), r"must be of one channel, got \[1, 2, 8, 8\]"),
    ((2, 2, 8, 8), (2, 2, 8, 8), (1, 1, 8, 8), r"got \[1, 1, 8, 8\]"),
]


def noise(batch: int, *spatial: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(batch, len(spatial), *spatial, generator=generator, dtype=torch.float64).to(dtype)


def squares(there: torch.Tensor, back: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """By SciPy: the squared distance of every point from where it comes back to, and whether it stays in the grid."""
    spatial = there.shape[2:]
    places = np.indices(spatial) + there.double().numpy()
    ends = places + [
        [ndimage.map_coordinates(axis, places[b], order=1, mode="nearest") for axis in back[b].double().numpy()]
        for b in range(len(there))
    ]
    inside = np.all([(places[:, i] >= 0) & (places[:, i] <= n - 1) for i, n in enumerate(spatial)], axis=0)
    return ((ends - np.indices(spatial)) ** 2).sum(1), inside


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_mean_squared_distance(shape: tuple[int, ...], masked: bool) -> None:
    there, back = noise(*shape), noise(*shape, seed=1)
    # along an axis of one voxel nothing is displaced
    there, back = (f * (torch.tensor(shape[1:]) > 1).view(-1, *[1] * (len(shape) - 1)) for f in (there, back))
    squared, counts = squares(there, back)
    mask = None
    if masked:
        mask = (torch.rand(shape[0], 1, *shape[1:], generator=torch.Generator().manual_seed(2)) > 0.4).float()
        counts = counts & (mask[:, 0].numpy() > 0)
    assert 0 < counts.mean() < 0.95
    assert InverseConsistencyLoss()(there, back, mask).item() == pytest.approx(squared[counts].mean(), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_inverse_of_a_linear_map(shape: tuple[int, ...]) -> None:
    """Linear interpolation is exact, so that nothing is left; and it must be the inverse, not the negative."""
    batch, *spatial = shape
    dims = len(spatial)
    matrix = np.eye(dims) + np.random.default_rng(0).uniform(-0.3, 0.3, (dims, dims))
    centre = (np.array(spatial) - 1) / 2
    points = np.indices(spatial) - centre.reshape(-1, *[1] * dims)
    there, back = (
        torch.from_numpy(np.einsum("ij,j...->i...", m - np.eye(dims), points))[None].repeat(batch, *[1] * (dims + 1))
        for m in (matrix, np.linalg.inv(matrix))
    )
    assert InverseConsistencyLoss()(there, back).item() < 1e-20
    assert InverseConsistencyLoss()(there, -there).item() > 1e-3


def test_points_that_leave_do_not_count() -> None:
    there = torch.full((1, 2, 9, 9), 3.0)
    back = -there
    back[:, 0] += 0.5
    assert InverseConsistencyLoss()(there, back).item() == pytest.approx(0.25)
    # what lies beyond where points arrive plays no part, and nobody pulls at points that leave
    back[:, :, :3, :3] = 100.0
    there = there.requires_grad_()
    loss = InverseConsistencyLoss()(there, back)
    loss.backward()
    assert loss.item() == pytest.approx(0.25)
    assert (there.grad[:, :, 6:].abs().max(), there.grad[:, :, :, 6:].abs().max()) == (0, 0)
    assert there.grad[0, 0, :6, :6].min() > 0
    assert InverseConsistencyLoss()(torch.full((1, 3, 4, 4, 4), 9.0), noise(1, 4, 4, 4)).item() == 0


def test_descent_makes_fields_inverse() -> None:
    there, back = (noise(1, 12, 12, seed=s, dtype=torch.float32) * 0.3 for s in (0, 1))
    fields = [field.requires_grad_() for field in (there, back)]
    optimizer, values = torch.optim.Adam(fields, 0.03), []
    for _ in range(60):
        loss = InverseConsistencyLoss()(*fields)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[0] > 0.5 and values[-1] < 0.1 * values[0]


def test_half_precision_is_computed_in_single() -> None:
    there, back = noise(1, 6, 7, 8), noise(1, 6, 7, 8, seed=1)
    halves = [field.to(torch.bfloat16) for field in (there, back)]
    loss = InverseConsistencyLoss()(*halves)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(InverseConsistencyLoss()(*(h.double() for h in halves)).item(), rel=1e-5)


@pytest.mark.parametrize(("there", "back", "mask", "message"), ILL_CASES)
def test_ill_shapes(there: tuple[int, ...], back: tuple[int, ...], mask: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InverseConsistencyLoss()(torch.zeros(there), torch.zeros(back), None if mask is None else torch.zeros(mask))


def symmetric_batch(*spatial: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    keys = [f"{role}_{entry}" for entry in ("image", "field_of_view") for role in ("moving", "fixed")]
    return {key: (torch.rand(2, 1, *spatial, generator=generator) > 0.3).float() for key in keys}


@pytest.mark.parametrize("use_masks", [False, True])
def test_in_the_loss_of_a_registration(use_masks: bool) -> None:
    _, target = PrepareRegistrationBatch(symmetric=True)(symmetric_batch(9, 10))
    ddf = noise(4, 9, 10, dtype=torch.float32)
    squared, counts = squares(ddf, ddf[[2, 3, 0, 1]])
    if use_masks:
        counts = counts & (target["fixed_field_of_view"][:, 0].numpy() > 0)
    expected = squared[counts].mean()
    plain = RegistrationLoss(use_masks=use_masks)(ddf, target).item()
    loss = RegistrationLoss(use_masks=use_masks, inverse_consistency_weight=0.2)
    assert loss(ddf, target).item() == pytest.approx(plain + 0.2 * expected, rel=1e-5)
    assert loss.last_terms["inverse_consistency"].item() == pytest.approx(expected, rel=1e-5)
    # another term in its place
    other = RegistrationLoss(inverse_consistency=lambda a, b, mask: (a + b).sum() * 0 + 7, inverse_consistency_weight=2)
    assert other(ddf, target).item() == pytest.approx(RegistrationLoss()(ddf, target).item() + 14, rel=1e-5)


def test_both_directions_are_needed() -> None:
    _, target = PrepareRegistrationBatch()(symmetric_batch(8, 8))
    with pytest.raises(ValueError, match=r"needs both directions of every pair .*symmetric=True"):
        RegistrationLoss(inverse_consistency_weight=0.1)(noise(2, 8, 8, dtype=torch.float32), target)


@pytest.mark.parametrize("weight", [-0.1, float("inf"), "much"])
def test_ill_weight(weight: object) -> None:
    with pytest.raises(ValueError, match=f"the weight of inverse_consistency must be .* got {weight!r}"):
        RegistrationLoss(inverse_consistency_weight=weight)
    with pytest.raises(ValueError, match="other than similarity, label, landmarks and inverse_consistency"):
        name = "inverse_consistency"
        RegistrationLoss(regularization={name: torch.nn.Identity()}, regularization_weight={name: 1.0})
