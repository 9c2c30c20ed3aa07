# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from monai_sacb.data.point_files import POINT_SUFFIXES, PointSet, read_point_set, write_point_set
from monai_sacb.data.spatial_mapping import Grid
from monai_sacb.transforms import read_points

POINTS = [[1.5, -2.0, 3.0], [40.0, 5.25, -0.5]]
FCSV_HEADER = (
    "# Markups fiducial file version = 4.11\n# CoordinateSystem = {}\n"
    "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
)
REST = ",0,0,0,1,1,1,0,l,,\n"
FCSV_LPS = FCSV_HEADER.format("LPS") + (
    "vtkMRMLMarkupsFiducialNode_0,-1.500,2.000,3.000,0.000,0.000,0.000,1.000,1,1,0,F-1,,\n"
    'vtkMRMLMarkupsFiducialNode_1,-40,-5.25,-0.5,0,0,0,1,1,1,0,"tip, ""left""","a, b",vtkMRMLScalarVolumeNode1,2,0\n'
)


def control_point(position: Any, label: str = "", **others: Any) -> dict[str, Any]:
    return {"id": "1", "label": label, "position": position, "visibility": True, **others}


def markups(frame: Any, *points: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"type": "Fiducial", "coordinateSystem": frame, "controlPoints": list(points), **others}


def document(*lists: dict[str, Any]) -> dict[str, Any]:
    return {"@schema": "https://example.org/markups-schema-v1.0.3.json#", "markups": list(lists)}


TURNED = [-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0]
JSON_LPS = document(
    markups(
        "LPS",
        control_point([-1.5, 2, 3.0], "F-1", orientation=TURNED, positionStatus="defined"),
        control_point([0, 0, 0], "nowhere", positionStatus="undefined"),
        control_point(None, "null"),
        display={"opacity": 0.5},
    ),
    markups("RAS", type="Line"),
    markups("RAS", control_point([40.0, 5.25, -0.5], 'größer, "b"'), coordinateUnits="mm"),
)

# ending, content, labels; the points are always the same
FILES: dict[str, tuple[str, str, list[str]]] = {
    "header": (".csv", "x,y,z\n1.5,-2,3\n40,5.25,-0.5\n", ["", ""]),
    "label": (".csv", 'x,y,z,label\n1.5,-2,3,"nose, tip"\n40,5.25,-0.5,b\n', ["nose, tip", "b"]),
    "name": (".csv", "Name,Z,Y,X,weight\na,3,-2,1.5,7\nb,-0.5,5.25,40,8", ["a", "b"]),
    "LPS comment": (".csv", "# from a scan\n# LPS\nx,y,z\n-1.5,2,3\n\n-40,-5.25,-0.5\n", ["", ""]),
    "LPS columns": (".csv", "x_lps,y_lps,z_lps,label\n-1.5,2,3,1\n-40,-5.25,-0.5,2\n", ["1", "2"]),
    "blanks": (".csv", "x y z\n1.5 -2 3\n40 5.25 -0.5\n", ["", ""]),
    "Windows": (".csv", "\ufeffx,y,z\r\n1.5,-2,3\r\n40,5.25,-0.5\r\n", ["", ""]),
    "upper case": (".CSV", "x,y,z\n1.5,-2,3\n40,5.25,-0.5\n", ["", ""]),
    "fcsv LPS": (".fcsv", FCSV_LPS, ["F-1", 'tip, "left"']),
    "fcsv 1": (".fcsv", FCSV_LPS.replace("= LPS", "= 1"), ["F-1", 'tip, "left"']),
    "fcsv 0": (".fcsv", FCSV_HEADER.format("0") + f"a,1.5,-2,3{REST}b,40,5.25,-0.5{REST}", ["l", "l"]),
    "fcsv other columns": (
        ".fcsv", "# CoordinateSystem=RAS\n# columns = label,z,y,x\nA,3,-2,1.5\nB,-0.5,5.25,40\n", ["A", "B"],
    ),
    "mrk.json": (".mrk.json", json.dumps(JSON_LPS), ["F-1", "größer, \"b\""]),
}  # fmt: skip


