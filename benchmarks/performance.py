# Copyright (c) the monai_sacb contributors
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the network and its operators against a floor and against the definitions.

    python benchmarks/performance.py [--sections network training operators growth] [--threads 1] [--rounds 3]

The *floor* is a network of the same convolutions, norms, activations, poolings and warps, in the same memory layout,
without clustering, gating and matching. The *definition* of an operator is the shortest way to write it: unfolded
windows, every cluster's convolution, Lloyd passes over all points. Every measurement is a process of its own, the
variants take turns, and ratios are of medians. Memory is the growth of the peak resident size.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from monai.losses import LocalNormalizedCrossCorrelationLoss

from monai_sacb.losses import LNCCLoss
from monai_sacb.networks.blocks import SACBlock, SameConv, SimilarityMatching
from monai_sacb.networks.layers import cluster_adaptive_conv, kmeans
from monai_sacb.networks.nets import SACBNet

OPERATORS = ("adaptive convolution", "matching", "k-means", "local NCC")
OPERATOR_SIZES = ((20, 24, 20), (40, 48, 40), (80, 96, 80))
CHANNELS, CLUSTERS = 16, 7


class FloorBlock(nn.Module):
    """A SACB block whose adaptive convolution is a plain one."""

    def __init__(self, block: SACBlock) -> None:
        super().__init__()
        self.proj_in, self.act = block.proj_in, block.act
        self.conv = SameConv(block.spatial_dims, block.channels, block.channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.conv(self.proj_in(x)))


