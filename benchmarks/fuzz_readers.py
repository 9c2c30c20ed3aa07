# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files for every reader of this package.

    python benchmarks/fuzz_readers.py --seconds 10

takes whole files of each kind, changes them at random (bytes, cuts, doubled and moved pieces, numbers and words that
hurt) and reads them. What may come of it is a result, or a ValueError or OSError whose message is one line. Anything
else is counted as wrong: another exception, a message of several lines, more than ten CPU seconds, more than 4 GiB of
memory, a file or folder that was not there before. Prints one line of JSON with the number of files for each reader,
how many of them were read and how many refused, and what was wrong; such files are kept in `--output_dir`.

With `--engine atheris` (`pip install atheris`), one reader is fuzzed by coverage of its code:

    python benchmarks/fuzz_readers.py --engine atheris --readers pickle --seconds 60
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch

from monai_sacb.apps.applying import _sidecar_grid, load_mappings
from monai_sacb.apps.registering import _read_pairs
from monai_sacb.data import (
    load_subjects,
    make_pairs,
    read_displacement,
    read_pickled_arrays,
    read_point_set,
    read_transform,
    read_volume,
    write_displacement,
)
from monai_sacb.data.point_files import read_point_table
from monai_sacb.data.spatial_mapping import PhysicalField, SpatialMapping
from monai_sacb.data.transform_files import write_transform
from monai_sacb.data.voxel_fields import load_learn2reg_field, save_learn2reg_field
from monai_sacb.handlers import PairJournal
from monai_sacb.transforms import LoadVolumed
from monai_sacb.utils import read_checkpoint
from monai_sacb.visualize.report_source import ReportSource

HANG_SECONDS = 10
MEMORY = 4 << 30
# packages whose branches lead atheris
INSTRUMENTED = ("monai_sacb", "nibabel", "json", "csv")
# what numbers and words of a text are replaced by
TEXT_TOKENS = (
    *(b"nan", b"inf", b"-1e999", b"1e-320", b"-0", b"null", b"true", b"[]", b"{}", b",", b"LPS"),
    *(b"", b'"', b"\\ud800", b"\\n", b"\x00", b"\xff\xfe", b"\n", b"\r", b"../../../etc/passwd", b"/dev/zero"),
    *(b"9" * 400, b"a" * 5000, b"[" * 5000, b'{"a":' * 3000),
)
BYTE_TOKENS = tuple(
    int(value).to_bytes(size, order, signed=value < 0)
    for value in (0, 1, -1, 127, 32767, 2**31 - 1, -(2**31))
    for size in (1, 2, 4, 8)
    for order in ("little", "big")
    if -(2 ** (8 * size - 1)) <= value < 2 ** (8 * size - 1)
)
JSON_LIST = {"training": [{"image": f"./{i}.nii", "label": f"./{i}.nii"} for i in "abcd"], "numTraining": 4}
MARKUPS = {
    "markups": [
        {
            "type": "Fiducial",
            "coordinateSystem": "LPS",
            "coordinateUnits": "mm",
            "controlPoints": [{"id": "1", "label": "first", "position": [1.5, -2.0, 3.0], "positionStatus": "defined"}],
        }
    ]
}
FCSV = "# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n# columns = id,x,y,z,label\n1,1.5,2,3,first\n"
SIDECAR = {
    "fixed": {"path": "f.nii", "shape": [6, 5, 4], "affine": np.eye(4).tolist()},
    "moving": {"path": "m.nii", "shape": [6, 5, 4], "affine": np.eye(4).tolist()},
    "affine": np.eye(4).tolist(),
}


class Reader(NamedTuple):
    """One way to read: the name of its file, whole files, and the function."""

    name: str
    seeds: list[bytes]
    read: Callable[[Path], Any]


