"""The volumes that a config names: image, labels and mask of each, opened lazily, checked against each other."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.errors import config_error, data_error
from common.volumes.axes import check_same_shape
from common.volumes.opening import open_volume, split_location
from common.volumes.slices import natural_key
from common.volumes.volume import StoredBox, Volume
from em_segmentation.config import Data
from em_segmentation.regions import Triple, VoxelSize

Role = Literal["train", "val", "test"]
SAMPLED_SECTIONS = 32  # spread evenly over z, whose middle is looked at for the grey scale
SAMPLED_EDGE = 512  # voxels, of that middle
SLAB = 2**24  # voxels read at once
READ_WHOLE = 2**27  # voxels; larger volumes are told apart by the sampled boxes
LARGEST_ID = 2**63 - 1  # of the integers that torch computes with


@dataclasses.dataclass(frozen=True)
class Scale:
    """Grey values per channel are seen as (value - mean) / deviation."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Annotated:
    """One volume of a role: its image, what is known of it, and the sections that are used."""

    image: Volume
    label: Volume | None
    mask: Volume | None
    sections: tuple[int, int]  # first and one past the last z
    voxel_size_nm: VoxelSize
    scale: Scale

    @property
    def shape(self) -> Triple:
        """Voxels z, y, x of the sections that are used."""
        return self.sections[1] - self.sections[0], self.image.shape[1], self.image.shape[2]

    def read_image(self, corner: Triple, size: Triple) -> npt.NDArray[np.float32]:
        """A box [c, z, y, x] of the image in standard deviations from the mean; corner counts from the first section."""
        return normalised(self.image, self._at(corner), size, self.scale)

    def read_truth(self, corner: Triple, size: Triple) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Labels [c, z, y, x] of a box, and where they are annotated [1, z, y, x]."""
        return self.read_labels(corner, size), self.read_annotated(corner, size)

    def read_labels(self, corner: Triple, size: Triple) -> npt.NDArray[np.int64]:
        """Ids or classes [c, z, y, x] of a box."""
        assert self.label is not None, f"{self.image.path} has no labels"
        ids = as_ids(self.label.read_channels(self._at(corner), size))
        if self.label.dtype.kind == "i" and ids.min(initial=0) < 0:
            raise data_error(f"{self.label.path}: holds the id {ids.min()}; expected ids from 0 (background) on")
        return ids

    def read_annotated(self, corner: Triple, size: Triple) -> npt.NDArray[np.bool_]:
        """Whether a box's voxels [1, z, y, x] are annotated: all, where there is no mask."""
        if self.mask is None:
            return np.ones((1, *size), np.bool_)
        known: npt.NDArray[np.bool_] = self.mask.read_channels(self._at(corner), size)[:1] != 0
        return known

    def _at(self, corner: Triple) -> Triple:
        return corner[0] + self.sections[0], corner[1], corner[2]


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory(Volume):
    """A volume of which some sections were read once; the others cannot be read."""

    first_section: int
    voxels: npt.NDArray[np.generic] = dataclasses.field(repr=False)  # [c, z, y, x] from the first section on

    def _read_stored(self, box: StoredBox) -> npt.NDArray[np.generic]:
        channels, z, y, x = box
        assert z.start >= self.first_section, f"Expected sections from {self.first_section} on, got {z}"
        return self.voxels[channels, z.start - self.first_section : z.stop - self.first_section, y, x]


def in_memory(volume: Volume, sections: tuple[int, int]) -> InMemory:
    """The same volume with its sections [first, last) in memory."""
    first, last = sections
    voxels = volume.read_channels((first, 0, 0), (last - first, *volume.shape[1:]))
    return InMemory(
        volume.path, "czyx", volume.shape, len(voxels), volume.dtype, volume.spacing_angstrom, first, voxels
    )


