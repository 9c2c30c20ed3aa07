# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Dictionary transforms of :py:mod:`monai_sacb.transforms.synthesis`.

As in MONAI, a transform draws once for all of its keys: for two images that differ, list it twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import ensure_tuple

from monai_sacb.transforms.synthesis import (
    RandDiffeomorphism,
    RandFieldOfView,
    RandLabelsToImage,
    labels_to_image,
)
from monai_sacb.utils import plain_tensor

__all__ = ["LabelsToImaged", "RandDiffeomorphismd", "RandFieldOfViewd", "RandKeepLabelsd", "RandLabelsToImaged"]


def _check_outputs(keys: Sequence[Hashable], output_keys: Sequence[Hashable]) -> None:
    if len(keys) != len(output_keys):
        raise ValueError(f"there must be one output key for each of the keys {tuple(keys)}, got {tuple(output_keys)}.")


class _Wrapper(RandomizableTransform, MapTransform):
    """Base of random transforms that do to every key what an array transform draws once."""

    def __init__(self, keys: KeysCollection, transform: RandomizableTransform, allow_missing_keys: bool) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, 1.0)
        self.transform: Any = transform

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandomizableTransform:
        super().set_random_state(seed, state)
        self.transform.set_random_state(seed, state)
        return self


class RandDiffeomorphismd(_Wrapper):
    """
    Dictionary wrapper of :py:class:`RandDiffeomorphism`.

    Args:
        keys: label maps ``(1, *spatial)``; all are deformed alike.
        allow_missing_keys: whether a key may be absent.
        kwargs: arguments of :py:class:`RandDiffeomorphism`.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, **kwargs: Any) -> None:
        super().__init__(keys, RandDiffeomorphism(**kwargs), allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for number, key in enumerate(self.key_iterator(data)):
            result[key] = self.transform(data[key], randomize=number == 0)
        return result


class RandFieldOfViewd(_Wrapper):
    """
    Dictionary wrapper of :py:class:`RandFieldOfView`.

    Args:
        keys: images ``(C, *spatial)``; all lose the same parts.
        allow_missing_keys: whether a key may be absent.
        kwargs: arguments of :py:class:`RandFieldOfView`.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, **kwargs: Any) -> None:
        super().__init__(keys, RandFieldOfView(**kwargs), allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for number, key in enumerate(self.key_iterator(data)):
            result[key] = self.transform(data[key], randomize=number == 0)
        return result


class RandLabelsToImaged(_Wrapper):
    """
    Dictionary wrapper of :py:class:`RandLabelsToImage`.

    Args:
        keys: label maps ``(S, *spatial)``; all get one contrast, but noise of their own.
        output_keys: where the image of each goes.
        allow_missing_keys: whether a key may be absent.
        kwargs: arguments of :py:class:`RandLabelsToImage`.

    Raises:
        ValueError: When there are not as many output keys as keys.
    """

    def __init__(
        self, keys: KeysCollection, output_keys: KeysCollection, allow_missing_keys: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(keys, RandLabelsToImage(**kwargs), allow_missing_keys)
        self.output_keys = ensure_tuple(output_keys)
        _check_outputs(self.keys, self.output_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for number, (key, output_key) in enumerate(self.key_iterator(data, self.output_keys)):
            result[output_key] = self.transform(data[key], randomize=number == 0)
        return result


class LabelsToImaged(MapTransform):
    """
    Images of one given contrast out of label maps, see :py:func:`labels_to_image`.

    Args:
        keys: label maps ``(S, *spatial)``.
        output_keys: where the image of each goes.
        means: intensity of the labels 0, 1, ...; higher labels count as 0.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When there are no intensities, or not as many output keys as keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_keys: KeysCollection,
        means: Sequence[float],
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_keys = ensure_tuple(output_keys)
        _check_outputs(self.keys, self.output_keys)
        if len(means) == 0:
            raise ValueError("means must hold an intensity for label 0 at least, got none.")
        self.means = torch.tensor([float(mean) for mean in means])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key, output_key in self.key_iterator(data, self.output_keys):
            label = data[key]
            image = labels_to_image(plain_tensor(label), self.means.to(label.device))
            result[output_key] = MetaTensor(image, meta=label.meta) if isinstance(label, MetaTensor) else image
        return result


class RandKeepLabelsd(RandomizableTransform, MapTransform):
    """
    Make background of all labels above a number: of what is not brain, for one, where the labels of the brain come
    first.

    Args:
        keys: label maps.
        num_kept: the labels 1 to this are kept.
        prob: probability; all keys share the draw.
        allow_missing_keys: whether a key may be absent.

    Raises:
        ValueError: When ``num_kept`` is below 1.
    """

    def __init__(
        self, keys: KeysCollection, num_kept: int, prob: float = 0.5, allow_missing_keys: bool = False
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        if num_kept < 1:
            raise ValueError(f"num_kept must be at least 1, got {num_kept}.")
        self.num_kept = num_kept

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        self.randomize(None)
        result = dict(data)
        if self._do_transform:
            for key in self.key_iterator(data):
                result[key] = data[key] * (data[key] <= self.num_kept)
        return result
