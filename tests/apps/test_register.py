# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Two files in, a result that every tool understands out."""

from __future__ import annotations

import csv
import errno
import json
import logging
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from geometries import GEOMETRIES
from scipy.ndimage import map_coordinates
from synthetic_pair import MakePair, Pair, deformation, grid_points, write_itk

from monai_sacb.apps import RegistrationResult, register
from monai_sacb.apps import registration as stages
from monai_sacb.apps.pair_reading import PairFiles
from monai_sacb.apps.registration import RegistrationOptions, Setting, request_digest
from monai_sacb.networks.nets import SACBNet
from monai_sacb.utils import file_digest

OASIS = Path(__file__).resolve().parents[3] / "shared" / "data" / "oasis_trt20"
ALIGNED: dict[str, Any] = {"affine": "false", "refine": 25}
ALWAYS = {
    "warped.nii.gz",
    "fixed_warped.nii.gz",
    "displacement.nii.gz",
    "transform.h5",
    "inverse_displacement.nii.gz",
    "inverse_transform.h5",
    "jacobian.nii.gz",
    "transform.json",
    "metrics.json",
    "report.html",
}


@pytest.fixture(autouse=True)
def _quick(quick_report: None) -> None:
    """The page is tested elsewhere, and in the registration that is shared."""


def run(pair: Pair, output: Path, **options: Any) -> RegistrationResult:
    result = register(fixed=pair.fixed, moving=pair.moving, output_dir=str(output), **{**ALIGNED, **options})
    assert isinstance(result, RegistrationResult)
    return result


def by_itk(image: str, reference: str, transform: Any, nearest: bool = False) -> np.ndarray:
    kind = itk.Image[itk.F, 3]
    grid = itk.imread(reference, itk.F)
    interpolate = itk.NearestNeighborInterpolateImageFunction if nearest else itk.LinearInterpolateImageFunction
    resample = itk.ResampleImageFilter[kind, kind].New(
        Input=itk.imread(image, itk.F),
        Transform=transform,
        Interpolator=interpolate[kind, itk.D].New(),
        ReferenceImage=grid,
        UseReferenceImage=True,
    )
    resample.Update()
    return itk.array_from_image(resample.GetOutput()).T


def transform_of(path: Path) -> Any:
    if path.suffix == ".h5":
        return itk.transformread(str(path))[0]
    read = itk.imread(str(path), itk.Vector[itk.F, 3])
    field = itk.Image[itk.Vector[itk.D, 3], 3].New()
    field.CopyInformation(read)
    field.SetRegions(itk.size(read))
    field.Allocate()
    itk.array_view_from_image(field)[...] = itk.array_view_from_image(read)
    transform = itk.DisplacementFieldTransform[itk.D, 3].New()
    transform.SetDisplacementField(field)
    return transform


