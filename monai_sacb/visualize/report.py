# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""One page that says whether a registration worked, and shows it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined

from monai_sacb.data.foreground import foreground_mask
from monai_sacb.data.spatial_mapping import Grid
from monai_sacb.utils import replacing
from monai_sacb.visualize.report_panels import Panel, SlicePainter, checkerboard, fuse, gradient_css, grid_step, window
from monai_sacb.visualize.report_slices import (
    PLANES,
    PatientSlice,
    box_corners,
    foreground_box,
    intensity_window,
    joined_box,
    middle_of,
    patient_slice,
)
from monai_sacb.visualize.report_source import ReportSource
from monai_sacb.visualize.report_tables import describe_affine, headline, provenance, tables

__all__ = ["render_report", "write_report"]

# longest side of a picture, and the width of three of them, pixels
MAX_SIDE, MAX_WIDTH = 360, 1040
# tiles of the checkerboard along the longest side
CHECKER_TILES = 8
FIXED_COLOR, MOVING_COLOR = "#ffd21f", "#ff3df2"
# log2 of the determinant: the scale reaches at least a factor of 1.4 and at most of 4
JACOBIAN_RANGE = (0.5, 2.0)
# of the marks at a colour bar, for each power of ten
ROUND_STEPS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0)
TEMPLATE = "report.html"
REASON_MISSING = "This image is no longer where it was."


class Row(NamedTuple):
    """Pictures in three planes; None for one that cannot be shown."""

    title: str
    text: str
    panels: list[Panel | None]


class Section(NamedTuple):
    """Rows that belong together, with what their colours mean."""

    title: str
    text: str
    rows: list[Row]
    keys: tuple[tuple[str, str], ...] = ()
    bar: tuple[str, tuple[str, ...], str] | None = None


