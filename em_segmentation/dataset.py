"""Patches of volumes as samples of an endless, addressed stream, and the fixed patches of validation."""

import dataclasses
import itertools

import numpy as np
import torch
from torch.utils.data import Dataset

from common.errors import UserError, config_error, data_error
from common.streams import random_for
from em_segmentation.augmentation import Patch
from em_segmentation.augmentation import problems as augmentation_problems
from em_segmentation.config import Config, Data, Targets
from em_segmentation.regions import Triple
from em_segmentation.volumes import Annotated, Role, check_apart, digest, in_memory, open_role

FIRST_PATCHES = 64  # looked at before training


@dataclasses.dataclass(frozen=True)
class Volumes:
    """The volumes of one run, and what a checkpoint must remember of them."""

    train: list[Annotated]
    val: list[Annotated]
    voxel_size_nm: tuple[float, float, float]
    digest: str  # changes with whatever training reads


def open_volumes(config: Config) -> Volumes:
    """Training and validation volumes of a config, checked; in memory where data.use_cache says so."""
    data = config.data
    roles: dict[Role, list[Annotated]] = {"train": open_role(data, "train"), "val": open_role(data, "val")}
    if not roles["train"]:
        raise config_error("data.train_image: expected at least one volume to train on")
    check_apart(roles)
    for role, volumes in roles.items():
        for volume in volumes:
            check_volume(config, role, volume)
    if data.train_weights and len(data.train_weights) != len(roles["train"]):
        raise config_error(
            f"data.train_weights: expected one per training volume ({len(roles['train'])}), "
            f"got {len(data.train_weights)}"
        )
    sizes = {volume.voxel_size_nm for volume in (*roles["train"], *roles["val"])}
    if len(sizes) > 1:
        raise config_error(f"data.voxel_size_nm: the volumes differ ({sorted(sizes)} nm); train on one size at a time")
    voxel_size = sizes.pop()
    if data.augmentation and (wrong := list(augmentation_problems(data.patch_size, voxel_size, config.augmentation))):
        raise config_error(*wrong)
    if data.use_cache:
        roles = {role: [cached(volume) for volume in volumes] for role, volumes in roles.items()}
    return Volumes(roles["train"], roles["val"], voxel_size, digest([*roles["train"], *roles["val"]]))


def check_volume(config: Config, role: Role, volume: Annotated) -> None:
    """A volume must have the channels and the labels that the targets need, and room for a patch."""
    path, needed = volume.image.path, max(config.targets.label_channels) + 1
    if volume.image.num_channels != config.model.in_channels:
        raise config_error(
            f"model.in_channels: {path} has {volume.image.num_channels} channels, got {config.model.in_channels}"
        )
    if volume.label is None:
        raise config_error(f"data.{role}_label: expected labels for {path}")
    if volume.label.num_channels < needed:
        raise config_error(
            f"targets.label_channels: {volume.label.path} has {volume.label.num_channels} channels, "
            f"expected at least {needed}"
        )
    size = config.data.patch_size
    least = size if role == "train" or config.model.architecture.endswith("unetr") else validation_granules(size)
    if any(edge > n for edge, n in zip(least, volume.shape, strict=True)):
        raise config_error(
            f"data.patch_size: {list(size)} is larger than {path} {list(volume.shape)}; "
            "expected a smaller patch, or larger volumes"
        )


def cached(volume: Annotated) -> Annotated:
    """The same volume with its used sections in memory; workers share the pages."""
    label, mask = (
        in_memory(lazy, volume.sections) if lazy is not None else None for lazy in (volume.label, volume.mask)
    )
    image = in_memory(volume.image, volume.sections)
    return dataclasses.replace(volume, image=image, label=label, mask=mask)


def foreground_share(labels: np.ndarray, annotated: np.ndarray, targets: Targets) -> float:
    """The share of a patch's voxels that are annotated and foreground of the first target."""
    ids = labels[targets.label_channels[0]]
    only = targets.semantic_only if targets.names[0] == "semantic" else ()
    foreground = np.isin(ids, only) if only else ids > 0
    return float((foreground & annotated[0]).mean())


