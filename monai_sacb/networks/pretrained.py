# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Finding a registration network by name or path, and setting it up as its bundle says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monai.bundle import ConfigParser

from monai_sacb.utils import bundle_source, file_digest, read_checkpoint

__all__ = ["RegistrationModel", "available_models", "find_model", "load_pretrained", "stored_setting"]

# entries of the configs that a file beside weights may set
SETTINGS = (
    "network_def",
    "working_grid",
    "refinement",
    "refine_alone",
    "refine_after_network",
    "fine_grid",
    "fine_refinement",
    "fine_steps",
    "thresholds",
)

# the first convolution of SACBNet, whose number of channels is base_channels
FIRST_WEIGHT = "encoder.levels.0.0.conv.weight"


@dataclass(frozen=True)
class RegistrationModel:
    """
    A network with the bundle that says how to use it.

    Args:
        name: what to call it; ``"none"`` for no network.
        bundle_root: folder with ``configs/inference.json``.
        weights: file of the weights; None for no network.
        sha256: digest of that file.
        settings: entries of the configs that these weights go with, from the ``.json`` beside them.
    """

    name: str
    bundle_root: Path
    weights: Path | None = None
    sha256: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def parser(self, **overrides: Any) -> ConfigParser:
        """
        The configs ``inference.json`` and ``register.json`` of the bundle.

        Args:
            overrides: entries to set.
        """
        files = []
        for name in ("inference.json", "register.json"):
            # a bundle of somebody else's has no settings for two files as they come
            own = self.bundle_root / "configs" / name
            files.append(str(own if own.is_file() else bundle_source() / "configs" / name))
        parser = ConfigParser()
        parser.read_config(files)
        entries = {**self.settings, "bundle_root": str(self.bundle_root), "ckpt_path": str(self.weights), **overrides}
        for key, value in entries.items():
            parser[key] = value
        return parser

    def network(self, parser: ConfigParser) -> nn.Module | None:
        """The network with its weights, on the parser's device, in evaluation mode; None for no network."""
        if self.weights is None:
            return None
        network: nn.Module = parser.get_parsed_content("network")
        parser.get_parsed_content("weights_loader")()
        return network.eval()


def _is_plain(value: Any) -> bool:
    """Whether a value of a config is nothing that MONAI would run, look up or load."""
    if isinstance(value, str):
        return not value.startswith(("$", "@", "%"))
    if isinstance(value, Mapping):
        return all(not str(key).startswith("_") and _is_plain(entry) for key, entry in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list) else True


def _models_folder() -> Path:
    return bundle_source() / "models"


def _read_card(weights: Path) -> dict[str, Any]:
    """The file beside weights that describes them; empty where there is none."""
    path = weights.with_suffix(".json")
    if not path.is_file():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is not a JSON file ({error}).") from error
    if not isinstance(card, dict) or not isinstance(card.get("settings", {}), dict):
        raise ValueError(f"'{path}' is not the card of a model: it must be an object, perhaps with 'settings'.")
    return card


def _own_models() -> dict[str, Path]:
    """The weights that came with the package, by the names on their cards."""
    models: dict[str, Path] = {}
    for path in sorted(_models_folder().glob("*.pt")):
        try:
            name = str(_read_card(path).get("name", path.stem))
        except ValueError:
            # said when this very model is asked for; the others do not depend on it
            name = path.stem
        if name in models:
            raise ValueError(f"'{models[name]}' and '{path}' both call themselves '{name}'.")
        models[name] = path
    return models


def available_models() -> list[str]:
    """Names of the models that came with the package."""
    return sorted(_own_models())


def _with_card(name: str, bundle_root: Path, weights: Path) -> RegistrationModel:
    digest = file_digest(weights)
    card = _read_card(weights)
    if card:
        path, expected = weights.with_suffix(".json"), card.get("sha256")
        if expected is not None and expected != digest:
            raise ValueError(f"'{weights}' is not the file that '{path}' describes: its SHA-256 is {digest}.")
        for key, value in card.get("settings", {}).items():
            # MONAI knows both separators; a part like _target_ would name what to call
            first, *rest = re.split("#|::", key)
            if first not in SETTINGS or any(part.startswith("_") for part in rest) or not _is_plain(value):
                raise ValueError(
                    f"'{path}' has the setting '{key}', which is refused: settings are plain values for "
                    f"{', '.join(SETTINGS)}."
                )
    return RegistrationModel(name, bundle_root, weights, digest, card.get("settings", {}))


