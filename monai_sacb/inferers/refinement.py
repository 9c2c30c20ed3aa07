# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Instance optimization from coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from monai_sacb.inferers.contrast import check_pair, common_region, match_channels
from monai_sacb.inferers.control_grid import ControlGrid, coarser_shape, resample_field, resample_image
from monai_sacb.inferers.masked_similarity import fill_outside, masked_similarity
from monai_sacb.losses import FoldPenaltyLoss, GradientPenaltyLoss, LNCCLoss
from monai_sacb.networks.layers import reference_grid, warp
from monai_sacb.utils import check_count

__all__ = ["InstanceOptimization", "refine_ddf"]

# Adam: a memory of a few steps, for levels of a few tens of steps
BETAS = (0.8, 0.9)
# matching raises the squared correlation of two brains of one contrast by 0.005 to 0.007, of one whose intensities are
# squared by 0.03 to 0.05, of an inverted one by 0.6
CONTRAST_GAIN = 0.02
LEVELS = ((4, 0.2), (2, 0.3), (1, 0.5))


class _Pair(NamedTuple):
    """Two images ``(1, C, *spatial)``, and masks ``(1, 1, *spatial)`` of weights in [0, 1] or None."""

    moving: torch.Tensor
    fixed: torch.Tensor
    moving_mask: torch.Tensor | None
    fixed_mask: torch.Tensor | None

    def at(self, spatial_shape: Sequence[int]) -> _Pair:
        images = (resample_image(x, spatial_shape) for x in (self.moving, self.fixed))
        masks = (None if x is None else resample_image(x, spatial_shape) for x in (self.moving_mask, self.fixed_mask))
        return _Pair(*images, *masks)


