# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from geometries import GEOMETRIES, turned
from PIL import Image
from registration_folder import good_metrics, write_result

from monai_sacb.apps.reporting import report
from monai_sacb.data.spatial_mapping import Grid
from monai_sacb.visualize.report import _Pictures, write_report
from monai_sacb.visualize.report_panels import SlicePainter, checkerboard, window
from monai_sacb.visualize.report_slices import PLANES, intensity_window, patient_slice
from monai_sacb.visualize.report_source import ReportSource

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a page holds; it fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str]] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "img":
            self.images.append({name: value or "" for name, value in attrs})
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def pixels(self, start: str) -> list[np.ndarray]:
        """The images whose alternative text begins so."""
        found = [image["src"] for image in self.images if image["alt"].startswith(start)]
        return [np.array(Image.open(io.BytesIO(base64.b64decode(x.split(",")[1]))).convert("RGB")) for x in found]


def volumes(folder: Path, fixed_affine: np.ndarray, shape: tuple[int, int, int], name: str = "fixed") -> list[Path]:
    """Two bodies in two orientations with a label map each; a bright ball on the patient's left, low and behind."""
    paths = []
    side = 60.0
    for role, affine, size in (
        (name, fixed_affine, shape),
        ("moving", turned([[0, -3, 0], [0, 0, 2.5], [-2, 0, 0]], (0, 0, 0)), (40, 36, 44)),
    ):
        # the middle of the grid becomes the origin
        affine = affine.copy()
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(size) - 1) / 2)
        voxels = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1)
        place = voxels @ affine[:3, :3].T + affine[:3, 3]
        # radii differ, so that no axis looks like another
        body = (place / np.array([0.4 * side, 0.6 * side, 0.5 * side])) ** 2
        image = np.where(body.sum(-1) < 1, 300.0 + 40 * np.sin(place[..., 1] / 5), 0.0)
        ball = np.linalg.norm(place - np.array([-10.0, -14.0, -12.0]), axis=-1) < 6
        image[ball] = 900.0
        label = (body.sum(-1) < 0.6).astype(np.int16)
        label[ball] = 2
        for kind, array in ((role, image.astype(np.float32)), (f"{role}_label", label)):
            nifti = nib.Nifti1Image(array, affine)
            nifti.header["descrip"] = EVIL
            paths.append(folder / f"{kind}.nii.gz")
            nib.save(nifti, paths[-1])
    return paths


def small_affine() -> torch.Tensor:
    affine = torch.from_numpy(turned(np.eye(3) * 1.02, (1, -2, 1), 2))
    return affine.double()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("result")
    fixed, fixed_label, moving, moving_label = volumes(
        folder, turned([[0, 0, 4], [1.5, 0, 0], [0, -1.5, 0]], (0, 0, 0), 12), (60, 52, 16), f"a{EVIL[:8]}&b"
    )
    metrics = good_metrics(verdict="check", reasons=[f"Something is {EVIL}."], folds_percent=0.4)
    return write_result(
        folder / "out", fixed, moving, small_affine(), 2.0, fixed_label, moving_label, metrics, length=40.0
    )


@pytest.fixture(scope="module")
def text(result: Path) -> str:
    path = report(result)
    assert path == str(result / "report.html")
    return Path(path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_page(text: str, page: Page) -> None:
    assert len(text) < 3_000_000
    # nothing is loaded from elsewhere, and nothing runs
    assert "script" not in page.tags and "link" not in page.tags
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name in ("src", "href"))
    # what came from file names, headers and metrics is text
    assert EVIL not in text and page.text.count(EVIL) >= 3
    assert "a<script>&b.nii.gz" not in text and "a<script>&b" in page.text
    # verdict first, its reasons, each measurement with a mark, the numbers
    assert page.text.index("CHECK") < page.text.index("Something is") < page.text.index("Do the images match?")
    for words in (
        "failed above 1 %",
        "0.310 → 0.420 → 0.630",
        "Dice by structure",
        "ab" * 32,
        "Refine",
        "2026-01-02",
        "scales by",
    ):
        assert words in page.text, words
    assert re.search(r'class="mark check">! check</td><td>Folds', text)
    assert page.tags.count("h1") == 1 and page.tags.count("h2") > 8


