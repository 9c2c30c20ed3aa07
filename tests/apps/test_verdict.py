# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from typing import Any

import pytest
from registration_folder import good_metrics

from monai_sacb.apps.verdict import VerdictThresholds, check_metrics, judge_registration

NAN = math.nan
# what is changed, the verdict, and a word of the reason
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "good", "0.310 → 0.630"),
    # similarity
    ({"similarity__after": 0.306}, "check", "less alike than the affine"),
    ({"similarity__after": 0.304}, "failed", "less alike than before"),
    ({"similarity__after": 0.41, "similarity__affine": 0.414}, "good", "alike"),
    ({"similarity__after": 0.41, "similarity__affine": 0.416}, "check", "affine alone: 0.416 → 0.410"),
    ({"similarity__after": 0.319, "similarity__affine": 0.31}, "check", "hardly more alike"),
    ({"similarity__after": 0.321, "similarity__affine": 0.31}, "good", "alike"),
    ({"similarity__before": 0.95, "similarity__affine": 0.95, "similarity__after": 0.95}, "good", "alike"),
    ({"similarity__before": 0.02, "similarity__affine": 0.05, "similarity__after": 0.09}, "check", "hardly alike even"),
    ({"similarity__before": 0.02, "similarity__affine": 0.05, "similarity__after": 0.11}, "good", "alike"),
    # folds and spread of volumes, at both sides of both limits
    ({"folds_percent": 0.1}, "good", "within"),
    ({"folds_percent": 0.11}, "check", "folds tissue over itself in 0.11 %"),
    ({"folds_percent": 1.0}, "check", "limit 0.1 %"),
    ({"folds_percent": 1.01}, "failed", "limit 1 %"),
    ({"sdlogj": 0.2}, "good", "within"),
    ({"sdlogj": 0.21}, "check", "unevenly"),
    ({"sdlogj": 0.41}, "failed", "unevenly"),
    # inverse
    ({"inverse_consistency_mm__median": 0.25}, "good", "within"),
    ({"inverse_consistency_mm__median": 0.3}, "check", "misses by 0.3 mm"),
    ({"inverse_consistency_mm__median": 0.3, "voxel_mm": 2.0}, "good", "within"),
    ({"inverse_consistency_mm__median": 0.3, "voxel_mm": 0.2}, "failed", "misses by 0.3 mm"),
    ({"inverse_consistency_mm__median": 1.1}, "failed", "misses by 1.1 mm"),
    ({"inverse_consistency_mm__p95": 1.2}, "check", "95th percentile"),
    ({"inverse_consistency_mm__p95": 3.2}, "failed", "95th percentile"),
    # displacement: 210 mm is the body's size
    ({"displacement_mm__p99": 31.0}, "good", "within"),
    ({"displacement_mm__p99": 32.0}, "check", "32 mm (99th percentile)"),
    ({"displacement_mm__p99": 64.0}, "failed", "64 mm"),
    ({"displacement_mm__max": 52.0}, "good", "within"),
    ({"displacement_mm__max": 53.0}, "check", "53 mm (largest)"),
    ({"displacement_mm__max": 106.0}, "failed", "106 mm (largest)"),
    ({"displacement_mm__max": 53.0, "extent_mm": 400.0}, "good", "within"),
    # overlap
    ({"overlap_percent": 80.0}, "good", "within"),
    ({"overlap_percent": 79.0}, "check", "Only 79 %"),
    ({"overlap_percent": 29.0}, "failed", "Only 29 %"),
    # labels
    ({"dice__after__mean": 0.516}, "good", "within"),
    ({"dice__after__mean": 0.514}, "check", "after the affine alone: Dice 0.520 → 0.514"),
    ({"dice__after__mean": 0.39, "dice__affine__mean": 0.3}, "check", "than before: Dice 0.410 → 0.390"),
    ({"dice__after__mean": 0.359}, "failed", "before the registration: Dice 0.410 → 0.359"),
    ({"dice__after__structures": {"1": 0.31, "2": 0.9}}, "good", "within"),
    ({"dice__after__structures": {"1": 0.29, "2": 0.9}}, "check", "Dice of 1 (0.40 → 0.29)"),
    ({"dice__after__structures": {"1": NAN, "2": 0.9}}, "good", "within"),
    ({"dice__after__mean": NAN, "dice__before__mean": NAN}, "check", "no structure in common"),
    ({"dice__after__mean": None, "dice__before__mean": None}, "check", "no structure in common"),
    ({"dice": None}, "good", "within"),
    # landmarks
    ({"landmarks_mm__after": 4.25}, "good", "within"),
    ({"landmarks_mm__after": 4.35}, "check", "after the affine alone: 4.20 → 4.35 mm"),
    ({"landmarks_mm__after": 9.0}, "check", "affine alone"),
    ({"landmarks_mm__after": 9.2}, "failed", "further apart than before: 8.10 → 9.20 mm"),
    ({"landmarks_mm": None}, "good", "within"),
    # the check by another program
    ({"self_check__max_difference": 1e-3}, "good", "within"),
    ({"self_check__max_difference": 1.1e-3}, "failed", "Another program"),
    # not finite
    ({"similarity__after": NAN}, "failed", "not a finite number"),
    ({"folds_percent": math.inf}, "failed", "not a finite number"),
    ({"displacement_mm__max": NAN}, "failed", "not a finite number"),
    ({"displacement_mm__median": NAN}, "failed", "'displacement_mm.median' is not a finite number"),
    ({"jacobian__min": -math.inf}, "failed", "'jacobian.min' is not a finite number"),
    ({"landmarks_mm__after": NAN}, "failed", "'landmarks_mm.after' is not a finite number"),
    ({"extent_mm": NAN}, "failed", "not a finite number"),
    ({"overlap_percent": NAN}, "failed", "not a finite number"),
    ({"self_check__max_difference": NAN}, "failed", "nan"),
    ({"seconds": {"affine": NAN}}, "good", "within"),
    # missing
    ({"similarity": None}, "check", "was not measured"),
    ({"folds_percent": None}, "check", "Folds was not measured"),
    ({"inverse_consistency_mm": None}, "check", "was not measured"),
    ({"extent_mm": None}, "check", "was not measured"),
    ({"overlap_percent": None}, "check", "was not measured"),
    ({"self_check": None}, "check", "was not measured"),
]