class _Objective(NamedTuple):
    """What is lowered: similarity at voxels plus penalties on a field, in units of the grid it lies on."""

    similarity: Callable[..., torch.Tensor]
    regularization: Callable[[torch.Tensor], torch.Tensor]
    regularization_weight: float
    folds: Callable[[torch.Tensor], torch.Tensor]
    fold_weight: float

    def compare(self, pair: _Pair, sample: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``sample`` warps images of the moving grid."""
        warped = sample(pair.moving)
        if pair.moving_mask is None and pair.fixed_mask is None:
            return self.similarity(warped, pair.fixed)
        # no gradient: a mapping is not to be led out of the masks
        weight = torch.ones_like(pair.fixed[:, :1]) if pair.fixed_mask is None else pair.fixed_mask
        if pair.moving_mask is not None:
            with torch.no_grad():
                weight = weight * sample(pair.moving_mask)
        return self.similarity(warped, pair.fixed, weight)

    def penalize(self, ddf: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        penalty = ddf.new_zeros(())
        if self.regularization_weight > 0:
            penalty = penalty + factor * self.regularization_weight * self.regularization(ddf)
        return penalty + self.fold_weight * self.folds(ddf) if self.fold_weight > 0 else penalty

    def value(self, pair: _Pair, ddf: torch.Tensor) -> float:
        with torch.no_grad():
            return (self.compare(pair, lambda image: warp(image, ddf)) + self.penalize(ddf)).item()


def _descend(
    pair: _Pair,
    ddf: torch.Tensor,
    objective: _Objective,
    factor: int,
    iterations: int,
    learning_rate: float,
    spacing: int,
    patience: int,
    project: bool,
) -> torch.Tensor:
    """Adam on one resolution; the best field that was seen there."""
    spatial = list(ddf.shape[2:])
    grid = ControlGrid(spatial, spacing, ddf.dtype, ddf.device)
    control = best = grid.fit(ddf)
    # what lies between the points stays for the finer levels; after the last one, nothing looks after it
    rest = torch.zeros_like(ddf) if project else ddf - grid.field(control)
    # coordinates for grid_sample: in [-1, 1], last axis first, so that a step has no arithmetic left but one sum
    scale = ddf.new_tensor([2 / (size - 1) for size in spatial]).view(1, -1, *[1] * len(spatial))
    origin = ((reference_grid(spatial, ddf.device).to(ddf.dtype) + rest) * scale - 1).flip(1).movedim(1, -1)
    control.requires_grad_()
    optimizer = torch.optim.Adam([control], learning_rate, BETAS)
    best_value, best_step = math.inf, 0
    for step in range(iterations + 1):
        with torch.set_grad_enabled(step < iterations):
            places = origin + grid.field((control * scale).flip(1)).movedim(1, -1)

            def sample(image: torch.Tensor, places: torch.Tensor = places) -> torch.Tensor:
                return F.grid_sample(image, places, mode="bilinear", padding_mode="zeros", align_corners=True)

            loss = objective.compare(pair, sample) + objective.penalize(control / grid.steps, factor)
        value = loss.item()
        if value < best_value:
            best, best_value, best_step = control.detach().clone(), value, step
        # a value that is not finite is no improvement either
        if step == iterations or step - best_step >= patience or not math.isfinite(value):
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / iterations))
        # of the field alone: a similarity that has parameters of its own collects no gradients
        (control.grad,) = torch.autograd.grad(loss, control)
        optimizer.step()
    return rest + grid.field(best.detach())


def _with_matched_contrast(pair: _Pair, ddf: torch.Tensor, gain: float) -> _Pair:
    """A further channel of the moving image in the contrast of the fixed one, if that explains the fixed one better."""
    counted = common_region(pair.fixed, ddf, pair.moving_mask, pair.fixed_mask)
    if not bool(counted.any()):
        return pair
    warped = warp(pair.moving, ddf)
    matched = match_channels(pair.moving, warped, pair.fixed, counted)

    def explained(image: torch.Tensor) -> torch.Tensor:
        """Squared correlation with the fixed image, the mean of the channels."""
        values = (x.masked_select(counted).view(x.shape[1], -1).double() for x in (image, pair.fixed))
        one, other = (value - value.mean(1, keepdim=True) for value in values)
        variances = one.square().sum(1) * other.square().sum(1)
        return ((one * other).sum(1).square() / variances.clamp(min=torch.finfo(torch.double).tiny)).mean()

    # a gain that is not a number is none
    if not bool(explained(warp(matched, ddf)) - explained(warped) > gain):
        return pair
    # beside the images as they are: what has one intensity in the moving image is told apart by its surroundings there
    return pair._replace(moving=torch.cat([pair.moving, matched], 1), fixed=torch.cat([pair.fixed, pair.fixed], 1))


def _refine_one(
    pair: _Pair,
    ddf: torch.Tensor,
    objective: _Objective,
    iterations: int,
    levels: Sequence[tuple[int, float]],
    learning_rate: float,
    spacing: int,
    patience: int,
    contrast_gain: float | None,
) -> torch.Tensor:
    """:py:func:`refine_ddf` of one pair, without checks of the arguments."""
    spatial = list(ddf.shape[2:])
    if contrast_gain is not None:
        pair = _with_matched_contrast(pair, ddf, contrast_gain)
    before = objective.value(pair, ddf)
    if not math.isfinite(before):
        raise ValueError(
            f"the objective of the field to be refined must be finite, got {before}: an image or the field is not, or "
            "the masks have nothing in common."
        )
    total = sum(share for _, share in levels)
    done, shares, field = 0, 0.0, ddf
    for number, (factor, share) in enumerate(levels, start=1):
        shares += share
        steps = round(iterations * shares / total) - done
        done += steps
        if steps > 0:
            shape = coarser_shape(spatial, factor)
            start = resample_field(field, shape)
            last = number == len(levels)
            refined = _descend(
                pair.at(shape), start, objective, factor, steps, learning_rate, spacing, patience, project=last
            )
            # the change alone: details of the field that the coarser grid does not hold are kept
            field = refined if shape == spatial else field + resample_field(refined - start, spatial)
    return field if objective.value(pair, field) < before else ddf


def _is_weight(value: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < math.inf


def _check_settings(
    regularization_weight: float,
    fold_weight: float,
    iterations: int,
    levels: Sequence[tuple[int, float]],
    learning_rate: float,
    spacing: int,
    patience: int,
    fold_margin: float,
    contrast_gain: float | None,
) -> None:
    """Refuse settings that :py:func:`refine_ddf` cannot work with; see there."""
    for name, number, least in (("iterations", iterations, 0), ("spacing", spacing, 1), ("patience", patience, 1)):
        check_count(name, number, least)
    weights = {"regularization_weight": regularization_weight, "fold_weight": fold_weight}
    for name, value in {**weights, "learning_rate": learning_rate}.items():
        if not _is_weight(value):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}.")
    if contrast_gain is not None and not _is_weight(contrast_gain):
        raise ValueError(f"contrast_gain must be None or a finite number of at least 0, got {contrast_gain!r}.")
    FoldPenaltyLoss(fold_margin)
    _check_levels(levels)


def _check_levels(levels: Sequence[tuple[int, float]]) -> None:
    message = (
        "levels must be pairs of a whole number, how many times coarser, the coarsest first, and of a finite positive "
        f"share of the steps, got {levels!r}."
    )
    if isinstance(levels, str) or not isinstance(levels, Sequence) or len(levels) == 0:
        raise ValueError(message)
    previous = math.inf
    for level in levels:
        if isinstance(level, str) or not isinstance(level, Sequence) or len(level) != 2:
            raise ValueError(message)
        factor, share = level
        if isinstance(factor, bool) or not isinstance(factor, Integral) or not 1 <= factor < previous:
            raise ValueError(message)
        if not _is_weight(share) or share == 0:
            raise ValueError(message)
        previous = int(factor)


def refine_ddf(
    moving: torch.Tensor,
    fixed: torch.Tensor,
    ddf: torch.Tensor,
    similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    *,
    regularization: Callable[[torch.Tensor], torch.Tensor] | None = None,
    regularization_weight: float = 0.36,
    fold_weight: float = 10.0,
    iterations: int = 100,
    levels: Sequence[tuple[int, float]] = LEVELS,
    learning_rate: float = 0.5,
    spacing: int = 2,
    patience: int = 20,
    fold_margin: float = 0.2,
    contrast_gain: float | None = CONTRAST_GAIN,
    moving_mask: torch.Tensor | None = None,
    fixed_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Register two images by gradient descent on a field, from coarse to fine: from a network's field, or from none.

    On images of each level's resolution, Adam moves a grid of control points, linear in between, so as to lower
    similarity plus penalties; the penalties are of the field of the control points in units of their distance, which is
    cheap. A level of factor f weighs the regularization f times: coarse images are to give the large motion only. At
    the end, the objective of the given field and of the result are compared at full resolution, and the better of the
    two is returned: it is never worse than at the start. Every pair of a batch is treated alone. The same input gives
    the same bits on a CPU; on a GPU, gradients of interpolation add up in an order that varies. With the default
    similarity, about 270 bytes per voxel are needed beside the arguments, whatever the number of steps and of pairs.

    Args:
        moving: ``(B, C, *spatial)``, 2-D or 3-D, at least 5 voxels along every axis; intensities should lie in [0, 1].
        fixed: ``(B, C, *spatial)``.
        ddf: field to start from, ``(B, d, *spatial)`` in voxels of the fixed grid, pull-back; zeros for none.
        similarity: ``(warped, fixed) -> loss``. Defaults to :py:class:`monai_sacb.losses.LNCCLoss` with windows of 5
            voxels; :py:class:`monai_sacb.losses.MINDSSCLoss` is for images of different contrasts. With masks, it needs
            an attribute ``reduction`` and gives a map with ``"none"``.
        regularization: ``(ddf) -> loss``. Defaults to :py:class:`monai_sacb.losses.GradientPenaltyLoss`, in voxels.
        regularization_weight: weight of the regularization at full resolution.
        fold_weight: weight of :py:class:`monai_sacb.losses.FoldPenaltyLoss`.
        iterations: steps at most, of all levels; 0 returns the field as it is.
        levels: of each, how many times coarser it is than the images, and its share of the steps; the coarsest first.
            No axis is shortened below 8 voxels.
        learning_rate: size of the first steps of a level, in its voxels; it falls to zero along half a cosine.
        spacing: distance of the control points in voxels of the level.
        patience: a level ends when its objective has not improved for this many steps, or is not finite.
        fold_margin: determinant of the mapping's gradient below which the fold penalty begins.
        contrast_gain: where :py:func:`match_contrast` under the given field raises the squared correlation of the
            images by more than this, as it does for other modalities, what it gives is compared as a further channel;
            None for never. Of the default similarity only: contrasts are the affair of others themselves.
        moving_mask: ``(B, 1, *spatial)``, not zero where the moving image may be compared; everywhere by default. Masks
            restrict the similarity, to where the fixed mask and the warped moving mask meet, and nothing else: the
            field goes on smoothly outside. What the images hold outside their masks plays no part.
        fixed_mask: ``(B, 1, *spatial)``, likewise of the fixed image.

    Returns:
        DDF of the shape and type of ``ddf``, without gradient.

    Raises:
        ValueError: When shapes do not belong together, an axis has less than 5 voxels, an argument is out of its range,
            a mask has no voxel, or the objective of the given field is not finite.

    Source: Rueckert et al., Nonrigid registration using free-form deformations, IEEE TMI 1999; Siebert et al.,
    ConvexAdam, 2021, for Adam on a coarse grid of linear interpolation.
    """
    _check_settings(
        regularization_weight,
        fold_weight,
        iterations,
        levels,
        learning_rate,
        spacing,
        patience,
        fold_margin,
        contrast_gain,
    )
    check_pair(moving, fixed, ddf, moving_mask, fixed_mask)
    if min(fixed.shape[2:]) < 5:
        raise ValueError(f"refinement needs at least 5 voxels along every axis, got shape {list(fixed.shape)}.")
    for name, mask in (("moving_mask", moving_mask), ("fixed_mask", fixed_mask)):
        if mask is not None and not bool((mask != 0).flatten(1).any(1).all()):
            raise ValueError(f"{name} must have voxels that are not zero for each image, got one that has none.")
    compare: Callable[..., torch.Tensor] = LNCCLoss(kernel_size=5) if similarity is None else similarity
    if moving_mask is not None or fixed_mask is not None:
        compare = masked_similarity(compare)
    if iterations == 0:
        return ddf.detach()
    objective = _Objective(
        compare,
        GradientPenaltyLoss() if regularization is None else regularization,
        regularization_weight,
        FoldPenaltyLoss(fold_margin),
        fold_weight,
    )
    # a similarity of one's own may know nothing of further channels
    gain = contrast_gain if similarity is None else None
    refined = []
    # engines infer without gradients; a field in half precision is off by tenths of a voxel
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(ddf.device.type, enabled=False):
        dtype = torch.float64 if ddf.dtype == torch.float64 else torch.float32
        for index in range(len(ddf)):
            # copies: tensors of inference mode cannot take part in a gradient
            image, target, start = (x[index : index + 1].detach().to(dtype, copy=True) for x in (moving, fixed, ddf))
            masks = [None if x is None else x[index : index + 1] != 0 for x in (moving_mask, fixed_mask)]
            image, target = (x if m is None else fill_outside(x, m) for x, m in zip((image, target), masks))
            pair = _Pair(image, target, *(None if m is None else m.to(dtype) for m in masks))
            refined.append(
                _refine_one(pair, start, objective, iterations, levels, learning_rate, spacing, patience, gain)
            )
    return torch.cat(refined).to(ddf.dtype)


@dataclass(eq=False)
class InstanceOptimization:
    """
    :py:func:`refine_ddf` with its settings, for a configuration to hold; see there.

    Raises:
        ValueError: When an argument is out of its range.
    """

    similarity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    regularization: Callable[[torch.Tensor], torch.Tensor] | None = None
    regularization_weight: float = 0.36
    fold_weight: float = 10.0
    iterations: int = 100
    levels: Sequence[tuple[int, float]] = LEVELS
    learning_rate: float = 0.5
    spacing: int = 2
    patience: int = 20
    fold_margin: float = 0.2
    contrast_gain: float | None = CONTRAST_GAIN

    def __post_init__(self) -> None:
        settings = self._settings()
        del settings["similarity"], settings["regularization"]
        _check_settings(**settings)

    def _settings(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(InstanceOptimization)}

    def __call__(
        self,
        moving: torch.Tensor,
        fixed: torch.Tensor,
        ddf: torch.Tensor,
        iterations: int | None = None,
        moving_mask: torch.Tensor | None = None,
        fixed_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The field refined, in ``iterations`` steps where these are given."""
        settings = self._settings()
        if iterations is not None:
            settings["iterations"] = iterations
        return refine_ddf(moving, fixed, ddf, moving_mask=moving_mask, fixed_mask=fixed_mask, **settings)
