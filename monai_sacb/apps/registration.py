# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Registering two image files as they come."""

from __future__ import annotations

import logging
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import itk
import torch
from tqdm import tqdm

from monai_sacb.apps.memory import check_memory, expected_memory_mb
from monai_sacb.apps.pair_metrics import compare_labels, compare_points, field_metrics, local_similarity
from monai_sacb.apps.pair_outputs import Outputs, check_by_itk, output_folder, write_outputs
from monai_sacb.apps.pair_reading import PairFiles, Subject, read_affine, read_pair
from monai_sacb.apps.verdict import VerdictThresholds, check_metrics, judge_registration
from monai_sacb.apps.working_pair import WorkingPair, pair_grid
from monai_sacb.data.disk_cache import file_hashing
from monai_sacb.data.spatial_mapping import Grid, SpatialMapping
from monai_sacb.networks import find_model
from monai_sacb.networks.layers import warp
from monai_sacb.networks.pretrained import RegistrationModel
from monai_sacb.utils import first_line, peak_memory_mb, settings_digest, write_json
from monai_sacb.version import __version__
from monai_sacb.visualize.report import write_report

__all__ = ["RegistrationOptions", "RegistrationResult", "register_files", "request_digest"]

logger = logging.getLogger(__name__)

STAGES = ("reading", "affine", "network", "refinement", "fine refinement", "inverse", "writing", "checking", "report")


@dataclass(frozen=True)
class RegistrationOptions:
    """How to register; see :py:func:`monai_sacb.apps.register`."""

    model: str = "none"
    affine: str = "true"
    refine: int | None = None
    fine: int | None = None
    fill: float | None = None
    keep_dtype: bool = False
    seed: int = 0
    num_threads: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name, steps in (("refine", self.refine), ("fine", self.fine)):
            if steps is not None and steps < 0:
                raise ValueError(f"{name} must be at least 0, got {steps}.")
        if self.fill is not None and not math.isfinite(self.fill):
            raise ValueError(f"fill must be finite, got {self.fill}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 0 to {2**31 - 1}, got {self.seed}.")
        if self.num_threads is not None and not 1 <= self.num_threads <= 256:
            raise ValueError(f"num_threads must be from 1 to 256, got {self.num_threads}.")
        if not self.affine:
            raise ValueError("affine must be true, false or the file of a transform, got ''.")

    @property
    def affine_source(self) -> str:
        """``"estimated"``, ``"aligned"`` or ``"given"``."""
        return {"true": "estimated", "false": "aligned"}.get(self.affine.lower(), "given")


@dataclass(frozen=True)
class RegistrationResult:
    """
    What came of one pair.

    Args:
        output_dir: folder of the files.
        verdict: ``"good"``, ``"check"`` or ``"failed"``.
        reasons: why, in sentences.
        metrics: content of ``metrics.json``, and the seconds of the report, which is written after it.
        files: paths by what they are.
        mapping: from the fixed image's space to the moving image's, RAS millimetres.
        inverse: from the moving image's space to the fixed image's.
    """

    output_dir: str
    verdict: str
    reasons: list[str]
    metrics: dict[str, Any]
    files: dict[str, str]
    mapping: SpatialMapping
    inverse: SpatialMapping


