# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.metrics import DiceMetric

from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.handlers import PairMetric, RegistrationTable
from monai_sacb.metrics import FieldErrorMetric, FoldsMetric
from monai_sacb.transforms import WarpDDFd

SHAPE = (6, 7, 8)
LOGGER = "monai_sacb.handlers.registration_table"
NAN = float("nan")


class Shift(torch.nn.Module):
    """In the place of a network: one voxel along the first axis, for every pair."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        ddf = torch.zeros(image.shape[0], 3, *image.shape[2:])
        ddf[:, 0] = 1.0
        return ddf


def label(left: int | None, right: int | None) -> torch.Tensor:
    """A box of label 1 and one of label 2, two voxels thick along the first axis, beginning there; None for no box."""
    result = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    for value, start, part in ((1, left, slice(0, 3)), (2, right, slice(4, None))):
        if start is not None:
            result[0, start : start + 2, part] = value
    return result


def pair(
    names: tuple[str, str], moving: torch.Tensor | None, fixed: torch.Tensor | None, true_shift: float | None = None
) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {
        f"{role}_image": MetaTensor(torch.rand(1, *SHAPE), meta={"filename_or_obj": f"/data/{name}.nii.gz"})
        for role, name in zip(("moving", "fixed"), names)
    }
    result |= {f"{r}_label": x for r, x in (("moving", moving), ("fixed", fixed)) if x is not None}
    if true_shift is not None:
        result["true_ddf"] = MetaTensor(
            torch.full((3, *SHAPE), true_shift) * torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1, 1),
            affine=torch.diag(torch.tensor([1.0, 2.0, 1.0, 1.0])),
        )
    return result


PAIRS = [
    # Dice after the shift 1.0 and 0.5, before it 0.5 and 1.0
    pair(("a", "b"), label(2, 2), label(1, 2), 0.0),
    # 0.0 and 1.0, 0.0 and 0.5
    pair(("b", "a"), label(4, 2), label(1, 1), 1.0),
    # 0.5 and nothing to compare with, 1.0 and likewise
    pair(("a", "c"), label(1, 1), label(1, None), 2.0),
]
AFTER = [(1.0, 0.5), (0.0, 1.0), (0.5, NAN)]
BEFORE = [(0.5, 1.0), (0.0, 0.5), (1.0, NAN)]


def dice(*keys: str) -> PairMetric:
    return PairMetric(DiceMetric(include_background=False, num_classes=3), keys)


def evaluate(
    table: RegistrationTable | None, data: Sequence[dict[str, torch.Tensor]], batch_size: int = 1, runs: int = 1
) -> SupervisedEvaluator:
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(data), batch_size=batch_size),
        network=Shift(),
        prepare_batch=PrepareRegistrationBatch(),
        postprocessing=WarpDDFd("moving_label", "warped_label", mode="nearest", allow_missing_keys=True),
        key_val_metric={"val_folds_percent": PairMetric(FoldsMetric(), ["pred"])},
        additional_metrics={
            "val_dice": dice("warped_label", "fixed_label"),
            "val_dice_before": dice("moving_label", "fixed_label"),
            "val_field_error_mm": PairMetric(FieldErrorMetric(), ["pred", "true_ddf"]),
            "val_field_error_before_mm": PairMetric(FieldErrorMetric(identity=True), ["pred", "true_ddf"]),
        },
        val_handlers=[] if table is None else [table],
    )
    for epoch in range(runs):
        engine.run(epoch + 1)
    return engine


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "pairs.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)


def nanmean(values: Sequence[float]) -> float:
    finite = [value for value in values if not math.isnan(value)]
    return sum(finite) / len(finite)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_one_row_for_each_pair(tmp_path: Path, batch_size: int) -> None:
    evaluate(RegistrationTable(tmp_path / "out", ["left", "right"]), PAIRS, batch_size)
    assert sorted(os.listdir(tmp_path / "out")) == ["pairs.csv", "summary.json"]
    found = rows(tmp_path / "out")
    assert list(found[0]) == [
        "moving",
        "fixed",
        *(f"val_dice_before/{name}" for name in ("left", "right", "mean")),
        *(f"val_dice/{name}" for name in ("left", "right", "mean")),
        "val_field_error_before_mm",
        "val_field_error_mm",
        "val_folds_percent",
    ]
    assert [(row["moving"], row["fixed"]) for row in found] == [("a", "b"), ("b", "a"), ("a", "c")]
    for i, row in enumerate(found):
        for name, values in (("val_dice", AFTER[i]), ("val_dice_before", BEFORE[i])):
            expected = [*values, nanmean(values)]
            actual = [float(row[f"{name}/{column}"]) for column in ("left", "right", "mean")]
            assert actual == pytest.approx(expected, abs=1e-5, nan_ok=True)
        # the true field is 2 i mm along the second axis, the predicted one 1 mm along the first
        assert float(row["val_field_error_mm"]) == pytest.approx(math.hypot(2 * i, 1), rel=1e-5)
        assert float(row["val_field_error_before_mm"]) == pytest.approx(2 * i, rel=1e-5)
        assert float(row["val_folds_percent"]) == 0.0


def test_means_in_the_summary(tmp_path: Path) -> None:
    evaluate(RegistrationTable(str(tmp_path), ["left", "right"]), PAIRS)
    found = summary(tmp_path)
    assert found.keys() == {"pairs", *(set(rows(tmp_path)[0]) - {"moving", "fixed"})}
    assert found["pairs"] == 3
    for name, values in (("val_dice", AFTER), ("val_dice_before", BEFORE)):
        assert found[f"{name}/left"] == pytest.approx(nanmean([v[0] for v in values]), abs=1e-6)
        assert found[f"{name}/right"] == pytest.approx(nanmean([v[1] for v in values]), abs=1e-6)
        assert found[f"{name}/mean"] == pytest.approx(nanmean([nanmean(v) for v in values]), abs=1e-6)
    assert found["val_field_error_before_mm"] == pytest.approx(2.0)
    assert found["val_field_error_mm"] == pytest.approx((1 + 5**0.5 + 17**0.5) / 3)
    assert found["val_folds_percent"] == 0.0
    # for people to read
    assert (tmp_path / "summary.json").read_text().count("\n") > len(found)


def test_table_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        evaluate(RegistrationTable(tmp_path, ["left", "right"]), PAIRS)
    (text,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    lines = [line.split() for line in text.strip().splitlines()]
    assert lines == [
        ["3", "pairs", "Dice", "before", "after"],
        ["left", "0.5000", "0.5000"],
        ["right", "0.7500", "0.7500"],
        ["mean", "0.6667", "0.5833"],
        ["val_field_error_before_mm", "2.0000"],
        ["val_field_error_mm", "2.4531"],
        ["val_folds_percent", "0.0000"],
    ]


@pytest.mark.parametrize("number", [1, 10])
def test_columns_in_the_log_stand_below_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        evaluate(RegistrationTable(tmp_path, ["left", "right"]), PAIRS[:1] * number)
    (text,) = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    assert len({len(line) for line in text.strip().splitlines()}) == 1, text


def test_what_nobody_has_is_null(tmp_path: Path) -> None:
    data = [pair(("a", "b"), label(2, None), label(1, None)), pair(("b", "a"), label(3, None), label(2, None))]
    evaluate(RegistrationTable(tmp_path, ["left", "right"]), data)
    found = summary(tmp_path)
    assert found["val_dice/left"] == found["val_dice/mean"] == 1.0
    assert found["val_dice/right"] is None and found["val_dice_before/right"] is None
    assert [row["val_dice/right"] for row in rows(tmp_path)] == ["nan", "nan"]
    # there are no true fields: no columns, not empty ones
    assert not [name for name in found if "field_error" in name]


@pytest.mark.parametrize("others", [(), ("val_folds_percent",), ("absent", "val_field_error_mm")], ids=str)
def test_columns_that_are_asked_for(tmp_path: Path, others: tuple[str, ...]) -> None:
    table = RegistrationTable(tmp_path, ["x", "y"], after="val_dice_before", before="val_dice", others=others)
    evaluate(table, PAIRS)
    names = list(rows(tmp_path)[0])[2:]
    present = [name for name in others if name != "absent"]
    assert names == [f"{m}/{c}" for m in ("val_dice", "val_dice_before") for c in ("x", "y", "mean")] + present
    assert summary(tmp_path)["val_dice_before/x"] == pytest.approx(0.5, abs=1e-6)


def test_data_without_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        evaluate(RegistrationTable(tmp_path, ["left", "right"]), [pair(("a", "b"), None, None)] * 2)
    assert summary(tmp_path) == {"pairs": 2, "val_folds_percent": 0.0}
    assert rows(tmp_path) == [{"moving": "a", "fixed": "b", "val_folds_percent": "0"}] * 2
    assert "left" not in caplog.text and "2 pairs" in caplog.text


def test_one_pair_without_labels_does_not_hide_the_others(tmp_path: Path) -> None:
    data = [PAIRS[0], pair(("c", "d"), None, None, 0.0), PAIRS[1]]
    engine = evaluate(RegistrationTable(tmp_path, ["left", "right"]), data)
    assert engine.state.metrics["val_dice"] == pytest.approx(0.625, abs=1e-6)
    assert [row["moving"] for row in rows(tmp_path)] == ["a", "c", "b"]
    assert summary(tmp_path)["val_dice/mean"] == pytest.approx(0.625, abs=1e-6)
    assert [float(row["val_dice/left"]) for row in rows(tmp_path)] == pytest.approx([1.0, NAN, 0.0], nan_ok=True)


def test_every_evaluation_has_a_table_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = list(PAIRS)
    table = RegistrationTable(tmp_path, ["left", "right"])
    with caplog.at_level(logging.INFO, LOGGER):
        engine = evaluate(table, data, runs=2)
        assert summary(tmp_path)["pairs"] == 3 and len(rows(tmp_path)) == 3
        # fewer pairs, and without labels
        data[:] = [pair(("y", "z"), None, None)]
        engine.data_loader = DataLoader(Dataset(data), batch_size=1)
        engine.state.epoch_length = 1
        engine.run(3)
    assert summary(tmp_path) == {"pairs": 1, "val_folds_percent": 0.0}
    assert rows(tmp_path) == [{"moving": "y", "fixed": "z", "val_folds_percent": "0"}]
    assert len([record for record in caplog.records if record.name == LOGGER]) == 3
    assert sorted(os.listdir(tmp_path)) == ["pairs.csv", "summary.json"]


@pytest.mark.parametrize("name", ["with, comma", 'with "quotes"', "grün", "a b"])
def test_names_survive(tmp_path: Path, name: str) -> None:
    evaluate(RegistrationTable(tmp_path, [name, "right"]), [pair((name, "b"), label(2, 2), label(1, 2))])
    assert [row["moving"] for row in rows(tmp_path)] == [name]
    assert float(rows(tmp_path)[0][f"val_dice/{name}"]) == 1.0
    assert summary(tmp_path)[f"val_dice/{name}"] == 1.0


def test_failed_write_keeps_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(RegistrationTable(tmp_path, ["left", "right"]), PAIRS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def failing(*args: Any, **kwargs: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(OSError, match="disk full"):
        evaluate(RegistrationTable(tmp_path, ["left", "right"]), PAIRS[:1])
    assert sorted(os.listdir(tmp_path)) == ["pairs.csv", "summary.json"]
    assert (tmp_path / "summary.json").read_bytes() == before["summary.json"]
