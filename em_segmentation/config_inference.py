"""The constants of em_segmentation that training does not see: inference, decoding, evaluation."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from common.config import LARGEST_INT, outside
from em_segmentation.regions import Triple

TestTimeName = Literal["none", "flips", "flips_in_plane", "turns_in_plane", "all"]
InstanceSource = Literal["none", "affinity", "boundary", "membrane", "semantic"]


@dataclasses.dataclass(frozen=True)
class Inference:
    tiling: Literal["exact", "blended"] = "blended"  # exact: batch-norm networks; blended: all others
    tile_size: Triple = (64, 256, 256)  # voxels of output computed at once by exact tiles; bounds the memory
    window_size: Triple | None = None  # of blended windows; null = data.patch_size
    overlap: float = 0.5  # of blended windows, share of their edges
    precision: Literal["32", "bf16"] = "bf16"  # bf16 is about 3 times faster on recent CPUs and GPUs
    tta: TestTimeName = "none"  # passes over the volume: 1, 8, 4, 8 and 16

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"tile_size": (1, 8192), "overlap": (0, 0.9)})
        if self.window_size is not None:
            yield from outside(self, {"window_size": (1, 8192)})


@dataclasses.dataclass(frozen=True)
class Decoding:
    target: InstanceSource = "none"  # membrane: the semantic class parts instances; semantic: its pieces are them
    label_channel: int | None = None  # of the label volumes, that holds the true instances; null = the target's
    method: Literal["components", "watershed", "mutex"] = "watershed"  # watershed: fragments merged by affinity
    threshold: int = 128  # 0..255; fragments merge while their affinity reaches it; eval.py chooses on validation
    thresholds: tuple[int, ...] = tuple(range(240, 15, -8))  # tried on validation volumes, descending
    foreground: int = 0  # 0..255, least mean affinity of a voxel in an object; 0: every voxel is in one
    neighbours: Literal["volume", "sections"] = "volume"  # of fragments; sections: each section by itself
    height: Literal["boundary", "distance"] = "boundary"  # what is flooded; distance: to the boundary
    distance_threshold: int = 128  # 0..255, mean affinity inside, of height=distance
    distance_reach: int = 16  # voxels; larger distances count as this one
    wall: int = 128  # 0..255; neighbours of less affinity touch in no fragment; 0: not looked at
    smoothing: Triple = (1, 1, 1)  # radius of the binomial window, voxels z, y, x
    min_depth: int = 5  # 0..255, of a fragment's valley
    linkage: Literal["mean", "quantile"] = "mean"  # affinity of two fragments
    quantile: int = 50  # per cent
    min_size: int = 0  # voxels; smaller objects are removed or joined
    small: Literal["remove", "join"] = "join"
    fill_holes: bool = False  # background that a single object encloses becomes part of it
    class_threshold: int = 128  # 0..255, of a single semantic class; eval.py chooses on validation
    exclusive_classes: tuple[int, ...] = ()  # a connected component of them is the one with the most probability in it
    by_section: bool = False  # every section is a picture of its own, objects are 2D
    block_size: Triple = (64, 512, 512)  # voxels decoded at once; larger volumes go block by block
    executor: Literal["serial", "processes", "dask"] = "serial"  # where blocks are worked on
    workers: int = 2  # processes on this machine
    dask_address: str = ""  # of a running scheduler, tcp://host:port; empty: local processes

    def problems(self) -> Iterator[str]:
        bytes_ = ("threshold", "class_threshold", "thresholds", "foreground", "distance_threshold", "wall", "min_depth")
        limits: dict[str, tuple[float, float]] = dict.fromkeys(bytes_, (0, 255))
        yield from outside(self, limits | {"distance_reach": (1, 1000), "smoothing": (0, 8), "quantile": (0, 100)})
        yield from outside(self, {"min_size": (0, 10**9), "block_size": (8, 8192), "workers": (1, 1024)})
        if list(self.thresholds) != sorted(set(self.thresholds), reverse=True) or not self.thresholds:
            yield f"thresholds: expected descending numbers, got {list(self.thresholds)}"
        if self.method == "components" and self.small == "join" and self.min_size > 1 and self.target != "none":
            yield "small: components touch nothing; expected remove with decoding.method=components"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    iou_thresholds: tuple[float, ...] = (0.5, 0.75, 0.9)  # of instance average precision
    boundary_tolerance_nm: float = 30.0  # of boundary F1, about two membranes' thickness
    min_object_voxels: int = 0  # smaller true objects are not judged
    confidence: float = 0.95  # of the intervals
    bootstrap_resamples: int = 1000  # of pieces of the test volumes
    volumes_at_once: int = 1  # judged by so many threads; each holds about 30 bytes per voxel
    seed: int = 0

    def problems(self) -> Iterator[str]:
        yield from outside(self, {"iou_thresholds": (0.01, 1), "boundary_tolerance_nm": (0, 1e6)})
        yield from outside(self, {"min_object_voxels": (0, 10**9), "confidence": (0.5, 0.9999)})
        yield from outside(
            self, {"bootstrap_resamples": (100, 10**6), "volumes_at_once": (1, 64), "seed": (0, LARGEST_INT)}
        )