def test_pictures(page: Page) -> None:
    starts = [
        "Fixed image,",
        "Moving image before",
        "Moving image after the affine",
        "Warped moving",
        "Fixed and moving image fused, before",
        "Fixed and moving image fused, after",
        "Edges of the fixed image on the moving image, before",
        "Edges of the fixed image on the moving image, after",
        "Checkerboard of fixed and moving image, before",
        "Checkerboard of fixed and moving image, after",
        "Outlines of the labels, before",
        "Outlines of the labels, after",
        "Deformed grid",
        "Length of the displacement",
        "Jacobian determinant",
    ]
    assert len(page.images) == 3 * len(starts)
    for start in starts:
        for pixels in page.pixels(start):
            assert pixels.std() > 3, start
        assert len(page.pixels(start)) == 3, start
    assert all(len(image["alt"]) > 40 and image["width"] and image["height"] for image in page.images)
    for plane, sides in (
        ("axial", "A at the top, P at the bottom, R on the left, L on the right"),
        ("coronal", "S at the top, I at the bottom, R on the left, L on the right"),
        ("sagittal", "S at the top, I at the bottom, A on the left, P on the right"),
    ):
        assert sum(f"{plane} slice; {sides}" in image["alt"] for image in page.images) == len(starts)
    # before and after differ, and after is what fits: fewer coloured pixels
    before, after = (page.pixels(f"Fixed and moving image fused, {stage}") for stage in ("before", "after"))
    assert all((a != b).any() for a, b in zip(before, after))


@pytest.mark.parametrize("name", ["RAS", "LAS", *list(GEOMETRIES)[1:]])
@pytest.mark.parametrize("plane", list(PLANES))
def test_left_is_on_the_right(name: str, plane: str) -> None:
    """Markers on the patient's left, at the back and at the bottom lie there, in whatever order the array is."""
    affine = np.diag([-1.0, 1, 1, 1]) if name == "LAS" else GEOMETRIES[name].copy()
    shape = (40, 50, 60)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    grid = Grid(shape, torch.from_numpy(affine))
    vertical, horizontal, _ = PLANES[plane]
    for side, patient_axis in enumerate((vertical, horizontal)):
        marker = np.zeros(3)
        marker[patient_axis] = -12.0
        center = np.rint(np.linalg.inv(affine[:3, :3]) @ (marker - affine[:3, 3])).astype(int)
        volume = np.zeros(shape, np.float32)
        volume[tuple(slice(c - 2, c + 3) for c in center)] = 1
        view = patient_slice(grid, plane, center)
        image = view.cut(volume)
        found = [float(x.mean()) for x in np.nonzero(image)]
        middle = [(len(line) - 1) / 2 for line in (view.rows, view.columns)]
        # downwards or to the right, by most of its 12 mm
        assert (found[side] - middle[side]) * view.spacing[side] > 8
        assert view.position_of(center) == (round(found[0]), round(found[1]))
    # lengths on the picture are those of the patient
    height, width = view.size
    np.testing.assert_allclose(height * width, np.prod([shape[a] * grid.spacing[a] for a in view.axes[:2]]))
    # the picture in pixels has them too, whatever the spacing
    pixels = Image.open(io.BytesIO(SlicePainter(view, 4.0).image(image).panel("x").png)).size
    np.testing.assert_allclose(pixels, (round(4 * width), round(4 * height)), atol=1)
    # sampling finds what cutting finds
    matrix = torch.eye(4, dtype=torch.float64)
    sampled = view.sample(torch.from_numpy(volume)[None], grid.affine, matrix, "linear", 0.0)
    np.testing.assert_allclose(sampled, image, atol=1e-5)


