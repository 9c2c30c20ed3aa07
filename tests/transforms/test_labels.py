# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from monai.data import MetaTensor
from monai.metrics import DiceMetric

from monai_sacb.transforms import CommonLabelsd, SelectLabelsd, number_labels

VALUES = torch.tensor([0, 1, 2, 7, 40, 2035, -3])

# label_ids -> what VALUES become
CASES = {
    "all": ([1, 2, 7, 40, 2035, -3], [0, 1, 2, 3, 4, 5, 6]),
    "order counts": ([2035, 2, 1], [0, 3, 2, 0, 0, 1, 0]),
    "one": ([7], [0, 0, 0, 1, 0, 0, 0]),
    # new numbers are values of the map, too
    "swapped": ([2, 1], [0, 2, 1, 0, 0, 0, 0]),
    "absent value": ([5, 40], [0, 0, 0, 0, 2, 0, 0]),
    "negative value": ([-3], [0, 0, 0, 0, 0, 0, 1]),
}


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("label_ids", "expected"), CASES.values(), ids=CASES)
def test_values_are_numbered_anew(label_ids: list[int], expected: list[int], dtype: torch.dtype) -> None:
    label = VALUES.to(dtype)
    selected = number_labels(label, label_ids)
    assert selected.dtype == torch.uint8
    assert selected.tolist() == expected
    assert torch.equal(label, VALUES.to(dtype))


@pytest.mark.parametrize("shape", [(1, 7), (7, 1, 1), (1, 1, 7, 1), (7,)], ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    selected = number_labels(VALUES.reshape(shape), [7, 1])
    assert selected.shape == shape
    assert selected.flatten().tolist() == [0, 2, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(("number", "dtype"), [(255, torch.uint8), (256, torch.int16), (300, torch.int16)])
def test_many_labels(number: int, dtype: torch.dtype) -> None:
    label = torch.arange(0, 2 * number + 2)
    selected = number_labels(label, [2 * i for i in range(1, number + 1)])
    assert selected.dtype == dtype
    expected = [i // 2 if i % 2 == 0 and i <= 2 * number else 0 for i in label.tolist()]
    assert selected.tolist() == expected


@pytest.mark.parametrize(
    "label_ids", [[], [1, 2, 1], [0], [3, 0], [1, 1.0]], ids=["none", "twice", "zero", "with zero", "equal numbers"]
)
def test_ill_formed(label_ids: list[int]) -> None:
    with pytest.raises(ValueError) as caught:
        number_labels(VALUES, label_ids)
    assert f"got {label_ids}" in str(caught.value)


@pytest.mark.parametrize("label_ids", [[], [1, 2, 1], [0, 5]], ids=str)
def test_ill_formed_in_the_dictionary_transform(label_ids: list[int]) -> None:
    with pytest.raises(ValueError) as caught:
        SelectLabelsd("label", label_ids)({"label": VALUES})
    assert f"got {label_ids}" in str(caught.value)


@pytest.mark.parametrize("value", [0.5, -1.25, 2.0001, float("nan")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_between_two_numbers_are_refused(value: float, dtype: torch.dtype) -> None:
    label = torch.tensor([0, 1, value, 2], dtype=dtype)
    for select in (lambda: number_labels(label, [1, 2]), lambda: SelectLabelsd("a", [1, 2])({"a": label})):
        with pytest.raises(ValueError, match=rf"whole numbers, got {value:g}"):
            select()


def test_dictionary_transform() -> None:
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    label = MetaTensor(VALUES.reshape(1, 7, 1, 1).float(), affine=affine, meta={"filename_or_obj": "l.nii.gz"})
    data: dict[str, Any] = {"label": label, "image": VALUES.float()}
    result = SelectLabelsd(["label"], [2, 7])(data)
    assert isinstance(result["label"], MetaTensor)
    assert result["label"].flatten().tolist() == [0, 0, 1, 2, 0, 0, 0]
    assert torch.equal(result["label"].affine, affine)
    assert result["label"].meta["filename_or_obj"] == "l.nii.gz"
    # all that was found, of this map only
    assert sorted(map(int, result["label"].meta["label_ids"].split())) == [-3, 0, 1, 2, 7, 40, 2035]
    # the input stays what it was
    assert data["label"] is label and torch.equal(label.flatten(), VALUES.float())
    assert "label_ids" not in label.meta
    assert result["image"] is data["image"]


def test_found_values_are_those_before_the_selection() -> None:
    label = MetaTensor(torch.tensor([[0, 9, 9, 4]], dtype=torch.float32))
    result = SelectLabelsd("label", [4])({"label": label})
    assert result["label"].tolist() == [[0, 0, 0, 1]]
    assert sorted(map(int, result["label"].meta["label_ids"].split())) == [0, 4, 9]


def test_several_keys_and_missing_ones() -> None:
    data = {"a": VALUES, "c": VALUES + 1}
    result = SelectLabelsd(["a", "b", "c"], np.array([2, 8]), allow_missing_keys=True)(data)
    assert set(result) == {"a", "c"}
    assert result["a"].tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert result["c"].tolist() == [0, 1, 0, 2, 0, 0, 0]
    with pytest.raises(KeyError, match="b"):
        SelectLabelsd(["a", "b"], [2])(data)


def test_labels_that_only_one_image_has_do_not_count() -> None:
    moving = torch.tensor([[[0, 1, 2, 2]]], dtype=torch.uint8)
    fixed = MetaTensor(torch.tensor([[[1, 3, 2, 0]]], dtype=torch.uint8), meta={"label_ids": "1"})
    result = CommonLabelsd()({"moving_label": moving, "fixed_label": fixed})
    assert result["fixed_label"].tolist() == [[[1, 0, 2, 0]]]
    assert isinstance(result["fixed_label"], MetaTensor) and result["fixed_label"].dtype == torch.uint8
    assert result["moving_label"] is moving and fixed.tolist() == [[[1, 3, 2, 0]]]
    # as MONAI's Dice then says: NaN for what either image lacks
    dice = DiceMetric(num_classes=4, include_background=False)
    assert torch.isnan(dice(moving[None], result["fixed_label"][None].as_tensor())).tolist() == [[False, False, True]]
    # without a label map on the other side nothing is known
    assert CommonLabelsd()({"fixed_label": fixed})["fixed_label"] is fixed
    assert CommonLabelsd(allow_missing_keys=True)({}) == {}
    with pytest.raises(KeyError):
        CommonLabelsd()({})
    with pytest.raises(ValueError, match="one reference key for each"):
        CommonLabelsd(["a", "b"], "c")


@pytest.mark.parametrize("values", [[-5, 0, 7], [0], [-(2**40), 3, 2**40], [2**31, 2**31 + 1], []], ids=str)
def test_values_found(values: list[int]) -> None:
    label = MetaTensor(torch.tensor([values * 3], dtype=torch.int64))
    assert SelectLabelsd("a", [7])({"a": label})["a"].meta["label_ids"] == " ".join(map(str, sorted(values)))