class _Pictures:
    """Everything that is looked at in slices, looked up there and nowhere else."""

    def __init__(self, source: ReportSource) -> None:
        self.source, self.grid = source, source.grid
        self.fixed, self.moving = source.originals.get("fixed"), source.originals.get("moving")
        warped = torch.from_numpy(np.ascontiguousarray(source.warped, dtype=np.float32))[None]
        base = warped if self.fixed is None else self.fixed.as_tensor()
        foreground = foreground_mask(base)[0].numpy()
        # by the moving image itself where it is there: what lies outside of it must not count
        self.moving_window = intensity_window((warped if self.moving is None else self.moving.as_tensor()).numpy())
        self.fixed_window = self.moving_window if self.fixed is None else intensity_window(base.numpy())
        boxes = [foreground_box(foreground).astype(float)]
        if self.moving is not None:
            box = foreground_box(foreground_mask(self.moving.as_tensor())[0].numpy())
            to_fixed = torch.linalg.inv(self.grid.affine)
            to_ras = Grid.of(self.moving).affine
            boxes += [
                box_corners(box, (to_fixed @ back @ to_ras).numpy())
                for back in (torch.eye(4, dtype=torch.float64), torch.linalg.inv(source.affine))
            ]
        self.box = joined_box(self.grid, boxes)
        self.middle = middle_of(foreground)
        self.views = self.views_at(self.middle)
        longest = max(max(view.size) for view in self.views)
        self.scale = min(MAX_SIDE / longest, MAX_WIDTH / sum(view.size[1] for view in self.views))
        self.tile = longest / CHECKER_TILES
        self.step = grid_step(self.views)
        jacobian = source.jacobian
        self.fold_mask = ~(jacobian > 0)
        self.folds = int(self.fold_mask.sum())
        self.folds_inside = int((self.fold_mask & foreground).sum())
        # the deepest one, in the body if there is one; NaN is the worst
        ranked = np.where(np.isnan(jacobian), -np.inf, jacobian)
        if self.folds_inside:
            ranked = np.where(foreground, ranked, np.inf)
        self.worst = np.array(np.unravel_index(int(np.argmin(ranked)), ranked.shape))
        self.shifts = {view.plane: self.shift(view) for view in self.views}

    def views_at(self, voxel: np.ndarray) -> list[PatientSlice]:
        # a fold may lie outside of what is shown
        box = np.stack([np.minimum(self.box[0], voxel), np.maximum(self.box[1], voxel)])
        return [patient_slice(self.grid, plane, voxel, box) for plane in PLANES]

    def fixed_in(self, view: PatientSlice) -> np.ndarray | None:
        return None if self.fixed is None else window(view.cut(self.fixed.numpy()[0]), *self.fixed_window)

    def warped_in(self, view: PatientSlice) -> np.ndarray:
        return window(view.cut(self.source.warped), *self.moving_window)

    def moving_in(self, view: PatientSlice, affine: bool) -> np.ndarray | None:
        """The moving image where its header says it is, or after the affine."""
        if self.moving is None:
            return None
        matrix = self.source.affine if affine else torch.eye(4, dtype=torch.float64)
        # black outside the image
        low, high = self.moving_window
        to_ras = Grid.of(self.moving).affine
        return window(view.sample(self.moving.as_tensor(), to_ras, matrix, "linear", low), low, high)

    def label_in(self, view: PatientSlice, role: str) -> np.ndarray | None:
        """Labels of the fixed image; of the moving image by its header; or warped."""
        if role == "warped_label":
            labels = self.source.warped_label
            return None if labels is None else view.cut(labels)
        volume = self.source.originals.get(role)
        if volume is None:
            return None
        if role == "fixed_label":
            return view.cut(volume.numpy()[0]) if Grid.of(volume).shape == self.grid.shape else None
        identity = torch.eye(4, dtype=torch.float64)
        return view.sample(volume.as_tensor(), Grid.of(volume).affine, identity, "nearest", 0)

    def shift(self, view: PatientSlice) -> np.ndarray:
        """Displacement before the affine, ``(rows, columns, 3)``: downwards, to the right and across, millimetres."""
        places = torch.from_numpy(view.places().reshape(-1, 3))
        matrix = self.grid.affine
        start = places @ matrix[:3, :3].T + matrix[:3, 3]
        total = torch.from_numpy(view.cut(self.source.total.vectors.numpy()).reshape(-1, 3)).double()
        back = torch.linalg.inv(self.source.affine)
        moved = (start + total) @ back[:3, :3].T + back[:3, 3] - start
        voxels = moved @ torch.linalg.inv(matrix)[:3, :3].T
        millimetres = (voxels * torch.tensor(self.grid.spacing, dtype=torch.float64)).numpy()
        picture = millimetres[:, list(view.axes)].reshape(len(view.rows), len(view.columns), 3)
        # indices may run backwards in the picture
        for axis, line in enumerate((view.rows, view.columns)):
            if len(line) > 1 and line[1] < line[0]:
                picture[..., axis] *= -1
        return picture

    def painter(self, view: PatientSlice) -> SlicePainter:
        return SlicePainter(view, self.scale)

    def plain(self, view: PatientSlice, image: np.ndarray | None, alt: str) -> Panel | None:
        return None if image is None else self.painter(view).image(image).panel(alt)

    def pairs(self) -> Iterator[tuple[str, str, list[tuple[PatientSlice, np.ndarray | None, np.ndarray | None]]]]:
        """Before and after: title, what is meant, and for each plane the fixed and the other image."""
        fixed = [self.fixed_in(view) for view in self.views]
        before = [self.moving_in(view, affine=False) for view in self.views]
        yield "Before", "by the files' headers alone", list(zip(self.views, fixed, before))
        yield (
            "After",
            "through the whole registration",
            list(zip(self.views, fixed, [self.warped_in(v) for v in self.views])),
        )


def _overlay_rows(pictures: _Pictures, kind: str) -> list[Row]:
    rows = []
    for title, text, triples in pictures.pairs():
        panels: list[Panel | None] = []
        for view, fixed, other in triples:
            painter = pictures.painter(view)
            if fixed is None or other is None:
                panels.append(None)
            elif kind == "fusion":
                panels.append(painter.image(fuse(fixed, other)).panel(f"Fixed and moving image fused, {title.lower()}"))
            elif kind == "checkerboard":
                board = checkerboard(fixed, other, view, pictures.tile)
                panels.append(painter.image(board).panel(f"Checkerboard of fixed and moving image, {title.lower()}"))
            else:
                alt = f"Edges of the fixed image on the moving image, {title.lower()}"
                panels.append(painter.image(other).edges(fixed, FIXED_COLOR).panel(alt))
        rows.append(Row(title, text, panels))
    return rows


def _image_rows(pictures: _Pictures) -> list[Row]:
    views = pictures.views
    return [
        Row("Fixed", "stays as it is", [pictures.plain(v, pictures.fixed_in(v), "Fixed image") for v in views]),
        Row(
            "Moving, before",
            "by the files' headers alone",
            [pictures.plain(v, pictures.moving_in(v, False), "Moving image before registration") for v in views],
        ),
        Row(
            "Moving, affine",
            "after the affine stage",
            [pictures.plain(v, pictures.moving_in(v, True), "Moving image after the affine stage") for v in views],
        ),
        Row(
            "Moving, warped",
            "through the whole registration",
            [pictures.plain(v, pictures.warped_in(v), "Warped moving image") for v in views],
        ),
    ]


