# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""``label-bundle``: an atlas as a segmentation model that MONAI Label loads."""

from __future__ import annotations

import csv
import json
import logging
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai.bundle import ConfigComponent, ConfigParser
from monai.data import MetaTensor

from monai_sacb.apps.pair_reading import Subject, read_subject
from monai_sacb.apps.registration import RegistrationOptions, Setting
from monai_sacb.data.volumes import write_volume
from monai_sacb.inferers.label_fusion import FUSIONS
from monai_sacb.transforms import number_labels
from monai_sacb.utils import bundle_source, new_folder, plain_tensor, write_json
from monai_sacb.version import __version__

__all__ = ["label_bundle"]

TEMPLATES = Path(__file__).resolve().parent / "templates"
# words by which MONAI Label takes a bundle for a model of another kind
OTHER_KINDS = ("deepedit", "deepgrow", "detection", "classification")
# entries of the model's configs that a label bundle takes over
TAKEN_OVER = (
    "network_def",
    "working_grid",
    "scale_intensity",
    "refinement",
    "fine_grid",
    "fine_refinement",
    "affine_stage",
)
BACKGROUND = "background"


def _read_csv(path: str) -> list[tuple[str, str]]:
    """Files of the atlases of a CSV file with the columns image and label; paths relative to it."""
    root = Path(path).parent
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [[value.strip() for value in row] for row in csv.reader(file, strict=True)] or [[]]
    except OSError as error:
        raise FileNotFoundError(f"cannot read atlases '{path}': {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read atlases '{path}': {error}.") from error
    rows = [row for row in rows if any(row)]
    if sorted(header) != ["image", "label"] or not rows or not all(len(row) == 2 and all(row) for row in rows):
        raise ValueError(f"atlases '{path}' must have the columns image and label, and a file of both in each line.")
    places = [[str(root / os.path.expanduser(value)) for value in row] for row in rows]
    listed = [(place[header.index("image")], place[header.index("label")]) for place in places]
    # one image may have label maps of several observers
    counts = Counter(tuple(map(os.path.realpath, atlas)) for atlas in listed)
    repeated = [image for image, label in listed if counts[os.path.realpath(image), os.path.realpath(label)] > 1]
    if repeated:
        raise ValueError(f"atlases '{path}' lists '{repeated[0]}' twice with one label map; it would have two votes.")
    return listed