def test_marker_in_the_page(result: Path) -> None:
    """From the file to the pixels: the bright ball on the patient's left is on the right of the axial picture."""
    source = ReportSource.read(result)
    pictures = _Pictures(source)
    image = source.originals["fixed"].numpy()[0]
    ball = np.array([round(float(x.mean())) for x in np.nonzero(image > 800)])
    for plane in PLANES:
        view = patient_slice(pictures.grid, plane, ball, pictures.box)
        panel = pictures.plain(view, pictures.fixed_in(view), "Fixed image")
        assert panel is not None
        grey = np.array(Image.open(io.BytesIO(panel.png)).convert("L")).astype(float)
        # letters are at the very border
        grey[:20], grey[-20:], grey[:, :20], grey[:, -20:] = 0, 0, 0, 0
        rows, columns = np.nonzero(grey > 0.9 * grey.max())
        assert rows.mean() > 0.52 * grey.shape[0] and columns.mean() > 0.52 * grey.shape[1], plane


def test_displacement_is_without_the_affine(result: Path) -> None:
    """The known wave comes out of the total mapping, turned into the directions of the picture."""
    pictures = _Pictures(ReportSource.read(result))
    matrix = pictures.grid.affine.numpy()
    for view in pictures.views:
        place = view.places() @ matrix[:3, :3].T + matrix[:3, 3]
        expected = 2.0 * np.sin(place[..., [1, 2, 0]] * (2 * np.pi / 40.0))
        found = pictures.shift(view)
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), np.linalg.norm(expected, axis=-1), atol=2e-3)
        # downwards and to the right as the rows and columns of this oblique grid run
        for axis, line in enumerate((view.rows, view.columns)):
            direction = matrix[:3, view.axes[axis]] / view.spacing[axis] * np.sign(line[1] - line[0])
            np.testing.assert_allclose(found[..., axis], expected @ direction, atol=2e-3)


@pytest.mark.parametrize("gone", [("fixed", "moving_label"), ("moving", "fixed_label")])
def test_originals_that_are_gone(result: Path, tmp_path: Path, gone: tuple[str, ...]) -> None:
    for name in os.listdir(result):
        (tmp_path / name).write_bytes((result / name).read_bytes())
    content = json.loads((tmp_path / "transform.json").read_text())
    for role in gone:
        if role.endswith("label"):
            content[role] = f"/nowhere/{role}.nii.gz"
        else:
            content[role]["path"] = f"/nowhere/{role}.nii.gz"
    (tmp_path / "transform.json").write_text(json.dumps(content))
    # the measurements are not laid beside limits here
    page = Page(Path(write_report(tmp_path)).read_text(encoding="utf-8"))
    assert "Measurements and their limits" not in page.text and "CHECK" in page.text
    for role in gone:
        assert f"/nowhere/{role}.nii.gz' does not exist" in page.text
    assert "Not everything can be shown" in page.text
    # what does not need them is there all the same
    assert all(len(page.pixels(start)) == 3 for start in ("Warped moving", "Deformed grid", "Jacobian"))
    assert bool(page.pixels("Fixed image,")) == ("fixed" not in gone)
    assert bool(page.pixels("Moving image before")) == ("moving" not in gone)
    assert bool(page.pixels("Fixed and moving image fused, after")) == ("fixed" not in gone)
    assert bool(page.pixels("Outlines of the labels, before")) == ("moving_label" not in gone)
    assert len(page.pixels("Outlines of the labels, after")) == 3


def test_folds_are_marked(tmp_path: Path) -> None:
    fixed, _, moving, _ = volumes(tmp_path, np.diag([1.5, 1.5, 1.5, 1.0]), (56, 60, 50))
    out = write_result(tmp_path / "out", fixed, moving, torch.eye(4, dtype=torch.float64), 9.0, length=30.0)
    count = int((nib.load(out / "jacobian.nii.gz").get_fdata() <= 0).sum())
    assert count > 0
    page = Page(Path(report(out)).read_text(encoding="utf-8"))
    assert f"{count:,} voxels fold" in page.text
    jacobians = page.pixels("Jacobian determinant")
    # the middle, and the worst fold
    assert len(jacobians) == 6 and len(page.pixels("Warped image at the worst fold")) == 3
    for pixels in jacobians[3:]:
        loud = (pixels[..., 1] > 200) & (pixels[..., 0] < 120) & (pixels[..., 2] < 120)
        assert loud.sum() > 20
    # without labels there is no section about them
    assert "Do the labels match?" not in page.text


