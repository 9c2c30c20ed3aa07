# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset as TorchDataset

from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.metrics import DiceMetric

from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.handlers import PairJournal, PairMetric, RegistrationTable
from monai_sacb.metrics import FieldErrorMetric, FoldsMetric, bootstrap_interval
from monai_sacb.transforms import WarpByDDFd

ROOT = Path(__file__).resolve().parents[2]

SHAPE = (6, 7, 8)
LABELS = ["left", "right"]
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
    table: RegistrationTable | None,
    data: Sequence[dict[str, torch.Tensor]] | Dataset,
    batch_size: int = 1,
    runs: int = 1,
) -> SupervisedEvaluator:
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(data if isinstance(data, TorchDataset) else Dataset(data), batch_size=batch_size),
        network=Shift(),
        prepare_batch=PrepareRegistrationBatch(),
        postprocessing=WarpByDDFd("moving_label", "warped_label", mode="nearest", allow_missing_keys=True),
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
    assert sorted(os.listdir(tmp_path / "out")) == ["pairs.csv", "structures.csv", "summary.json"]
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
    lowest = {f"{name}/mean_lowest30" for name in ("val_dice", "val_dice_before")}
    assert found.keys() == {"pairs", *(set(rows(tmp_path)[0]) - {"moving", "fixed"}), *lowest}
    # one of three pairs
    assert found["val_dice/mean_lowest30"] == pytest.approx(0.5) and found["val_dice_before/mean_lowest30"] == 0.25
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
        ["3", "pairs", "dice_before", "dice"],
        ["left", "0.5000", "0.5000"],
        ["right", "0.7500", "0.7500"],
        ["mean", "0.6667", "0.5833"],
        ["lowest", "30", "%", "0.2500", "0.5000"],
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
    head, *lines = text.strip().splitlines()
    ends = {head.index("dice_before") + len("dice_before"), len(head)}
    assert {len(line) for line in lines} == ends, text
    # the point of every number stands at one of two places
    assert {i for line in lines for i, letter in enumerate(line) if letter == "."} == {end - 5 for end in ends}, text


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
    table = RegistrationTable(tmp_path, ["x", "y"], ("val_dice", "absent", "val_dice_before"), others)
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
    assert sorted(os.listdir(tmp_path)) == ["pairs.csv", "structures.csv", "summary.json"]
    assert (tmp_path / "summary.json").read_bytes() == before["summary.json"]


def test_structures(tmp_path: Path) -> None:
    evaluate(RegistrationTable(tmp_path, ["left", "right"]), PAIRS)
    with open(tmp_path / "structures.csv", newline="") as file:
        found = {row["structure"]: row for row in csv.DictReader(file)}
    assert list(found) == ["left", "right", "mean"]
    assert [float(found["left"][f"val_dice {x}"]) for x in ("mean", "median", "std")] == pytest.approx(
        [0.5, 0.5, (0.5 / 3) ** 0.5], abs=1e-5
    )
    assert [found[name]["val_dice pairs"] for name in ("left", "right")] == ["3", "2"]
    assert float(found["right"]["val_dice_before mean"]) == pytest.approx(0.75)


