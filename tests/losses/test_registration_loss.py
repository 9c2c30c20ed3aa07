# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from monai.losses import BendingEnergyLoss, DiceCELoss

from monai_sacb.losses import GradientPenaltyLoss, LNCCLoss, RegistrationLoss

ILL_CASES = [
    ({"regularization_weight": -1.0}, r"of regularization must be a finite number of at least 0, got -1\.0"),
    (
        {"regularization_weight": float("nan")},
        r"the weight of regularization must be a finite number of at least 0, got nan",
    ),
    ({"label_weight": -0.5}, r"the weight of label must be a finite number of at least 0, got -0\.5"),
    ({"regularization": {"a": nn.Identity()}}, r"the same names.*got \['a'\] and \['regularization'\]"),
    ({"regularization_weight": {"b": 1.0}}, r"the same names.*got \['regularization'\] and \['b'\]"),
    ({"regularization": {"label": nn.Identity()}, "regularization_weight": {"label": 1}}, r"other than similarity"),
    (
        {"regularization_weight": "abc"},
        r"the weight of regularization must be a finite number of at least 0, got 'abc'",
    ),
    ({"label_weight": float("inf")}, r"the weight of label must be a finite number of at least 0, got inf"),
    ({"label_weight": 1.0}, r"num_labels of at least 1, got None"),
    ({"label_weight": 1.0, "num_labels": 0}, r"num_labels of at least 1, got 0"),
]