def _written(write: Callable[[Path], Any], name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def _torch_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def make_readers() -> dict[str, Reader]:
    """All readers by name."""
    rng = np.random.default_rng(0)
    volume = rng.random((6, 5, 4), dtype=np.float32)
    field = PhysicalField(torch.from_numpy(rng.random((3, 4, 5, 6), dtype=np.float32)), torch.eye(4).double())
    mapping = SpatialMapping([torch.eye(4).double(), field])
    affine = SpatialMapping([torch.eye(4).double()])
    image = nib.Nifti1Image(volume, np.diag([-1.0, 2, 1, 1]))
    nifti = _written(lambda path: nib.save(image, path), "a.nii")
    pickles = [pickle.dumps((volume, volume.astype(np.int16)), protocol) for protocol in (0, 2, 4, 5)]
    fields = [
        _written(lambda path: save_learn2reg_field(field.vectors, path), "a.npz"),
        _written(lambda path: save_learn2reg_field(torch.ones(3, 4, 6, 8), path, True), "a.npz"),
    ]
    header = json.dumps({"settings": {"a": 1}})
    journal = "\n".join([header, json.dumps({"pair": 0, "moving": "m", "fixed": "f", "values": {"d": [0.5]}}), ""])

    def datalist(path: Path) -> Any:
        for name in "abcd":
            (path.parent / f"{name}.nii").touch()
        return load_subjects(path), make_pairs(path)

    def sidecar(path: Path) -> Any:
        for name in ("displacement.nii.gz", "warped.nii.gz", "jacobian.nii.gz"):
            (path.parent / name).write_bytes(b"")
        (path.parent / "metrics.json").write_text('{"verdict": "good"}')
        try:
            return _sidecar_grid(path.parent, "fixed")
        finally:
            ReportSource.read(path.parent)

    texts = {
        "csv_points": Reader("p.csv", [b"x,y,z,label\n1,2,3,a\n4,5,6,b\n", b"# LPS\nx,y,z\n1,2,3\n"], read_point_set),
        "voxel_points": Reader("p.csv", [b"1,2,3\n4,5,6\n", b"1 2 3\n4 5 6\n"], read_point_table),
        "fcsv_points": Reader("p.fcsv", [FCSV.encode()], read_point_set),
        "markups": Reader("p.mrk.json", [json.dumps(MARKUPS).encode()], read_point_set),
        "datalist": Reader("dataset.json", [json.dumps(JSON_LIST).encode()], datalist),
        "pairs_csv": Reader(
            "pairs.csv", [b"fixed,moving,output\na.nii,b.nii,x\n"], lambda path: _read_pairs(str(path))
        ),
        "journal": Reader("j.jsonl", [journal.encode()], lambda path: PairJournal(path, {"a": 1}, resume=True)),
        "sidecar": Reader("transform.json", [json.dumps(SIDECAR).encode()], sidecar),
        "affine_text": Reader("t.tfm", [_written(lambda path: write_transform(affine, path), "t.tfm")], read_transform),
    }
    nifti_field = _written(lambda path: save_learn2reg_field(field.vectors, path), "a.nii.gz")
    displacement = _written(lambda path: write_displacement(field, path), "d.nii")
    transform = _written(lambda path: write_transform(mapping, path), "t.h5")
    return texts | {
        "pickle": Reader("a.pkl", pickles, read_pickled_arrays),
        "weights": Reader("w.pt", [_torch_bytes({"a": torch.ones(3), "b": {"c": 1}})], read_checkpoint),
        "learn2reg_npz": Reader("disp.npz", fields, load_learn2reg_field),
        "learn2reg_nifti": Reader("disp.nii.gz", [nifti_field], load_learn2reg_field),
        "displacement": Reader("d.nii", [displacement], read_displacement),
        "transform_h5": Reader("t.h5", [transform], lambda path: load_mappings(str(path))),
        "volume": Reader("v.nii", [nifti], read_volume),
        "training_volume": Reader("v.nii", [nifti], lambda path: LoadVolumed("image")({"image": str(path)})),
    }


TEXTS = ("points", "markups", "datalist", "csv", "journal", "sidecar", "text")


def mutate(content: bytes, draw: random.Random, is_text: bool) -> bytes:
    """One to four changes."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        start = draw.randrange(len(data) + 1)
        length = draw.choice((1, 1, 2, 4, 8, 16, len(data) // 2))
        kind = draw.randrange(6)
        if kind == 0:
            del data[start:]
        elif kind == 1:
            del data[start : start + length]
        elif kind == 2:
            data[start:start] = data[draw.randrange(len(data) + 1) :][:length]
        elif kind == 3 and start < len(data):
            data[start] ^= 1 << draw.randrange(8)
        elif kind == 4:
            data[start : start + length] = draw.randbytes(length)
        else:
            token = draw.choice(TEXT_TOKENS if is_text or draw.random() < 0.1 else BYTE_TOKENS)
            stop = start + (draw.choice((0, 1, 4, 12)) if is_text else len(token))
            data[start:stop] = token
    return bytes(data)


class HangError(BaseException):
    """It takes too long."""


@contextmanager
def _limited_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise HangError

    # of CPU time, so that other work does not matter
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def attempt(reader: Reader, content: bytes, folder: Path) -> str:
    """Read a file: "read", "refused", or what is wrong."""
    inner = folder / "inside"
    inner.mkdir(exist_ok=True)
    path = inner / reader.name
    path.write_bytes(content)
    outside = sorted(os.listdir(folder))
    try:
        with _limited_time():
            reader.read(path)
        result = "read"
    except (ValueError, OSError) as error:
        text = str(error)
        broken = "\n" in text or "\r" in text or not text
        result = f"message {text[:200]!r}" if broken else "refused"
    except HangError:
        result = "more than ten seconds"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "monai_sacb" in f.filename]
        result = f"{type(error).__name__} at {ours[-1] if ours else '?'}: {str(error)[:100]!r}"
    if sorted(os.listdir(folder)) != outside:
        result = f"made files {sorted(set(os.listdir(folder)) - set(outside))}"
    return result


def fuzz(name: str, reader: Reader, seconds: float, seed: int, kept: Path | None) -> tuple[Counter[str], Counter[str]]:
    """Read changed files for some seconds; how many were read and refused, and what was wrong."""
    draw = random.Random(f"{seed} {name}")
    counts: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for content in reader.seeds:
            result = attempt(reader, content, Path(folder))
            if name != "sidecar" and result != "read":
                raise SystemExit(f"the whole file of '{name}' is not read: {result}.")
        end = time.process_time() + seconds
        while time.process_time() < end:
            content = mutate(draw.choice(reader.seeds), draw, name.endswith(TEXTS))
            result = attempt(reader, content, Path(folder))
            counts["files"] += 1
            if result in ("read", "refused"):
                counts[result] += 1
                continue
            if not wrong[result] and kept is not None:
                kept.mkdir(parents=True, exist_ok=True)
                (kept / f"{name}_{len(wrong)}_{reader.name}").write_bytes(content)
            wrong[result] += 1
    return counts, wrong


def fuzz_by_coverage(reader: Reader, seconds: float) -> None:
    """Hand one reader to atheris, which ends the process itself."""
    import atheris

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, content in enumerate(reader.seeds):
            (corpus / str(number)).write_bytes(content)
        place = Path(folder) / "work"
        place.mkdir()

        def one(content: bytes) -> None:
            result = attempt(reader, content, place)
            if result not in ("read", "refused"):
                raise RuntimeError(result)

        # those of all packages are a quarter of a million
        for function in gc.get_objects():
            if isinstance(function, FunctionType) and (function.__module__ or "").split(".")[0] in INSTRUMENTED:
                atheris.instrument_func(function)
        atheris.Setup([sys.argv[0], str(corpus), f"-max_total_time={int(seconds)}", "-verbosity=1"], one)
        atheris.Fuzz()


def main() -> None:
    """Run with the arguments of the command line."""
    readers = make_readers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="CPU seconds for each reader")
    parser.add_argument("--readers", nargs="+", choices=readers, default=list(readers))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="where files are kept that go wrong")
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if options.engine == "atheris":
        fuzz_by_coverage(readers[options.readers[0]], options.seconds)
        return
    result: dict[str, Any] = {}
    all_wrong: dict[str, int] = {}
    for name in options.readers:
        counts, wrong = fuzz(name, readers[name], options.seconds, options.seed, options.output_dir)
        result[name] = dict(counts)
        all_wrong |= {f"{name}: {what}": number for what, number in wrong.items()}
    total = {key: sum(counts.get(key, 0) for counts in result.values()) for key in ("files", "read", "refused")}
    sys.stdout.write(json.dumps({**result, "all": total, "wrong": all_wrong}) + "\n")
    if all_wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
