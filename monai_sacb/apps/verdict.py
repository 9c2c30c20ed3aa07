# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a registration can be trusted, from its measurements, by limits that are written down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

__all__ = ["MetricCheck", "VerdictThresholds", "check_metrics", "judge_registration"]

# from the best to the worst
VERDICTS = ("good", "check", "failed")
# smaller numbers are rounding
LEAST = 0.001
# not looked at for NaN: what has a check of its own, and what says nothing about the result
NOT_SWEPT = (
    "similarity",
    "dice",
    "folds_percent",
    "sdlogj",
    "extent_mm",
    "voxel_mm",
    "overlap_percent",
    "self_check",
    "inverse_consistency_mm.median",
    "inverse_consistency_mm.p95",
    "displacement_mm.p99",
    "displacement_mm.max",
    "seconds",
    "peak_memory_mb",
    "thresholds",
)


@dataclass(frozen=True)
class VerdictThresholds:
    """
    Limits of the verdict. Where there are two, a value beyond ``*_check`` should be looked at, one beyond ``*_failed``
    cannot be used.

    Raises:
        ValueError: When a limit is not a finite number from 0, or a pair is in the wrong order.
    """

    # local NCC changes by less when nothing but the sampling changes; more of a loss is a loss
    similarity_tolerance: float = 0.005
    # a deformation that gains less did nothing, unless there was nothing to do
    similarity_gain: float = 0.01
    # images as alike as this have nothing to gain
    similarity_high: float = 0.9
    # unrelated textures come to about 0.05 to 0.1 in small windows: no more than chance
    similarity_low: float = 0.1
    # percent of voxels; 0.1 is what careful methods keep to, with 1 a structure is torn
    folds_check: float = 0.1
    folds_failed: float = 1.0
    # no unit, of log(3 + Jacobian): anatomy gives 0.05 to 0.15, and 0.4 is every fourth volume gone or tripled
    sdlogj_check: float = 0.2
    sdlogj_failed: float = 0.4
    # voxels: at its own voxels the inverse is exact, between them as good as linear interpolation of what it undoes
    inverse_median_check: float = 0.25
    inverse_median_failed: float = 1.0
    inverse_p95_check: float = 1.0
    inverse_p95_failed: float = 3.0
    # of the diagonal of the body: after an affine, organs move by up to a tenth of it (breathing lungs)
    displacement_p99_check: float = 0.15
    displacement_p99_failed: float = 0.30
    # a few voxels may go further, at the border and in the air
    displacement_max_check: float = 0.25
    displacement_max_failed: float = 0.50
    # percent; images that show different parts of a body leave some out, but most of it must have a partner
    overlap_check: float = 80.0
    overlap_failed: float = 30.0
    # Dice, on average over the structures; less is rounding of borders
    dice_drop_check: float = 0.005
    dice_drop_failed: float = 0.05
    # Dice of one structure: small ones change by chance
    structure_drop_check: float = 0.10
    # millimetres, on average over the landmarks; less than a landmark can be set to
    landmarks_rise_check: float = 0.1
    landmarks_rise_failed: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"threshold {field.name} must be a finite number from 0, got {value!r}.")
        for field in fields(self):
            name = field.name.removesuffix("_failed")
            if name == field.name:
                continue
            check, failed = getattr(self, f"{name}_check"), getattr(self, field.name)
            # of the overlap, less is worse
            if check > failed if name != "overlap" else check < failed:
                raise ValueError(f"threshold {name}_check must come before {field.name}, got {check} and {failed}.")

    @classmethod
    def of(cls, thresholds: VerdictThresholds | Mapping[str, float] | None) -> VerdictThresholds:
        """Thresholds as they are, the defaults with some replaced by name, or the defaults for None."""
        if isinstance(thresholds, VerdictThresholds):
            return thresholds
        if not isinstance(thresholds, Mapping | None):
            raise ValueError(f"thresholds must be limits by their names, got {thresholds!r}.")
        given = dict(thresholds or {})
        known = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"unknown threshold '{unknown[0]}'; there is: {', '.join(known)}.")
        return cls(**given)


