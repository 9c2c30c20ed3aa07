# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from synthetic_pair import MakePair, Pair, blobs, centred, deformation, grid_points, structures, write_itk


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> MakePair:
    """Write a pair with ``fixed(p) = moving(deformation(p))``, each on a grid of its own."""

    def make(
        fixed_affine: np.ndarray | None = None,
        moving_affine: np.ndarray | None = None,
        suffix: str = ".nii.gz",
        dtype: type = np.float32,
        offset: float = 0.0,
    ) -> Pair:
        folder = tmp_path_factory.mktemp("pair")
        files = {}
        for role, affine in (("fixed", fixed_affine), ("moving", moving_affine)):
            affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
            size = np.linalg.norm(affine[:3, :3], axis=0)
            shape = tuple(int(np.ceil(76 / s)) + i for i, s in enumerate(size))
            affine = centred(affine, shape)
            places = grid_points(shape, affine)
            inside = deformation(places) if role == "fixed" else places
            for name, function in ((role, blobs), (f"{role}_label", structures)):
                array = function(inside) + (offset if function is blobs else 0)
                stored = array.astype(dtype if function is blobs else np.int16)
                files[name] = str(folder / f"{name}{suffix}")
                if suffix.startswith(".nii"):
                    nib.save(nib.Nifti1Image(stored, affine), files[name])
                else:
                    write_itk(stored, affine, files[name])
        return Pair(**files)

    return make


@pytest.fixture(scope="session")
def pair(make_pair: MakePair) -> Pair:
    """One pair on grids of 2 mm."""
    return make_pair()


@pytest.fixture(scope="session")
def registered(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair, registered with labels."""
    from monai_sacb.apps import register

    folder = tmp_path_factory.mktemp("registered") / "out"
    register(**pair._asdict(), output_dir=str(folder), refine=40, affine="false")
    return folder


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty page in place of the report, whose pictures take seconds."""
    from monai_sacb.apps import registration

    def write(folder: Path, checks: object) -> None:
        (folder / "report.html").write_text("<p>report</p>")

    monkeypatch.setattr(registration, "write_report", write)