class _Clock:
    """Seconds of the stages, shown as a bar."""

    def __init__(self, name: str) -> None:
        self.seconds: dict[str, float] = {}
        # on a terminal only
        hidden = True if sys.stderr is None else None
        self.bar = tqdm(total=len(STAGES), desc=name, disable=hidden, bar_format="{desc} |{bar}| {postfix} {elapsed}")

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.bar.set_postfix_str(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        logger.info(f"{name}: {self.seconds[name]:.1f} s")
        self.bar.update()


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before, itk_before = torch.get_num_threads(), itk.MultiThreaderBase.GetGlobalDefaultNumberOfThreads()
    if number is not None:
        torch.set_num_threads(number)
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(itk_before)


class Setting:
    """
    A model with everything its bundle says about how to use it, checked before any work.

    Args:
        options: how to register.

    Raises:
        FileNotFoundError: When there is no such model.
        ValueError: When the device cannot be used, or a number in the configs is out of its range.
    """

    def __init__(self, options: RegistrationOptions) -> None:
        self.model: RegistrationModel = find_model(options.model)
        try:
            self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device '{options.device}' cannot be used: {first_line(error)}.") from error
        # the refinement is a stage of its own here
        self.parser = self.model.parser(device=self.device, refine=0)
        self.parser["affine_stage#seed"] = options.seed
        default = self.parser["refine_alone" if self.model.weights is None else "refine_after_network"]
        self.refine = int(default) if options.refine is None else options.refine
        # who wants no refinement wants none on the finer grid
        default = self.parser["fine_steps"] if self.refine > 0 else 0
        self.fine = int(default) if options.fine is None else options.fine
        self.thresholds = VerdictThresholds.of(self.parser["thresholds"])
        self.tolerance = float(self.parser["self_check_tolerance"])
        self.network = self.model.network(self.parser)

    def get(self, name: str) -> Any:
        """A component of the configs; made once."""
        return self.parser.get_parsed_content(name)


def _affine_stage(setting: Setting, options: RegistrationOptions, moving: Subject, fixed: Subject) -> torch.Tensor:
    if options.affine_source == "aligned":
        return torch.eye(4, dtype=torch.float64)
    estimate = setting.get("affine_stage")
    affine: torch.Tensor = estimate(moving.image, fixed.image, moving_mask=moving.mask, fixed_mask=fixed.mask)
    return affine


def _find_ddf(setting: Setting, pair: WorkingPair, clock: _Clock) -> tuple[WorkingPair, torch.Tensor]:
    """The pair on the finest grid that it was compared on, and the DDF ``(3, *grid)`` in voxels of that grid."""
    with clock.stage("network"):
        inferer = setting.get("inferer") if setting.network is not None else None
        ddf = pair.network_ddf(setting.network, inferer, setting.device)
    with clock.stage("refinement"):
        if setting.refine > 0:
            ddf = pair.refined_ddf(ddf, setting.get("refinement"), setting.refine)
    with clock.stage("fine refinement"):
        pair, ddf = pair.refined_on_finer_grid(
            ddf, setting.get("fine_refinement"), setting.fine, setting.get("fine_grid")
        )
    return pair, ddf.float().cpu()


def _numbers(pair: WorkingPair, ddf: torch.Tensor, outputs: Outputs, moving: Subject, fixed: Subject) -> dict[str, Any]:
    identity = torch.eye(4, dtype=torch.float64)
    stages = {"before": SpatialMapping(), "affine": SpatialMapping([pair.affine]), "after": outputs.mapping}
    warped = warp(pair.moving[None], ddf[None])[0]
    metrics: dict[str, Any] = {
        "similarity": {
            "measure": "local NCC",
            "before": local_similarity(pair.moved(identity), pair.fixed, pair.foreground),
            "affine": local_similarity(pair.moving, pair.fixed, pair.foreground),
            "after": local_similarity(warped, pair.fixed, pair.foreground),
        }
    }
    if moving.label is not None and fixed.label is not None:
        metrics["dice"] = compare_labels(moving.label, fixed.label, stages)
    if moving.points is not None and fixed.points is not None:
        metrics["landmarks_mm"] = compare_points(moving.points.positions, fixed.points.positions, stages)
    return {**metrics, **field_metrics(outputs)}


def request_digest(files: PairFiles, options: RegistrationOptions, setting: Setting) -> str:
    """
    Hash of whatever decides the result of a registration: the files, their sizes and times, the options, the model.

    Args:
        files: what belongs to the pair.
        options: how to register. Threads and device do not count.
        setting: the model.
    """
    given = {**asdict(files), "affine": options.affine if options.affine_source == "given" else None}
    paths = {name: os.path.abspath(path) for name, path in given.items() if path is not None}
    stages = ("affine_stage", "inferer", "working_grid", "refinement", "fine_grid", "fine_refinement")
    # the card of a model may set its network up in another way for the same weights
    parts = [setting.network, *(setting.get(name) for name in ("scale_intensity", *stages))]
    choices = (options.affine_source, options.fill, options.keep_dtype, options.seed, setting.refine, setting.fine)
    numbers = (setting.model.sha256, setting.tolerance, asdict(setting.thresholds), version("monai-sacb"))
    return settings_digest(file_hashing(paths), choices, numbers, parts)


def _described(grid: Grid) -> str:
    return f"{grid.shape} voxels of {tuple(round(s, 3) for s in grid.spacing)} mm"


def _sidecar(
    files: PairFiles,
    options: RegistrationOptions,
    setting: Setting,
    pair: WorkingPair,
    grids: Mapping[str, Grid],
    written: Mapping[str, str],
    request: str,
) -> dict[str, Any]:
    def absolute(path: str | None) -> str | None:
        return None if path is None else str(Path(path).resolve())

    def described(subject: Subject) -> dict[str, Any]:
        return {"path": subject.path, "shape": list(subject.grid.shape), "affine": subject.grid.affine.tolist()}

    model = setting.model
    versions = {name: version(name) for name in ("monai", "torch", "itk", "numpy")}
    return {
        "format": 1,
        "direction": "pull-back: fixed to moving",
        "units": "mm",
        "frame": "LPS",
        "fixed": described(pair.fixed_subject),
        "moving": described(pair.moving_subject),
        **{key: absolute(getattr(files, key)) for key in files.__dataclass_fields__ if key not in ("fixed", "moving")},
        "stages": ["displacement", "affine"],
        "affine": pair.affine.tolist(),
        "affine_frame": "RAS",
        "affine_source": options.affine_source,
        "model": None if model.weights is None else {"name": model.name, "sha256": model.sha256},
        "refine": setting.refine,
        "fine": setting.fine,
        "seed": options.seed,
        "device": str(setting.device),
        **{
            name: {"shape": list(grid.shape), "affine": grid.affine.tolist(), "spacing": list(grid.spacing)}
            for name, grid in grids.items()
        },
        "files": dict(written),
        "versions": {"monai_sacb": __version__, **versions, "python": platform.python_version()},
        "request_sha256": request,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _check_memory(setting: Setting, moving: Subject, fixed: Subject) -> None:
    """Refuse images that are too large for this machine, working grids being at most as large as they may be."""
    native = math.prod(moving.grid.shape) + math.prod(fixed.grid.shape)
    working, fine = (min(native, setting.get(name).get("max_voxels", native)) for name in ("working_grid", "fine_grid"))
    network = setting.model.weights is not None
    if setting.fine == 0:
        fine = 0
    check_memory(expected_memory_mb(setting.get("costs"), native, working, network, setting.refine, fine))


def register_files(
    files: PairFiles, output_dir: str | os.PathLike[str], options: RegistrationOptions, setting: Setting | None = None
) -> RegistrationResult:
    """
    Register one pair of files; see :py:func:`monai_sacb.apps.register`.

    Args:
        files: what belongs to the pair.
        output_dir: where the results go.
        options: how to register.
        setting: the model, where it is at hand already.
    """
    setting = Setting(options) if setting is None else setting
    target, inputs = Path(output_dir), [*files.paths, options.affine]
    # of the files as they are read
    request = request_digest(files, options, setting)
    with _Clock(target.name) as clock, output_folder(target, inputs) as folder, _threads(options.num_threads):
        with clock.stage("reading"):
            given = read_affine(options.affine) if options.affine_source == "given" else None
            moving, fixed = read_pair(files, given)
            _check_memory(setting, moving, fixed)
        with clock.stage("affine"):
            affine = _affine_stage(setting, options, moving, fixed) if given is None else given
            grid = pair_grid(moving, fixed, affine, setting.get("working_grid"))
            pair = WorkingPair(moving, fixed, affine, setting.get("scale_intensity"), grid)
        logger.info(f"working grid: {_described(grid)}")
        pair, ddf = _find_ddf(setting, pair, clock)
        # the second grid, where there was one
        grids = {"working_grid": grid, **({} if pair.grid is grid else {"fine_grid": pair.grid})}
        with clock.stage("inverse"):
            outputs = Outputs(moving, fixed, pair.displacement(ddf), affine)
        with clock.stage("writing"):
            written = write_outputs(outputs, folder, options.fill, options.keep_dtype)
        with clock.stage("checking"):
            metrics = _numbers(pair, ddf, outputs, moving, fixed)
            background = moving.background if options.fill is None else options.fill
            metrics["self_check"] = check_by_itk(outputs, folder, background, setting.tolerance)
            verdict, reasons = judge_registration(metrics, setting.thresholds)
        written |= {"transform_json": "transform.json", "metrics": "metrics.json", "report": "report.html"}
        write_json(_sidecar(files, options, setting, pair, grids, written, request), folder / "transform.json")
        metrics = {"verdict": verdict, "reasons": reasons, **metrics}
        metrics |= {
            "thresholds": asdict(setting.thresholds),
            "seconds": clock.seconds,
            "peak_memory_mb": round(peak_memory_mb(), 1),
        }
        write_json(metrics, folder / "metrics.json")
        with clock.stage("report"):
            write_report(folder, check_metrics(metrics, setting.thresholds))
    return RegistrationResult(
        str(target),
        verdict,
        reasons,
        metrics,
        {key: str(target / name) for key, name in written.items()},
        outputs.mapping,
        outputs.inverse,
    )