@pytest.mark.parametrize(("changes", "verdict", "words"), CASES)
def test_verdict(changes: dict[str, Any], verdict: str, words: str) -> None:
    found, reasons = judge_registration(good_metrics(**changes))
    assert found == verdict, reasons
    assert any(words in reason for reason in reasons), reasons
    assert all(reason.endswith(".") and reason[0].isupper() for reason in reasons)


def test_verdict_is_the_worst_and_its_reason_comes_first() -> None:
    verdict, reasons = judge_registration(good_metrics(folds_percent=0.5, overlap_percent=10.0, sdlogj=0.3))
    assert verdict == "failed"
    assert "10 %" in reasons[0] and len(reasons) == 3


def test_no_metrics_are_to_be_checked() -> None:
    verdict, reasons = judge_registration({})
    assert verdict == "check" and all("not measured" in reason for reason in reasons)


def test_thresholds_are_replaced_by_name() -> None:
    metrics = good_metrics(folds_percent=0.5)
    assert judge_registration(metrics)[0] == "check"
    assert judge_registration(metrics, {"folds_check": 0.6})[0] == "good"
    assert judge_registration(metrics, {"folds_failed": 0.4})[0] == "failed"
    assert judge_registration(metrics, VerdictThresholds(folds_check=0.6))[0] == "good"
    assert judge_registration({**metrics, "thresholds": {"folds_check": 0.6}})[0] == "good"
    assert judge_registration({**metrics, "thresholds": {"folds_check": 0.6}}, {})[0] == "check"
    folds = next(check for check in check_metrics(metrics, {"folds_check": 0.6}) if check.name == "Folds")
    assert folds.mark == "good" and "0.6 %" in folds.limits and folds.value == "0.5 %"


def test_each_limit_has_an_effect() -> None:
    """Whatever threshold is moved, the table of limits says so."""
    before = [check.limits for check in check_metrics(good_metrics())]
    silent = {"similarity_tolerance"}
    for name, value in vars(VerdictThresholds()).items():
        other = value * (0.99 if name.endswith("check") != name.startswith("overlap") else 1.01)
        after = [check.limits for check in check_metrics(good_metrics(), {name: round(other, 6)})]
        assert (after != before) == (name not in silent), name


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"fold_check": 0.1}, "unknown threshold 'fold_check'"),
        ({"folds_check": -1}, "folds_check must be a finite number from 0, got -1"),
        ({"folds_check": NAN}, "folds_check must be a finite number"),
        ({"folds_check": "0.1"}, "got '0.1'"),
        ({"folds_check": True}, "got True"),
        ({"folds_check": 2.0}, "folds_check must come before folds_failed"),
        ({"overlap_check": 20.0}, "overlap_check must come before overlap_failed"),
    ],
)
def test_ill_thresholds(thresholds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_registration(good_metrics(), thresholds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folds_percent": "few"}, "'folds_percent' must be a number, got 'few'"),
        ({"similarity": 0.5}, "a mapping above 'similarity.before'"),
        ({"overlap_percent": True}, "'overlap_percent' must be a number, got True"),
    ],
)
def test_ill_metrics(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_registration(good_metrics(**changes))


def test_metrics_from_a_file() -> None:
    """NaN goes through JSON as Python writes it."""
    metrics = json.loads(json.dumps(good_metrics(sdlogj=NAN)))
    assert judge_registration(metrics)[0] == "failed"
