# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from monai.bundle import create_workflow
from monai.bundle import load as load_bundle

from monai_sacb.apps import bundle
from monai_sacb.networks.nets import SACBNet
from monai_sacb.utils import bundle_source
from monai_sacb.version import __version__

PARTS = ("LICENSE", "configs", "docs", "models")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_source_is_a_bundle() -> None:
    source = bundle_source()
    metadata = json.loads((source / "configs" / "metadata.json").read_text())
    assert {"version", "monai_version", "network_data_format"} <= metadata.keys()
    for name in ("train", "evaluate", "inference"):
        assert "run" in json.loads((source / "configs" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["copy", "new/folders/copy", "two words"])
def test_copy_is_complete(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    assert bundle(target) == str(target)
    source = bundle_source()
    expected = {name: data for name, data in contents(source).items() if name.split(os.sep)[0] in PARTS}
    assert {"LICENSE", os.path.join("configs", "train.json"), os.path.join("configs", "metadata.json")} <= set(expected)
    assert contents(target) == expected
    assert os.listdir(target.parent) == [target.name]


def test_copy_is_independent_of_the_source(tmp_path: Path) -> None:
    before = contents(bundle_source())
    target = Path(bundle(tmp_path / "copy"))
    (target / "configs" / "train.json").write_text("{}")
    assert contents(bundle_source()) == before
    assert not any(path.is_symlink() for path in target.rglob("*"))


def test_others_may_read_the_copy(tmp_path: Path) -> None:
    target = Path(bundle(tmp_path / "copy"))
    assert stat.S_IMODE(target.stat().st_mode) & 0o055 == 0o055


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bundle("copy") == "copy"
    assert (tmp_path / "copy" / "configs" / "inference.json").is_file()


@pytest.mark.parametrize("kind", ["empty folder", "folder", "file"])
def test_existing_target_is_left_alone(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "there"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        if kind == "folder":
            (target / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"there' exists already"):
        bundle(target)
    assert os.listdir(tmp_path) == ["there"]
    assert target.read_text() == "mine" if kind == "file" else len(os.listdir(target)) == (kind == "folder")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "KeyboardInterrupt"])
def test_nothing_is_left_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    copied = []
    copytree = shutil.copytree

    def failing(source: Path, *args: object, **kwargs: object) -> object:
        if copied:
            raise error
        copied.append(source)
        return copytree(source, *args, **kwargs)

    monkeypatch.setattr(shutil, "copytree", failing)
    with pytest.raises(type(error)):
        bundle(tmp_path / "copy")
    assert copied
    assert os.listdir(tmp_path) == []


def test_folder_of_the_target_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        bundle(tmp_path / "file" / "copy")


@pytest.fixture
def with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SACBNet:
    """Have the package come with weights of the width that ``inference.json`` has by default; theirs."""
    source = tmp_path / "package" / "bundle"
    shutil.copytree(bundle_source(), source, ignore=shutil.ignore_patterns("hippocampus*", "__pycache__"))
    torch.manual_seed(0)
    net = SACBNet(self_similarity=True).eval()
    torch.save(net.state_dict(), source / "models" / "model.pt")
    monkeypatch.setattr("monai_sacb.apps.bundle_copy.bundle_source", lambda: source)
    return net


def same_field(network: torch.nn.Module, expected: SACBNet) -> bool:
    x = torch.rand(1, 2, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.equal(network.eval()(x), expected(x))


def test_archive_loads_back(with_weights: SACBNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out" / "brain_mri_registration"
    path = Path(bundle(folder, archive=True))
    assert path == tmp_path / "out" / f"brain_mri_registration_v{__version__}.zip"
    assert sorted(os.listdir(path.parent)) == [folder.name, path.name]
    target = tmp_path / "downloads"
    with zipfile.ZipFile(path) as archive:
        assert {name.split("/")[0] for name in archive.namelist()} == {folder.name}
        archive.extractall(target)
    assert contents(target / folder.name) == contents(folder)
    # wherever one is
    monkeypatch.chdir(tmp_path)
    network = load_bundle(name=folder.name, bundle_dir=str(target), source="monaihosting", workflow_type="inference")
    assert same_field(network, with_weights)
    workflow = create_workflow(
        config_file=str(target / folder.name / "configs" / "inference.json"),
        workflow_type="inference",
        logging_file=False,
        bundle_root=str(target / folder.name),
    )
    workflow.parser.get_parsed_content("weights_loader")()
    assert same_field(workflow.network_def, with_weights)


def test_archives_of_the_same_are_the_same(with_weights: SACBNet, tmp_path: Path) -> None:
    first, second = (Path(bundle(tmp_path / name / "same", archive=True)).read_bytes() for name in ("a", "b"))
    assert first == second and len(first) > 10**6


@pytest.mark.parametrize("name", ["Brain", "brain-mri", "brain mri", "brain__mri", "_brain", "brain.mri"])
def test_name_of_an_archive(with_weights: SACBNet, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="needs a name of a-z, 0-9 and single underscores, got"):
        bundle(tmp_path / "out" / name, archive=True)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("missing", ["models/model.pt", "LICENSE", "configs/inference.json"])
def test_archive_lacks_a_file(with_weights: SACBNet, tmp_path: Path, missing: str) -> None:
    (tmp_path / "package" / "bundle" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"needs the file '{missing}'"):
        bundle(tmp_path / "out" / "brain", archive=True)
    assert os.listdir(tmp_path / "out") == []


def test_archive_with_a_large_file(with_weights: SACBNet, tmp_path: Path) -> None:
    with open(tmp_path / "package" / "bundle" / "docs" / "film.gif", "wb") as file:
        file.truncate(25_000_001)
    with pytest.raises(ValueError, match=r"'docs.film.gif' has 25\.0 MB; the Model Zoo takes files of 25 MB at most"):
        bundle(tmp_path / "out" / "brain", archive=True)
    assert os.listdir(tmp_path / "out") == []


def test_existing_archive_is_left_alone(with_weights: SACBNet, tmp_path: Path) -> None:
    path = tmp_path / f"brain_v{__version__}.zip"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"\.zip' exists already"):
        bundle(tmp_path / "brain", archive=True)
    assert path.read_text() == "mine" and not (tmp_path / "brain").exists()


def test_self_contained(with_weights: SACBNet, tmp_path: Path) -> None:
    plain, full = (Path(bundle(tmp_path / name, self_contained=name == "full")) for name in ("plain", "full"))
    package = Path(__file__).resolve().parents[2] / "monai_sacb"
    code = {f"monai_sacb/{name}": data for name, data in contents(package).items() if not name.startswith("bundle")}
    before, after = contents(plain), contents(full)
    changed = os.path.join("configs", "metadata.json")
    assert {name: data for name, data in after.items() if name != changed} == {
        **{name: data for name, data in before.items() if name != changed},
        **code,
    }
    asked, asks = (json.loads(text[changed])["required_packages_version"] for text in (before, after))
    assert asked.pop("monai_sacb") == __version__ and asks == asked


def test_package_needs_nothing_but_monai_and_its_extras() -> None:
    """What the code inside a self-contained bundle imports; nilearn and onnx are for the sample and for exports."""
    used = set()
    for path in (Path(__file__).resolve().parents[2] / "monai_sacb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                used.add(node.module.split(".")[0])
    known = {"ignite": "pytorch-ignite", "PIL": "pillow"}
    extras = {re.match(r"[\w-]+", line)[0] for line in requires("monai") or () if "all" in line}  # type: ignore[index]
    foreign = {known.get(name, name) for name in used - set(sys.stdlib_module_names)}
    assert "pytorch-ignite" in foreign & extras
    # which come with PyTorch and with matplotlib
    come_along = {"jinja2", "contourpy"}
    assert foreign - extras - come_along - {"monai", "monai_sacb", "torch", "numpy", "nilearn"} == set()


def run_bundle(folder: Path, arguments: list[str], cwd: Path, path: list[Path]) -> None:
    """Run Python where the package itself, if it is found, fails."""
    broken = folder.parent / "broken" / "monai_sacb"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('this is the installed package')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, broken.parent]))}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_self_contained_runs(with_weights: SACBNet, tmp_path: Path) -> None:
    """As a download is run: from its folder, by MONAI's own command."""
    folder = Path(bundle(tmp_path / "brain", self_contained=True))
    for name in ("a", "b"):
        data = np.random.default_rng(ord(name)).random((20, 22, 18)).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / f"{name}.nii.gz")
    arguments = ["-m", "monai.bundle", "run", "--config_file", "configs/inference.json", "--device", "cpu"]
    arguments += ["--moving_image", "../a.nii.gz", "--fixed_image", "../b.nii.gz", "--output_dir", "../output"]
    run_bundle(folder, arguments, folder, [])
    warped = nib.load(tmp_path / "output" / "registered" / "a_to_b" / "warped.nii.gz")
    assert warped.shape == (20, 22, 18) and np.asarray(warped.dataobj).std() > 0


@pytest.mark.slow
def test_self_contained_loads(with_weights: SACBNet, tmp_path: Path) -> None:
    """By ``monai.bundle.load`` from elsewhere, with the bundle's folder on the path."""
    folder = Path(bundle(tmp_path / "brain", self_contained=True))
    script = (
        "import torch, monai.bundle as b; net = b.load('brain', bundle_dir='.', workflow_type='inference', "
        "source='monaihosting', device='cpu').eval(); x = torch.rand(1, 2, 32, 32, 32, "
        "generator=torch.Generator().manual_seed(0)); y = torch.no_grad()(net)(x); torch.save(y, 'field.pt')"
    )
    run_bundle(folder, ["-c", script], tmp_path, [folder])
    x = torch.rand(1, 2, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "field.pt", weights_only=True), with_weights(x))
