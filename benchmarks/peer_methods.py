# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Registration tools and networks behind one interface: arrays in, a displacement field in voxels out.

Every method gets the moving and the fixed image as arrays ``(D, H, W)`` on one grid, paired by index, and the size of
the voxels. For tools that know physical space, array axis i is axis i of that space, without rotation, and the first
voxel is its origin: a displacement along axis i is then the tool's i-th component over the voxel size, with no sign to
turn.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch

from monai_sacb.data import Grid

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "bundle" / "configs"

# Settings of the tools. Chosen among a few, by Dice on four pairs of hippocampus subjects that are not evaluated on.
# SyN, with mutual information: the preset of ANTsPy, but iterations at the full resolution too, of which the preset,
# meant for whole heads, has none
SYN = {"type_of_transform": "SyN", "reg_iterations": (100, 70, 50)}
# SyN with cross-correlation as the metric: the preset of ANTsPy; minutes for one pair of small images
SYN_CC = {"type_of_transform": "SyNCC"}
# greedy: as its users do (affine, then deformable, NCC of radius 2, 100x50x10), with its default smoothing, and more
# than the 10 iterations at the full resolution that are enough for whole heads
GREEDY_AFFINE = "-a -dof 12 -m NCC 2x2x2 -ia-identity -n 100x50x10"
GREEDY = "-m NCC 2x2x2 -n 100x100x50 -s 1.732vox 0.7071vox"
# elastix: its default maps, but three resolutions and a final grid of 5 mm instead of four and 10 mm
ELASTIX: tuple[tuple[str, Mapping[str, Sequence[str]]], ...] = (
    ("affine", {"NumberOfResolutions": ["3"]}),
    (
        "bspline",
        {
            "NumberOfResolutions": ["3"],
            "GridSpacingSchedule": ["4", "2", "1"],
            "FinalGridSpacingInPhysicalUnits": ["5"],
        },
    ),
)
# ConvexAdam: its defaults, but a grid of 4 voxels instead of 6, for small images, and so a search of 12 voxels
CONVEX_ADAM: Mapping[str, Any] = {"grid_sp": 4, "disp_hw": 3}


class Registration(NamedTuple):
    """What a method returns: the field, what its own tool makes of the moving image with it, and what it took."""

    ddf: np.ndarray  # (3, D, H, W) in voxels of the fixed grid, pull-back
    warped: np.ndarray | None  # (D, H, W), linear; None for a method without a warp of its own
    cpu_seconds: float  # of the process, all threads
    wall_seconds: float


