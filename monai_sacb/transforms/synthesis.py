# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Images of random contrast and shape out of label maps, to train a network that knows no contrast.

What MONAI has comes from MONAI: bias fields (``RandBiasFieldd``), blur (``RandGaussianSmoothd``), noise
(``RandGaussianNoised``), gamma (``RandAdjustContrastd``), flips, and ``OneOf`` to choose between recipes.

Source: Hoffmann et al., SynthMorph: learning contrast-invariant registration without acquired images, IEEE TMI 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from monai.data import MetaTensor
from monai.transforms import RandomizableTransform, create_rotate, create_scale

from monai_sacb.networks.layers import exponential, reference_grid
from monai_sacb.utils import plain_tensor

__all__ = [
    "RandDiffeomorphism",
    "RandFieldOfView",
    "RandLabelsToImage",
    "labels_to_image",
    "random_diffeomorphism",
    "sample_labels",
]

# within a voxel: its centre, and four places that together represent it
PLACES = ((0.0, 0.0, 0.0), (0.25, 0.25, 0.25), (0.25, -0.25, -0.25), (-0.25, 0.25, -0.25), (-0.25, -0.25, 0.25))


def labels_to_image(
    label: torch.Tensor, means: torch.Tensor, stds: torch.Tensor | None = None, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Give every label its intensity.

    Args:
        label: ``(S, *spatial)``, whole numbers; the S channels are labels at several places of a voxel (see
            :py:func:`sample_labels`), whose intensities are averaged, which blurs the borders as partial volume does.
        means: ``(N,)``, mean intensity of the labels 0 to N - 1; higher labels count as 0.
        stds: ``(N,)``, standard deviation of each label's intensities. Defaults to none.
        noise: ``(1, *spatial)``, of standard deviation 1; needed with ``stds``.

    Returns:
        image ``(1, *spatial)``, float32.

    Raises:
        ValueError: When the label map has no channels, or the tables do not belong together.
    """
    if label.dim() < 3 or len(label) == 0:
        raise ValueError(f"label must be (S, *spatial), got shape {list(label.shape)}.")
    if means.dim() != 1 or len(means) == 0 or (stds is not None and stds.shape != means.shape):
        shape = None if stds is None else list(stds.shape)
        raise ValueError(f"means and stds must be (N,), one a label, got {list(means.shape)} and {shape}.")
    if (stds is None) != (noise is None) or (noise is not None and noise.shape[1:] != label.shape[1:]):
        shape = None if noise is None else list(noise.shape)
        raise ValueError(f"stds need noise (1, *{list(label.shape[1:])}) and noise needs stds, got noise {shape}.")
    index = label.long()
    index = index * ((index >= 0) & (index < len(means)))
    image = means.float()[index].mean(0, keepdim=True)
    if stds is not None and noise is not None:
        # the first channel is the centre of the voxel
        image = image.addcmul_(stds.float()[index[:1]], noise.float())
    return image


def random_diffeomorphism(
    spatial_shape: Sequence[int],
    amplitude: float,
    scales: Sequence[int] = (8, 16, 32),
    random_state: np.random.RandomState | None = None,
) -> torch.Tensor:
    """
    A smooth invertible displacement field: the flow of a random stationary velocity field.

    The velocities are sums of random values on coarse grids, one a scale, interpolated smoothly. The flow is computed
    at half the resolution.

    Args:
        spatial_shape: two or three sizes.
        amplitude: root mean square of each component of the velocity, in voxels.
        scales: distances of the knots of the coarse grids, in voxels; the coarser, the greater its part.
        random_state: source of random numbers.

    Returns:
        DDF ``(1, d, *spatial_shape)`` in voxels, pull-back.

    Raises:
        ValueError: When an argument is out of its range.
    """
    shape = [int(size) for size in spatial_shape]
    if len(shape) not in (2, 3) or min(shape) < 2:
        raise ValueError(f"spatial_shape must be two or three sizes of at least 2, got {list(spatial_shape)}.")
    if not 0 <= amplitude < math.inf or len(scales) == 0 or min(scales) < 4:
        raise ValueError(f"amplitude must be at least 0 and scales at least 4, got {amplitude} and {list(scales)}.")
    rng = np.random.RandomState() if random_state is None else random_state
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    half = [(size + 1) // 2 for size in shape]
    velocity = torch.zeros([1, len(shape), *half])
    for scale in scales:
        knots = torch.from_numpy(rng.standard_normal([1, len(shape), *(math.ceil(s / scale) + 3 for s in shape)]))
        # a denser grid, smoothed, has no kinks at the knots
        fine = F.interpolate(knots.float(), scale_factor=2.0, mode=mode, align_corners=True)
        for axis in range(len(shape)):
            kernel = torch.tensor([0.25, 0.5, 0.25]).view(1, 1, *[3 if i == axis else 1 for i in range(len(shape))])
            conv = F.conv3d if len(shape) == 3 else F.conv2d
            fine = conv(fine.transpose(0, 1), kernel).transpose(0, 1)
        velocity += scale * F.interpolate(fine, size=half, mode=mode, align_corners=True)
    rms = velocity.square().mean(list(range(1, velocity.dim())), keepdim=True).sqrt()
    # in voxels of the half resolution
    ddf = exponential(0.5 * amplitude * velocity / rms, num_steps=5)
    return 2.0 * F.interpolate(ddf, size=shape, mode=mode, align_corners=True)


def sample_labels(label: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """
    The label nearest to each point, 0 outside the map.

    Args:
        label: ``(1, *spatial)``.
        points: ``(S, d, *shape)``, in voxels of the label map.

    Returns:
        ``(S, *shape)``, of the label map's type.

    Raises:
        ValueError: When the shapes do not belong together.
    """
    dims = label.dim() - 1
    if dims not in (2, 3) or label.shape[0] != 1 or points.dim() != dims + 2 or points.shape[1] != dims:
        raise ValueError(
            f"label must be (1, *spatial) and points (S, d, *shape) with d = 2 or 3, got {list(label.shape)} and "
            f"{list(points.shape)}."
        )
    index = torch.zeros_like(points[:, 0], dtype=torch.int32)
    inside = torch.ones_like(index, dtype=torch.bool)
    for axis, size in enumerate(label.shape[1:]):
        place = points[:, axis].round().int()
        inside &= (place >= 0) & (place < size)
        index.mul_(size).add_(place.clamp_(0, size - 1))
    return label.reshape(-1)[index] * inside


class RandDiffeomorphism(RandomizableTransform):
    """
    Deform a label map at random, smoothly and invertibly, and resample it on a grid in its middle.

    A mapping from the new grid to the map's: a diffeomorphism, then an affine mapping around the middle. Labels are
    taken from the nearest voxel once, so that a map of finer voxels than the new grid's gives smooth borders.

    Args:
        prob: probability to deform; else the map is only resampled.
        spatial_size: size of the new grid. Defaults to the map's size.
        voxel_size: size of a voxel of the new grid, in voxels of the map.
        amplitude: greatest root mean square of the velocity of the deformation, in voxels of the new grid; the actual
            one is uniform between 0 and this.
        scales: see :py:func:`random_diffeomorphism`.
        rotation: greatest rotation around each axis, in radians.
        scaling: greatest relative change of each axis' scale.
        translation: greatest shift along each axis, in voxels of the new grid.
        subsamples: return labels at five places of every voxel, its centre first, instead of only there.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        prob: float = 1.0,
        spatial_size: Sequence[int] | None = None,
        voxel_size: float = 1.0,
        amplitude: float = 2.0,
        scales: Sequence[int] = (8, 16, 32),
        rotation: float = 0.0,
        scaling: float = 0.0,
        translation: float = 0.0,
        subsamples: bool = False,
    ) -> None:
        super().__init__(prob)
        limits = {"amplitude": amplitude, "rotation": rotation, "scaling": scaling, "translation": translation}
        for name, value in limits.items():
            if not isinstance(value, Real) or not 0 <= value < (1 if name == "scaling" else math.inf):
                raise ValueError(f"{name} must be at least 0 and finite, and scaling below 1, got {name} = {value!r}.")
        if not 0 < voxel_size < math.inf:
            raise ValueError(f"voxel_size must be positive, got {voxel_size}.")
        if spatial_size is not None and (len(spatial_size) not in (2, 3) or min(spatial_size) < 2):
            raise ValueError(f"spatial_size must be two or three sizes of at least 2, got {list(spatial_size)}.")
        if len(scales) == 0 or min(scales) < 4:
            raise ValueError(f"scales must be at least 4, got {list(scales)}.")
        self.spatial_size = None if spatial_size is None else [int(size) for size in spatial_size]
        self.voxel_size = float(voxel_size)
        self.amplitude, self.scales = amplitude, list(scales)
        self.rotation, self.scaling, self.translation = rotation, scaling, translation
        self.subsamples = subsamples
        self.ddf: torch.Tensor | None = None
        self.linear = np.eye(3)
        self.shift = np.zeros(3)

    def randomize(self, data: Sequence[int]) -> None:
        """Draw the mapping for a new grid of the given size."""
        super().randomize(None)
        dims = len(data)
        self.ddf, self.linear, self.shift = None, np.eye(dims), np.zeros(dims)
        if not self._do_transform:
            return
        self.ddf = random_diffeomorphism(data, self.R.uniform(0, self.amplitude), self.scales, self.R)
        angles = self.R.uniform(-self.rotation, self.rotation, 1 if dims == 2 else 3)
        scale = 1 + self.R.uniform(-self.scaling, self.scaling, dims)
        turned = np.asarray(create_rotate(dims, list(angles))) @ np.asarray(create_scale(dims, list(scale)))
        self.linear = turned[:dims, :dims]
        self.shift = self.R.uniform(-self.translation, self.translation, dims)

    def __call__(self, label: torch.Tensor, randomize: bool = True) -> torch.Tensor:
        """
        Args:
            label: ``(1, *spatial)``, 2-D or 3-D.
            randomize: whether to draw a new mapping.

        Returns:
            ``(1, *spatial_size)``, or ``(5, *spatial_size)`` with ``subsamples``, of the label map's type; a MetaTensor
            keeps its meta data, with the affine of the new grid before the deformation.

        Raises:
            ValueError: When the label map has another number of axes than ``spatial_size``.
        """
        source = list(label.shape[1:])
        size = source if self.spatial_size is None else self.spatial_size
        if len(size) != len(source) or label.shape[0] != 1:
            raise ValueError(f"label must be (1, *spatial) with {len(size)} axes, got shape {list(label.shape)}.")
        if randomize:
            self.randomize(size)
        dims = len(size)
        points = reference_grid(size, label.device)
        if self.ddf is not None:
            points = points + self.ddf[0].to(label.device)
        matrix = torch.from_numpy(self.voxel_size * self.linear).float().to(label.device)
        middle = [torch.tensor([(s - 1) / 2 for s in sizes], device=label.device) for sizes in (size, source)]
        shift = middle[1] + matrix @ (torch.from_numpy(self.shift).float().to(label.device) - middle[0])
        places = matrix @ torch.tensor(PLACES, device=label.device)[: len(PLACES) if self.subsamples else 1, :dims].T
        base = (matrix @ points.flatten(1)).view(dims, *size)
        offsets = (places.T + shift).view(-1, dims, *[1] * dims)
        result = torch.cat([sample_labels(plain_tensor(label), (base + offset)[None]) for offset in offsets])
        if not isinstance(label, MetaTensor):
            return result
        affine = label.affine.clone().double()
        moved = np.eye(len(affine))
        moved[:dims, :dims] *= self.voxel_size
        moved[:dims, -1] = [(s - self.voxel_size * (n - 1) - 1) / 2 for s, n in zip(source, size)]
        meta = {key: value for key, value in label.meta.items() if key != "affine"}
        return MetaTensor(result, affine=affine @ torch.from_numpy(moved).to(affine), meta=meta)