def normalised(image: Volume, corner: Triple, size: Triple, scale: Scale) -> npt.NDArray[np.float32]:
    """A box [c, z, y, x] in standard deviations from the mean; a data error for voxels that are not finite."""
    voxels = image.read_channels(corner, size).astype(np.float32)
    if image.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise data_error(f"{image.path}: holds NaN or infinite voxels near z, y, x = {list(corner)}; export it again")
    mean, deviation = (np.array(v, np.float32)[:, None, None, None] for v in (scale.mean, scale.deviation))
    voxels -= mean
    voxels /= deviation
    return voxels


def as_ids(labels: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """Labels of any integer dtype as int64; within the box, ids from 2^63 on become the largest that are free."""
    if labels.dtype != np.uint64 or not labels.size or labels.max() <= LARGEST_ID:
        return labels.astype(np.int64)
    ids, number = np.unique(labels, return_inverse=True)
    too_large = ids > LARGEST_ID
    free = np.setdiff1d(np.arange(LARGEST_ID, LARGEST_ID - 2 * len(ids), -1), ids[~too_large].astype(np.int64))
    ids[too_large] = free[-np.count_nonzero(too_large) :]
    renumbered: npt.NDArray[np.int64] = ids.astype(np.int64)[number.reshape(labels.shape)]
    return renumbered


def sampled_boxes(shape: Triple, sections: tuple[int, int]) -> tuple[list[Triple], Triple]:
    """Corners and size of the middles of evenly spread sections: what stands for a volume of any size."""
    first, last = sections
    chosen = np.unique(np.linspace(first, last - 1, min(last - first, SAMPLED_SECTIONS)).round().astype(int))
    y, x = (max(0, (edge - SAMPLED_EDGE) // 2) for edge in shape[1:])
    return [(int(z), y, x) for z in chosen], (1, min(shape[1], SAMPLED_EDGE), min(shape[2], SAMPLED_EDGE))


def measure_scale(image: Volume, sections: tuple[int, int]) -> Scale:
    """Mean and deviation of each channel, from the sampled boxes.

    Raises a data error for an image that is constant, boolean or not finite there.
    """
    corners, size = sampled_boxes(image.shape, sections)
    sample = np.concatenate([image.read_channels(corner, size) for corner in corners], 1)
    if sample.dtype.kind not in "uif":
        raise data_error(f"{image.path}: holds {sample.dtype}, no grey values; expected an image")
    flat = sample.reshape(len(sample), -1).astype(np.float64)
    if not np.isfinite(flat).all():
        raise data_error(f"{image.path}: holds NaN or infinite voxels; export the volume again")
    mean, deviation = flat.mean(1), flat.std(1)
    constant = (flat.min(1) == flat.max(1)) | (deviation == 0)  # of equal fractions the deviation is not quite 0
    if constant.any():
        channel = int(constant.argmax())
        where = f" of channel {channel}" if len(flat) > 1 else ""
        raise data_error(
            f"{image.path}: all sampled voxels{where} equal {flat[channel, 0]:g}; expected an image with contrast"
        )
    return Scale(tuple(mean.tolist()), tuple(deviation.tolist()))


def overlaps(one: Annotated, other: Annotated) -> bool:
    """Whether two roles use the same sections of the same volume."""
    first, second = (dataclasses.replace(each.image, path=each.image.path.resolve()) for each in (one, other))
    return first == second and max(one.sections[0], other.sections[0]) < min(one.sections[1], other.sections[1])


def check_apart(roles: dict[Role, list[Annotated]]) -> None:
    """A config error where a volume, or some of its sections, serves two roles."""
    for (role, volumes), (other_role, others) in itertools.combinations(roles.items(), 2):
        for one, other in itertools.product(volumes, others):
            if overlaps(one, other):
                raise config_error(
                    f"data.{other_role}_image: {other.image.path} (sections {list(other.sections)}) is among what is used "
                    f"as {role}_image (sections {list(one.sections)}); expected other volumes, or sections apart "
                    f"(data.{other_role}_sections)"
                )


def matching(path: Path) -> list[Path]:
    """The files and folders that a path, perhaps with *, stands for, in natural order; none where there are none."""
    if "*" not in str(path):
        return [path] if path.exists() else []
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))), key=lambda p: natural_key(str(p)))


