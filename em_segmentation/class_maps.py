"""Classes of voxels out of a prediction's probabilities, in a file: each voxel by itself, or bodies as wholes.

A mitochondrion is not half a lysosome: the touching voxels of decoding.whole_bodies become the one class that most of
their probability speaks for. Bodies are found block by block where the volume is larger than one block.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.volumes.opening import open_volume
from common.volumes.streaming import StreamedVolume, open_streamed, partial_folder
from common.volumes.volume import Volume
from em_segmentation.config import Config
from em_segmentation.decoding.settings import Settings
from em_segmentation.inference import written_channels
from em_segmentation.prediction import (
    Bytes,
    Triple,
    VoxelSize,
    decode,
    finish,
    forget_others,
    is_finished,
    scratch_of,
)

VALUES = 2**26  # probabilities read at once
PIECES = Settings(method="components", input="boundary", threshold=128)


def classes_identity(config: Config, threshold: int, made_from: str) -> str:
    """Changes with all that a class map depends on; made_from: the prediction's identity."""
    facts = f"{made_from} {written_channels(config.targets)['semantic']} {threshold} {config.decoding.whole_bodies}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def write_classes(
    prediction: Volume, config: Config, threshold: int, voxel_size_nm: VoxelSize, made_from: str, path: Path
) -> Volume:
    """Classes [z, y, x] uint8 of a prediction at a path, 0 background; what is finished is kept.

    threshold (0..255) is that of a single class. made_from: the prediction's identity. Raises a config error where
    something else is at the path.
    """
    identity = classes_identity(config, threshold, made_from)
    if not is_finished(path, identity):
        streamed = open_streamed(path, (1, *prediction.shape), np.dtype(np.uint8), identity)
        channels = written_channels(config.targets)["semantic"]
        source = ClassReader(prediction, channels, threshold, config.decoding.whole_bodies)
        bodies = find_bodies(source, config, identity, bodies_of(path)) if source.whole_bodies else None
        for missing in streamed.missing_ranges():
            for first, last in source.parts(*missing):
                streamed.write(first, source.classes(first, last, bodies)[None])
        finish(streamed, voxel_size_nm)
        discard_bodies(path)
    return open_volume(path, "auto")


@dataclasses.dataclass(frozen=True, eq=False)
class Bodies:
    """Ids [z, y, x] of whole bodies, 0 elsewhere, and the class of each (num_bodies + 1,)."""

    ids: StreamedVolume
    chosen: npt.NDArray[np.uint8]

    def read(self, first: int, last: int) -> npt.NDArray[np.unsignedinteger]:
        """The planes first <= z < last."""
        found: npt.NDArray[np.unsignedinteger] = self.ids.read_channels(
            (first, 0, 0), (last - first, *self.ids.shape[2:])
        )[0]
        return found


@dataclasses.dataclass(frozen=True)
class ClassReader:
    """The semantic channels of a prediction; to the decoder one channel, 0 in whole bodies and 255 elsewhere."""

    prediction: Volume
    channels: slice
    threshold: int
    whole_bodies: tuple[int, ...]

    @property
    def shape(self) -> Triple:
        return self.prediction.shape

    @property
    def num_channels(self) -> int:
        return 1

    def read_channels(self, corner: Triple, size: Triple) -> Bytes:
        classes = self.likeliest(self.prediction.read_channels(corner, size)[self.channels])
        return np.where(np.isin(classes, self.whole_bodies), 0, 255).astype(np.uint8)[None]

    def likeliest(self, values: Bytes) -> Bytes:
        """Classes [z, y, x] of probabilities [k, z, y, x], each voxel by itself."""
        found = values[0] >= self.threshold if len(values) == 1 else values.argmax(0)
        return np.asarray(found, np.uint8)

    def planes(self, first: int, last: int) -> Bytes:
        """Probabilities [k, z, y, x] of the planes first <= z < last."""
        found: Bytes = self.prediction.read_channels((first, 0, 0), (last - first, *self.shape[1:]))[self.channels]
        return found

    def classes(self, first: int, last: int, bodies: Bodies | None) -> Bytes:
        """Final classes of the planes first <= z < last."""
        found = self.likeliest(self.planes(first, last))
        if bodies is None:
            return found
        body = bodies.read(first, last)
        return np.where(body > 0, bodies.chosen[body], found)

    def parts(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The planes first <= z < last in ranges that fit into the memory."""
        num_channels = self.channels.stop - self.channels.start
        step = max(1, VALUES // (num_channels * self.shape[1] * self.shape[2]))
        for start in range(first, last, step):
            yield start, min(start + step, last)


def find_bodies(source: ClassReader, config: Config, identity: str, path: Path) -> Bodies:
    """Connected pieces of whole bodies with their classes (single voxels keep their own), in a hidden unfinished volume."""
    forget_others(path, identity)
    ids = decode(source, PIECES, config.decoding, identity, path)
    bodies = Bodies(ids, np.zeros(1, np.uint8))
    sums = np.zeros((len(source.whole_bodies), 1))
    for first, last in source.parts(0, source.shape[0]):
        body, values = bodies.read(first, last).reshape(-1), source.planes(first, last)
        own = np.stack([np.bincount(body, values[number].reshape(-1)) for number in source.whole_bodies])
        both = np.zeros((len(own), max(own.shape[1], sums.shape[1])))
        both[:, : sums.shape[1]] = sums
        both[:, : own.shape[1]] += own
        sums = both
    return dataclasses.replace(bodies, chosen=np.array(source.whole_bodies, np.uint8)[sums.argmax(0)])


def bodies_of(path: Path) -> Path:
    """Where the ids of a class map's bodies lie while it is made."""
    return path.with_name(f".{path.name}.bodies.npy")


def discard_bodies(path: Path) -> None:
    """Remove what finding the bodies of a class map left."""
    for folder in (partial_folder(bodies_of(path)), scratch_of(bodies_of(path))):
        shutil.rmtree(folder, ignore_errors=True)