class RandLabelsToImage(RandomizableTransform):
    """
    An image of random contrast out of a label map.

    Args:
        num_labels: labels are 0 to this.
        groups: labels that are alike, as tissues of one kind are: the labels of a group have one random intensity in
            common, from which each differs by at most a random ``spread``. Labels in no group are alone.
        means: intensities in [0, 1] of the labels 0 to ``num_labels`` instead of random ones, from which each group and
            each label differ by at most ``spread``.
        spread: greatest difference of a label from its group.
        std: greatest standard deviation of the noise within a label, which differs from label to label.
        background: probability that label 0 is not black.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(
        self,
        num_labels: int,
        groups: Sequence[Sequence[int]] = (),
        means: Sequence[float] | None = None,
        spread: float = 0.2,
        std: float = 0.05,
        background: float = 0.2,
    ) -> None:
        super().__init__(1.0)
        if num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {num_labels}.")
        members = [number for group in groups for number in group]
        if len(set(members)) != len(members) or any(not 0 <= number <= num_labels for number in members):
            raise ValueError(f"groups must hold different labels of 0 to {num_labels}, got {groups!r}.")
        if means is not None and len(means) != num_labels + 1:
            raise ValueError(f"means must be {num_labels + 1} intensities, got {len(means)}.")
        if not 0 <= spread < math.inf or not 0 <= std < math.inf or not 0 <= background <= 1:
            raise ValueError(
                f"spread and std must be at least 0 and background a probability, got {spread}, {std} and {background}."
            )
        self.num_labels = num_labels
        self.groups = [list(group) for group in groups]
        self.groups += [[number] for number in range(1, num_labels + 1) if number not in set(members)]
        self.means = None if means is None else np.asarray(means, dtype=float)
        self.spread, self.std, self.background = spread, std, background
        self.contrast = self.deviations = np.zeros(num_labels + 1)

    def randomize(self, data: Any = None) -> None:
        """Draw intensity and noise of every label."""
        super().randomize(data)
        number = self.num_labels + 1
        self.contrast = np.zeros(number) if self.means is None else self.means.copy()
        spread = self.R.uniform(0, self.spread)
        for group in self.groups:
            self.contrast[group] += self.R.uniform(0, 1) if self.means is None else self.R.uniform(-spread, spread)
        self.contrast += self.R.uniform(-spread, spread, number)
        self.deviations = self.R.uniform(0, self.std, number)
        if self.R.uniform() >= self.background:
            self.contrast[0] = self.deviations[0] = 0.0
        self.contrast = self.contrast.clip(0, 1)

    def __call__(self, label: torch.Tensor, randomize: bool = True) -> torch.Tensor:
        """
        Args:
            label: ``(S, *spatial)``, see :py:func:`labels_to_image`.
            randomize: whether to draw a new contrast.

        Returns:
            image ``(1, *spatial)``, float32, plain or with the label map's meta data.
        """
        if randomize:
            self.randomize()
        # drawn by the transform's own generator
        noise = torch.Generator().manual_seed(int(self.R.randint(2**31)))
        image = labels_to_image(
            plain_tensor(label),
            torch.from_numpy(self.contrast).to(label.device),
            torch.from_numpy(self.deviations).to(label.device),
            torch.randn([1, *label.shape[1:]], generator=noise).to(label.device),
        )
        return MetaTensor(image, meta=label.meta) if isinstance(label, MetaTensor) else image


class RandFieldOfView(RandomizableTransform):
    """
    Blacken slabs at the ends of an image, as if it had not been measured there.

    Args:
        prob: probability of each of the two ends of each axis, given that the image is cut at all.
        cut: probability to cut.
        fraction: greatest part of an axis that is lost at an end.

    Raises:
        ValueError: When an argument is out of its range.
    """

    def __init__(self, cut: float = 0.1, prob: float = 0.3, fraction: float = 0.2) -> None:
        if not 0 <= cut <= 1 or not 0 <= prob <= 1 or not 0 <= fraction < 0.5:
            raise ValueError(
                f"cut and prob must be probabilities and fraction below 0.5, got {cut}, {prob} and {fraction}."
            )
        super().__init__(cut)
        self.end_prob, self.fraction = prob, fraction
        self.lost = np.zeros((0, 2))

    def randomize(self, data: int) -> None:
        """Draw the lost part of each end of the given number of axes."""
        super().randomize(None)
        self.lost = self.R.uniform(0, self.fraction, (data, 2)) * (self.R.uniform(size=(data, 2)) < self.end_prob)

    def __call__(self, image: torch.Tensor, randomize: bool = True) -> torch.Tensor:
        """
        Args:
            image: ``(C, *spatial)``.
            randomize: whether to draw anew.
        """
        dims = image.dim() - 1
        if randomize:
            self.randomize(dims)
        if not self._do_transform:
            return image
        result = image.clone()
        for axis, size in enumerate(image.shape[1:]):
            first, last = (round(float(part) * size) for part in self.lost[axis])
            result.narrow(axis + 1, 0, first).zero_()
            result.narrow(axis + 1, size - last, last).zero_()
        return result