def batch_of(batch: int, spatial: tuple[int, ...], labels: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    mode = "trilinear" if len(spatial) == 3 else "bilinear"
    result = {}
    for name in ("moving", "fixed"):
        coarse = torch.rand(batch, 1, *[5] * len(spatial), generator=generator)
        result[f"{name}_image"] = F.interpolate(coarse, size=spatial, mode=mode)
        result[f"{name}_label"] = (result[f"{name}_image"] * (labels + 1)).floor().clamp(0, labels)
    return result


def field(batch: int, spatial: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return 1.5 * torch.randn(batch, len(spatial), *spatial, generator=generator)


def displaced(image: torch.Tensor, ddf: torch.Tensor) -> torch.Tensor:
    """Linear interpolation at p + ddf(p) by SciPy, zeros outside."""
    points = np.indices(ddf.shape[2:]) + ddf.double().numpy()
    sampled = [
        [ndimage.map_coordinates(channel, points[i], order=1, mode="grid-constant") for channel in image[i].double()]
        for i in range(len(image))
    ]
    return torch.from_numpy(np.array(sampled)).float()


class Difference(nn.Module):
    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (pred - target).square().mean()


@pytest.mark.parametrize(("batch", "spatial"), [(1, (10, 12)), (2, (8, 9, 7))])
@pytest.mark.parametrize("weight", [0.0, 0.3, 3.0])
def test_images_and_field(batch: int, spatial: tuple[int, ...], weight: float) -> None:
    data, ddf = batch_of(batch, spatial), field(batch, spatial)
    warped = displaced(data["moving_image"], ddf)
    smooth = np.mean([np.mean(np.diff(ddf.numpy(), axis=axis) ** 2) for axis in range(2, ddf.dim())])
    expected = (warped - data["fixed_image"]).square().mean().item() + weight * smooth
    actual = RegistrationLoss(similarity=Difference(), regularization_weight=weight)(ddf, data)
    assert actual.shape == () and actual.item() == pytest.approx(expected, rel=1e-4)
    # the default similarity is the local correlation of the warped image with the fixed one
    expected = LNCCLoss()(warped, data["fixed_image"]).item() + weight * smooth
    actual = RegistrationLoss(regularization_weight=weight)(ddf, data)
    assert actual.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("batch", "spatial", "labels"), [(1, (10, 12), 3), (2, (8, 9, 7), 2)])
def test_labels(batch: int, spatial: tuple[int, ...], labels: int) -> None:
    data, ddf = batch_of(batch, spatial, labels), field(batch, spatial)
    dice = []
    for i in range(batch):
        for label in range(1, labels + 1):
            moving = displaced((data["moving_label"][i : i + 1] == label).float(), ddf[i : i + 1])
            fixed = (data["fixed_label"][i : i + 1] == label).float()
            dice.append((2 * (moving * fixed).sum() + 1e-5) / (moving.sum() + fixed.sum() + 1e-5))
    expected = 1 - torch.stack(dice).mean().item()
    loss = RegistrationLoss(regularization_weight=0.0, label_weight=2.0, num_labels=labels)
    plain = RegistrationLoss(regularization_weight=0.0)(ddf, data).item()
    assert loss(ddf, data).item() - plain == pytest.approx(2 * expected, rel=1e-3)
    assert 0.2 < expected < 0.95


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_terms_can_be_exchanged() -> None:
    data, ddf = batch_of(1, (10, 11, 12)), field(1, (10, 11, 12))
    terms = {"similarity": Difference(), "regularization": BendingEnergyLoss(), "label": DiceCELoss()}
    loss = RegistrationLoss(**terms, regularization_weight=0.5, label_weight=0.1, num_labels=2)
    similarity = terms["similarity"](displaced(data["moving_image"], ddf), data["fixed_image"])
    one_hot = [torch.cat([data[f"{n}_label"] == k for k in range(3)], 1).float() for n in ("moving", "fixed")]
    overlap = terms["label"](displaced(one_hot[0], ddf), one_hot[1])
    expected = similarity + 0.5 * terms["regularization"](ddf) + 0.1 * overlap
    assert loss(ddf, data).item() == pytest.approx(expected.item(), rel=1e-4)


class Size(nn.Module):
    def forward(self, pred: torch.Tensor) -> torch.Tensor:
        return pred.abs().mean()


class Count(nn.Module):
    """A term that remembers how often it was wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return tensors[0].sum() * 0 + 1.0


def test_terms_without_weight_are_not_computed() -> None:
    data, ddf = batch_of(1, (8, 8)), field(1, (8, 8))
    terms = [Count() for _ in range(3)]
    for regularization, label, value in ((0.0, 0.0, 1.0), (2.0, 0.0, 3.0), (0.0, 4.0, 5.0), (2.0, 4.0, 7.0)):
        loss = RegistrationLoss(terms[0], terms[1], regularization, terms[2], label, num_labels=2)
        assert loss(ddf, data).item() == value
    assert [term.calls for term in terms] == [4, 2, 2]


def test_several_regularizations() -> None:
    data, ddf = batch_of(1, (10, 11, 12)), field(1, (10, 11, 12))
    terms = {"gradient": GradientPenaltyLoss(), "size": Size()}
    loss = RegistrationLoss(Difference(), terms, {"gradient": 0.2, "size": 3.0})
    alone = RegistrationLoss(Difference(), regularization_weight=0.2)(ddf, data).item()
    assert loss(ddf, data).item() == pytest.approx(alone + 3 * ddf.abs().mean().item(), rel=1e-5)
    loss.weights["size"] = 0.0
    assert loss(ddf, data).item() == pytest.approx(alone, rel=1e-6)


def test_names_and_containers_of_regularizations() -> None:
    data, ddf = batch_of(1, (10, 11)), field(1, (10, 11))
    expected = RegistrationLoss(Difference(), Size(), 3.0)(ddf, data)
    for terms in ({"type": Size()}, {"a.b": Size()}, nn.ModuleDict({"size": Size()})):
        loss = RegistrationLoss(Difference(), terms, dict.fromkeys(terms, 3.0))
        assert torch.equal(loss(ddf, data), expected)


def test_label_term_switched_on_later_needs_the_number() -> None:
    loss = RegistrationLoss()
    loss.weights["label"] = 1.0
    with pytest.raises(ValueError, match="num_labels of at least 1, got None"):
        loss(field(1, (8, 8)), batch_of(1, (8, 8)))


def test_gradient_of_every_term() -> None:
    """The label term reaches the field, through the one-hot maps that are warped linearly."""
    data, ddf = batch_of(1, (12, 12, 12)), field(1, (12, 12, 12))
    for arguments in (
        {"regularization_weight": 0.0},
        {"similarity": Count(), "regularization_weight": 1.0},
        {"similarity": Count(), "regularization_weight": 0.0, "label_weight": 1.0, "num_labels": 2},
    ):
        leaf = ddf.clone().requires_grad_()
        RegistrationLoss(**arguments)(leaf, data).backward()
        assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0


@pytest.mark.parametrize(("batch", "spatial"), [(1, (10, 12)), (2, (8, 9, 7))])
def test_masks(batch: int, spatial: tuple[int, ...]) -> None:
    """Outside either mask, that of the moving image carried along, nothing counts and nothing pulls."""
    data, ddf = batch_of(batch, spatial), field(batch, spatial).round() + 0.2
    for name, half in (("moving", slice(2, None)), ("fixed", slice(None, 6))):
        data[f"{name}_field_of_view"] = torch.zeros_like(data[f"{name}_image"])
        data[f"{name}_field_of_view"][:, :, half] = 1
    steps = np.rint(np.indices(spatial) + ddf.numpy()).astype(int)
    mask = torch.zeros_like(data["fixed_image"])
    for b, p in itertools.product(range(batch), np.ndindex(*spatial)):
        q = steps[(b, slice(None), *p)]
        inside = all(0 <= a < n for a, n in zip(q, spatial))
        mask[(b, 0, *p)] = float(p[0] < 6 and inside and q[0] >= 2)
    assert 0.1 < mask.mean() < 0.9
    warped = displaced(data["moving_image"], ddf)
    expected = ((warped - data["fixed_image"]) * mask).square().mean().item()
    arguments = {"similarity": Difference(), "regularization_weight": 0.0}
    leaf = ddf.clone().requires_grad_()
    loss = RegistrationLoss(**arguments, use_masks=True)(leaf, data)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert RegistrationLoss(**arguments)(ddf, data).item() > 1.1 * expected
    loss.backward()
    assert (leaf.grad * (1 - mask)).abs().max() == 0 and leaf.grad.abs().max() > 0
    # the images of the batch are left as they are
    assert torch.equal(data["fixed_image"], batch_of(batch, spatial)["fixed_image"])


@pytest.mark.parametrize("missing", ["moving_field_of_view", "fixed_field_of_view"])
def test_missing_masks(missing: str) -> None:
    data, ddf = batch_of(1, (8, 8)), field(1, (8, 8))
    data |= {key: torch.ones(1, 1, 8, 8) for key in ("moving_field_of_view", "fixed_field_of_view") if key != missing}
    with pytest.raises(ValueError, match=missing):
        RegistrationLoss(use_masks=True)(ddf, data)


@pytest.mark.parametrize("labels", [0, 2])
def test_descent_registers(labels: int) -> None:
    """A free field, improved by some steps from the identity, lowers the loss; a large weight keeps it smoother."""
    data, results = batch_of(1, (14, 14, 14)), []
    for weight in (0.02, 2.0):
        ddf = torch.zeros(1, 3, 14, 14, 14, requires_grad=True)
        label_weight = 1.0 if labels else 0.0
        loss = RegistrationLoss(regularization_weight=weight, label_weight=label_weight, num_labels=labels or None)
        optimizer, values = torch.optim.Adam([ddf], 0.03), []
        for _ in range(15):
            value = loss(ddf, data)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        assert values[-1] < values[0] - 0.05
        results.append(GradientPenaltyLoss()(ddf).item())
    assert 0 < results[1] < 0.5 * results[0]


@pytest.mark.parametrize(("arguments", "message"), ILL_CASES)
def test_ill_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegistrationLoss(**arguments)


@pytest.mark.parametrize("missing", [["moving_label"], ["fixed_label"], ["moving_label", "fixed_label"]])
def test_missing_labels(missing: list[str]) -> None:
    data = {key: value for key, value in batch_of(1, (8, 8)).items() if key not in missing}
    ddf = field(1, (8, 8))
    with pytest.raises(ValueError, match=r"needs labels, but the batch has no \['" + "', '".join(missing)):
        RegistrationLoss(label_weight=1.0, num_labels=2)(ddf, data)
    # without the term nobody asks for them
    assert RegistrationLoss()(ddf, data).item() != 0


def test_field_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\[1, 1, 8, 8\] and \[1, 3, 8, 8\]"):
        RegistrationLoss()(torch.zeros(1, 3, 8, 8), batch_of(1, (8, 8)))
