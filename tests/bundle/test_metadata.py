# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""What the Model Zoo's checker asks of a bundle."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from monai.bundle import ConfigParser, ckpt_export, verify_metadata, verify_net_in_out
from monai.bundle import load as load_bundle

from monai_sacb.networks import stored_setting
from monai_sacb.networks.nets import SACBNet
from monai_sacb.version import __version__

BUNDLE = Path(__file__).resolve().parents[2] / "bundle"
METADATA = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
LARGEST_FILE = 25 * 10**6
# the rules of meta_schema_20240725.json, which the checker downloads; what the zoo asks beyond them: changelog, name
TEXTS = "schema version monai_version pytorch_version numpy_version task description authors copyright name"
TENSOR = {
    "type": "object",
    "properties": {
        "type": {"type": "string"},
        "format": {"type": "string"},
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "dtype": {"type": "string"},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
}
TENSORS = {"type": "object", "additionalProperties": TENSOR}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2019-09/schema",
    "type": "object",
    "properties": {
        **{key: {"type": "string"} for key in TEXTS.split()},
        **{key: {"type": "string"} for key in ("data_source", "data_type", "image_classes", "label_classes")},
        **{key: {"type": "string"} for key in ("pred_classes", "intended_use")},
        **{key: {"type": "object"} for key in ("changelog", "required_packages_version", "eval_metrics")},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
            "required": ["inputs", "outputs"],
        },
    },
    "required": [*TEXTS.split(), "required_packages_version", "network_data_format", "changelog"],
}
INFERENCE_KEYS = "bundle_root device network_def inferer output_dir preprocessing postprocessing run"
TRAIN_KEYS = (
    "bundle_root device dataset_dir output_dir val_interval run train#trainer#max_epochs train#dataset#data "
    "train#handlers train#preprocessing train#inferer validate#evaluator validate#handlers validate#dataset#data "
    "validate#preprocessing validate#postprocessing validate#inferer validate#key_metric"
)
README_SECTIONS = [
    "### **Authors**",
    "### **Tags**",
    "## **Model Description**",
    "## **Data**",
    "#### **Preprocessing**",
    "## **Performance**",
    "## **Additional Usage Steps**",
    "## **System Configuration**",
    "## **Limitations**",
    "## **Citation Info**",
    "## **References**",
    "## **License**",
]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Of the width that ``inference.json`` has where no weights say another."""
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    torch.save(SACBNet(self_similarity=True).state_dict(), path)
    return path


def test_files() -> None:
    for name in ("LICENSE", "configs/train.json", "configs/inference.json", "configs/evaluate.json", "docs/README.md"):
        assert (BUNDLE / name).stat().st_size > 0, name
    assert (BUNDLE / "docs" / "data_license.txt").stat().st_size > 0


def test_no_file_is_too_large() -> None:
    files = [path for path in BUNDLE.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path.name for path in files if path.stat().st_size > LARGEST_FILE] == []


def test_metadata() -> None:
    assert METADATA["version"] == __version__
    assert METADATA["version"] in METADATA["changelog"]
    assert METADATA["schema"].endswith("meta_schema_20240725.json")
    for kind, name in (("inputs", "image"), ("outputs", "pred")):
        tensor = METADATA["network_data_format"][kind][name]
        assert len(tensor["channel_def"]) == tensor["num_channels"]


def test_required_packages() -> None:
    """An exact version of each package that the installation asks for, but MONAI, PyTorch and NumPy."""
    setup = configparser.ConfigParser()
    setup.read(BUNDLE.parent / "setup.cfg")
    asked = {re.match(r"[\w-]+", line)[0] for line in setup["options"]["install_requires"].split("\n") if line}  # type: ignore[index]
    given = METADATA["required_packages_version"]
    # it comes with PyTorch
    assert set(given) == asked - {"monai", "torch", "numpy", "jinja2"} | {"monai_sacb"}
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in given.values())


def verify(metadata: dict[str, Any], folder: Path) -> None:
    """MONAI's verify_metadata, which downloads nothing where the schema is there."""
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    (folder / "metadata.json").write_text(json.dumps(metadata))
    verify_metadata(meta_file=str(folder / "metadata.json"), filepath=str(folder / "schema.json"))


def test_schema(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    verify(METADATA, tmp_path)
    for key in SCHEMA["required"]:
        with pytest.raises(ValueError, match=f"'{key}' is a required property|must provide the `schema` field"):
            verify({name: value for name, value in METADATA.items() if name != key}, tmp_path)


@pytest.mark.parametrize(("name", "keys"), [("inference", INFERENCE_KEYS), ("train", TRAIN_KEYS)])
def test_keys(name: str, keys: str) -> None:
    parser = ConfigParser(json.loads((BUNDLE / "configs" / f"{name}.json").read_text()))
    assert [key for key in keys.split() if key not in parser] == []


def test_readme_has_the_sections_of_the_template() -> None:
    lines = (BUNDLE / "docs" / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert [line for line in lines if line in README_SECTIONS] == README_SECTIONS
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", "\n".join(lines)):
        assert (BUNDLE / "docs" / figure).is_file()


@pytest.mark.parametrize("name", ["base_channels", "self_similarity"])
def test_network_without_weights(name: str) -> None:
    """Programs that build the network before they know where the weights are build that of the bundle's own."""
    path = BUNDLE / "models" / "model.pt"
    entry = json.loads((BUNDLE / "configs" / "inference.json").read_text())["network_def"][name]
    default = ConfigParser({"x": entry.replace("@ckpt_path", "None"), "imports": ["$import monai_sacb"]})
    assert default.get_parsed_content("x") == stored_setting(path, name, -1)


def test_network_input_and_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BUNDLE)
    verify_net_in_out(
        net_id="network_def",
        meta_file="configs/metadata.json",
        config_file="configs/inference.json",
        device="cpu",
        n=1,
        p=1,
        any=1,
    )


@pytest.mark.parametrize("own", [True, False])
def test_export_to_torchscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check_same_field, own: bool) -> None:
    """Weights of another kind than the bundle's own are also named as those that the config is for."""
    monkeypatch.chdir(BUNDLE)
    torch.manual_seed(0)
    net = SACBNet(self_similarity=True) if own else SACBNet(base_channels=2)
    path = str(tmp_path / "model.pt")
    torch.save(net.state_dict(), path)
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=path,
        meta_file="configs/metadata.json",
        config_file="configs/inference.json",
        key_in_ckpt="",
        **({} if own else {"ckpt_path": path}),
    )
    x = torch.rand(1, 2, 33, 40, 36)
    with torch.no_grad():
        check_same_field(torch.jit.load(tmp_path / "model.ts")(x), net(x))


def test_load_returns_the_network(weights: Path, tmp_path: Path) -> None:
    target = tmp_path / "zoo" / "sacb"
    from monai_sacb.apps import bundle

    bundle(target)
    (target / "models" / "model.pt").unlink(missing_ok=True)
    weights.rename(target / "models" / "model.pt")
    net = load_bundle(name="sacb", bundle_dir=str(target.parent), source="monaihosting", workflow_type="inference")
    network = net["model"] if isinstance(net, dict) else net
    x = torch.rand(1, 2, 32, 32, 32)
    reference = SACBNet(self_similarity=True)
    reference.load_state_dict(torch.load(target / "models" / "model.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(network(x), reference(x))