@pytest.mark.parametrize(("suffix", "content", "labels"), FILES.values(), ids=FILES)
def test_files(tmp_path: Path, suffix: str, content: str, labels: list[str]) -> None:
    path, copy = tmp_path / f"sub.01{suffix}", tmp_path / "deep" / f"copy{suffix}"
    path.write_bytes(content.encode())
    points = read_point_set(path)
    assert points.positions.dtype == torch.float64 and points.positions.tolist() == POINTS
    assert points.labels == tuple(labels) and len(points) == 2 and points.suffix == suffix.lower()
    read, in_voxels = read_points(path)
    assert read.tolist() == POINTS and not in_voxels
    # moved, they are in the same frame, and nothing else has changed
    moved = points.moved(points.positions * 2 + torch.tensor([1.0, 2.0, 3.0]))
    assert points.positions.tolist() == POINTS
    write_point_set(moved, copy)
    found = read_point_set(copy)
    torch.testing.assert_close(found.positions, moved.positions, rtol=0, atol=1e-12)
    assert found.labels == points.labels
    write_point_set(found.moved(points.positions), copy)
    same = copy.read_text(encoding="utf-8")
    if suffix == ".mrk.json":
        assert json.loads(same) == json.loads(content)
    else:
        # but for the form of the numbers
        old, new = (
            [[cell.strip('"') for cell in line.replace(" ", ",").split(",")] for line in text.strip().splitlines()]
            for text in (content.removeprefix("\ufeff").replace("\r\n", "\n"), same)
        )
        for before, after in zip(old, new, strict=True):
            assert [float(c) if _numeric(c) else c for c in before] == [float(c) if _numeric(c) else c for c in after]
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == [f"copy{suffix}"]


def _numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_what_is_beside_the_points_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.mrk.json").write_text(json.dumps(JSON_LPS), encoding="utf-8")
    points = read_point_set(tmp_path / "a.mrk.json")
    write_point_set(points.moved(points.positions + 1), tmp_path / "b.mrk.json")
    first, line, last = json.loads((tmp_path / "b.mrk.json").read_text(encoding="utf-8"))["markups"]
    assert first["controlPoints"][0]["position"] == [-2.5, 1.0, 4.0]
    assert first["controlPoints"][0]["orientation"] == TURNED
    assert first["controlPoints"][1:] == JSON_LPS["markups"][0]["controlPoints"][1:]
    assert first["display"] == {"opacity": 0.5} and line == JSON_LPS["markups"][1]
    assert last["controlPoints"][0]["position"] == [41.0, 6.25, 0.5] and last["coordinateSystem"] == "RAS"
    (tmp_path / "a.fcsv").write_text(FCSV_LPS)
    points = read_point_set(tmp_path / "a.fcsv")
    write_point_set(points.moved(points.positions + 1), tmp_path / "b.fcsv")
    lines = (tmp_path / "b.fcsv").read_text().splitlines()
    assert lines[:3] == FCSV_LPS.splitlines()[:3]
    assert lines[4] == (
        'vtkMRMLMarkupsFiducialNode_1,-41.0,-6.25,0.5,0,0,0,1,1,1,0,"tip, ""left""","a, b",vtkMRMLScalarVolumeNode1,2,0'
    )


@pytest.mark.parametrize("target", POINT_SUFFIXES)
@pytest.mark.parametrize("source", ["label", "fcsv LPS", "mrk.json"])
def test_from_each_form_to_each(tmp_path: Path, source: str, target: str) -> None:
    suffix, content, labels = FILES[source]
    (tmp_path / f"a{suffix}").write_text(content, encoding="utf-8")
    write_point_set(read_point_set(tmp_path / f"a{suffix}"), tmp_path / f"b{target}")
    found = read_point_set(tmp_path / f"b{target}")
    assert found.positions.tolist() == POINTS and found.labels == tuple(labels)
    if suffix != target:
        text = (tmp_path / f"b{target}").read_text(encoding="utf-8")
        says = {".csv": "x,y,z,label\n1.5,-2.0,3.0,", ".fcsv": "CoordinateSystem = LPS\n", ".mrk.json": '"LPS"'}
        assert says[target] in text and (target == ".csv" or "-1.5" in text)