def expand(names: tuple[str, ...], key: str) -> list[str]:
    """The locations that names with * stand for, in natural order."""
    found: list[str] = []
    for name in names:
        if "*" not in name:
            found.append(name)
            continue
        path, inside = split_location(name)
        matches = matching(path)
        if not matches:
            raise config_error(f"data.{key}: {name} matches nothing; expected files or folders by that pattern")
        found += (f"{match}:{inside}" if inside else str(match) for match in matches)
    return found


def open_role(data: Data, role: Role) -> list[Annotated]:
    """The volumes of one role with everything about them checked; empty where the config names none."""
    images, labels, masks = (
        expand(getattr(data, f"{role}_{kind}"), f"{role}_{kind}") for kind in ("image", "label", "mask")
    )
    for kind, others in (("label", labels), ("mask", masks)):
        if others and len(others) != len(images):
            raise config_error(f"data.{role}_{kind}: expected one per image, found {len(others)} for {len(images)}")
    volumes = [
        open_annotated(data, role, image, labels[n] if labels else None, masks[n] if masks else None)
        for n, image in enumerate(images)
    ]
    for volume in volumes[1:]:
        if volume.image.num_channels != volumes[0].image.num_channels:
            raise data_error(
                f"{volume.image.path}: has {volume.image.num_channels} channels, {volumes[0].image.path} has "
                f"{volumes[0].image.num_channels}; expected the same of all"
            )
    return volumes


def open_annotated(data: Data, role: Role, image_name: str, label_name: str | None, mask_name: str | None) -> Annotated:
    """One volume with its labels and mask, of one shape."""
    image = open_volume(image_name, data.image_axes)
    others = [open_volume(name, data.label_axes) if name is not None else None for name in (label_name, mask_name)]
    for other in others:
        if other is not None:
            check_same_shape(image, other)
            if other.dtype.kind not in "uib":
                raise data_error(
                    f"{other.path}: holds {other.dtype} labels (expected whole-numbered ids): convert them, "
                    "for example labels.round().astype('uint32')"
                )
    wanted: tuple[int, int] | None = getattr(data, f"{role}_sections")
    first, last = wanted if wanted is not None else (0, image.shape[0])
    if last > image.shape[0]:
        raise config_error(
            f"data.{role}_sections: [{first}, {last}] reaches beyond the {image.shape[0]} sections of {image.path}"
        )
    voxel_size = data.voxel_size_nm if data.voxel_size_nm is not None else image.voxel_size_nm
    if voxel_size is None:
        raise config_error(f"data.voxel_size_nm: {image.path} does not say its own; give [z, y, x] in nm")
    return Annotated(image, others[0], others[1], (first, last), voxel_size, measure_scale(image, (first, last)))


def digest(volumes: list[Annotated]) -> str:
    """Changes with what training reads: shapes, sections, grey scales, and voxels, labels and masks.

    Of volumes above READ_WHOLE voxels labels and masks count in the sampled boxes, and images by their grey scales.
    """
    found = hashlib.sha256()
    for one in volumes:
        found.update(
            json.dumps([one.shape, one.sections, one.voxel_size_nm, one.scale.mean, one.scale.deviation]).encode()
        )
        first, last = one.sections
        _, y, x = one.image.shape
        is_small = one.shape[0] * y * x <= READ_WHOLE
        if is_small:  # in slabs, so that few chunks of a compressed file are read twice
            thick = max(1, SLAB // (y * x))
            boxes = [((z, 0, 0), (min(thick, last - z), y, x)) for z in range(first, last, thick)]
        else:
            corners, edges = sampled_boxes(one.image.shape, one.sections)
            boxes = [(corner, edges) for corner in corners]
        for volume in (one.label, one.mask, one.image if is_small else None):
            for corner, size in boxes if volume is not None else []:
                assert volume is not None
                voxels = volume.read_channels(corner, size)
                found.update(np.ascontiguousarray(voxels if volume is one.image else as_ids(voxels)).tobytes())
    return found.hexdigest()
