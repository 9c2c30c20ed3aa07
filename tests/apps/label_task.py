# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""A bundle used in the order and by the entries that MONAI Label uses it, without MONAI Label."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai.bundle import ConfigParser
from monai.transforms import SaveImaged


class LabelTask:
    """The bundle in a folder, once for all requests."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = ConfigParser()
        self.config.read_config(str(self.folder / "configs" / "inference.json"))
        self.config.config["bundle_root"] = str(self.folder)
        network = self.config.get_parsed_content("network_def", instantiate=True)
        self.metadata = json.loads((self.folder / "configs" / "metadata.json").read_text())
        formats = self.metadata["network_data_format"]
        self.key_image, self.key_pred = next(iter(formats["inputs"])), next(iter(formats["outputs"]))
        channels = formats["outputs"][self.key_pred]["channel_def"]
        self.labels = {name.lower(): int(key) for key, name in channels.items() if name.lower() != "background"}
        self.network = copy.deepcopy(network).to("cpu")
        state = torch.load(self.folder / "models" / "model.pt", map_location="cpu")
        state = state.get("model", state)
        assert set(state) == set(network.state_dict())
        self.network.load_state_dict(state, strict=True)
        self.network.eval()

    def data(self, image: str | Path) -> dict[str, Any]:
        """All that there is after the last transform."""
        data: Any = {"image": str(image), "image_path": str(image), "device": "cpu", "model": "x", "config": {}}
        for transform in self.config.get_parsed_content("preprocessing").transforms:
            data = transform(data)
        inferer = self.config.get_parsed_content("inferer")
        inputs = data[self.key_image][None].to("cpu")
        with torch.no_grad():
            data[self.key_pred] = inferer(inputs, self.network)[0]
        for transform in self.config.get_parsed_content("postprocessing").transforms:
            if not isinstance(transform, SaveImaged):
                data = transform(data)
        return dict(data)

    def __call__(self, image: str | Path) -> tuple[np.ndarray, np.ndarray]:
        """Label map and affine, as they would be written."""
        data = self.data(image)
        meta = data[self.key_image].meta
        answer = data[self.key_pred]
        # of another size it would be stretched to this one
        assert tuple(answer.shape[1:]) == tuple(meta["spatial_shape"])
        return answer.array[0], np.asarray(meta["original_affine"])