class Method:
    """A registration method. ``register`` is timed; ``field`` only brings its result into our form."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def register(self, moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> Any:
        raise NotImplementedError

    def field(self, result: Any, moving: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
        raise NotImplementedError

    def __call__(self, moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> Registration:
        cpu, wall = time.process_time(), time.perf_counter()
        result = self.register(moving, fixed, spacing)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        ddf, warped = self.field(result, moving, spacing)
        return Registration(np.ascontiguousarray(ddf, np.float32), warped, cpu, wall)


class Identity(Method):
    """No registration."""

    def register(self, moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> Any:
        return np.zeros((3, *fixed.shape), np.float32)

    def field(self, result: Any, moving: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
        return result, moving


class Ants(Method):
    """ANTsPy, https://pypi.org/project/antspyx."""

    def __init__(self, threads: int, options: Mapping[str, Any]) -> None:
        super().__init__(threads)
        self.ants = importlib.import_module("ants")
        self.options = options
        self.folder = tempfile.TemporaryDirectory()

    def register(self, moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> Any:
        for path in Path(self.folder.name).iterdir():
            path.unlink()
        images = [self.ants.from_numpy(image, spacing=tuple(spacing)) for image in (fixed, moving)]
        prefix = os.path.join(self.folder.name, "pair_")
        found = self.ants.registration(*images, outprefix=prefix, random_seed=1, **self.options)
        return images, found["fwdtransforms"]

    def field(self, result: Any, moving: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
        images, transforms = result
        # affine and warp in one
        path = self.ants.apply_transforms(*images, transforms, compose=os.path.join(self.folder.name, "both_"))
        displacement = np.moveaxis(self.ants.image_read(path).numpy(), -1, 0)
        warped = self.ants.apply_transforms(*images, transforms, interpolator="linear").numpy()
        return displacement / np.reshape(spacing, (3, 1, 1, 1)), warped


class Greedy(Method):
    """greedy, https://pypi.org/project/picsl-greedy."""

    def __init__(self, threads: int, affine: str | None = GREEDY_AFFINE, deformable: str = GREEDY) -> None:
        super().__init__(threads)
        self.sitk = importlib.import_module("SimpleITK")
        self.greedy = importlib.import_module("picsl_greedy")
        self.affine, self.deformable = affine, deformable

    def register(self, moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> Any:
        images = {}
        for name, array in (("fixed", fixed), ("moving", moving)):
            images[name] = self.sitk.GetImageFromArray(np.ascontiguousarray(array.T))
            images[name].SetSpacing([float(size) for size in spacing])
        tool = self.greedy.Greedy3D()
        common = f"-i fixed moving -threads {self.threads} -seed 1 -V 0"
        initial = ""
        if self.affine is not None:
            tool.execute(f"{common} {self.affine} -o affine", **images, affine=None)
            initial, images = "-it affine", {}  # the tool keeps what it has been given
        tool.execute(f"{common} {self.deformable} {initial} -wp 0 -o warp", **images, warp=None)
        return tool

    def field(self, result: Any, moving: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
        transforms = "warp" if self.affine is None else "warp affine"
        result.execute(
            f"-threads {self.threads} -V 0 -rf fixed -rm moving warped -rc both -wp 0 -r {transforms}",
            warped=None,
            both=None,
        )
        # ITK's axes are ours backwards
        displacement = self.sitk.GetArrayFromImage(result["both"]).T
        return displacement / np.reshape(spacing, (3, 1, 1, 1)), self.sitk.GetArrayFromImage(result["warped"]).T


class Elastix(Method):
    """elastix, https://pypi.org/project/itk-elastix."""

    def __init__(self, threads: int, stages: Sequence[tuple[str, Mapping[str, Sequence[str]]]] = ELASTIX) -> None:
        super().__init__(threads)
        self.itk = importlib.import_module("itk")
        self.stages = stages

    def image(self, array: np.ndarray, spacing: Sequence[float]) -> Any:
        image = self.itk.image_from_array(np.ascontiguousarray(array.T))
        image.SetSpacing([float(size) for size in spacing])
        return image

    def register(self, moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> Any:
        parameters = self.itk.ParameterObject.New()
        for name, changes in self.stages:
            stage = parameters.GetDefaultParameterMap(name)
            for key, value in {"RandomSeed": ["1"], **changes}.items():
                stage[key] = list(value)
            parameters.AddParameterMap(stage)
        _, found = self.itk.elastix_registration_method(
            self.image(fixed, spacing),
            self.image(moving, spacing),
            parameter_object=parameters,
            number_of_threads=self.threads,
            log_to_console=False,
        )
        return found

    def field(self, result: Any, moving: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
        image = self.image(moving, spacing)
        displacement = self.itk.array_from_image(self.itk.transformix_deformation_field(image, result))
        # the default is cubic, which would not agree with a linear warp
        for index in range(result.GetNumberOfParameterMaps()):
            result.SetParameter(index, "ResampleInterpolator", "FinalLinearInterpolator")
        warped = self.itk.array_from_image(self.itk.transformix_filter(image, result))
        return displacement.T / np.reshape(spacing, (3, 1, 1, 1)), warped.T


class ConvexAdam(Method):
    """ConvexAdam with MIND features, https://pypi.org/project/convexAdam."""

    def __init__(self, threads: int, options: Mapping[str, Any] = CONVEX_ADAM) -> None:
        super().__init__(threads)
        self.convex_adam = importlib.import_module("convexAdam.convex_adam_MIND").convex_adam_pt
        self.apply = importlib.import_module("convexAdam.apply_convex").apply_convex
        self.options = options

    def register(self, moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> Any:
        # of the tool's own convention: voxels, along array axes
        return self.convex_adam(
            img_fixed=fixed, img_moving=moving, device=torch.device("cpu"), dtype=torch.float32, **self.options
        )

    def field(self, result: Any, moving: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
        return np.moveaxis(result, -1, 0), self.apply(result, moving)


class Network(Method):
    """A network of this project's interface, with the inferer of the bundle's evaluation."""

    def __init__(self, threads: int, configs: Sequence[str], weights: str, refine: int) -> None:
        super().__init__(threads)
        from monai.bundle import ConfigParser

        from monai_sacb.handlers.checkpoint import load_weights

        parser = ConfigParser()
        parser.read_config([*configs, str(CONFIGS / "evaluate.json")])
        parser["refine"] = refine
        self.network = parser.get_parsed_content("network_def").eval()
        self.inferer = parser.get_parsed_content("validate#inferer")
        load_weights(self.network, weights)

    def register(self, moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> Any:
        with torch.no_grad():
            return self.inferer(torch.from_numpy(np.stack([moving, fixed]))[None], self.network)

    def field(self, result: Any, moving: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
        return result[0].numpy(), None


class Optimization(Method):
    """The refinement of the bundle's evaluation alone, from no displacement."""

    def __init__(self, threads: int, configs: Sequence[str], iterations: int) -> None:
        super().__init__(threads)
        from monai.bundle import ConfigParser

        parser = ConfigParser()
        parser.read_config([*configs, str(CONFIGS / "evaluate.json")])
        self.optimization, self.iterations = parser.get_parsed_content("refinement"), iterations

    def register(self, moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> Any:
        images = [torch.from_numpy(np.ascontiguousarray(image))[None, None] for image in (moving, fixed)]
        return self.optimization(*images, torch.zeros(1, 3, *fixed.shape), self.iterations)

    def field(self, result: Any, moving: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
        return result[0].numpy(), None


class Application(Method):
    """``monai_sacb.apps.register`` as its users have it: from files to files, its affine stage and report included."""

    def __init__(self, threads: int, model: str) -> None:
        super().__init__(threads)
        self.model = model
        self.folder = tempfile.TemporaryDirectory()

    def register(self, moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> Any:
        from monai_sacb.apps import register

        paths = {}
        for name, image in (("moving", moving), ("fixed", fixed)):
            paths[name] = os.path.join(self.folder.name, f"{name}.nii.gz")
            nib.save(nib.Nifti1Image(np.asarray(image, np.float32), np.diag([*spacing, 1.0])), paths[name])
        return register(**paths, output_dir=os.path.join(self.folder.name, "out"), model=self.model)

    def field(self, result: Any, moving: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray | None]:
        affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
        # both stages in one
        field = result.mapping.flatten(Grid((moving.shape[0], moving.shape[1], moving.shape[2]), affine))
        warped = np.asarray(nib.load(result.files["warped"]).dataobj)
        return field.vectors.numpy() / np.reshape(spacing, (3, 1, 1, 1)), warped


METHODS: Mapping[str, tuple[type[Method], tuple[Any, ...]]] = {
    "identity": (Identity, ()),
    "syn": (Ants, (SYN,)),
    "synpreset": (Ants, ({"type_of_transform": "SyN"},)),
    "syncc": (Ants, (SYN_CC,)),
    "greedy": (Greedy, ()),
    "elastix": (Elastix, ()),
    "convexadam": (ConvexAdam, ()),
    "application": (Application, ("none",)),
    "application_brain": (Application, ("brain",)),
}


def _serve(connection: Connection, log: str, method: type[Method], threads: int, arguments: Sequence[Any]) -> None:
    """Register the pairs that come in, until None does."""
    # tools write on the console from C++
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tool: Method | None = None
    while (pair := connection.recv()) is not None:
        try:
            tool = method(threads, *arguments) if tool is None else tool
            connection.send(tool(*pair))
        except Exception as error:
            connection.send(f"{type(error).__name__}: {error}")


class Worker:
    """
    A method in a process of its own: libraries do not meet, threads are counted apart, and a crash ends only one pair.

    Args:
        method, arguments: the class and what it takes after the number of threads.
        threads: threads for the method.
        log: file for what the tool writes on the console.
    """

    def __init__(self, method: type[Method], arguments: Sequence[Any], threads: int, log: str) -> None:
        self.task = (log, method, threads, arguments)
        self.context = multiprocessing.get_context("spawn")
        self.process: Any = None

    def register(self, moving: np.ndarray, fixed: np.ndarray, spacing: Sequence[float]) -> Registration:
        """Raises RuntimeError, with what the method said, when it fails."""
        if self.process is None:
            self.connection, theirs = self.context.Pipe()
            self.process = self.context.Process(target=_serve, args=(theirs, *self.task), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.connection.send((moving, fixed, spacing))
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join()
            code, self.process = self.process.exitcode, None
            raise RuntimeError(f"the process ended with code {code}") from error
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.connection.send(None)
            self.process.join()
            self.process = None