def _read_names(path: str | None) -> dict[int, str]:
    """Names of labels by id."""
    if path is None:
        return {}
    try:
        # an object as its pairs, since a key may come twice in it
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=tuple)
        if not isinstance(content, tuple):
            raise ValueError("not an object")
        keys = [int(key) for key, _ in content]
    except OSError as error:
        raise FileNotFoundError(f"cannot read names '{path}': {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'names \'{path}\' must be a JSON object of ids and names, as {{"17": "hippocampus"}}.'
        ) from error
    names = {key: name for key, (_, name) in zip(keys, content)}
    twice = [key for key in names if keys.count(key) > 1]
    if twice:
        written = " and ".join(f"'{text}'" for key, (text, _) in zip(keys, content) if key == twice[0])
        raise ValueError(f"names '{path}' names the label {twice[0]} more than once, as {written}.")
    wrong = [key for key, name in names.items() if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise ValueError(f"names '{path}' gives the label {wrong[0]} no name, but {names[wrong[0]]!r}.")
    # in one line, as they stand in tables
    return {key: " ".join(name.split()) for key, name in names.items()}


def _label_names(ids: Sequence[int], given: Mapping[int, str]) -> dict[int, str]:
    """A name for each id; MONAI Label tells names apart in lower case only."""
    names = {label: given.get(label, str(label)) for label in ids}
    lower = [name.lower() for name in names.values()]
    for name in names.values():
        if lower.count(name.lower()) > 1:
            raise ValueError(f"several labels are called '{name}', in upper or lower case.")
    if BACKGROUND in lower:
        label = ids[lower.index(BACKGROUND)]
        raise ValueError(f"the label {label} must not be called '{BACKGROUND}': that is what 0 is.")
    unnamed = [label for label in ids if label not in given]
    if given and unnamed:
        logging.getLogger(__name__).warning(f"labels without a name are called by their ids: {unnamed}.")
    return names


def _ids(atlases: Sequence[Subject]) -> list[int]:
    ids = sorted({int(value) for atlas in atlases for value in torch.unique(plain_tensor(atlas.label))} - {0})
    if not ids:
        raise ValueError("the atlas has no label.")
    if ids[0] < 0:
        raise ValueError(f"the atlas has the label {ids[0]}; labels must be positive, 0 is background.")
    return ids


def _self_contained(value: Any) -> bool:
    """Whether an entry of a config refers to no other, and is what JSON can hold."""
    if isinstance(value, str):
        return not value.startswith(("$", "@", "%"))
    if isinstance(value, (Mapping, list)):
        return all(map(_self_contained, value.values() if isinstance(value, Mapping) else value))
    return value is None or isinstance(value, (int, float))


def _as_config(value: Any) -> Any:
    """A parsed entry, with the components in it, as it stands in a config."""
    if isinstance(value, ConfigComponent):
        value = value.get_config()
    if isinstance(value, Mapping):
        return {key: _as_config(entry) for key, entry in value.items()}
    return [_as_config(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _config(setting: Setting, options: Mapping[str, Any], number: int) -> dict[str, Any]:
    """``inference.json``."""
    config: dict[str, Any] = json.loads((TEMPLATES / "label_inference.json").read_text(encoding="utf-8"))
    entries = {name: setting.parser[name] for name in TAKEN_OVER}
    # what depends on the weights is known now; a parser of its own, since the other has made the network already
    network_def = ConfigParser(setting.parser.get()).get_parsed_content("network_def", instantiate=False)
    if isinstance(network_def, ConfigComponent):
        entries["network_def"] = _as_config(network_def)
    for name, entry in entries.items():
        if not _self_contained(entry):
            raise ValueError(
                f"the model '{setting.model.name}' cannot be put into a label bundle: the entry '{name}' of its "
                "configs refers to others, or holds what JSON does not."
            )
    # of the label bundle, the network is all of it together
    network = entries.pop("network_def")
    config["registration_network"] = {"_target_": "IdentityField"} if setting.network is None else network
    config.update(entries)
    if not options["affine"]:
        config["affine_stage"] = None
    config["refine"], config["fine"] = setting.refine, setting.fine
    config["fusion"]["fusion"] = options["fusion"]
    config["atlases"] = [
        {kind: f"atlas/{kind}{'' if number == 1 else f'_{index}'}.nii.gz" for kind in ("image", "label")}
        for index in range(1, number + 1)
    ]
    return config


def _metadata(name: str, names: Mapping[int, str], number: int, has_network: bool) -> dict[str, Any]:
    source = json.loads((bundle_source() / "configs" / "metadata.json").read_text(encoding="utf-8"))
    taken = ("schema", "monai_version", *(["references"] if has_network else []))
    shape = {"type": "image", "num_channels": 1, "spatial_shape": ["*", "*", "*"], "is_patch_data": False}
    return {
        **{key: source[key] for key in taken},
        # whose the atlas is, nobody has said
        "authors": "not stated",
        "copyright": "not stated; that of the atlas is that of its source",
        "version": "0.1.0",
        "changelog": {"0.1.0": "written by monai-sacb label-bundle"},
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"monai_sacb": __version__, "nibabel": version("nibabel"), "itk": version("itk")},
        "name": name,
        "task": "Segmentation by registration to an atlas",
        "description": f"Lays {number} labelled {'atlas' if number == 1 else 'atlases'} on a 3-D image of any size, "
        "spacing and orientation, and returns the labels on its grid.",
        "data_type": "nifti",
        "image_classes": "single-channel 3-D image of any range of intensities",
        "pred_classes": "label map with the ids of channel_def",
        "intended_use": "This is a research tool, not for clinical use.",
        "network_data_format": {
            "inputs": {
                "image": {
                    **shape,
                    "format": "magnitude",
                    "modality": "any",
                    "dtype": "float32",
                    "value_range": [],
                    "channel_def": {"0": "image"},
                }
            },
            "outputs": {
                "pred": {
                    **shape,
                    "format": "segmentation",
                    "dtype": "int32" if max(names) > 32767 else "int16" if max(names) > 255 else "uint8",
                    "value_range": [0, max(names)],
                    "channel_def": {"0": BACKGROUND, **{str(label): text for label, text in names.items()}},
                }
            },
        },
    }


def _readme(
    folder: str,
    name: str,
    setting: Setting,
    options: Mapping[str, Any],
    names: Mapping[int, str],
    own: Sequence[int],
    number: int,
) -> str:
    stages = ["an affine by mutual information" if options["affine"] else "no affine, the headers count"]
    if setting.network is not None:
        stages.append(f"the network `{setting.model.name}`")
    stages.append(f"{setting.refine} steps of instance optimization" if setting.refine else "no instance optimization")
    if setting.fine:
        stages.append(f"{setting.fine} more on a finer grid, where the images are finer than the first one")
    fusion = {
        "majority": "the majority decides",
        "locally_weighted": "those count more that resemble the subject there",
    }
    renumbered = list(names) != list(own)
    return (
        (TEMPLATES / "label_readme.md")
        .read_text(encoding="utf-8")
        .format(
            name=name,
            name_of_folder=folder,
            folder=shlex.quote(folder),
            configs=shlex.quote(f"{folder}/configs/inference.json"),
            version=__version__,
            what="an atlas is" if number == 1 else f"{number} atlases are",
            stages=", ".join(stages),
            fusion="One atlas." if number == 1 else f"{number} atlases: at each voxel, {fusion[options['fusion']]}.",
            own_header=" id in the atlas |" if renumbered else "",
            own_rule="---|" if renumbered else "",
            labels="\n".join(
                f"| {label} | {text.replace('|', chr(92) + '|')} |" + (f" {before} |" if renumbered else "")
                for (label, text), before in zip(names.items(), own)
            ),
        )
    )


def _write_atlas(atlas: Subject, config: Mapping[str, str], folder: Path, own: Sequence[int] | None) -> None:
    """The files of an atlas, anew: without what else the headers held."""
    label = plain_tensor(atlas.label)
    if own is not None:
        label = number_labels(label, own)
    highest = int(label.max())
    kind = next(kind for kind in (np.uint8, np.int16, np.int32) if highest <= np.iinfo(kind).max)
    write_volume(atlas.image, folder / config["image"], np.dtype(str(atlas.image.meta["original_dtype"])))
    write_volume(MetaTensor(label, affine=atlas.grid.affine), folder / config["label"], kind)


def _write_model(setting: Setting, folder: Path) -> None:
    """Weights by the names that the whole model has for them, the licence, and the card of the network."""
    state = {} if setting.network is None else setting.network.state_dict()
    (folder / "models").mkdir()
    torch.save({f"network.{key}": value.cpu() for key, value in state.items()}, folder / "models" / "model.pt")
    shutil.copyfile(bundle_source() / "LICENSE", folder / "LICENSE")
    weights = setting.model.weights
    if weights is not None and weights.with_suffix(".json").is_file():
        shutil.copyfile(weights.with_suffix(".json"), folder / "docs" / "model_card.json")
    licence = setting.model.bundle_root / "docs" / "data_license.txt"
    if weights is not None and licence.is_file():
        shutil.copyfile(licence, folder / "docs" / "data_license.txt")


def _check_loads(folder: Path) -> None:
    """Make the model as MONAI Label will."""
    parser = ConfigParser()
    parser.read_config(str(folder / "configs" / "inference.json"))
    parser["bundle_root"] = str(folder)
    model = parser.get_parsed_content("network_def")
    model.load_state_dict(torch.load(folder / "models" / "model.pt", map_location="cpu", weights_only=True))


def label_bundle(
    output_dir: str,
    atlas_image: str | None = None,
    atlas_label: str | None = None,
    atlases: str | None = None,
    names: str | None = None,
    model: str = "none",
    affine: bool = True,
    refine: int | None = None,
    fine: int | None = None,
    fusion: str = "majority",
    renumber: bool = False,
    seed: int = 0,
) -> str:
    """
    Write a bundle that segments by an atlas: MONAI Label's app monaibundle loads it as it is.

    A subject comes in, of any size, spacing and orientation; the atlas is registered to it as by register, and its
    labels come back on the subject's grid. The bundle holds all it needs but this package.

    Args:
        output_dir: the new folder; it must not exist yet. Its name is that of the model in MONAI Label.
        atlas_image: the image of the atlas.
        atlas_label: its label map.
        atlases: a CSV file with the columns image and label, instead of one atlas; paths relative to it.
        names: a JSON file with an object of ids and names, {"17": "hippocampus"}; a label that it does not name is
            called by its id.
        model: name of a model that came along, file of weights, folder of a bundle, or none.
        affine: whether to estimate the affine; if not, subjects lie as the atlas does by their headers.
        refine: steps of gradient descent on the field, as those of register.
        fine: further steps on a finer grid, as those of register.
        fusion: of several atlases, majority or locally_weighted: by how much each resembles the subject there.
        renumber: number the labels 1, 2, ... instead of keeping the ids of the atlas.
        seed: of the affine stage's samples.

    Returns:
        the folder.

    Raises:
        FileExistsError: When the folder exists.
        FileNotFoundError: When a file or the model does not exist.
        ValueError: When a file or an option cannot be used; the message says why.
    """
    target = Path(output_dir)
    if target.exists():
        raise FileExistsError(f"'{target}' exists already.")
    taken = [word for word in OTHER_KINDS if word in target.name.lower()]
    if taken:
        raise ValueError(f"'{target.name}' has '{taken[0]}' in it, by which MONAI Label would not segment.")
    if "," in target.name:
        raise ValueError(f"'{target.name}' has a comma in it, where MONAI Label takes one name for two.")
    if fusion not in FUSIONS:
        raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}, got '{fusion}'.")
    if (atlases is None) == (atlas_image is None and atlas_label is None):
        raise ValueError("give either atlases, or atlas_image and atlas_label.")
    if atlases is None and (atlas_image is None or atlas_label is None):
        raise ValueError("an atlas needs both atlas_image and atlas_label.")
    listed = [(str(atlas_image), str(atlas_label))] if atlases is None else _read_csv(atlases)
    given = _read_names(names)
    setting = Setting(RegistrationOptions(model, refine=refine, fine=fine, seed=seed, device="cpu"))
    subjects = [read_subject("atlas", image, label) for image, label in listed]
    own = _ids(subjects)
    by_own = _label_names(own, given)
    label_names = {number if renumber else label: by_own[label] for number, label in enumerate(own, start=1)}
    options = {"affine": affine, "fusion": fusion}
    config = _config(setting, options, len(subjects))
    name = f"Atlas segmentation: {target.name}"
    with new_folder(target) as folder:
        for part in ("atlas", "configs", "docs"):
            (folder / part).mkdir()
        for subject, files in zip(subjects, config["atlases"]):
            _write_atlas(subject, files, folder, own if renumber else None)
        table = [{"id": label, "name": text, "atlas_id": o} for (label, text), o in zip(label_names.items(), own)]
        write_json(table, folder / "atlas" / "labels.json")
        write_json(config, folder / "configs" / "inference.json")
        metadata = _metadata(name, label_names, len(subjects), setting.network is not None)
        write_json(metadata, folder / "configs" / "metadata.json")
        shutil.copyfile(bundle_source() / "configs" / "logging.conf", folder / "configs" / "logging.conf")
        readme = _readme(target.name, name, setting, options, label_names, own, len(subjects))
        (folder / "docs" / "README.md").write_text(readme, encoding="utf-8")
        _write_model(setting, folder)
        _check_loads(folder)
    return str(target)