def test_structure_that_no_pair_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its name is told apart from the sentence."""
    with caplog.at_level(logging.WARNING, LOGGER):
        evaluate(RegistrationTable(tmp_path, LABELS), PAIRS[2:])
    assert caplog.messages == ["No pair has 'right' in both images: wrong label ids?"]


def test_groups(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        evaluate(RegistrationTable(tmp_path, ["left", "right"], groups={"one": ["right"], "all": LABELS}), PAIRS)
    found = summary(tmp_path)
    assert found["val_dice/one"] == found["val_dice/right"]
    assert found["val_dice/all"] == pytest.approx(found["val_dice/mean"])
    assert found["val_dice/one_lowest30"] == pytest.approx(0.5)
    assert "\none " in caplog.text and "val_dice/one" in rows(tmp_path)[0]


def test_absent_structures_as_zero(tmp_path: Path) -> None:
    evaluate(RegistrationTable(tmp_path, LABELS, absent_as_zero=True), PAIRS)
    assert summary(tmp_path)["val_dice/mean_absent_as_zero"] == pytest.approx(sum([1.0, 0.5, 0.0, 1.0, 0.5, 0.0]) / 6)
    assert summary(tmp_path)["val_dice/mean"] == pytest.approx(1.75 / 3)


@pytest.mark.parametrize("members", [["middle"], []])
def test_unknown_structure_in_a_group(tmp_path: Path, members: list[str]) -> None:
    with pytest.raises(ValueError, match="group 'one' must name some of the structures, got"):
        RegistrationTable(tmp_path, ["left", "right"], groups={"one": members})


def test_intervals(tmp_path: Path) -> None:
    evaluate(RegistrationTable(tmp_path, ["left", "right"], num_resamples=300), PAIRS * 4)
    found = summary(tmp_path)
    values = [float(row["val_dice/mean"]) for row in rows(tmp_path)]
    names = [(row["moving"], row["fixed"]) for row in rows(tmp_path)]
    expected = bootstrap_interval(values, names, num_resamples=300)
    assert (found["val_dice/mean_low95"], found["val_dice/mean_high95"]) == pytest.approx(expected, abs=1e-5)
    assert 0 < found["val_dice/mean_low95"] < found["val_dice/mean"] < found["val_dice/mean_high95"] < 1
    assert found["val_field_error_mm_low95"] < found["val_field_error_mm_high95"]


def test_picture(tmp_path: Path) -> None:
    evaluate(RegistrationTable(tmp_path, ["left", "right"], plot=["val_dice_before", "val_dice"]), PAIRS)
    assert (tmp_path / "structures.png").read_bytes().startswith(b"\x89PNG")


def indexed() -> list[dict[str, torch.Tensor]]:
    return [{**item, "pair_index": i} for i, item in enumerate(PAIRS)]


class KilledError(Exception):
    """In the place of a kill."""


def evaluate_until(output_dir: Path, stop: int | None, settings: Any = None, resume: bool = True) -> list[int]:
    """Evaluate with a journal, stopped in front of a pair; the pairs that were measured."""
    journal = PairJournal(output_dir / "pairs.jsonl", settings, resume)
    seen: list[int] = []

    def load(item: dict[str, Any]) -> dict[str, Any]:
        if item["pair_index"] == stop:
            raise KilledError
        seen.append(item["pair_index"])
        return item

    table = RegistrationTable(output_dir, LABELS, num_resamples=20, journal=journal)
    try:
        evaluate(table, journal.remaining(Dataset(indexed(), load)))
    except Exception:
        assert stop is not None
    return seen


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("torn", [False, True])
def test_goes_on_where_it_was_stopped(tmp_path: Path, stop: int, torn: bool) -> None:
    assert evaluate_until(tmp_path / "whole", None) == [0, 1, 2]
    assert sorted(os.listdir(tmp_path / "whole")) == ["pairs.csv", "structures.csv", "summary.json"]
    assert evaluate_until(tmp_path / "parts", stop) == list(range(stop))
    assert os.listdir(tmp_path / "parts") == ["pairs.jsonl"]
    if torn:
        # cut off while a line was written
        with open(tmp_path / "parts" / "pairs.jsonl", "a") as file:
            file.write('{"pair": 1, "mov')
    assert evaluate_until(tmp_path / "parts", None) == list(range(stop, 3))
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "parts" / "pairs.jsonl").exists()


def test_begins_anew_unless_told_to_resume(tmp_path: Path) -> None:
    evaluate_until(tmp_path, 2)
    assert evaluate_until(tmp_path, None, resume=False) == [0, 1, 2]
    assert summary(tmp_path)["pairs"] == 3


def test_all_measured_but_not_reported(tmp_path: Path) -> None:
    journal = PairJournal(tmp_path / "pairs.jsonl")
    journal.begin()
    journal.append([{"pair": i, "moving": "a", "fixed": "b", "values": {"x": [math.nan, math.inf]}} for i in range(3)])
    again = PairJournal(tmp_path / "pairs.jsonl", resume=True)
    assert len(again.rows) == 3 and math.isnan(again.rows[0]["values"]["x"][0])
    assert again.rows[0]["values"]["x"][1] == math.inf
    # an engine must have something to do
    assert [item["pair_index"] for item in again.remaining(Dataset(indexed()))] == [2]


def test_names_of_other_settings_stay_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"settings": {"a\nb": 1}}) + "\n")
    with pytest.raises(ValueError, match=r"other settings \('a\\nb', c\)"):
        PairJournal(path, {"c": 1}, resume=True)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    settings = {"weights": "1", "steps": [50], "device": "cpu"}
    evaluate_until(tmp_path, 1, settings=settings)
    for other, names in (({"steps": [51]}, "steps"), ({"weights": "2", "seed": 0}, "weights, seed")):
        with pytest.raises(ValueError, match=rf"pairs\.jsonl' was written with other settings \({names}\)"):
            PairJournal(tmp_path / "pairs.jsonl", {**settings, **other}, resume=True)
    assert len(PairJournal(tmp_path / "pairs.jsonl", settings, resume=True).rows) == 1


def test_two_evaluations_in_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    journal = PairJournal(tmp_path / "pairs.jsonl")
    journal.begin()
    code = (
        "import sys\nfrom monai_sacb.handlers import PairJournal\n"
        "try:\n    PairJournal(sys.argv[1], resume=True).begin()\nexcept ValueError as error:\n    sys.exit(str(error))"
    )
    command = [sys.executable, "-c", code, str(journal.path)]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 1 and "another evaluation is writing to" in refused.stderr
    journal.append([{"pair": 0, "moving": "a", "fixed": "b", "values": {"x": [1.0]}}])
    journal.close()
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert len(PairJournal(journal.path, resume=True).rows) == 1
    with pytest.raises(ValueError, match="has not begun"):
        journal.append([])


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs", "my [pairs].of.one.jsonl"])
def test_journals_of_other_processes(tmp_path: Path, name: str) -> None:
    """What two processes have measured, one goes on with."""
    main = tmp_path / name
    for i, path in enumerate((main, main.with_name(f"{main.stem}.1{main.suffix}"))):
        lines = [{"settings": {}}, {"pair": i, "moving": "a", "fixed": "b", "values": {"x": [0.5]}}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal = PairJournal(main, resume=True)
    assert [row["pair"] for row in journal.rows] == [0, 1]
    journal.begin()
    assert os.listdir(tmp_path) == [name]
    journal.remove()
    assert os.listdir(tmp_path) == []


def test_bytes_that_are_no_journal(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not the journal"):
        PairJournal(tmp_path / "pairs.jsonl", resume=True)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "moving,fixed\n",
        "{}\n",
        '{"settings": 0}\n{"pair": "x"}\n',
        "[1]\n",
        '{"settings": {}}\n{"pair": 0, "values": {}}\n',
    ],
)
def test_no_journal(tmp_path: Path, content: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"pairs\.jsonl' is not the journal of an evaluation"):
        PairJournal(tmp_path / "pairs.jsonl", resume=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_names": ["a", "mean"]}, "got 'mean' twice"),
        ({"label_names": ["a", "a"]}, "got 'a' twice"),
        ({"label_names": ["a", "b"], "groups": {"a": ["b"]}}, "got 'a' twice"),
        ({"label_names": ["a"], "num_resamples": -5}, "num_resamples .* got -5"),
        ({"label_names": ["a"], "num_resamples": 1.5}, r"num_resamples .* got 1\.5"),
    ],
)
def test_ill_names_and_numbers(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RegistrationTable(tmp_path, **arguments)
