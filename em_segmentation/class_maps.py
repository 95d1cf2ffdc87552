"""Classes of voxels out of a prediction's probabilities, in a file: each voxel by itself, or components as wholes.

A mitochondrion is not half a lysosome: a connected component of decoding.exclusive_classes becomes the one class that most
of its probability speaks for. Components are found block by block where the volume is larger than one block.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.volumes.opening import open_volume
from common.volumes.streaming import StreamedVolume, open_streamed
from common.volumes.volume import Volume
from em_segmentation.config import Config
from em_segmentation.decoding.settings import Settings
from em_segmentation.inference import written_channels
from em_segmentation.prediction import Bytes, decode, decode_sections, discard, finish, forget_others, is_finished
from em_segmentation.regions import Triple, VoxelSize

PROBABILITIES_AT_ONCE = 2**24  # read together; each voxel of them takes about 25 bytes more
COMPONENT_SETTINGS = Settings(method="components", input="boundary", threshold=128)


def classes_identity(config: Config, threshold: int, made_from: str) -> str:
    """16 hex digits that change with all that a class map depends on; made_from: the prediction's identity."""
    facts: list[object] = [made_from, written_channels(config.targets)["semantic"]]
    if config.targets.semantic_classes == 1:
        facts.append(threshold)
    if config.decoding.exclusive_classes:
        facts += [config.decoding.exclusive_classes, config.decoding.by_section]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def write_classes(
    prediction: Volume, config: Config, threshold: int, voxel_size_nm: VoxelSize, made_from: str, path: Path
) -> Volume:
    """Classes [z, y, x] uint8 of a prediction at a path, 0 background; what is finished is kept.

    threshold (0..255) is that of a single class. made_from: the prediction's identity. Exclusive classes take up to 8 bytes
    per voxel of scratch beside the path. Raises a config error where something else is at the path, a data error where it
    cannot be written.
    """
    identity = classes_identity(config, threshold, made_from)
    if not is_finished(path, identity):
        streamed = open_streamed(path, (1, *prediction.shape), np.dtype(np.uint8), identity)
        missing = streamed.missing_ranges()
        if missing:
            channels = written_channels(config.targets)["semantic"]
            source = ClassReader(prediction, channels, threshold, config.decoding.exclusive_classes)
            components = find_components(source, config, identity, components_of(path))
            for first, last in (planes for range_ in missing for planes in source.plane_ranges(*range_)):
                streamed.write(first, source.classes(first, last, components)[None])
        discard(components_of(path))  # before the target is there: nobody would look for them afterwards
        finish(streamed, voxel_size_nm)
    return open_volume(path, "auto")


@dataclasses.dataclass(frozen=True, eq=False)
class Components:
    """Ids [z, y, x] of the components of exclusive classes, 0 elsewhere, and the class of each (num_components + 1,)."""

    ids: StreamedVolume
    chosen: npt.NDArray[np.uint8]

    def read(self, first: int, last: int) -> npt.NDArray[np.unsignedinteger]:
        """Ids [z, y, x] of the planes first <= z < last."""
        found: npt.NDArray[np.unsignedinteger] = self.ids.read_channels(
            (first, 0, 0), (last - first, *self.ids.shape[2:])
        )[0]
        return found


@dataclasses.dataclass(frozen=True)
class ClassReader:
    """The semantic channels of a prediction; to the decoder one channel, 0 in exclusive classes and 255 elsewhere."""

    prediction: Volume
    channels: slice
    threshold: int
    exclusive_classes: tuple[int, ...]

    @property
    def shape(self) -> Triple:
        """z, y, x."""
        return self.prediction.shape

    @property
    def num_channels(self) -> int:
        """Of what the decoder reads."""
        return 1

    def read_channels(self, corner: Triple, size: Triple) -> Bytes:
        """What the decoder reads, [1, z, y, x]."""
        classes = self.likeliest(self.prediction.read_channels(corner, size)[self.channels])
        return np.where(np.isin(classes, self.exclusive_classes), 0, 255).astype(np.uint8)[None]

    def likeliest(self, values: Bytes) -> Bytes:
        """Classes [z, y, x] of probabilities [k, z, y, x], each voxel by itself; of equals the first."""
        found = values[0] >= self.threshold if len(values) == 1 else values.argmax(0)
        return np.asarray(found, np.uint8)

    def planes(self, first: int, last: int) -> Bytes:
        """Probabilities [k, z, y, x] of the planes first <= z < last."""
        found: Bytes = self.prediction.read_channels((first, 0, 0), (last - first, *self.shape[1:]))[self.channels]
        return found

    def classes(self, first: int, last: int, components: Components | None) -> Bytes:
        """Final classes [z, y, x] of the planes first <= z < last."""
        found = self.likeliest(self.planes(first, last))
        if components is None:
            return found
        ids = components.read(first, last)
        return np.where(ids > 0, components.chosen[ids], found)

    def plane_ranges(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The planes first <= z < last in ranges that fit into the memory."""
        step = max(1, PROBABILITIES_AT_ONCE // (self.prediction.num_channels * self.shape[1] * self.shape[2]))
        for start in range(first, last, step):
            yield start, min(start + step, last)


def find_components(source: ClassReader, config: Config, identity: str, path: Path) -> Components | None:
    """Components of exclusive classes (single voxels keep their class), in the unfinished volume of a hidden path.

    None where no class is exclusive. Raises the errors of the decoder.
    """
    if not source.exclusive_classes:
        return None
    forget_others(path, identity)
    if config.decoding.by_section:
        ids = decode_sections(source, COMPONENT_SETTINGS, identity, path)
    else:
        ids = decode(source, COMPONENT_SETTINGS, config.decoding, identity, path)
    components = Components(ids, np.zeros(1, np.uint8))
    sums = np.zeros((len(source.exclusive_classes), 1))  # of probabilities, per class and component
    for first, last in source.plane_ranges(0, source.shape[0]):
        values = source.planes(first, last)
        found, number = np.unique(components.read(first, last), return_inverse=True)
        if found[-1] >= sums.shape[1]:
            sums = np.pad(sums, ((0, 0), (0, max(sums.shape[1], int(found[-1]) + 1 - sums.shape[1]))))
        for row, class_number in zip(sums, source.exclusive_classes, strict=True):
            row[found] += np.bincount(number.reshape(-1), values[class_number].reshape(-1))
    chosen = np.array(source.exclusive_classes, np.uint8)[sums.argmax(0)]
    return dataclasses.replace(components, chosen=chosen)


def components_of(path: Path) -> Path:
    """Where the ids of a class map's components lie while it is made."""
    return path.with_name(f".{path.name}.components.npy")
