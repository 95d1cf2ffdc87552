"""What annotated volumes hold to be judged by: classes, instances, the raw image; each read whole."""

import numpy as np
import numpy.typing as npt

from common.errors import data_error
from em_segmentation.config import Config
from em_segmentation.evaluation import Ids, Mask, Truth, truth_of
from em_segmentation.volumes import Annotated


def labels_of(volume: Annotated, channel: int) -> Ids:
    """One channel of a volume's labels, whole."""
    labels: Ids = volume.read_labels((0, 0, 0), volume.shape)[channel]
    return labels


def annotated_of(volume: Annotated) -> Mask:
    known: Mask = volume.read_annotated((0, 0, 0), volume.shape)[0]
    return known


def image_of(volume: Annotated) -> npt.NDArray[np.float32]:
    """The first channel, whole, in standard deviations."""
    image: npt.NDArray[np.float32] = volume.read_image((0, 0, 0), volume.shape)[0]
    return image


def semantic_truth(volume: Annotated, config: Config) -> npt.NDArray[np.uint8]:
    """Classes [z, y, x]: 0 or 1 for a single class, else as labelled; a data error for classes that there are not."""
    targets = config.targets
    labels = labels_of(volume, targets.label_channels[targets.names.index("semantic")])
    if targets.semantic_classes == 1:
        return (np.isin(labels, targets.semantic_only) if targets.semantic_only else labels != 0).astype(np.uint8)
    labels = np.where(annotated_of(volume), labels, 0)
    if labels.min() < 0 or labels.max() >= targets.semantic_classes:
        assert volume.label is not None
        raise data_error(
            f"{volume.label.path}: holds the classes {labels.min()} to {labels.max()}; expected 0 to "
            f"{targets.semantic_classes - 1} (targets.semantic_classes), or a mask over the others"
        )
    return labels.astype(np.uint8)


def truth_channel(config: Config) -> int:
    """The channel of the label volumes that holds the true instances."""
    targets, decoding = config.targets, config.decoding
    if decoding.label_channel is not None:
        return decoding.label_channel
    target = "semantic" if decoding.target == "membrane" else decoding.target
    return targets.label_channels[[str(name) for name in targets.names].index(target)]


def instance_truth(volume: Annotated, config: Config) -> Truth:
    """True instances [z, y, x], and where they are judged."""
    ids = labels_of(volume, truth_channel(config))
    if config.decoding.by_section:
        ids = np.unique(ids, return_inverse=True)[1].reshape(ids.shape) + (0 if (ids == 0).any() else 1)
        first = np.arange(len(ids))[:, None, None] * (ids.max() + 1)
        ids = np.where(ids > 0, ids + first, 0)
    return truth_of(ids, annotated_of(volume), config.evaluation)