def test_points_made_here(tmp_path: Path) -> None:
    write_point_set(PointSet(torch.tensor([[1, 2, 0]])), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "x,y,z\n1.0,2.0,0.0\n"
    for suffix in POINT_SUFFIXES:
        write_point_set(PointSet(torch.tensor(POINTS), ("two\nlines", "#")), tmp_path / f"b{suffix}")
        found = read_point_set(tmp_path / f"b{suffix}")
        assert found.positions.tolist() == POINTS and found.labels == ("two lines", "#")


def test_voxels_need_a_grid(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2,3\n4,5,6\n")
    with pytest.raises(ValueError, match=r"no header 'x,y,z', so it is in voxels instead of millimetres\.$"):
        read_point_set(tmp_path / "a.csv")
    affine = torch.diag(torch.tensor([-2.0, 1.0, 1.0, 1.0])).double()
    points = read_point_set(tmp_path / "a.csv", Grid((9, 9, 9), affine))
    assert points.positions.tolist() == [[-2, 2, 3], [-8, 5, 6]]
    # they are millimetres from here on, and the file says so
    write_point_set(points, tmp_path / "b.csv")
    assert read_point_set(tmp_path / "b.csv").positions.tolist() == points.positions.tolist()


ROW = "a,1,2,3,0,0,0,1,1,1,0,l,,\n"
DEEP = '{"markups": ' + "[" * 100_000 + "]" * 100_000 + "}"
LESS_DEEP = json.dumps({**document(markups("LPS", control_point([1, 2, 3]))), "x": json.loads("[" * 200 + "]" * 200)})
BAD: dict[str, tuple[str, bytes | str | None, str]] = {
    "missing": ("a.csv", None, "No such file"),
    "name": ("a.json", "{}", r"does not end in .csv, .fcsv, .mrk.json"),
    "empty csv": ("a.csv", "", "no points"),
    "empty fcsv": ("a.fcsv", "", "coordinate system is ''"),
    "empty json": ("a.mrk.json", "", "no JSON: Expecting value in line 1"),
    "binary csv": ("a.csv", b"\x1f\x8b\x08\x00\xff", "can't decode"),
    "binary json": ("a.mrk.json", b"\xff\xfe\x00", "can't decode"),
    "NUL": ("a.csv", b"x,y,z\n1,2,\x00\n", "line 2 is not numeric"),
    "NaN": ("a.csv", "x,y,z\n1,2,nan\n", "line 2 has a value that is not finite"),
    "huge csv": ("a.csv", "x,y,z\n1,2,1e999\n", "line 2 has a value that is not finite"),
    "ragged": ("a.csv", "x,y,z,label\n1,2,3\n", "line 2 has 3 columns instead of 4"),
    "open quote": ("a.csv", 'x,y,z,label\n1,2,3,"a\n4,5,"6,b\n', "line 3 has 3 columns instead of 4"),
    "long field": ("a.csv", "x,y,z,label\n1,2,3," + "a" * 200_000 + "\n", "field larger than field limit"),
    "long line": ("a.csv", "x" * 1_000_000, r"nor a header 'x,y,z': 'x{100}\.\.\.'"),
    "no frame": ("a.fcsv", "# columns = x,y,z\n1,2,3\n", "coordinate system is '' instead"),
    "IJK": ("a.fcsv", FCSV_HEADER.format("IJK") + ROW, "coordinate system is 'IJK'"),
    "2": ("a.fcsv", FCSV_HEADER.format("2") + ROW, "coordinate system is '2'"),
    "no columns": ("a.fcsv", "# CoordinateSystem = LPS\n" + ROW, "no line '# columns = '"),
    "no z": ("a.fcsv", "# CoordinateSystem = LPS\n# columns = x,y\n1,2\n", "no line '# columns = ' with x, y and z"),
    "no rows": ("a.fcsv", FCSV_HEADER.format("LPS"), "no points"),
    "short row": ("a.fcsv", FCSV_HEADER.format("LPS") + "a,1,2\n", "line 4 has 3 columns instead of 12 or more"),
    "words": ("a.fcsv", FCSV_HEADER.format("LPS") + ROW.replace("2", "two"), "line 4 is not numeric"),
    "infinite": ("a.fcsv", FCSV_HEADER.format("LPS") + ROW.replace("2", "inf"), "line 4 has a value that is not fin"),
    "list": ("a.mrk.json", "[1, 2]", "has no 'markups'"),
    "number": ("a.mrk.json", "7", "has no 'markups'"),
    "cut": ("a.mrk.json", json.dumps(JSON_LPS)[:100], "no JSON"),
    "other type": ("a.mrk.json", '{"markups": 7}', "'markups' of the file is not a list of objects"),
    "list of numbers": ("a.mrk.json", '{"markups": [7]}', "'markups' of the file is not a list of objects"),
    "no lists": ("a.mrk.json", '{"markups": []}', "no points"),
    "nothing placed": ("a.mrk.json", json.dumps(document(markups("LPS", control_point(None)))), "no points"),
    "no system": ("a.mrk.json", json.dumps(document({"controlPoints": []})), "must be LPS or RAS, got 'None'"),
    "system": ("a.mrk.json", json.dumps(document(markups({"a": 1}))), "coordinateSystem of markups 1 must be LPS"),
    "unit": ("a.mrk.json", json.dumps(document(markups("LPS", coordinateUnits="um"))), "must be mm, got 'um'"),
    "points": ("a.mrk.json", json.dumps(document(markups("LPS", controlPoints={"a": 1}))), "not a list of objects"),
    "two numbers": ("a.mrk.json", json.dumps(document(markups("LPS", control_point([1, 2])))), "list of three numbers"),
    "true": ("a.mrk.json", json.dumps(document(markups("RAS", control_point([1, 2, True])))), "list of three numbers"),
    "texts": ("a.mrk.json", json.dumps(document(markups("RAS", control_point(["1", 2, 3])))), "list of three numbers"),
    "NaN in json": ("a.mrk.json", json.dumps(document(markups("RAS", control_point([1, 2, float("nan")])))), "finite"),
    "huge whole": ("a.mrk.json", json.dumps(document(markups("RAS", control_point([1, 2, 10**400])))), "not finite"),
    "many digits": ("a.mrk.json", '{"markups": ' + "9" * 10_000 + "}", "."),
    "region": (
        "a.mrk.json",
        json.dumps(document(markups("LPS", type="ROI"))),
        "of type ROI, which is more than points",
    ),
    "deep": ("a.mrk.json", DEEP, "nested too deeply"),
    "less deep": ("a.mrk.json", LESS_DEEP, "nested too deeply"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path: Path, name: str, content: bytes | str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"^cannot read points '.*{name}': .*{message}.*\.$") as caught:
        read_point_set(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert time.monotonic() - start < 5


def test_endless_files_are_not_read_to_their_end(tmp_path: Path) -> None:
    for suffix in POINT_SUFFIXES:
        (tmp_path / f"a{suffix}").symlink_to("/dev/zero")
        with pytest.raises(ValueError, match=r"larger than 64 MiB\.$"):
            read_point_set(tmp_path / f"a{suffix}")


ONE = PointSet(torch.zeros(1, 3))
BAD_ARGUMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "shape": (lambda: PointSet(torch.zeros(3)), r"\(N, 3\), got \[3\]"),
    "NaN": (lambda: PointSet(torch.full((2, 3), float("nan"))), "got 6 NaN or infinite"),
    "labels": (lambda: PointSet(torch.zeros(2, 3), ("a",)), "one label for each of 2 points, got 1"),
    "suffix": (lambda: PointSet(torch.zeros(2, 3), suffix=".txt"), "got '.txt'"),
    "moved": (lambda: ONE.moved(torch.zeros(2, 3)), r"\[1, 3\], got \[2, 3\]"),
    "moved to nowhere": (lambda: ONE.moved(torch.full((1, 3), float("inf"))), "got 3 NaN or infinite"),
    "name": (lambda: write_point_set(ONE, "a.txt"), "must end in .csv, .fcsv, .mrk.json, got 'a.txt'"),
}


@pytest.mark.parametrize(("call", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