def find_model(model: str | os.PathLike[str]) -> RegistrationModel:
    """
    The model of a name or path.

    Args:
        model: ``"none"``; a name among :py:func:`available_models`; a file of weights of the network of
            ``inference.json``; or a folder of a bundle with ``configs/inference.json`` and ``models/model.pt``. Beside
            weights, a ``.json`` of the same name may hold their ``sha256``, which is checked, and ``settings`` to
            use them with, such as ``{"working_grid#spacing": 2.0}``.

    Raises:
        FileNotFoundError: When there is no such model.
        ValueError: When the file beside the weights is broken or does not belong to them, or the bundle registers
            nothing itself but segments by an atlas.
    """
    name = os.fspath(model)
    if name.lower() == "none":
        return RegistrationModel("none", bundle_source())
    own = _own_models()
    if name in own:
        return _with_card(name, bundle_source(), own[name])
    path = Path(name)
    if path.is_dir():
        root, weights = path.resolve(), path.resolve() / "models" / "model.pt"
        if not (root / "configs" / "inference.json").is_file() or not weights.is_file():
            raise FileNotFoundError(f"'{name}' is no bundle: it lacks configs/inference.json or models/model.pt.")
        if (root / "atlas" / "labels.json").is_file():
            raise ValueError(
                f"'{name}' segments by an atlas, as label-bundle writes it; it is no model to register with."
            )
        return _with_card(root.name, root, weights)
    if path.is_file():
        return _with_card(path.stem, bundle_source(), path.resolve())
    known = ", ".join([*sorted(own), "none"])
    raise FileNotFoundError(
        f"there is no model '{name}': give one of {known}, a file of weights, or a bundle's folder."
    )


def load_pretrained(model: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """
    A network with its weights, ready for inference; the digest of the weights is compared with that on their card.

    Args:
        model: a name among :py:func:`available_models`, a file of weights, or a bundle's folder; see
            :py:func:`find_model`.
        device: where to put it.

    Returns:
        :py:class:`monai_sacb.networks.nets.SACBNet`, or what the bundle's ``inference.json`` says, in evaluation mode.

    Raises:
        FileNotFoundError: When there is no such model.
        ValueError: When its card is broken or does not belong to it, or ``model`` is ``"none"``.
    """
    found = find_model(model)
    network = found.network(found.parser(device=torch.device(device)))
    if network is None:
        raise ValueError(f"'{model}' is no network: give one of {', '.join(available_models())}, or a file of weights.")
    return network


def stored_setting(path: str | os.PathLike[str] | None, name: str, default: int | bool) -> int | bool:
    """
    How the network was built whose weights a file holds: what ``inference.json`` builds its network with.

    So weights of any width and input can be named there, as those of a training by ``train.json``.

    Args:
        path: a state dict of :py:class:`monai_sacb.networks.nets.SACBNet`, or the state of a whole training.
        name: ``"base_channels"`` or ``"self_similarity"``.
        default: the value where there is no such file, or it holds the weights of another kind of network, which is
            refused with a sentence when they are loaded.

    Returns:
        the value of that argument.

    Raises:
        ValueError: When there is no such setting, or the file is there but cannot be read.
    """
    if name not in ("base_channels", "self_similarity"):
        raise ValueError(f"name must be 'base_channels' or 'self_similarity', got {name!r}.")
    if path is None or not Path(path).is_file():
        return default
    state = read_checkpoint(path)
    if isinstance(state, Mapping) and isinstance(state.get("network"), Mapping):
        state = state["network"]
    first = state.get(FIRST_WEIGHT) if isinstance(state, Mapping) else None
    if not isinstance(first, torch.Tensor) or first.dim() == 0:
        return default
    return int(first.shape[0]) if name == "base_channels" else bool(state.get(name, False))