def test_no_folds(page: Page) -> None:
    assert "No voxel folds." in page.text and len(page.pixels("Jacobian determinant")) == 3


def test_window() -> None:
    rng = np.random.default_rng(0)
    # 88 percent background and an outlier
    brain = np.zeros((40, 40, 40), np.float32)
    brain[10:30, 10:30, 10:22] = rng.uniform(50, 150, (20, 20, 12))
    brain[20, 20, 20] = 1e7
    low, high = intensity_window(brain)
    assert low == 0 and 140 < high < 160
    ct = rng.uniform(-1000, 1500, (20, 20, 20))
    assert intensity_window(ct) == (-160.0, 240.0)
    assert intensity_window(np.full((3, 3, 3), np.nan)) == (0.0, 1.0)
    np.testing.assert_allclose(window(np.array([[np.nan, -160, 40, 1e9]]), -160, 240), [[0, 0, 0.5, 1]])


def test_checkerboard() -> None:
    view = patient_slice(Grid((4, 6, 2), torch.diag(torch.tensor([2.0, 1, 1, 1]).double())), "axial", np.zeros(3))
    board = checkerboard(np.zeros((6, 4)), np.ones((6, 4)), view, 2.0)
    np.testing.assert_array_equal(board[:4], [[0, 1, 0, 1], [0, 1, 0, 1], [1, 0, 1, 0], [1, 0, 1, 0]])


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("transform.json", None, FileNotFoundError, "is not the result of a registration: it has no transform.json"),
        ("jacobian.nii.gz", None, FileNotFoundError, "it has no jacobian.nii.gz"),
        ("transform.json", b"{", ValueError, "cannot read '.*transform.json'"),
        ("transform.json", b"[]", ValueError, "must hold a JSON object, got list"),
        ("transform.json", b"{}", ValueError, "does not describe a registration"),
        ("metrics.json", b"{}", ValueError, "must hold a verdict, got None"),
        (
            "metrics.json",
            b'{"verdict": "good", "sdlogj": "x"}',
            ValueError,
            "metrics.json' .*'sdlogj' must be a number",
        ),
        (
            "metrics.json",
            b'{"verdict": "good", "reasons": -1}',
            ValueError,
            "metrics.json' must hold a list of reasons, got -1",
        ),
        ("metrics.json", b'{"verdict": "good", "voxel_mm": []}', ValueError, "'voxel_mm' must be a number"),
        (
            "metrics.json",
            b'{"verdict": "good", "thresholds": -1}',
            ValueError,
            "thresholds must be limits by their names",
        ),
        ("warped.nii.gz", b"no image", ValueError, "cannot read '.*warped.nii.gz'"),
        ("displacement.nii.gz", b"no image", ValueError, "displacement.nii.gz"),
        ("jacobian.nii.gz", "other size", ValueError, r"must have the size \(60, 52, 16\) of the fixed image, got \(2"),
    ],
)
def test_broken_results(
    result: Path, tmp_path: Path, name: str, content: bytes | str | None, error: type[Exception], message: str
) -> None:
    for file in os.listdir(result):
        if file != "report.html":
            (tmp_path / file).write_bytes((result / file).read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    elif isinstance(content, str):
        nib.save(nib.Nifti1Image(np.ones((2, 2, 2), np.float32), np.eye(4)), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    files = sorted(os.listdir(tmp_path))
    with pytest.raises(error, match=message) as caught:
        report(tmp_path)
    assert "\n" not in str(caught.value)
    # nothing half-written
    assert sorted(os.listdir(tmp_path)) == files


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        report(tmp_path / "none")
