"""How to decode predictions into instances: one frozen, checked table of settings."""

import dataclasses
from typing import TYPE_CHECKING

from common.errors import config_error
from em_segmentation.decoding.agglomeration import MEAN
from em_segmentation.decoding.heights import LARGEST_HEIGHT
from em_segmentation.decoding.links import FULL, STORED_AT, Link, affinity_links, boundary_links
from em_segmentation.decoding.watershed import SECTION_AXES, VOLUME_AXES
from em_segmentation.regions import Triple

if TYPE_CHECKING:
    from em_segmentation.config import Targets
    from em_segmentation.config_inference import Decoding

CHOICES = {
    "method": ("components", "watershed", "mutex"),
    "input": ("affinities", "boundary"),
    "stored_at": STORED_AT,
    "neighbours": ("volume", "sections"),
    "height": ("boundary", "distance"),
    "linkage": ("mean", "quantile"),
    "small": ("remove", "join"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode. Probabilities are 0..255 throughout."""

    method: str = "watershed"  # components | watershed (then merged by affinity) | mutex (watershed)
    input: str = "affinities"  # affinities | boundary (one channel, 255 on membranes)
    offsets: tuple[Triple, ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))  # of the channels (z, y, x); unused for boundary
    stored_at: str = "source"  # aff[c, v] joins v and v + offset; destination: v - offset and v
    foreground: int = 0  # least mean affinity of a voxel's links; 0: every voxel belongs to an object
    neighbours: str = "volume"  # volume: 3D fragments | sections: 2D ones, of in-plane channels alone, then joined
    height: str = "boundary"  # what is flooded: boundary | distance (to the boundary, from its midlines down)
    distance_threshold: int = 128  # least mean affinity inside; for height = distance
    distance_reach: int = 16  # voxels; larger distances count as this one
    wall: int = 128  # ways through an affinity below it pass at least at its height, however thin the boundary; 0: none
    smoothing: Triple = (1, 1, 1)  # radius (voxels) of the binomial window along z, y, x
    min_depth: int = 5  # of a fragment's valley in steps of boundary probability (distance: in voxels squared)
    linkage: str = "mean"  # affinity of two fragments: mean | quantile
    quantile: int = 50  # per cent
    bins: int = 256  # of the histograms that quantiles are read from; a divisor of 256
    threshold: int = 128  # fragments are merged while their affinity reaches it; components: voxels
    min_size: int = 0  # voxels
    fill_holes: bool = False  # background that a single object encloses becomes part of it
    small: str = "remove"  # what happens to objects below min_size: remove | join (the neighbour of highest affinity)

    def __post_init__(self) -> None:
        wrong = [
            f"decoding.{name}: {getattr(self, name)!r} (expected {' | '.join(names)}): choose one of them"
            for name, names in CHOICES.items()
            if getattr(self, name) not in names
        ]
        limits = {"foreground": FULL, "wall": FULL, "distance_threshold": FULL, "quantile": 100, "threshold": FULL}
        wrong += [
            f"decoding.{name}: {getattr(self, name)} (expected 0 to {most}): correct it"
            for name, most in limits.items()
            if not 0 <= getattr(self, name) <= most
        ]
        if self.bins < 1 or 256 % self.bins:
            wrong.append(f"decoding.bins: {self.bins} (expected 1, 2, 4 ... 256): correct it")
        if min(*self.smoothing, self.min_depth, self.min_size) < 0 or self.distance_reach < 1:
            wrong.append("decoding: smoothing, min_depth or min_size below 0 or distance_reach below 1: correct it")
        if not wrong and self.largest_height >= LARGEST_HEIGHT:
            wrong.append(f"decoding.smoothing: {self.smoothing} overflows 32 bits (with these heights): smooth less")
        if self.method == "components" and self.min_size > 1 and self.small == "join":
            wrong.append("decoding.small: join (expected remove with method = components): components touch nothing")
        axes = {"zyx"[axis] for axis in self.axes} - {
            "zyx"[link.offset.index(1)] for link in self.direct_links if not wrong
        }
        if not wrong and axes:
            wrong.append(
                f"targets.affinity_offsets: none joins direct neighbours along {', '.join(sorted(axes))}: "
                "add [1, 0, 0], [0, 1, 0] and [0, 0, 1]"
            )
        if self.method == "mutex" and not wrong and not self.repulsive_links:
            wrong.append(
                "targets.affinity_offsets: mutex needs offsets of several voxels, which keep objects apart: add some"
            )
        if wrong:
            raise config_error(*wrong)

    @property
    def links(self) -> tuple[Link, ...]:
        """One per channel, or the three direct ones of a boundary map."""
        return boundary_links() if self.input == "boundary" else affinity_links(self.offsets, self.stored_at)

    @property
    def direct_links(self) -> tuple[Link, ...]:
        """Of direct neighbours."""
        return tuple(link for link in self.links if link.is_direct)

    @property
    def flooded_links(self) -> tuple[Link, ...]:
        """Of direct neighbours along the axes that fragments extend along; alone they make the height."""
        return tuple(link for link in self.direct_links if link.offset.index(1) in self.axes)

    @property
    def axes(self) -> tuple[int, ...]:
        """Along which fragments extend."""
        return VOLUME_AXES if self.neighbours == "volume" else SECTION_AXES

    @property
    def largest_height(self) -> int:
        """Above all heights that can occur."""
        return self.height_scale * (self.distance_reach**2 if self.height == "distance" else FULL)

    @property
    def height_scale(self) -> int:
        """Heights per step of boundary probability (distance: per square voxel)."""
        terms = 1 if self.input == "boundary" or self.height == "distance" else 2 * len(self.flooded_links)
        return terms << 2 * sum(self.smoothing)

    @property
    def percent(self) -> int:
        """The quantile, or MEAN."""
        return MEAN if self.linkage == "mean" else self.quantile

    @property
    def graph_bins(self) -> int:
        """Of the region graph's histograms."""
        return 0 if self.linkage == "mean" else self.bins

    @property
    def repulsive_links(self) -> tuple[Link, ...]:
        """Of voxels farther apart."""
        return tuple(link for link in self.links if not link.is_direct)


def settings_of(decoding: "Decoding", targets: "Targets", threshold: int) -> Settings:
    """The settings under a config; a config error for those that are impossible."""
    return Settings(
        method=decoding.method,
        input="affinities" if decoding.target == "affinity" else "boundary",
        offsets=targets.affinity_offsets,
        stored_at=targets.affinity_stored_at,
        foreground=decoding.foreground,
        neighbours="sections" if decoding.by_section else decoding.neighbours,
        height=decoding.height,
        distance_threshold=decoding.distance_threshold,
        distance_reach=decoding.distance_reach,
        wall=decoding.wall,
        smoothing=decoding.smoothing,
        min_depth=decoding.min_depth,
        linkage=decoding.linkage,
        quantile=decoding.quantile,
        bins=256,
        threshold=threshold,
        min_size=decoding.min_size,
        fill_holes=decoding.fill_holes,
        small=decoding.small if decoding.method != "components" else "remove",
    )
