# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Turning folders of pickled subjects into NIfTI files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from tqdm.auto import tqdm

from monai_sacb.data.folders import describe_folder
from monai_sacb.data.pickle_reader import read_pickled_arrays
from monai_sacb.utils import file_digest, replacing

__all__ = ["convert_pickled_folder"]

# endings of the folders of images and labels; Decathlon's where it has them
NAME = "converted from pickle files"
FOLDER_ENDINGS = {"training": "Tr", "validation": "Val", "test": "Ts"}


def _image_array(array: np.ndarray) -> np.ndarray:
    """Intensities in a type that NIfTI readers know, no wider than float32 where that is no loss to registration."""
    if array.dtype.kind == "c":
        raise ValueError("the image is complex")
    return array if array.dtype in (np.uint8, np.int16, np.uint16) else array.astype(np.float32)


def _label_array(array: np.ndarray) -> np.ndarray:
    """Label values as they are, in the smallest common type of whole numbers."""
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all() or (array != np.rint(array)).any():
        raise ValueError("the label map has values that are no whole numbers")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    raise ValueError(f"the label map has values from {low} to {high}")


def _made_from(path: Path) -> str | None:
    """The mark that tells which pickle file a NIfTI file was made from."""
    try:
        return bytes(nib.load(path).header["descrip"]).rstrip(b"\0").decode("ascii", "replace")
    except (OSError, ImageFileError):
        return None


def _convert(source: Path, targets: Mapping[str, Path]) -> None:
    """Write those of the volumes of a pickle file that are not there yet."""
    mark = f"sha256 {file_digest(source)[:64]}"
    missing = {key for key, path in targets.items() if _made_from(path) != mark}
    if not missing:
        return
    arrays = read_pickled_arrays(source)
    if len(arrays) != len(targets):
        raise ValueError(
            f"'{source}' holds {len(arrays)} arrays instead of {len(targets)}, as the first file of its folder does."
        )
    for (key, path), array, make in zip(targets.items(), arrays, (_image_array, _label_array)):
        if array.ndim not in (2, 3):
            raise ValueError(f"'{source}': the {key} has {array.ndim} dimensions.")
        if array.shape != arrays[0].shape:
            raise ValueError(f"'{source}': the image has size {arrays[0].shape}, but its label map {array.shape}.")
        try:
            volume = make(array)
        except ValueError as error:
            raise ValueError(f"'{source}': {error}.") from error
        if key in missing:
            image = nib.Nifti1Image(volume, np.eye(4))
            image.header["descrip"] = mark.encode()
            with replacing(path) as temporary:
                nib.save(image, temporary)


def convert_pickled_folder(input_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> str:
    """
    Convert a folder of pickled brain images into NIfTI files with a dataset.json.

    The folder has subfolders Train and Val, perhaps Test, of .pkl files of an image and its label map, and perhaps a
    file atlas.pkl. Nothing in such a file is run. Label values stay as they are; voxels are 1 mm along the axes R, A
    and S, since the files say nothing of their place in space. A conversion that was stopped goes on where it was:
    files that were made from the same pickle files are left alone.

    Args:
        input_dir: the folder of pickled images.
        output_dir: the folder for the NIfTI files and the dataset.json.

    Returns:
        the output folder.

    Raises:
        FileNotFoundError: When the input folder is not one of this kind.
        ValueError: When a file is not a pickle of an image and a label map, both folders are the same, or the output
            folder has a dataset.json of other origin.
    """
    source, target = Path(input_dir), Path(output_dir)
    content = describe_folder(source)
    if content is None:
        raise FileNotFoundError(f"'{source}' has no folder Train of .pkl files.")
    if target.exists() and (not target.is_dir() or target.samefile(source)):
        raise ValueError(f"output_dir must be a folder other than input_dir, got '{target}'.")
    description = target / "dataset.json"
    if description.is_file() and NAME not in description.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"'{description}' is there already, and was not made by a conversion.")
    # relative to both folders: pickle files, and what their volumes become
    jobs: list[tuple[str, dict[str, str]]] = []
    renamed: dict[str, dict[str, str]] = {}
    for section, ending in FOLDER_ENDINGS.items():
        for entry in content.get(section, []):
            name = Path(entry["image"]).stem
            files = {key: f"./{key}s{ending}/{name}.nii.gz" for key in entry}
            jobs.append((entry["image"], files))
    if "atlas" in content:
        files = {key: "./atlas.nii.gz" if key == "image" else f"./atlas_{key}.nii.gz" for key in content["atlas"]}
        jobs.append((content["atlas"]["image"], files))
    seen: dict[str, str] = {}
    for pickled, files in jobs:
        if seen.setdefault(files["image"], pickled) != pickled:
            raise ValueError(f"'{source / seen[files['image']]}' and '{source / pickled}' would become one file.")
        renamed[pickled] = files
    for pickled, files in tqdm(jobs, desc="converting", unit="subject"):
        _convert(source / pickled, {key: target / path for key, path in files.items()})
    with replacing(target / "dataset.json") as temporary:
        temporary.write_text(json.dumps(_description(content, renamed), indent=2) + "\n", encoding="utf-8")
    return str(target)


def _description(content: Mapping[str, Any], renamed: Mapping[str, dict[str, str]]) -> dict[str, Any]:
    """The content of dataset.json, with the paths of the NIfTI files."""
    sections: dict[str, Any] = {
        section: [renamed[entry["image"]] for entry in content[section]]
        for section in FOLDER_ENDINGS
        if section in content
    }
    if "atlas" in content:
        sections["atlas"] = renamed[content["atlas"]["image"]]
    for name in ("registration_val", "registration_test"):
        if name in content:
            sections[name] = [
                {key: renamed[path]["label" if key.endswith("_label") else "image"] for key, path in pair.items()}
                for pair in content[name]
            ]
    return {
        "name": NAME,
        "description": "label values as in the pickle files; voxels of 1 mm by assumption",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "numTraining": len(sections["training"]),
        "numTest": len(sections.get("test", [])),
        **sections,
    }
