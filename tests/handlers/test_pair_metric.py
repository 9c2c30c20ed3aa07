# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.metrics import DiceMetric, MAEMetric

from monai_sacb.engines import PrepareRegistrationBatch
from monai_sacb.handlers import PairMetric
from monai_sacb.metrics import FieldErrorMetric, FoldsMetric
from monai_sacb.transforms import WarpByDDFd

SHAPE = (6, 7, 8)
NAN = float("nan")


class Shift(torch.nn.Module):
    """In the place of a network: one voxel along the first axis, for every pair."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        ddf = torch.zeros(image.shape[0], 3, *image.shape[2:])
        ddf[:, 0] = 1.0
        return ddf


def label(start: int) -> torch.Tensor:
    """A box of label 1 and one of label 2, two voxels thick along the first axis."""
    result = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    result[0, start : start + 2, :3] = 1
    result[0, start : start + 2, 4:] = 2
    return result


def pairs(starts: Sequence[tuple[int | None, int | None]]) -> list[dict[str, torch.Tensor]]:
    """Pairs whose boxes begin there; None for a subject without label map."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for moving, fixed in starts:
        pair = {f"{role}_image": torch.rand(1, *SHAPE, generator=generator) for role in ("moving", "fixed")}
        if moving is not None:
            pair["moving_label"] = label(moving)
        if fixed is not None:
            pair["fixed_label"] = label(fixed)
        result.append(pair)
    return result


def evaluator(
    data: list[dict[str, torch.Tensor]],
    key: dict[str, PairMetric] | None = None,
    additional: dict[str, PairMetric] | None = None,
    batch_size: int = 1,
    handlers: Sequence[Any] = (),
) -> SupervisedEvaluator:
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(data), batch_size=batch_size),
        network=Shift(),
        prepare_batch=PrepareRegistrationBatch(),
        postprocessing=WarpByDDFd("moving_label", "warped_label", mode="nearest", allow_missing_keys=True),
        key_val_metric=key,
        additional_metrics=additional,
        val_handlers=list(handlers),
    )


def dice(keys: Sequence[str] = ("warped_label", "fixed_label"), **kwargs: Any) -> PairMetric:
    return PairMetric(DiceMetric(include_background=False, num_classes=3), keys, **kwargs)


# where the boxes of the moving and the fixed label begin -> Dice of each pair after the shift, before it
STARTS: dict[str, tuple[list[tuple[int | None, int | None]], list[float], list[float]]] = {
    "all labelled": ([(2, 1), (2, 2), (4, 1)], [1.0, 0.5, 0.0], [0.5, 1.0, 0.0]),
    "one without labels": ([(2, 1), (None, None), (2, 2)], [1.0, NAN, 0.5], [0.5, NAN, 1.0]),
    "first without labels": ([(None, None), (2, 2)], [NAN, 0.5], [NAN, 1.0]),
    "half labelled pairs": ([(2, None), (None, 2), (3, 2)], [NAN, NAN, 1.0], [NAN, NAN, 0.5]),
}


@pytest.mark.parametrize(("starts", "after", "before"), STARTS.values(), ids=STARTS)
def test_pairs_with_labels_are_measured(
    starts: list[tuple[int | None, int | None]], after: list[float], before: list[float]
) -> None:
    engine = evaluator(pairs(starts), {"after": dice()}, {"before": dice(("moving_label", "fixed_label"))})
    engine.run()
    for name, values in (("after", after), ("before", before)):
        # one row for each pair, one column for each structure
        expected = torch.tensor(values)[:, None].expand(-1, 2)
        details = engine.state.metric_details[name]
        torch.testing.assert_close(details, expected, atol=1e-6, rtol=0, equal_nan=True)
        assert engine.state.metrics[name] == pytest.approx(expected.nanmean().item(), abs=1e-6)
    assert engine.state.best_metric == engine.state.metrics["after"]


def test_batches_are_measured_pair_by_pair() -> None:
    data = pairs([(2, 1), (2, 2), (4, 1), (3, 2)])
    engines = [evaluator(data, {"after": dice()}, batch_size=size) for size in (1, 2, 4)]
    for engine in engines:
        engine.run()
        assert engine.state.metric_details["after"][:, 0].tolist() == pytest.approx([1.0, 0.5, 0.0, 1.0], abs=1e-6)
        assert engine.state.metrics["after"] == pytest.approx(2.5 / 4, abs=1e-6)


def test_metric_that_nothing_is_known_of_does_not_appear() -> None:
    labelled = pairs([(2, 1), (2, 2)])
    additional = {
        "error": PairMetric(FieldErrorMetric(), ["pred", "true_ddf"]),
        "before": dice(("moving_label", "absent_label")),
        "folds": PairMetric(FoldsMetric(), ["pred"]),
    }
    engine = evaluator(labelled, {"after": dice()}, additional)
    engine.run()
    assert set(engine.state.metrics) == {"after", "folds"}
    assert engine.state.metrics["folds"] == 0.0
    assert set(engine.state.metric_details) == {"after", "folds"}


def test_metric_of_one_entry_and_metric_with_meta_data() -> None:
    data = pairs([(None, None), (None, None)])
    for number, pair in enumerate(data):
        true = torch.zeros(3, *SHAPE)
        true[0] = 1.0
        true[1] = float(number)
        # voxels of 3 mm along the second axis
        affine = torch.diag(torch.tensor([1.0, 3.0, 1.0, 1.0], dtype=torch.float64))
        pair["true_ddf"] = MetaTensor(true, affine=affine)
    metrics = {
        "error": PairMetric(FieldErrorMetric(), ["pred", "true_ddf"]),
        "before": PairMetric(FieldErrorMetric(identity=True), ("pred", "true_ddf")),
    }
    engine = evaluator(data, {"folds": PairMetric(FoldsMetric(), ["pred"])}, metrics)
    engine.run()
    assert engine.state.metric_details["error"].flatten().tolist() == pytest.approx([0.0, 3.0])
    assert engine.state.metrics["error"] == pytest.approx(1.5)
    assert engine.state.metrics["before"] == pytest.approx((1 + 10**0.5) / 2)