@pytest.mark.parametrize("name", ["RAS", "LIA", "RPS", "oblique", "oblique ASL"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_itk_gets_the_same_image(make_pair: MakePair, tmp_path: Path, name: str, suffix: str) -> None:
    names = list(GEOMETRIES)
    other = GEOMETRIES[names[(names.index(name) + 2) % len(names)]]
    scale = np.diag([2.0, 2.0, 2.0, 1.0])
    pair = make_pair(GEOMETRIES[name] @ scale, other @ scale, suffix)
    result = run(pair, tmp_path / "out", refine=6, moving_label=pair.moving_label)
    assert result.metrics["self_check"]["max_difference"] < 1e-3
    warped = nib.load(tmp_path / "out" / "warped.nii.gz")
    reference = str(tmp_path / "out" / "warped.nii.gz")
    ours = warped.get_fdata()
    spread = ours.max() - ours.min()
    assert ours.std() > 5
    for file in ("transform.h5", "displacement.nii.gz"):
        theirs = by_itk(pair.moving, reference, transform_of(tmp_path / "out" / file))
        difference = np.abs(theirs - ours)
        # at the very edge of the moving image rounding decides what is inside
        assert np.mean(difference > 1e-3 * spread) < 1e-4, file
        label = nib.load(tmp_path / "out" / "warped_label.nii.gz")
        nearest = by_itk(pair.moving_label, reference, transform_of(tmp_path / "out" / file), nearest=True)
        assert np.mean(nearest != label.get_fdata()) < 0.05
    assert np.issubdtype(label.get_data_dtype(), np.integer)
    assert set(np.unique(label.get_fdata())) == {0, 3, 1021}
    back = by_itk(pair.fixed, pair.moving, transform_of(tmp_path / "out" / "inverse_transform.h5"))
    theirs_back = nib.load(tmp_path / "out" / "fixed_warped.nii.gz").get_fdata()
    assert np.mean(np.abs(back - theirs_back) > 1e-3 * spread) < 1e-4


def test_results_lie_where_the_fixed_file_does(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(GEOMETRIES["oblique ASL"] @ np.diag([2, 2, 2, 1.0]), GEOMETRIES["LIA"] @ np.diag([2, 2, 2, 1.0]))
    run(pair, tmp_path / "out", refine=2)
    for file, source in (
        ("warped.nii.gz", pair.fixed),
        ("jacobian.nii.gz", pair.fixed),
        ("displacement.nii.gz", pair.fixed),
        ("fixed_warped.nii.gz", pair.moving),
        ("inverse_displacement.nii.gz", pair.moving),
    ):
        written, read = nib.load(tmp_path / "out" / file), nib.load(source)
        assert written.shape[:3] == read.shape
        assert np.allclose(written.affine, read.affine, atol=1e-4)
    field = nib.load(tmp_path / "out" / "displacement.nii.gz")
    assert int(field.header["intent_code"]) == 1007 and field.shape[3:] == (1, 3)
    assert str(field.header.get_xyzt_units()[0]) == "mm"


def test_known_deformation_is_recovered(pair: Pair, registered: Path) -> None:
    image = nib.load(pair.fixed)
    places = grid_points(image.shape, image.affine)
    true = deformation(places) - places
    # LPS on disk
    found = nib.load(registered / "displacement.nii.gz").get_fdata()[..., 0, :] * [-1, -1, 1]
    inside = image.get_fdata() > 20
    before, after = (np.linalg.norm(error[inside], axis=-1).mean() for error in (true, true - found))
    assert before > 2.5
    assert after < 0.3 * before


def test_metrics_and_files(registered: Path, pair: Pair) -> None:
    made = {path.name for path in registered.iterdir()}
    assert made == ALWAYS | {"warped_label.nii.gz"}
    metrics = json.loads((registered / "metrics.json").read_text())
    assert metrics["verdict"] == "good", metrics["reasons"]
    similarity, dice = metrics["similarity"], metrics["dice"]
    assert similarity["before"] == pytest.approx(similarity["affine"])
    assert similarity["after"] > similarity["before"] + 0.1
    assert set(dice["after"]["structures"]) == {"3", "1021"}
    assert dice["after"]["mean"] > dice["before"]["mean"] + 0.05
    assert metrics["folds_percent"] == 0.0
    assert 0 < metrics["jacobian"]["min"] < 1 < metrics["jacobian"]["max"]
    assert metrics["inverse_consistency_mm"]["median"] < 0.1
    assert metrics["overlap_percent"] > 95
    assert 1 < metrics["displacement_mm"]["median"] < metrics["displacement_mm"]["max"] < 10
    sidecar = json.loads((registered / "transform.json").read_text())
    assert sidecar["fixed"]["path"] == str(Path(pair.fixed).resolve())
    assert sidecar["frame"] == "LPS" and sidecar["units"] == "mm" and "pull-back" in sidecar["direction"]
    assert set(sidecar["files"].values()) == made
    assert np.allclose(sidecar["affine"], np.eye(4)) and sidecar["affine_source"] == "aligned"


def test_jacobian_is_that_of_the_whole_mapping(pair: Pair, tmp_path: Path) -> None:
    transform = itk.AffineTransform[itk.D, 3].New()
    transform.SetMatrix(itk.matrix_from_array(np.diag([1.1, 0.9, 1.0])))
    itk.transformwrite([transform], str(tmp_path / "affine.tfm"))
    result = run(pair, tmp_path / "out", refine=0, affine=str(tmp_path / "affine.tfm"))
    jacobian = nib.load(tmp_path / "out" / "jacobian.nii.gz").get_fdata()
    assert np.allclose(jacobian, 0.99, atol=1e-5)
    assert result.metrics["displacement_mm"]["max"] == 0.0


def test_points_travel_with_the_image(pair: Pair, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    fixed = rng.uniform(-12, 12, (20, 3))
    moving = deformation(fixed)
    for name, points in (("fixed", fixed), ("moving", moving)):
        rows = [f"{x:.6f},{y:.6f},{z:.6f},p{i}" for i, (x, y, z) in enumerate(points)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["x,y,z,label", *rows]) + "\n")
    result = run(
        pair,
        tmp_path / "out",
        refine=40,
        moving_points=str(tmp_path / "moving.csv"),
        fixed_points=str(tmp_path / "fixed.csv"),
    )
    landmarks = result.metrics["landmarks_mm"]
    assert landmarks["before"] == pytest.approx(np.linalg.norm(moving - fixed, axis=1).mean(), rel=1e-4)
    assert landmarks["after"] < 0.4 * landmarks["before"]
    with open(tmp_path / "out" / "warped_points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [f"p{i}" for i in range(20)]
    carried = np.array([[float(row[axis]) for axis in "xyz"] for row in rows])
    assert np.linalg.norm(carried - fixed, axis=1).mean() < 0.4 * np.linalg.norm(moving - fixed, axis=1).mean()
    # as ITK carries them
    inverse = transform_of(tmp_path / "out" / "inverse_transform.h5")
    lps = np.array([-1, -1, 1])
    theirs = np.array([list(inverse.TransformPoint((point * lps).tolist())) for point in moving]) * lps
    assert np.abs(carried - theirs).max() < 0.01


def test_same_input_same_bits(pair: Pair, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(pair, tmp_path / name, affine="true", refine=5, seed=3)
    for file in ("warped.nii.gz", "displacement.nii.gz", "inverse_displacement.nii.gz"):
        one, two = (nib.load(tmp_path / name / file).get_fdata() for name in ("one", "two"))
        assert np.array_equal(one, two)


def test_network_goes_through_the_same_door(pair: Pair, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "net.pt"
    torch.save(SACBNet().state_dict(), weights)
    alone = run(pair, tmp_path / "alone", model=str(weights), refine=0)
    refined = run(pair, tmp_path / "refined", model=str(weights), refine=20)
    assert alone.metrics["displacement_mm"]["max"] > 0.1
    assert refined.metrics["similarity"]["after"] > alone.metrics["similarity"]["after"]
    sidecar = json.loads((tmp_path / "alone" / "transform.json").read_text())
    assert sidecar["model"]["name"] == "net" and len(sidecar["model"]["sha256"]) == 64


def test_details_on_a_finer_grid(pair: Pair, tmp_path: Path) -> None:
    # a model whose working grid has voxels three times as large as those of the images
    weights = tmp_path / "net.pt"
    torch.save(SACBNet().state_dict(), weights)
    card = {"sha256": file_digest(weights), "settings": {"working_grid#spacing": 6.0}}
    weights.with_suffix(".json").write_text(json.dumps(card))
    points = np.random.default_rng(0).uniform(-14, 14, (200, 3))
    errors, grids = {}, {}
    for fine in (0, 20):
        output = tmp_path / f"fine_{fine}"
        result = run(pair, output, model=str(weights), refine=40, fine=fine)
        found = result.mapping.transform_points(torch.from_numpy(points)).numpy()
        errors[fine] = np.linalg.norm(found - deformation(points), axis=1).mean()
        grids[fine] = json.loads((output / "transform.json").read_text())
    assert grids[0]["working_grid"]["spacing"] == pytest.approx([6] * 3) and "fine_grid" not in grids[0]
    assert grids[20]["working_grid"] == grids[0]["working_grid"] and grids[20]["fine"] == 20
    assert grids[20]["fine_grid"]["spacing"] == pytest.approx([2] * 3)
    assert errors[20] < 0.8 * errors[0]
    options = {**ALIGNED, "model": str(weights), "dry_run": True}
    plan = register(fixed=pair.fixed, moving=pair.moving, output_dir=str(tmp_path / "plan"), **options)
    assert isinstance(plan, dict) and plan["fine_grid"]["shape"] == grids[20]["fine_grid"]["shape"]
    assert "refinement on a finer grid: 20 steps" in plan["stages"]


@pytest.mark.parametrize(("refine", "fine", "expected"), [(0, None, 0), (5, None, 20), (0, 3, 3), (5, 0, 0)])
def test_steps_on_a_finer_grid(refine: int, fine: int | None, expected: int) -> None:
    assert stages.Setting(stages.RegistrationOptions(refine=refine, fine=fine, device="cpu")).fine == expected


def test_masks_restrict_the_similarity_and_nothing_else(pair: Pair, tmp_path: Path) -> None:
    """What lies outside the masks has no influence, but is still carried along."""
    image = nib.load(pair.moving)
    array = image.get_fdata()
    outside = np.zeros(image.shape, bool)
    outside[:10] = True
    mask = str(tmp_path / "mask.nii.gz")
    nib.save(nib.Nifti1Image((~outside).astype(np.uint8), image.affine), mask)
    result = run(pair, tmp_path / "masked", moving_mask=mask)
    free = run(pair, tmp_path / "free")
    assert result.metrics["similarity"]["after"] > result.metrics["similarity"]["before"]
    assert not np.array_equal(
        *(nib.load(tmp_path / name / "displacement.nii.gz").get_fdata() for name in ("masked", "free"))
    )
    warped = nib.load(tmp_path / "masked" / "warped.nii.gz").get_fdata()
    assert np.isfinite(warped).all() and warped[5:9].std() > 0.1 * array[5:9].std()
    assert free.verdict == "good"


def test_ct_keeps_hounsfield_units(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(dtype=np.int16, offset=-1000.0)
    run(pair, tmp_path / "out", refine=2, keep_dtype=True)
    warped = nib.load(tmp_path / "out" / "warped.nii.gz")
    assert warped.get_data_dtype() == np.int16
    array = warped.get_fdata()
    assert array.min() == nib.load(pair.moving).get_fdata().min() and array.max() > -960


def test_outside_is_filled(pair: Pair, tmp_path: Path) -> None:
    image = nib.load(pair.moving)
    nib.save(image.slicer[:, :, 12:], tmp_path / "cut.nii.gz")
    cut = pair._replace(moving=str(tmp_path / "cut.nii.gz"))
    run(cut, tmp_path / "out", refine=2, fill=-5.0)
    warped = nib.load(tmp_path / "out" / "warped.nii.gz").get_fdata()
    assert (warped[:, :, :8] == -5).all() and (warped[15:20, 15:20, 20:25] > 0).all()


def test_earlier_results_are_replaced_and_other_files_stay(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    (output / "warped_label.nii.gz").write_text("of an earlier run")
    run(pair, output, refine=1)
    assert {path.name for path in output.iterdir()} == ALWAYS | {"mine.txt"}
    assert (output / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("stage", ["read_pair", "write_outputs", "check_by_itk", "write_report"])
def test_nothing_half_written(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException, existing: bool
) -> None:
    output = tmp_path / "new" / "out"
    if existing:
        output.mkdir(parents=True)
        (output / "warped.nii.gz").write_text("old")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(stages, stage, fail)
    with pytest.raises(type(error)):
        run(pair, output, refine=0)
    if existing:
        assert [path.name for path in output.iterdir()] == ["warped.nii.gz"]
        assert (output / "warped.nii.gz").read_text() == "old"
    else:
        assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing(pair: Pair, tmp_path: Path) -> None:
    plan = register(fixed=pair.fixed, moving=pair.moving, output_dir=str(tmp_path / "out"), dry_run=True)
    assert isinstance(plan, dict)
    assert plan["fixed"]["shape"] == list(nib.load(pair.fixed).shape)
    assert plan["expected_seconds"] > 0 and plan["expected_memory_mb"] > 100
    assert list(tmp_path.iterdir()) == []


def test_passes_of_the_network_cost_seconds_and_no_memory(pair: Pair, tmp_path: Path) -> None:
    """Whether the weights say how many there are, or the card beside them does."""
    plans = []
    for stored, card in ((1, {}), (3, {}), (1, {"network_def#num_passes": 5})):
        torch.save(SACBNet(num_passes=stored).state_dict(), tmp_path / "x.pt")
        (tmp_path / "x.json").write_text(json.dumps({"settings": card}))
        files = {"fixed": pair.fixed, "moving": pair.moving, "output_dir": str(tmp_path / "out")}
        plan = register(**files, model=str(tmp_path / "x.pt"), affine="false", dry_run=True)
        assert isinstance(plan, dict)
        plans.append(plan)
    first, second, third = (plan["expected_seconds"] for plan in plans)
    assert second > first and third - second == pytest.approx(second - first, abs=0.11)
    assert len({plan["expected_memory_mb"] for plan in plans}) == 1


def test_digest_of_a_request_knows_the_card_of_the_network(pair: Pair, tmp_path: Path) -> None:
    torch.save(SACBNet().state_dict(), tmp_path / "x.pt")
    options = RegistrationOptions(model=str(tmp_path / "x.pt"))
    digests = []
    for passes in (1, 1, 2):
        (tmp_path / "x.json").write_text(json.dumps({"settings": {"network_def#num_passes": passes}}))
        digests.append(request_digest(PairFiles(pair.fixed, pair.moving), options, Setting(options)))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "output_dir '.*file' is a file"),
        ("file/below", "output_dir '.*below' cannot be made: '.*file' is no folder"),
        ("link/below", "output_dir '.*below' cannot be made: '.*link' is no folder"),
        ("link", "output_dir '.*link' is a link that leads nowhere"),
    ],
)
def test_folder_that_results_cannot_go_to(pair: Pair, tmp_path: Path, output: str, message: str, dry_run: bool) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match=message):
        register(fixed=pair.fixed, moving=pair.moving, output_dir=str(tmp_path / output), dry_run=dry_run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_affine_that_leads_away(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "away.tfm").write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        "Parameters: 1 0 0 0 1 0 0 0 1 900 0 0\nFixedParameters: 0 0 0\n"
    )
    with pytest.raises(ValueError, match="do not overlap after the given affine: their centres are 900"):
        register(
            fixed=pair.fixed, moving=pair.moving, output_dir=str(tmp_path / "o"), affine=str(tmp_path / "away.tfm")
        )


def test_many_pairs_go_on_after_a_bad_one(pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = tmp_path / "pairs.csv"
    rows = [(pair.fixed, pair.moving, "first"), (pair.fixed, "missing.nii.gz", "second"), (pair.moving, pair.fixed, "")]
    table.write_text("fixed,moving,output\n" + "\n".join(",".join(row) for row in rows) + "\n")
    with caplog.at_level(logging.ERROR):
        result = register(pairs=str(table), output_dir=str(tmp_path / "out"), **{**ALIGNED, "refine": 5})
    assert isinstance(result, list)
    assert [row["output"] for row in result] == ["first", "second", "fixed_to_moving"]
    assert result[1]["verdict"] == "error" and "missing.nii.gz" in result[1]["message"]
    assert result[0]["verdict"] != "error" and result[2]["verdict"] != "error"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"first", "fixed_to_moving", "pairs.csv"}
    assert "missing.nii.gz" in result.table() and result.table().startswith("output")
    with open(tmp_path / "out" / "pairs.csv", newline="") as file:
        assert [row["verdict"] for row in csv.DictReader(file)] == [row["verdict"] for row in result]


PAIRS_CASES = [
    ("moving\na.nii\n", "must have the columns fixed and moving"),
    ("fixed,moving,colour\na,b,c\n", "must have the columns fixed and moving, and perhaps others"),
    ("fixed,moving\n", "lists no pair"),
    ("fixed,moving\na,\n", "pair 1 lacks its fixed or moving image"),
    ("fixed,moving\na,b,c\n", "cannot read pairs"),
    ("fixed,moving,output\na,b,../x\n", "leads out of the output folder"),
    ("fixed,moving,output\na,b,/x\n", "leads out of the output folder"),
    ("fixed,moving,output\na,b,pairs.csv\n", "no output can be called pairs.csv"),
    ("fixed,moving,output\na,b,x\nc,d,x/\n", "several pairs with the output 'x'"),
    ("fixed,moving\na,b\na,b\n", "several pairs with the output 'b_to_a'"),
]


@pytest.mark.parametrize("content, message", PAIRS_CASES)
def test_bad_list_of_pairs(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "pairs.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        register(pairs=str(tmp_path / "pairs.csv"), output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


ILL_OPTIONS = [
    ({"refine": -1}, "refine must be at least 0, got -1"),
    ({"fine": -2}, "fine must be at least 0, got -2"),
    ({"fill": float("nan")}, "fill must be finite, got nan"),
    ({"seed": -1}, "seed must be from 0"),
    ({"num_threads": 0}, "num_threads must be from 1 to 256, got 0"),
    ({"device": "gpu7"}, "device 'gpu7' cannot be used"),
    ({"affine": ""}, "affine must be true, false or"),
    ({"affine": "missing.h5"}, "missing.h5"),
    ({"model": "brian"}, "there is no model 'brian'"),
    ({"fixed": None}, "needs a fixed and a moving image"),
    ({"output_dir": ""}, "needs output_dir"),
    ({"output_dir": None}, "needs output_dir"),
    ({"pairs": "x.csv"}, "either pairs or the files of one pair"),
]


@pytest.mark.parametrize("options, message", ILL_OPTIONS)
def test_ill_formed_options(pair: Pair, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    arguments = {"fixed": pair.fixed, "moving": pair.moving, "output_dir": str(tmp_path / "out"), **options}
    with pytest.raises((ValueError, OSError), match=message):
        register(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_output_that_would_replace_an_input(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "warped.nii.gz").write_bytes(Path(pair.moving).read_bytes())
    with pytest.raises(ValueError, match=r"holds the input 'warped\.nii\.gz'"):
        run(pair._replace(moving=str(tmp_path / "warped.nii.gz")), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["warped.nii.gz"]


@pytest.mark.parametrize("suffix", [".mgz", ".mha", ".nii"])
def test_other_formats(pair: Pair, tmp_path: Path, suffix: str) -> None:
    """Also those that ITK does not read."""
    image = nib.load(pair.moving)
    moving = str(tmp_path / f"moving{suffix}")
    if suffix == ".mha":
        write_itk(np.asarray(image.dataobj), image.affine, moving)
    else:
        kind = nib.MGHImage if suffix == ".mgz" else nib.Nifti1Image
        nib.save(kind(np.asarray(image.dataobj), image.affine), moving)
    result = run(pair._replace(moving=moving), tmp_path / "out", refine=1)
    assert result.metrics["self_check"]["max_difference"] < 1e-3
    expected = run(pair, tmp_path / "expected", refine=1)
    assert result.metrics["similarity"]["after"] == pytest.approx(expected.metrics["similarity"]["after"], abs=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float64])
def test_types_of_files_are_kept(make_pair: MakePair, tmp_path: Path, dtype: type) -> None:
    pair = make_pair(dtype=dtype)
    result = run(pair, tmp_path / "out", keep_dtype=True, refine=10)
    assert nib.load(tmp_path / "out" / "warped.nii.gz").get_data_dtype() == dtype
    assert result.metrics["self_check"]["max_difference"] < 1e-3 and result.verdict != "failed"


@pytest.mark.parametrize("affine", ["true", "false"])
def test_disjoint_fields_of_view(pair: Pair, tmp_path: Path, affine: str) -> None:
    image = nib.load(pair.moving)
    moved = image.affine.copy()
    moved[:3, 3] += 1000
    nib.save(nib.Nifti1Image(image.get_fdata(), moved), tmp_path / "away.nii.gz")
    away = pair._replace(moving=str(tmp_path / "away.nii.gz"))
    with pytest.raises(ValueError, match="do not overlap by their headers"):
        run(away, tmp_path / "out", affine=affine)
    assert not (tmp_path / "out").exists()
    # a transform that brings them together is all that is needed
    transform = itk.AffineTransform[itk.D, 3].New()
    transform.SetTranslation([-1000.0, -1000.0, 1000.0])
    itk.transformwrite([transform], str(tmp_path / "affine.tfm"))
    result = run(away, tmp_path / "out", affine=str(tmp_path / "affine.tfm"))
    assert result.metrics["similarity"]["after"] > 0.5


def test_list_of_pairs_is_not_replaced_by_the_results(pair: Pair, tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    table.write_text(f"fixed,moving\n{pair.fixed},{pair.moving}\n")
    with pytest.raises(ValueError, match="would be replaced by the table of results"):
        register(pairs=str(table), output_dir=str(tmp_path))
    assert table.read_text().startswith("fixed,moving\n")


@pytest.mark.slow
@pytest.mark.parametrize("affine", ["false", "true"])
def test_known_deformation_of_a_real_brain_is_recovered(tmp_path: Path, affine: str) -> None:
    """With ``true``, the copy is also turned by 10 degrees and shifted by 12 mm."""
    moving = OASIS / "aligned_2mm" / "images" / "oasis_trt_02.nii.gz"
    if not moving.is_file():
        pytest.skip("needs the brains of OASIS-TRT-20")
    image = nib.load(moving)
    places = grid_points(image.shape, image.affine)
    middle = image.affine[:3, :3] @ ((np.array(image.shape) - 1) / 2) + image.affine[:3, 3]
    partners = deformation(places - middle) + middle
    if affine == "true":
        c, s = np.cos(np.deg2rad(10)), np.sin(np.deg2rad(10))
        partners = (partners - middle) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T + middle + (8, -8, 4)
    voxels = (partners - image.affine[:3, 3]) @ np.linalg.inv(image.affine[:3, :3]).T
    array = image.get_fdata()
    fixed = map_coordinates(array, np.moveaxis(voxels, -1, 0), order=3)
    nib.save(nib.Nifti1Image(fixed.astype(np.float32), image.affine), tmp_path / "fixed.nii.gz")
    pair = Pair(str(moving), str(tmp_path / "fixed.nii.gz"), "", "")
    run(pair, tmp_path / "out", affine=affine, refine=100)
    found = nib.load(tmp_path / "out" / "displacement.nii.gz").get_fdata()[..., 0, :] * [-1, -1, 1]
    inside = fixed > 0.1 * fixed.max()
    errors = np.linalg.norm(found - (partners - places), axis=-1)[inside]
    assert np.linalg.norm(partners - places, axis=-1)[inside].mean() > 2
    # a third of a voxel
    assert errors.mean() < 0.67 and np.median(errors) < 0.67