def as_patch(image: np.ndarray, labels: np.ndarray, annotated: np.ndarray, position: int) -> Patch:
    """A batch of one."""
    image_, labels_, annotated_ = (torch.from_numpy(part)[None] for part in (image, labels, annotated))
    return Patch(image_, labels_, annotated_, torch.tensor([position]))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Where a patch lies, and what is written there."""

    volume: Annotated
    corner: Triple
    labels: np.ndarray
    annotated: np.ndarray


@dataclasses.dataclass(frozen=True)
class PatchStream(Dataset[Patch | UserError]):
    """Item p is the p-th patch that the run ever sees, from anywhere in the training volumes; endless."""

    volumes: list[Annotated]
    data: Data
    targets: Targets  # the first one's foreground counts
    seed: int

    def chances(self) -> np.ndarray:
        """How likely each volume is drawn."""
        sizes = [float(np.prod(volume.shape)) for volume in self.volumes]
        weights = np.array(self.data.train_weights if self.data.train_weights else sizes)
        return np.asarray(weights / weights.sum())

    def draw(self, position: int) -> Drawn:
        """The place of a position: a pure function of it and of the seed."""
        random, chances, size = random_for("patch", self.seed, position), self.chances(), self.data.patch_size
        for attempt in range(self.data.foreground_tries):
            volume = self.volumes[int(random.choice(len(self.volumes), p=chances))]
            z, y, x = (int(random.integers(n - edge + 1)) for n, edge in zip(volume.shape, size, strict=True))
            drawn = Drawn(volume, (z, y, x), *volume.read_truth((z, y, x), size))
            last_try = attempt == self.data.foreground_tries - 1
            share = foreground_share(drawn.labels, drawn.annotated, self.targets)
            if last_try or (drawn.annotated.any() and share >= self.data.min_foreground):
                break
        return drawn

    def name(self, position: int) -> str:
        """The place of a position in words."""
        drawn = self.draw(position)
        z, y, x = drawn.corner
        return f"patch {position} ({drawn.volume.image.path} from z, y, x = {[z + drawn.volume.sections[0], y, x]})"

    def __getitem__(self, position: int) -> Patch | UserError:
        try:
            drawn = self.draw(position)
            image = drawn.volume.read_image(drawn.corner, self.data.patch_size)
            return as_patch(image, drawn.labels, drawn.annotated, position)
        except UserError as error:
            return error  # as an item: a worker process would wrap what it raises in a traceback


def check_stream(stream: PatchStream) -> None:
    """A data error where the first patches hold nothing that is annotated, a warning where they hold no foreground."""
    is_annotated = has_foreground = False
    for position in range(FIRST_PATCHES):
        drawn = stream.draw(position)
        is_annotated |= bool(drawn.annotated.any())
        has_foreground |= foreground_share(drawn.labels, drawn.annotated, stream.targets) > 0
        if is_annotated and has_foreground:
            return
    if not is_annotated:
        raise data_error(
            f"data.train_mask: none of {FIRST_PATCHES} patches has an annotated voxel; expected masks that are not 0 there"
        )
    print(
        f"warning: none of the first {FIRST_PATCHES} patches holds foreground (labels above 0, or targets.semantic_only)"
    )


def patch_stream(volumes: Volumes, config: Config) -> PatchStream:
    """The training patches of a run."""
    return PatchStream(volumes.train, config.data, config.targets, config.system.seed)


@dataclasses.dataclass(frozen=True)
class PatchList(Dataset[Patch | UserError]):
    """Item i is the i-th of the fixed validation patches."""

    volumes: list[Annotated]
    places: list[tuple[int, Triple]]
    size: Triple

    def __getitem__(self, index: int) -> Patch | UserError:
        number, corner = self.places[index]
        volume = self.volumes[number]
        try:
            return as_patch(volume.read_image(corner, self.size), *volume.read_truth(corner, self.size), index)
        except UserError as error:
            return error


def validation_granules(size: Triple) -> Triple:
    """What edges of a smaller patch must be multiples of: the powers of two in those of a patch that a network takes."""
    z, y, x = (edge & -edge for edge in size)
    return z, y, x


def validation_size(volumes: list[Annotated], size: Triple) -> Triple:
    """Edges of validation patches: those of training patches, shorter where a validation volume is smaller."""
    least = np.array([volume.shape for volume in volumes]).min(0)
    granules = validation_granules(size)
    z, y, x = (edge if edge <= n else int(n) // g * g for edge, n, g in zip(size, least, granules, strict=True))
    return z, y, x


def validation_places(volumes: list[Annotated], size: Triple, most: int) -> list[tuple[int, Triple]]:
    """Volume and corner of at most `most` patches, evenly chosen from grids that cover the volumes without gaps."""
    every: list[tuple[int, Triple]] = []
    for number, volume in enumerate(volumes):
        starts = [grid_starts(n, edge) for n, edge in zip(volume.shape, size, strict=True)]
        every += [(number, (z, y, x)) for z, y, x in itertools.product(*starts)]
    chosen = np.unique(np.linspace(0, len(every) - 1, min(most, len(every))).round().astype(int))
    return [every[k] for k in chosen]


def grid_starts(n: int, edge: int) -> list[int]:
    """First cells of the fewest evenly spread patches that cover n cells."""
    count = -(-n // edge)
    return [round(k * (n - edge) / max(1, count - 1)) for k in range(count)]


def stack(patches: list[Patch | UserError]) -> Patch | UserError:
    """One batch of several patches, or the first error among them."""
    for patch in patches:
        if isinstance(patch, UserError):
            return patch
    return Patch(*(torch.cat([getattr(p, field.name) for p in patches]) for field in dataclasses.fields(Patch)))


def to_device(batch: Patch, device: torch.device) -> Patch:
    """The batch with its voxels on a device; positions stay, as what is drawn from them is drawn on the host."""
    image, labels, annotated = (
        part.to(device, non_blocking=True) for part in (batch.image, batch.labels, batch.annotated)
    )
    return Patch(image, labels, annotated, batch.position)