def _label_rows(pictures: _Pictures) -> list[Row]:
    rows = []
    for title, text, role in (
        ("Before", "by the files' headers alone", "moving_label"),
        ("After", "through the whole registration", "warped_label"),
    ):
        panels: list[Panel | None] = []
        for view in pictures.views:
            fixed, moved = pictures.label_in(view, "fixed_label"), pictures.label_in(view, role)
            if moved is None or (fixed is None and role == "moving_label" and pictures.source.warped_label is None):
                panels.append(None)
                continue
            back = pictures.fixed_in(view)
            painter = pictures.painter(view).image(pictures.warped_in(view) if back is None else back, alpha=0.7)
            if fixed is not None:
                painter.contours(fixed, FIXED_COLOR, 1.5)
            panels.append(painter.contours(moved, MOVING_COLOR, 0.9).panel(f"Outlines of the labels, {title.lower()}"))
        rows.append(Row(title, text, panels))
    return rows


def _jacobian_limit(jacobian: np.ndarray) -> float:
    """Half the width of the scale, as a power of two."""
    positive = jacobian.reshape(-1)[:: max(1, jacobian.size // 1_000_000)]
    positive = positive[np.isfinite(positive) & (positive > 0)]
    if not positive.size:
        return JACOBIAN_RANGE[0]
    spread = float(np.abs(np.log2(np.percentile(positive, (0.5, 99.5)))).max())
    return min(max(math.ceil(spread * 4) / 4, JACOBIAN_RANGE[0]), JACOBIAN_RANGE[1])


def _round_up(length: float) -> float:
    """The next length of which a quarter is a round number."""
    decade = 10.0 ** math.floor(math.log10(length / 4))
    return 4 * decade * next(step for step in ROUND_STEPS if 4 * decade * step >= length)


def _jacobian_panel(pictures: _Pictures, view: PatientSlice, limit: float, ring: bool = False) -> Panel:
    values = view.cut(pictures.source.jacobian).astype(np.float64)
    folded = view.cut(pictures.fold_mask)
    logs = np.log2(np.where(folded, 1.0, values))
    fixed = pictures.fixed_in(view)
    painter = pictures.painter(view).colors(logs, "RdBu_r", -limit, limit)
    painter.edges(pictures.warped_in(view) if fixed is None else fixed, "#00000066", 0.6).folds(folded)
    if ring:
        painter.ring(pictures.worst)
    return painter.panel(f"Jacobian determinant, {int(folded.sum())} folded voxels in the slice")


def _deformation_sections(pictures: _Pictures) -> list[Section]:
    views, limit = pictures.views, _jacobian_limit(pictures.source.jacobian)
    lengths = {view.plane: np.linalg.norm(pictures.shifts[view.plane], axis=-1) for view in views}
    longest = max(float(np.percentile(length, 99.5)) for length in lengths.values())
    top = _round_up(max(longest, 0.1))
    grids, colours = [], []
    for view in views:
        fixed = pictures.fixed_in(view)
        back = pictures.warped_in(view) if fixed is None else fixed
        shift = pictures.shifts[view.plane][..., :2]
        grids.append(
            pictures.painter(view).image(back, alpha=0.5).deformed_grid(shift, pictures.step).panel("Deformed grid")
        )
        painter = pictures.painter(view).colors(lengths[view.plane], "viridis", 0.0, top)
        colours.append(painter.edges(back, "#ffffff80", 0.6).panel("Length of the displacement"))
    ticks = tuple(f"{2**x:.2g}" for x in np.linspace(-limit, limit, 5))
    rows = [Row("Jacobian", "of the whole mapping", [_jacobian_panel(pictures, view, limit) for view in views])]
    if pictures.folds:
        worst = pictures.views_at(pictures.worst)
        images = [
            pictures.painter(v)
            .image(pictures.warped_in(v))
            .ring(pictures.worst)
            .panel("Warped image at the worst fold")
            for v in worst
        ]
        rows.append(
            Row("Worst fold", "slices through it, ringed", [_jacobian_panel(pictures, v, limit, True) for v in worst])
        )
        rows.append(Row("Worst fold", "the warped image there", list(images)))
    share = 100 * pictures.folds / pictures.fold_mask.size
    folds = (
        f"{pictures.folds:,} voxels fold ({share:.2g} % of the volume), {pictures.folds_inside:,} of them in the body; "
        "they are marked in bright green."
        if pictures.folds
        else "No voxel folds."
    )
    return [
        Section(
            "How was it deformed?",
            "The deformation that follows the affine stage. Undeformed, the lines are a regular grid of "
            f"{pictures.step:g} mm; they must not cross.",
            [Row("Deformed grid", f"{pictures.step:g} mm", list(grids))],
        ),
        Section(
            "How far was it displaced?",
            "Length of the displacement, affine stage left out. Colours outside the body mean nothing.",
            [Row("Displacement", "millimetres", list(colours))],
            bar=(gradient_css("viridis"), tuple(f"{x:.3g} mm" for x in np.linspace(0, top, 5)), ""),
        ),
        Section(
            "Where did tissue grow or shrink?",
            "Jacobian determinant: volume in the moving image for each unit of volume in the fixed image. 1 is "
            f"unchanged; above 1 the moving tissue was shrunk to fit, below 1 it was grown. {folds}",
            rows,
            keys=((("#39ff14", "folded"),) if pictures.folds else ()),
            bar=(gradient_css("RdBu_r"), ticks, "Jacobian determinant, logarithmic"),
        ),
    ]


def _sections(pictures: _Pictures) -> list[Section]:
    fusion_keys = (
        ("#ff2bff", "only in the fixed image"),
        ("#19d419", "only in the moving image"),
        ("#9a9a9a", "in both"),
    )
    sections = [
        Section(
            "Do the images match?",
            "Both images on top of each other: grey where they agree, coloured where they do not. Coloured rims are "
            "outlines that do not meet; an even tint is a difference of brightness, not of place. "
            "Radiological convention: the patient's right is on the left.",
            _overlay_rows(pictures, "fusion"),
            fusion_keys,
        )
    ]
    label_rows = _label_rows(pictures)
    if any(panel is not None for row in label_rows for panel in row.panels):
        sections.append(
            Section(
                "Do the labels match?",
                "Outlines of the structures on the fixed image.",
                label_rows,
                ((FIXED_COLOR, "fixed label"), (MOVING_COLOR, "moving label")),
            )
        )
    sections += [
        Section(
            "Do the edges match?",
            "Edges of the fixed image drawn on the moving image; they say more than colours where the two are of "
            "different kinds.",
            _overlay_rows(pictures, "edges"),
            ((FIXED_COLOR, "edges of the fixed image"),),
        ),
        Section(
            "Checkerboard",
            "Tiles of the fixed and of the moving image in turn: outlines must go on from tile to tile.",
            _overlay_rows(pictures, "checkerboard"),
        ),
        Section("The images themselves", "All on the grid of the fixed image.", _image_rows(pictures)),
    ]
    return sections + _deformation_sections(pictures)


def render_report(source: ReportSource, checks: Sequence[Any] = ()) -> str:
    """
    The page as HTML.

    Args:
        source: what the registration wrote.
        checks: as for :py:func:`write_report`.
    """
    pictures = _Pictures(source)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        resources.files("monai_sacb.visualize").joinpath("templates").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    widths = [pictures.painter(view).pixels[1] for view in pictures.views]
    return template.render(
        verdict=source.metrics["verdict"],
        reasons=[str(reason) for reason in source.metrics.get("reasons") or []],
        names={role: Path(str(source.transform[role]["path"])).name for role in ("fixed", "moving")},
        headline=headline(source.metrics, checks, pictures.folds),
        notes=source.notes,
        planes=list(PLANES),
        widths=widths,
        sections=_sections(pictures),
        checks=checks,
        tables=tables(source.metrics),
        affine=describe_affine(source.affine.numpy(), pictures.grid, pictures.middle),
        provenance=provenance(source),
        missing=REASON_MISSING,
        oblique=not np.allclose(np.abs(source.grid.affine.numpy()[:3, :3] / source.grid.spacing).max(0), 1, atol=1e-3),
    )


def write_report(output_dir: str | os.PathLike[str] | ReportSource, checks: Sequence[Any] = ()) -> str:
    """
    Write ``report.html`` into the output folder of a registration, from what the registration wrote there.

    The images that it was made from are read from their places in ``transform.json``; where they are gone, the page
    says so and shows what it can.

    Args:
        output_dir: the folder, with ``transform.json``, ``metrics.json``, ``warped.nii.gz``, ``displacement.nii.gz``
            and ``jacobian.nii.gz``; or its content, where that is at hand.
        checks: measurements beside their limits, with ``name``, ``value``, ``limits``, ``mark`` and ``reason``, as
            :py:func:`monai_sacb.apps.verdict.check_metrics` gives them; without, the page has no table of them.

    Returns:
        the file, which is replaced once all of it is written.

    Raises:
        FileNotFoundError: When the folder is not the result of a registration.
        ValueError: When one of its files is broken.
    """
    source = output_dir if isinstance(output_dir, ReportSource) else ReportSource.read(output_dir)
    page = render_report(source, checks)
    path = source.folder / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return str(path)