class MetricCheck(NamedTuple):
    """
    One measurement beside its limits.

    Args:
        name: what has been measured, in words.
        value: the number with its unit, in words.
        limits: what is asked of it, in words; empty where it is not judged.
        mark: ``"good"``, ``"check"``, ``"failed"``; empty where it is not judged.
        reason: a sentence on what is wrong; empty if nothing is.
    """

    name: str
    value: str
    limits: str = ""
    mark: str = ""
    reason: str = ""


def _get(metrics: Mapping[str, Any], path: str) -> float | None:
    """The number at a path such as ``"similarity.after"``, None where there is none."""
    value: Any = metrics
    for key in path.split("."):
        if not isinstance(value, Mapping):
            raise ValueError(f"metrics must hold a mapping above '{path}', got {value!r}.")
        value = value.get(key)
        if value is None:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"metrics '{path}' must be a number, got {value!r}.")
    return float(value)


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """All numbers with their paths, except those that have a check of their own or need not be finite."""
    if path in NOT_SWEPT:
        return
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _numbers(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def _missing(name: str) -> MetricCheck:
    return MetricCheck(name, "not measured", "must be measured", "check", f"{name} was not measured.")


def _graded(
    name: str, value: float | None, unit: str, check: float, failed: float, says: str, digits: int = 3
) -> MetricCheck:
    """A number of which more is worse, by two limits. ``says`` is a sentence with ``{value}`` and ``{limit}``."""
    if value is None:
        return _missing(name)
    text = f"{value:.{digits}g}{unit}" if not 0 < value < LEAST else f"below {LEAST:g}{unit}"
    limits = f"at most {check:g}{unit}; failed above {failed:g}{unit}"
    if not math.isfinite(value):
        return MetricCheck(name, text, limits, "failed", f"{name} is not a finite number ({value}).")
    if value <= check:
        return MetricCheck(name, text, limits, "good")
    limit, mark = (failed, "failed") if value > failed else (check, "check")
    return MetricCheck(name, text, limits, mark, says.format(value=text, limit=f"{limit:g}{unit}"))


def _course(before: float | None, affine: float | None, after: float | None, form: str) -> str:
    """The values before, after the affine stage and at the end."""
    return " → ".join("?" if value is None else format(value, form) for value in (before, affine, after))


def _similarity(metrics: Mapping[str, Any], limits: VerdictThresholds) -> MetricCheck:
    before, affine, after = (_get(metrics, f"similarity.{key}") for key in ("before", "affine", "after"))
    measure = metrics.get("similarity", {}).get("measure", "") if before is not None else ""
    name = "Similarity of the images"
    if before is None or affine is None or after is None:
        return _missing(name)
    value = _course(before, affine, after, ".3f") + (f" ({measure})" if measure else "")
    asked = (
        f"must not fall below before; rises by {limits.similarity_gain:g} or is {limits.similarity_high:g} already; "
        f"at least {limits.similarity_low:g}"
    )
    mark, reason = "check", ""
    if not all(math.isfinite(x) for x in (before, affine, after)):
        mark, reason = "failed", f"{name} is not a finite number ({value})."
    elif after < before - limits.similarity_tolerance:
        mark = "failed"
        reason = f"The images are less alike than before the registration: similarity {before:.3f} → {after:.3f}."
    elif after < affine - limits.similarity_tolerance:
        reason = f"The deformation made the images less alike than the affine alone: {affine:.3f} → {after:.3f}."
    elif after < limits.similarity_low:
        reason = f"The images are hardly alike even after the registration: similarity {after:.3f}."
    elif after < before + limits.similarity_gain and after < limits.similarity_high:
        reason = f"The images are hardly more alike than before: similarity {before:.3f} → {after:.3f}."
    return MetricCheck(name, value, asked, mark if reason else "good", reason)


def _dice(metrics: Mapping[str, Any], limits: VerdictThresholds) -> list[MetricCheck]:
    if metrics.get("dice") is None:
        return []
    before, affine, after = (_get(metrics, f"dice.{key}.mean") for key in ("before", "affine", "after"))
    name = "Dice, mean of the structures"
    value = _course(before, affine, after, ".3f")
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        reason = "The label maps have no structure in common, so they say nothing about the registration."
        return [MetricCheck(name, value, "structures in common", "check", reason)]
    start = before if affine is None or not math.isfinite(affine) else max(before, affine)
    asked = f"falls by at most {limits.dice_drop_check:g}; failed if {limits.dice_drop_failed:g} lower than before"
    mark, reason = "good", ""
    if after < before - limits.dice_drop_failed:
        mark, reason = "failed", f"The labels fit worse than before the registration: Dice {before:.3f} → {after:.3f}."
    elif after < start - limits.dice_drop_check:
        stage = "before" if start == before else "after the affine alone"
        mark, reason = "check", f"The labels fit worse than {stage}: Dice {start:.3f} → {after:.3f}."
    checks = [MetricCheck(name, value, asked, mark, reason)]
    structures = {key: metrics["dice"][key].get("structures") or {} for key in ("before", "after")}
    worse = {}
    for structure, first in structures["before"].items():
        last = structures["after"].get(structure)
        if last is not None and first - last > limits.structure_drop_check:
            worse[str(structure)] = (first, last)
    if structures["before"]:
        names = sorted(worse, key=lambda key: worse[key][1] - worse[key][0])
        listed = ", ".join(f"{key} ({worse[key][0]:.2f} → {worse[key][1]:.2f})" for key in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        checks.append(
            MetricCheck(
                "Structures that fit clearly worse",
                f"{len(worse)} of {len(structures['before'])}",
                f"none falls by more than {limits.structure_drop_check:g}",
                "check" if worse else "good",
                f"Structures fit worse than before: Dice of {listed}{more}." if worse else "",
            )
        )
    return checks


def _landmarks(metrics: Mapping[str, Any], limits: VerdictThresholds) -> list[MetricCheck]:
    if metrics.get("landmarks_mm") is None:
        return []
    before, affine, after = (_get(metrics, f"landmarks_mm.{key}") for key in ("before", "affine", "after"))
    name = "Distance of the landmarks, mean"
    if before is None or after is None:
        return [_missing(name)]
    value = _course(before, affine, after, ".2f") + " mm"
    asked = (
        f"must not rise by more than {limits.landmarks_rise_check:g} mm; failed if {limits.landmarks_rise_failed:g} mm "
        "more than before"
    )
    start = before if affine is None else min(before, affine)
    mark, reason = "good", ""
    # what is not finite is found with all other numbers
    if after > before + limits.landmarks_rise_failed:
        mark, reason = "failed", f"The landmarks are further apart than before: {before:.2f} → {after:.2f} mm."
    elif after > start + limits.landmarks_rise_check:
        stage = "before" if start == before else "after the affine alone"
        mark, reason = "check", f"The landmarks are further apart than {stage}: {start:.2f} → {after:.2f} mm."
    return [MetricCheck(name, value, asked, mark, reason)]


def _displacement(metrics: Mapping[str, Any], limits: VerdictThresholds) -> Iterator[MetricCheck]:
    extent = _get(metrics, "extent_mm")
    for key, words in (("p99", "99th percentile"), ("max", "largest")):
        value = _get(metrics, f"displacement_mm.{key}")
        name = f"Displacement after the affine, {words}"
        if value is None or extent is None or extent == 0:
            yield _missing(name)
            continue
        check, failed = (100 * getattr(limits, f"displacement_{key}_{level}") for level in ("check", "failed"))
        says = f"Tissue is displaced implausibly far: {value:.3g} mm ({words}) is {{value}} the body's size."
        row = _graded(name, 100 * value / extent, " % of", check, failed, says)
        yield row._replace(
            value=f"{value:.3g} mm, {row.value} the body's {extent:.0f} mm",
            limits=f"at most {check:g} % of the body's diagonal; failed above {failed:g} %",
        )


def _overlap(metrics: Mapping[str, Any], limits: VerdictThresholds) -> MetricCheck:
    value, name = _get(metrics, "overlap_percent"), "Overlap"
    if value is None:
        return _missing(name)
    asked = f"at least {limits.overlap_check:g} %; failed below {limits.overlap_failed:g} %"
    mark, reason = "good", ""
    if not math.isfinite(value):
        mark, reason = "failed", f"{name} is not a finite number ({value})."
    elif value < limits.overlap_check:
        mark = "failed" if value < limits.overlap_failed else "check"
        reason = f"Only {value:.3g} % of the fixed body has a partner inside the moving image."
    return MetricCheck(name, f"{value:.3g} % of the fixed body", asked, mark, reason)


def _self_check(metrics: Mapping[str, Any]) -> MetricCheck:
    value, tolerance = (_get(metrics, f"self_check.{key}") for key in ("max_difference", "tolerance"))
    name = "Written transform against the warped image"
    if value is None or tolerance is None:
        return _missing(name)
    text, asked = f"{value:.2g} of the intensity range", f"at most {tolerance:g}"
    if value <= tolerance:
        return MetricCheck(name, text, asked, "good")
    reason = f"Another program's resampling through the written transform differs from the warped image: {text}."
    return MetricCheck(name, text, asked, "failed", reason)


def check_metrics(
    metrics: Mapping[str, Any], thresholds: VerdictThresholds | Mapping[str, float] | None = None
) -> list[MetricCheck]:
    """
    Lay the measurements of a registration beside their limits.

    Args:
        metrics: content of a ``metrics.json``: lengths in millimetres, shares in percent.
        thresholds: all limits, or some by name in place of the defaults; by default those that ``metrics`` holds as
            ``"thresholds"``, if any.

    Returns:
        one entry for each measurement. One that is missing is to be checked; Dice and landmarks may be left out.

    Raises:
        ValueError: When a limit is unknown or out of its range, or a measurement is no number.
    """
    limits = VerdictThresholds.of(metrics.get("thresholds") if thresholds is None else thresholds)
    checks = [_similarity(metrics, limits), *_dice(metrics, limits), *_landmarks(metrics, limits)]
    checks += [
        _graded(
            "Folds",
            _get(metrics, "folds_percent"),
            " %",
            limits.folds_check,
            limits.folds_failed,
            "The mapping folds tissue over itself in {value} of the voxels (limit {limit}).",
        ),
        _graded(
            "Spread of local volume change",
            _get(metrics, "sdlogj"),
            "",
            limits.sdlogj_check,
            limits.sdlogj_failed,
            "Local volumes change implausibly unevenly: spread of the log Jacobian {value} (limit {limit}).",
        ),
    ]
    # a metrics.json of another source may not say how large voxels are
    voxel = _get(metrics, "voxel_mm") or 1.0
    for key, words in (("median", "median"), ("p95", "95th percentile")):
        checks.append(
            _graded(
                f"Error of the inverse, {words}",
                _get(metrics, f"inverse_consistency_mm.{key}"),
                " mm",
                getattr(limits, f"inverse_{key}_check") * voxel,
                getattr(limits, f"inverse_{key}_failed") * voxel,
                f"There and back again misses by {{value}} ({words}, limit {{limit}}): do not rely on the inverse.",
            )
        )
    checks += [*_displacement(metrics, limits), _overlap(metrics, limits), _self_check(metrics)]
    for path, value in _numbers(metrics):
        if not math.isfinite(value):
            reason = f"The measurement '{path}' is not a finite number ({value})."
            checks.append(MetricCheck(f"Measurement '{path}'", str(value), "a finite number", "failed", reason))
    return checks


def judge_registration(
    metrics: Mapping[str, Any], thresholds: VerdictThresholds | Mapping[str, float] | None = None
) -> tuple[str, list[str]]:
    """
    Judge a registration by its measurements.

    Args:
        metrics: as for :py:func:`check_metrics`.
        thresholds: as for :py:func:`check_metrics`.

    Returns:
        the verdict, ``"good"``, ``"check"`` or ``"failed"``, and the reasons as sentences, the weightiest first.

    Raises:
        ValueError: When a limit is unknown or out of its range, or a measurement is no number.
    """
    checks = check_metrics(metrics, thresholds)
    verdict = max((check.mark for check in checks), key=VERDICTS.index)
    if verdict == "good":
        before, after = (_get(metrics, f"similarity.{key}") or 0.0 for key in ("before", "after"))
        words = "have become more alike" if after > before else "are alike as they were"
        return verdict, [
            f"The images {words}: similarity {before:.3f} → {after:.3f}.",
            f"All {len(checks)} checks are within their limits.",
        ]
    marked = [check for check in checks if check.reason]
    return verdict, [check.reason for check in sorted(marked, key=lambda check: -VERDICTS.index(check.mark))]
