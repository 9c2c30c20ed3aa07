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

from monai.losses import BendingEnergyLoss, DiceCELoss, DiceLoss, DiffusionLoss, GlobalMutualInformationLoss

from monai_sacb.losses import (
    BendingPenaltyLoss,
    GradientPenaltyLoss,
    LandmarkLoss,
    LNCCLoss,
    MINDSSCLoss,
    RegistrationLoss,
)

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
    ({"landmark_weight": -2}, r"the weight of landmarks must be a finite number of at least 0, got -2"),
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
@pytest.mark.parametrize("label", [None, DiceLoss(include_background=False)], ids=["default", "one-hot"])
def test_pairs_without_labels_skip_the_term(missing: list[str], label: nn.Module | None) -> None:
    data, ddf = batch_of(1, (8, 8)), field(1, (8, 8))
    loss = RegistrationLoss(label=label, label_weight=1.0, num_labels=2)
    whole = loss(ddf, data).item()
    assert loss.last_terms.keys() == {"similarity", "regularization", "label"}
    plain = RegistrationLoss()(ddf, data).item()
    assert whole > plain + 0.1
    value = loss(ddf, {key: entry for key, entry in data.items() if key not in missing})
    assert value.item() == plain
    assert loss.last_terms.keys() == {"similarity", "regularization"}


@pytest.mark.parametrize("label", [None, DiceLoss(include_background=False)], ids=["default", "one-hot"])
@pytest.mark.parametrize("role", ["moving", "fixed"])
def test_batch_of_which_some_have_labels(label: nn.Module | None, role: str) -> None:
    """A map of -1 stands for a subject without labels, whose pairs do not count."""
    data, ddf = batch_of(3, (8, 9)), field(3, (8, 9)).requires_grad_()
    data[f"{role}_label"][1] = -1
    terms = {"similarity": Count(), "regularization_weight": 0.0, "label": label, "label_weight": 1.0, "num_labels": 2}
    loss = RegistrationLoss(**terms)
    value = loss(ddf, data)
    value.backward()
    alone = []
    for i in (0, 2):
        loss(ddf[i : i + 1], {key: entry[i : i + 1] for key, entry in data.items()})
        alone.append(loss.last_terms["label"].item())
    assert value.item() - 1 == pytest.approx(np.mean(alone), rel=1e-5) and alone[0] != alone[1]
    assert (ddf.grad[1] == 0).all() and (ddf.grad[[0, 2]].flatten(1).abs().amax(1) > 0).all()
    data[f"{role}_label"][:] = -1
    assert loss(ddf, data).item() == 1.0


def test_landmarks() -> None:
    data, ddf = batch_of(2, (10, 11, 12)), field(2, (10, 11, 12))
    plain = RegistrationLoss()(ddf, data).item()
    loss = RegistrationLoss(landmark_weight=0.5)
    # a batch has none
    assert loss(ddf, data).item() == plain and "landmarks" not in loss.last_terms
    fixed = torch.randint(0, 10, (2, 6, 3), generator=torch.Generator().manual_seed(3))
    carried = torch.stack([fixed[b] + ddf[b][(slice(None), *fixed[b].T)].T for b in range(2)])
    data["fixed_landmarks"] = fixed.float()
    data["moving_landmarks"] = carried + torch.tensor([2.0, 3.0, 6.0])
    assert loss(ddf, data).item() == pytest.approx(plain + 0.5 * 7.0, rel=1e-5)
    assert loss.last_terms["landmarks"].item() == pytest.approx(7.0, rel=1e-5)
    # nobody asks for them without a weight
    assert RegistrationLoss()(ddf, data).item() == plain
    in_mm = RegistrationLoss(landmarks=LandmarkLoss(2.0), landmark_weight=0.5)
    assert in_mm(ddf, data).item() == pytest.approx(plain + 7.0, rel=1e-5)


def test_last_terms_are_without_weight_and_gradient() -> None:
    data, ddf = batch_of(1, (10, 11)), field(1, (10, 11)).requires_grad_()
    regularization = {"gradient": GradientPenaltyLoss(), "size": Size()}
    weights = {"gradient": 0.2, "size": 3.0}
    loss = RegistrationLoss(Difference(), regularization, weights, label_weight=0.7, num_labels=2)
    assert loss.last_terms == {}
    value = loss(ddf, data)
    terms = loss.last_terms
    assert list(terms) == ["similarity", "gradient", "size", "label"]
    assert not any(term.requires_grad for term in terms.values())
    assert terms["size"].item() == pytest.approx(ddf.abs().mean().item())
    assert sum(loss.weights[name] * term for name, term in terms.items()).item() == pytest.approx(value.item())
    loss.weights["size"] = 0.0
    loss(ddf, data)
    assert "size" not in loss.last_terms


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("spatial", [(16, 17), (10, 12, 11)])
@pytest.mark.parametrize("use_masks", [False, True])
@pytest.mark.parametrize("regularization", [BendingEnergyLoss, DiffusionLoss, BendingPenaltyLoss])
@pytest.mark.parametrize("similarity", [nn.MSELoss, GlobalMutualInformationLoss, MINDSSCLoss])
def test_losses_of_others(similarity: type, regularization: type, use_masks: bool, spatial: tuple[int, ...]) -> None:
    data, ddf = batch_of(2, spatial), field(2, spatial)
    warped, fixed = displaced(data["moving_image"], ddf), data["fixed_image"]
    if use_masks:
        for name in ("moving", "fixed"):
            data[f"{name}_field_of_view"] = torch.ones_like(fixed)
        data["fixed_field_of_view"][..., 7:] = 0
        ddf = 0.0 * ddf
        warped, inside = data["moving_image"], data["fixed_field_of_view"]
        warped, fixed = warped * inside, fixed * inside
    leaf = ddf.clone().requires_grad_()
    loss = RegistrationLoss(similarity(), regularization(), 0.3, use_masks=use_masks)
    value = loss(leaf, data)
    expected = similarity()(warped, fixed) + 0.3 * regularization()(ddf)
    assert value.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    value.backward()
    assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0


def test_field_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"\[1, 1, 8, 8\] and \[1, 3, 8, 8\]"):
        RegistrationLoss()(torch.zeros(1, 3, 8, 8), batch_of(1, (8, 8)))


def test_similarity_compares_the_entries_of_its_key() -> None:
    torch.manual_seed(0)
    ddf = torch.randn(1, 3, 12, 12, 12)
    moving, fixed = torch.rand(1, 1, 12, 12, 12), torch.rand(1, 1, 12, 12, 12)
    target = {f"{role}_image": torch.rand(1, 1, 12, 12, 12) for role in ("moving", "fixed")}
    loss = RegistrationLoss(similarity_key="anatomy")
    with pytest.raises(ValueError, match=r"moving_anatomy.*but the batch has"):
        loss(ddf, target)
    value = loss(ddf, {**target, "moving_anatomy": moving, "fixed_anatomy": fixed})
    expected = RegistrationLoss()(ddf, {"moving_image": moving, "fixed_image": fixed})
    torch.testing.assert_close(value, expected)
    assert not torch.isclose(value, RegistrationLoss()(ddf, target))
    with pytest.raises(ValueError, match=r"similarity_key.*'label'"):
        RegistrationLoss(similarity_key="label")
