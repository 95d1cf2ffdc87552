"""Files of a prediction: probabilities streamed plane range by plane range, instances decoded from them.

Both can be killed and continued; several processes share the planes of the probabilities.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from common.config import as_yaml
from common.errors import config_error
from common.files import parsing, read_text, write_atomically, write_text
from common.logbook import progress
from common.memory import give_back_freed_memory
from common.parallel import all_ranks_do, first_rank_does
from common.volumes.finishing import check_target
from common.volumes.opening import open_volume
from common.volumes.streaming import (
    ABOUT,
    DATA,
    PlaneRange,
    StreamedVolume,
    closing_folder,
    discard_streamed,
    open_streamed,
    partial_folder,
)
from common.volumes.volume import Volume
from em_segmentation.config import Config
from em_segmentation.config_inference import Decoding
from em_segmentation.decoding.block_grid import ChannelReader
from em_segmentation.decoding.blocks import decode_blocks, write_decoded
from em_segmentation.decoding.cleaning import smallest_dtype
from em_segmentation.decoding.executors import open_executor
from em_segmentation.decoding.pipeline import segment_at
from em_segmentation.decoding.settings import Settings, settings_of
from em_segmentation.inference import predicted_boxes, row_starts, written_channels
from em_segmentation.model_defs.registry import SegmentationModel
from em_segmentation.regions import Triple, VoxelSize
from em_segmentation.volumes import Scale

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
        """Changes with all that the predicted file depends on."""
        image = dataclasses.replace(self.image, path=self.image.path.resolve())  # with its axes and its key in the file
        state = image.path.stat()  # of a folder: when a section came or went
        facts = [image, state.st_size, state.st_mtime_ns]
        facts += [self.scale, self.sections, self.voxel_size_nm, self.weights, as_yaml(config.inference)]
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
        missing = all_ranks_do(streamed.missing_ranges)  # every rank has looked before one begins to write
        all_ranks_do(lambda: write_own_planes(model, source, config, streamed, missing))
        first_rank_does(lambda: finish(streamed, source.voxel_size_nm))
    return open_volume(path, "auto")  # some formats have an order of their own


def finish(streamed: StreamedVolume, voxel_size_nm: VoxelSize) -> None:
    """Make the target and say what it was made from; the note comes first, so that a kill between them loses nothing."""
    write_text(note_of(streamed.path), streamed.identity)
    streamed.finish(voxel_size_nm)


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
    return read_text(note) == identity and unfinished_identity(path) != identity


def unfinished_identity(path: Path) -> str | None:
    """What the unfinished output of a target is made from; None where there is none."""
    for folder in (partial_folder(path), closing_folder(path)):
        if (folder / DATA).exists():
            with parsing(folder / ABOUT, "remove this folder"):
                return str(json.loads(read_text(folder / ABOUT))["identity"])
    return None


def forget_others(path: Path, identity: str) -> None:
    """Remove the unfinished output of a target that is made from something else."""
    if unfinished_identity(path) not in (None, identity):
        discard(path)


def discard(path: Path) -> None:
    """Remove all that is unfinished of a target.

    A call that was killed while it replaced an older target has noted its identity already: the older is not that.
    """
    note = note_of(path)
    if note.exists() and unfinished_identity(path) == read_text(note):
        write_text(note, "replaced by something that was given up")
    discard_streamed(path)
    if scratch_of(path).exists():
        shutil.rmtree(scratch_of(path))


def write_own_planes(
    model: SegmentationModel, source: Source, config: Config, streamed: StreamedVolume, missing: list[PlaneRange]
) -> None:
    """This rank's share of what is missing."""
    first = source.sections[0]
    starts = [start - first for start in row_starts(model, source.image.shape, config)]
    own = share_of(missing, starts, dist.get_rank(), dist.get_world_size())
    total = sum(end - begin for begin, end in own)
    bar = progress(range(total), f"predicting {source.image.path.name}", total, dist.get_rank() == 0)
    for begin, end in own:
        planes = begin + first, end + first
        for (z, y, x), found in predicted_boxes(model, source.image, source.scale, config, planes):
            streamed.write_box((z - first, y, x), found)
            if (y + found.shape[2], x + found.shape[3]) == source.shape[1:]:  # the last box of its planes
                streamed.mark_finished(z - first, z - first + found.shape[1])
                bar.update(found.shape[1])
                give_back_freed_memory()
    bar.close()


