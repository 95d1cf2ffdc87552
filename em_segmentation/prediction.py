"""Files of a prediction: probabilities streamed plane range by plane range, instances decoded from them.

Both can be killed and continued, and several processes share the work.
"""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from common.config import as_yaml
from common.errors import config_error
from common.files import read_text, write_text
from common.logbook import progress
from common.parallel import all_ranks_do, first_rank_does
from common.volumes.opening import open_volume
from common.volumes.streaming import PlaneRange, StreamedVolume, open_streamed
from common.volumes.volume import Volume
from em_segmentation.config import Config, Decoding, Targets
from em_segmentation.decoding.blocks import decode_blocks, write_decoded
from em_segmentation.decoding.executors import open_executor
from em_segmentation.decoding.pipeline import segment_at
from em_segmentation.decoding.settings import Settings
from em_segmentation.inference import predicted_planes, written_channels
from em_segmentation.model_defs.registry import SegmentationModel
from em_segmentation.volumes import Scale

Triple = tuple[int, int, int]
VoxelSize = tuple[float, float, float]
Bytes = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Source:
    """What is predicted: the sections [first, last) of an image; `weights` names the network's weights."""

    image: Volume
    scale: Scale
    sections: tuple[int, int]
    voxel_size_nm: VoxelSize
    weights: str

    @property
    def shape(self) -> Triple:
        return self.sections[1] - self.sections[0], self.image.shape[1], self.image.shape[2]

    def identity(self, config: Config) -> str:
        """Changes with all that the predicted bytes depend on."""
        facts = [str(self.image.path), self.scale, self.sections, self.weights, as_yaml(config.inference)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def write_prediction(model: SegmentationModel, source: Source, config: Config, path: Path) -> Volume:
    """Probabilities [C, z, y, x] uint8 of a source at a path; processes of the group share its planes.

    What this or another, killed call finished is kept; a file that is not such a prediction is a config error. The
    channels are those of inference.written_channels.
    """
    channels = sum(part.stop - part.start for part in written_channels(config.targets).values())
    identity = source.identity(config)
    if not all_ranks_do(lambda: is_finished(path, identity)):
        shape = (channels, *source.shape)
        streamed = all_ranks_do(lambda: open_streamed(path, shape, np.dtype(np.uint8), identity))
        all_ranks_do(lambda: write_own_planes(model, source, config, streamed))
        first_rank_does(lambda: streamed.finish(source.voxel_size_nm))
        first_rank_does(lambda: write_text(note_of(path), identity))
    return open_volume(path, "czyx" if channels > 1 else "zyx")


def note_of(path: Path) -> Path:
    """The small file that says what a finished output was made from."""
    return path.with_name(f".{path.name}.identity")


def is_finished(path: Path, identity: str) -> bool:
    """Whether an output is there and made from just this; a config error where something else is there."""
    if not path.exists() and not path.is_symlink():
        return False
    note = note_of(path)
    if not note.exists():
        raise config_error(f"{path}: exists and was not made by this program; remove it, or name another output")
    return read_text(note) == identity


def write_own_planes(model: SegmentationModel, source: Source, config: Config, streamed: StreamedVolume) -> None:
    """This rank's share of what is missing."""
    first, last = share_of(streamed.missing_ranges(), dist.get_rank(), dist.get_world_size())
    bar = progress(range(last - first), f"predicting {source.image.path.name}", last - first, dist.get_rank() == 0)
    for begin, end in streamed.missing_ranges():
        begin, end = max(begin, first), min(end, last)
        if begin >= end:
            continue
        planes = (begin + source.sections[0], end + source.sections[0])
        for plane, found in predicted_planes(model, source.image, source.scale, config, planes):
            streamed.write(plane - source.sections[0], found)
            bar.update(found.shape[1])
    bar.close()


def share_of(missing: list[PlaneRange], rank: int, num_ranks: int) -> PlaneRange:
    """One rank's range of planes: the missing ones are parted evenly, in order."""
    if not missing:
        return 0, 0
    planes = np.concatenate([np.arange(first, last) for first, last in missing])
    ends = np.linspace(0, len(planes), num_ranks + 1).round().astype(int)
    mine = planes[ends[rank] : ends[rank + 1]]
    return (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)


@dataclasses.dataclass(frozen=True)
class Channels:
    """Some channels of a volume [c, z, y, x] of bytes, seen as a volume; inverted: 255 - value."""

    volume: Volume
    channels: slice
    inverted: bool

    @property
    def shape(self) -> Triple:
        return self.volume.shape

    @property
    def num_channels(self) -> int:
        return int(self.channels.stop - self.channels.start)

    def read_channels(self, corner: Triple, size: Triple) -> Bytes:
        found: Bytes = self.volume.read_channels(corner, size)[self.channels]
        return 255 - found if self.inverted else found


def decoded_channels(prediction: Volume, config: Config) -> Channels:
    """What instances are made of."""
    target = config.decoding.target
    return Channels(prediction, written_channels(config.targets)[target], target == "semantic")


def decoding_settings(decoding: Decoding, targets: Targets, threshold: int) -> Settings:
    """The decoder's settings under a config."""
    return Settings(
        method=decoding.method,
        input="affinities" if decoding.target == "affinity" else "boundary",
        offsets=targets.affinity_offsets,
        stored_at=targets.affinity_stored_at,
        foreground=decoding.foreground,
        neighbours=decoding.neighbours,
        height=decoding.height,
        distance_threshold=decoding.distance_threshold,
        distance_reach=decoding.distance_reach,
        smoothing=decoding.smoothing,
        min_depth=decoding.min_depth,
        linkage=decoding.linkage,
        quantile=decoding.quantile,
        bins=256,
        threshold=threshold,
        min_size=decoding.min_size,
        small=decoding.small if decoding.method != "components" else "remove",
    )


@dataclasses.dataclass(frozen=True)
class BoxWriter:
    """Takes blocks of labels into a streamed volume."""

    streamed: StreamedVolume

    def write(self, corner: Triple, labels: npt.NDArray[np.unsignedinteger]) -> None:
        self.streamed.write_box(corner, labels.astype(self.streamed.dtype))


def write_instances(
    prediction: Volume, config: Config, threshold: int, voxel_size_nm: VoxelSize, made_from: str, path: Path
) -> Volume:
    """Instances [z, y, x] of a prediction at a path, ids from 1, block by block where it is larger than one block.

    made_from: the prediction's identity; what is finished is kept.
    """
    settings = decoding_settings(config.decoding, config.targets, threshold)
    identity = hashlib.sha256(f"{made_from} {settings}".encode()).hexdigest()[:16]
    if not is_finished(path, identity):
        channels = decoded_channels(prediction, config)
        if np.prod(prediction.shape) <= np.prod(config.decoding.block_size):
            streamed = decode_whole(channels, settings, identity, path)
        else:
            streamed = decode_by_blocks(channels, settings, config.decoding, identity, path)
        streamed.finish(voxel_size_nm)
        write_text(note_of(path), identity)
        shutil.rmtree(scratch_of(path), ignore_errors=True)
    return open_volume(path, "zyx")


def decode_whole(channels: Channels, settings: Settings, identity: str, path: Path) -> StreamedVolume:
    labels = segment_at(channels.read_channels((0, 0, 0), channels.shape), settings, (settings.threshold,))[0]
    streamed = open_streamed(path, (1, *channels.shape), labels.dtype, identity)
    streamed.write(0, labels)
    return streamed


def scratch_of(path: Path) -> Path:
    """Where the blocks of unfinished instances lie."""
    return path.with_name(f".{path.name}.blocks")


def decode_by_blocks(
    channels: Channels, settings: Settings, decoding: Decoding, identity: str, path: Path
) -> StreamedVolume:
    with open_executor(decoding.executor, decoding.workers, decoding.dask_address) as executor:
        decoded = decode_blocks(channels, settings, decoding.block_size, scratch_of(path) / identity, executor)
        streamed = open_streamed(path, (1, *channels.shape), np.dtype(decoded.dtype), identity)
        write_decoded(decoded, BoxWriter(streamed), executor)
    streamed.mark_finished(0, channels.shape[0])
    return streamed


def whole(volume: Volume | Channels) -> npt.NDArray[np.generic]:
    """A volume [c, z, y, x] in memory."""
    voxels: npt.NDArray[np.generic] = volume.read_channels((0, 0, 0), volume.shape)
    return voxels