class FloorMatching(nn.Module):
    """A field of the right shape for next to nothing."""

    def forward(self, moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
        dims = moving.dim() - 2
        return 0.1 * (moving[:, :dims] - fixed[:, :dims])


def make_network(floor: bool) -> SACBNet:
    torch.manual_seed(0)
    net = SACBNet()
    if floor:
        for estimator in net.estimators:
            estimator.sacb = FloorBlock(estimator.sacb)
            estimator.matching = FloorMatching()
    return net


def smooth_noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Noise with structure of a few voxels, as feature maps have."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for _ in range(2):
        x = F.avg_pool3d(F.pad(x, [2] * 6), 5, 1)
    return x / x.std()


def adaptive_by_definition(
    x: torch.Tensor, weight: torch.Tensor, gates: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    spatial, (out_channels, in_channels, _) = x.shape[2:], weight.shape
    y = x.new_zeros([1, out_channels, *spatial])
    for k in range(gates.shape[1]):
        kernel = (weight * gates[0, k]).view(out_channels, in_channels, 3, 3, 3)
        plain = F.conv3d(x, kernel, bias[0, k], padding=1)
        y = torch.where(labels.view(1, 1, *spatial) == k, plain, y)
    return y


def matching_by_definition(moving: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    padded = F.pad(moving, [1] * 6).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1).flatten(5)
    weights = (padded * fixed.unsqueeze(5)).sum(1).softmax(4)
    steps = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 3)
    return (weights @ steps).movedim(-1, 1)


def kmeans_by_definition(points: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    centroids = points[:, :: points.shape[1] // num_clusters][:, :num_clusters].clone()
    for _ in range(100):
        labels = torch.cdist(points, centroids).argmin(2)
        moved = torch.stack([points[0][labels[0] == k].mean(0) for k in range(num_clusters)]).unsqueeze(0)
        moved = torch.where(moved.isnan(), centroids, moved)
        if (moved - centroids).norm() < 1e-4 * centroids.norm():
            break
        centroids = moved
    return labels, centroids


def operator_case(operator: str, own: bool, size: tuple[int, ...], clusters: int) -> tuple[Callable[..., Any], list]:
    """A function and its arguments; gradients are taken of those that ask for them."""
    layout = torch.channels_last_3d if own else torch.contiguous_format
    x = smooth_noise((1, CHANNELS, *size)).contiguous(memory_format=layout)
    if operator == "adaptive convolution":
        labels, _ = kmeans(x.flatten(2).transpose(1, 2), clusters)
        weight = torch.randn(CHANNELS, CHANNELS, 27) / 20
        gates, bias = torch.rand(1, clusters, 27), torch.randn(1, clusters, CHANNELS)
        leaves = [t.requires_grad_() for t in (x, weight, gates, bias)]
        return (cluster_adaptive_conv if own else adaptive_by_definition), [*leaves, labels]
    if operator == "matching":
        fixed = smooth_noise((1, CHANNELS, *size), 1).contiguous(memory_format=layout)
        return (SimilarityMatching() if own else matching_by_definition), [x.requires_grad_(), fixed.requires_grad_()]
    if operator == "k-means":
        return (kmeans if own else kmeans_by_definition), [x.flatten(2).transpose(1, 2), clusters]
    images = [smooth_noise((1, 1, *size), seed).sigmoid() for seed in (0, 1)]
    loss = LNCCLoss(9) if own else LocalNormalizedCrossCorrelationLoss(3, 9, smooth_nr=0.0, smooth_dr=1e-5)
    return loss, [images[0].requires_grad_(), images[1]]


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Run one case in this process."""
    torch.set_num_threads(case["threads"])
    size, own = tuple(case["size"]), case["own"]
    seconds_of_clustering = 0.0
    if case["section"] in ("network", "training"):
        net = make_network(floor=not own)
        images = smooth_noise((1, 2, *size)).sigmoid()

        def run() -> None:
            if case["section"] == "network":
                with torch.no_grad():
                    net(images)
            else:
                net(images).square().mean().backward()

        def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(points: torch.Tensor) -> Any:
                nonlocal seconds_of_clustering
                start = time.perf_counter()
                result = function(points)
                seconds_of_clustering += time.perf_counter() - start
                return result

            return call

        if own:
            for estimator in net.estimators:
                estimator.sacb.clusterer = clocked(estimator.sacb.clusterer)
    else:
        function, arguments = operator_case(case["operator"], own, size, case["clusters"])
        leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]

        def run() -> None:
            if case["backward"]:
                torch.autograd.grad(function(*arguments).square().sum(), leaves)
            else:
                with torch.no_grad():
                    function(*arguments)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds_of_clustering = 0.0
    times = []
    for _ in range(case["repeats"]):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {
        "seconds": min(times),
        "megabytes": memory / 1024,
        "clustering": seconds_of_clustering / sum(times),
    }


def compare(rounds: int, **case: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Medians of our variant and of the other one, measured in turns."""
    results: tuple[list, list] = ([], [])
    for _ in range(rounds):
        for own, into in ((True, results[0]), (False, results[1])):
            command = [sys.executable, __file__, "--case", json.dumps({**case, "own": own})]
            into.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = [{key: statistics.median(r[key] for r in each) for key in each[0]} for each in results]
    return medians[0], medians[1]


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the network and its operators.")
    sections = ("network", "training", "operators", "growth")
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--network_size", type=int, nargs=3, default=[160, 192, 160])
    parser.add_argument("--training_size", type=int, nargs=3, default=[96, 112, 96])
    parser.add_argument("--largest", type=int, default=192, help="longest axis of what operators and growth measure")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        write(json.dumps(measure(json.loads(options.case))))
        return
    common = {"threads": options.threads, "repeats": options.repeats}
    for section, size in (("network", options.network_size), ("training", options.training_size)):
        if section in options.sections:
            own, floor = compare(options.rounds, section=section, size=size, **common)
            write(f"| {section} {'x'.join(map(str, size))} | SACB-Net | floor | ratio |\n|---|---|---|---|")
            for key, unit in (("seconds", "s"), ("megabytes", "MB")):
                write(f"| {key} | {own[key]:.2f} {unit} | {floor[key]:.2f} {unit} | {own[key] / floor[key]:.2f} |")
            write(f"| share of k-means | {own['clustering']:.1%} | | |\n")
    if "operators" in options.sections:
        write("| operator | size | pass | ours | definition | speed-up | ours | definition |\n" + "|---" * 8 + "|")
        for operator in OPERATORS:
            for size in (size for size in OPERATOR_SIZES if max(size) <= options.largest):
                for backward in (False, True) if operator != "k-means" else (False,):
                    case = {"operator": operator, "backward": backward, "clusters": CLUSTERS}
                    own, other = compare(options.rounds, section="operators", size=size, **case, **common)
                    write(
                        f"| {operator} | {'x'.join(map(str, size))} | {'both' if backward else 'forward'} "
                        f"| {1e3 * own['seconds']:.1f} ms | {1e3 * other['seconds']:.1f} ms "
                        f"| {other['seconds'] / own['seconds']:.1f} "
                        f"| {own['megabytes']:.0f} MB | {other['megabytes']:.0f} MB |"
                    )
        write("")
    if "growth" in options.sections:
        write("| network | SACB-Net | per million voxels |\n|---|---|---|")
        for edge in (edge for edge in (32, 64, 96, 128, 160, 192) if edge <= options.largest):
            own, _ = compare(1, section="network", size=[edge] * 3, **common)
            write(
                f"| {edge}^3 | {own['seconds']:.2f} s, {own['megabytes']:.0f} MB "
                f"| {own['seconds'] / edge**3 * 1e6:.2f} s, {own['megabytes'] / edge**3 * 1e6:.0f} MB |"
            )
        write("\n| adaptive convolution, clusters | forward and backward |\n|---|---|")
        clusters_size = OPERATOR_SIZES[1] if max(OPERATOR_SIZES[1]) <= options.largest else OPERATOR_SIZES[0]
        for clusters in (1, 2, 7, 14, 28):
            case = {"operator": OPERATORS[0], "backward": True, "clusters": clusters}
            own, _ = compare(1, section="operators", size=clusters_size, **case, **common)
            write(f"| {clusters} | {1e3 * own['seconds']:.1f} ms |")


if __name__ == "__main__":
    main()