def share_of(missing: list[PlaneRange], starts: list[int], rank: int, num_ranks: int) -> list[PlaneRange]:
    """One rank's ranges of the missing planes, ascending: parted where rows of tiles start, so that no row is two ranks'."""
    pieces = [
        piece
        for first, last in missing
        for piece in itertools.pairwise([first, *(start for start in starts if first < start < last), last])
    ]
    ends = np.linspace(0, len(pieces), num_ranks + 1).round().astype(int)
    own: list[PlaneRange] = []
    for first, last in pieces[ends[rank] : ends[rank + 1]]:
        if own and own[-1][1] == first:
            own[-1] = own[-1][0], last
        else:
            own.append((first, last))
    return own


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


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Which channels of a prediction instances are made of; inverted: they are 255 inside objects."""

    channels: slice
    inverted: bool


def decoded_of(config: Config) -> Decoded:
    """What decoding.target means: affinities, or a map that is 255 on boundaries."""
    target = config.decoding.target
    name = "semantic" if target == "membrane" else target
    return Decoded(written_channels(config.targets)[name], target == "semantic")


def decoded_channels(prediction: Volume, config: Config) -> Channels:
    """What instances are made of, as the decoder reads it."""
    decoded = decoded_of(config)
    return Channels(prediction, decoded.channels, decoded.inverted)


@dataclasses.dataclass(frozen=True)
class BoxWriter:
    """Takes blocks of labels into a streamed volume."""

    streamed: StreamedVolume

    def write(self, corner: Triple, labels: npt.NDArray[np.unsignedinteger]) -> None:
        self.streamed.write_box(corner, labels.astype(self.streamed.dtype))


def instances_identity(config: Config, threshold: int, made_from: str) -> str:
    """Changes with all that instances depend on; made_from: the prediction's identity."""
    settings = settings_of(config.decoding, config.targets, threshold)
    facts = f"{made_from} {settings} {config.decoding.by_section} {decoded_of(config)}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def write_instances(
    prediction: Volume, config: Config, threshold: int, voxel_size_nm: VoxelSize, made_from: str, path: Path
) -> Volume:
    """Instances [z, y, x] of a prediction at a path, ids from 1, block by block where it is larger than one block.

    made_from: the prediction's identity; what is finished is kept.
    """
    identity = instances_identity(config, threshold, made_from)
    if not is_finished(path, identity):
        settings = settings_of(config.decoding, config.targets, threshold)
        channels = decoded_channels(prediction, config)
        if config.decoding.by_section:
            streamed = decode_sections(channels, settings, identity, path)
        else:
            streamed = decode(channels, settings, config.decoding, identity, path)
        finish(streamed, voxel_size_nm)
        shutil.rmtree(scratch_of(path), ignore_errors=True)
    return open_volume(path, "auto")


def segment_sections(
    volume: Bytes, settings: Settings, thresholds: tuple[int, ...], decoding: Decoding
) -> list[npt.NDArray[np.unsignedinteger]]:
    """pipeline.segment_at of a volume [c, z, y, x], or, by_section, of each section by itself with ids numbered on."""
    if not decoding.by_section:
        return [*segment_at(volume, settings, thresholds)]
    sections = [segment_at(volume[:, z : z + 1], settings, thresholds) for z in range(volume.shape[1])]
    return [numbered_on([section[k] for section in sections]) for k in range(len(thresholds))]


def numbered_on(sections: list[npt.NDArray[np.unsignedinteger]]) -> npt.NDArray[np.unsignedinteger]:
    """Sections [1, y, x] with ids 1..n each as one volume of different ids."""
    ends = np.cumsum([int(section.max(initial=0)) for section in sections])
    numbered = np.concatenate(sections).astype(smallest_dtype(int(ends[-1])))
    for section, first in zip(numbered[1:], ends[:-1], strict=True):
        section[section > 0] += first.astype(numbered.dtype)
    return numbered


def decode(
    channels: ChannelReader, settings: Settings, decoding: Decoding, identity: str, path: Path
) -> StreamedVolume:
    """The instances of a volume, at once or block by block, in the unfinished output of a path."""
    if np.prod(channels.shape) <= np.prod(decoding.block_size):
        return decode_whole(channels, settings, identity, path)
    return decode_by_blocks(channels, settings, decoding, identity, path)


def decode_whole(channels: ChannelReader, settings: Settings, identity: str, path: Path) -> StreamedVolume:
    labels = segment_at(whole(channels), settings, (settings.threshold,))[0]
    check_target(path, 1, labels.dtype)  # PNG holds no more than 65535 ids
    streamed = open_streamed(path, (1, *channels.shape), labels.dtype, identity)
    streamed.write(0, labels)
    return streamed


def decode_sections(channels: ChannelReader, settings: Settings, identity: str, path: Path) -> StreamedVolume:
    """Sections one by one; those that are finished lie in the scratch folder until the type that holds all ids is known."""
    depth, height, width = channels.shape
    files = [scratch_of(path) / f"{identity}-sections" / f"{z}.npy" for z in range(depth)]
    for z in progress(range(depth), "decoding sections", depth, True):
        if not files[z].exists():
            values = channels.read_channels((z, 0, 0), (1, height, width))
            labels = segment_at(values, settings, (settings.threshold,))[0]
            write_atomically(files[z], functools.partial(np.save, arr=labels))
    counts = [int(np.load(file, mmap_mode="r").max(initial=0)) for file in files]
    dtype = np.dtype(smallest_dtype(sum(counts)))
    check_target(path, 1, dtype)
    streamed = open_streamed(path, (1, *channels.shape), dtype, identity)
    for z, first in enumerate(np.cumsum([0, *counts[:-1]]).tolist()):
        labels = np.load(files[z]).astype(dtype)
        labels[labels > 0] += dtype.type(first)
        streamed.write_box((z, 0, 0), labels)
    streamed.mark_finished(0, depth)
    return streamed


def scratch_of(path: Path) -> Path:
    """Where the blocks of unfinished instances lie."""
    return path.with_name(f".{path.name}.blocks")


def decode_by_blocks(
    channels: ChannelReader, settings: Settings, decoding: Decoding, identity: str, path: Path
) -> StreamedVolume:
    edges = "x".join(map(str, decoding.block_size))
    scratch = scratch_of(path) / f"{identity}-{edges}"
    with open_executor(decoding.executor, decoding.workers, decoding.dask_address) as executor:
        decoded = decode_blocks(channels, settings, decoding.block_size, scratch, executor)
        check_target(path, 1, np.dtype(decoded.dtype))
        streamed = open_streamed(path, (1, *channels.shape), np.dtype(decoded.dtype), identity)
        write_decoded(decoded, BoxWriter(streamed), executor)
    streamed.mark_finished(0, channels.shape[0])
    return streamed


def whole(volume: Volume | ChannelReader) -> npt.NDArray[Any]:
    """A volume [c, z, y, x] in memory."""
    voxels: npt.NDArray[Any] = volume.read_channels((0, 0, 0), volume.shape)
    return voxels