@pytest.mark.parametrize("keys", [("warped_label", "fixed_label"), ("absent",)], ids=" and ".join)
def test_key_metric_that_cannot_be_computed(keys: tuple[str, ...]) -> None:
    metric = dice(keys) if len(keys) == 2 else PairMetric(FoldsMetric(), keys)
    engine = evaluator(pairs([(None, 1), (None, None)]), {"val_dice": metric})
    with pytest.raises(ValueError, match=rf"key metric 'val_dice' cannot be computed: .* has {' and '.join(keys)}\."):
        engine.run()


@pytest.mark.parametrize("runs", [1, 2])
def test_fallback_decides_where_the_key_metric_cannot(caplog: pytest.LogCaptureFixture, runs: int) -> None:
    metric = dice(fallback="difference")
    additional = {"difference": PairMetric(MAEMetric(), ["moving_image", "fixed_image"])}
    data = pairs([(None, 1), (2, None)])
    engine = evaluator(data, {"after": metric}, additional)
    with caplog.at_level(logging.WARNING, "monai_sacb.handlers.pair_metric"):
        for epoch in range(runs):
            engine.run(epoch + 1)
    assert set(engine.state.metrics) == {"difference"}
    assert engine.state.key_metric_name == "difference"
    expected = sum((pair["moving_image"] - pair["fixed_image"]).abs().mean().item() for pair in data) / 2
    assert engine.state.best_metric == engine.state.metrics["difference"] == pytest.approx(expected, abs=1e-6)
    assert engine.state.best_metric_epoch == 1
    # said once
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("monai_sacb")]
    assert len(messages) == 1
    assert "warped_label and fixed_label" in messages[0] and "'difference'" in messages[0]


def test_fallback_is_not_needed_where_there_is_something_to_measure(caplog: pytest.LogCaptureFixture) -> None:
    additional = {"difference": PairMetric(MAEMetric(), ["moving_image", "fixed_image"])}
    engine = evaluator(pairs([(None, None), (2, 1)]), {"after": dice(fallback="difference")}, additional)
    with caplog.at_level(logging.WARNING, "monai_sacb.handlers.pair_metric"):
        engine.run()
    assert engine.state.key_metric_name == "after"
    assert engine.state.best_metric == engine.state.metrics["after"] == pytest.approx(1.0, abs=1e-6)
    assert not [record for record in caplog.records if record.name.startswith("monai_sacb")]


def test_every_evaluation_starts_anew() -> None:
    data = pairs([(2, 1), (2, 2)])
    metric = dice()
    engine = evaluator(data, {"after": metric})
    engine.run()
    assert engine.state.metrics["after"] == pytest.approx(0.75, abs=1e-6)
    data[0]["moving_label"] = label(4)
    engine.run()
    assert engine.state.metrics["after"] == pytest.approx(0.25, abs=1e-6)
    assert engine.state.metric_details["after"].shape == (2, 2)
    # ... also where there is nothing to measure any more
    for pair in data:
        del pair["moving_label"]
    with pytest.raises(ValueError, match="cannot be computed"):
        engine.run()


def test_results_of_an_earlier_evaluation_are_gone() -> None:
    data = pairs([(2, 1), (2, 2)])
    engine = evaluator(data, {"folds": PairMetric(FoldsMetric(), ["pred"])}, {"after": dice()})
    engine.run()
    assert engine.state.metrics["after"] == pytest.approx(0.75, abs=1e-6)
    for pair in data:
        del pair["fixed_label"]
    engine.run()
    # or they would be taken for those of these pairs
    assert "after" not in engine.state.metrics
    assert "after" not in engine.state.metric_details


@pytest.mark.parametrize("save_details", [True, False])
def test_details_are_kept_on_demand(save_details: bool) -> None:
    engine = evaluator(pairs([(2, 1)]), {"after": dice(save_details=save_details)})
    engine.run()
    assert ("after" in engine.state.metric_details) == save_details
    assert engine.state.metrics["after"] == pytest.approx(1.0, abs=1e-6)


def test_results_come_before_entries_of_the_batch() -> None:
    # postprocessing may replace what the batch had
    data = pairs([(2, 1)])
    data[0]["warped_label"] = torch.zeros_like(data[0]["moving_label"])
    engine = evaluator(data, {"after": dice()})
    engine.run()
    assert engine.state.metrics["after"] == pytest.approx(1.0, abs=1e-6)


def test_one_value_for_each_pair() -> None:
    data = pairs([(1, 1), (2, 2), (3, 3)])
    engine = evaluator(data, {"mae": PairMetric(MAEMetric(), ["moving_image", "fixed_image"])}, batch_size=2)
    engine.run()
    expected = [(pair["moving_image"] - pair["fixed_image"]).abs().mean().item() for pair in data]
    assert engine.state.metric_details["mae"].flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "keys", ["pred", "", [], (), ["a", "b", "c"]], ids=["string", "empty string", "empty list", "empty tuple", "three"]
)
def test_ill_formed(keys: Any) -> None:
    with pytest.raises(ValueError) as caught:
        PairMetric(FoldsMetric(), keys)
    assert f"got {keys!r}" in str(caught.value)
