"""Backbones by name.

create_backbone("resnet18", 3, 1) makes a 3D ResNet-18 that reads one channel; pretrained.load_pretrained fills it from a
file of torchvision's 2D weights.
"""

import difflib

from common.backbones.backbone import Backbone, Builder
from common.backbones.convnext import CONVNEXTS
from common.backbones.densenet import DENSENETS
from common.backbones.efficientnet import EFFICIENTNETS
from common.backbones.inception import INCEPTIONS
from common.backbones.maxvit import MAXVITS
from common.backbones.mobilenet import MOBILENETS
from common.backbones.mvit import MVITS
from common.backbones.regnet import REGNETS
from common.backbones.resnet import RESNETS
from common.backbones.shufflenet import SHUFFLENETS
from common.backbones.swin import SWINS
from common.backbones.vgg import VGGS
from common.backbones.video import VIDEOS
from common.backbones.vit import VITS
from common.errors import config_error

BACKBONES: dict[str, Builder] = {
    **RESNETS, **DENSENETS, **EFFICIENTNETS, **MOBILENETS, **CONVNEXTS, **REGNETS, **VGGS, **SHUFFLENETS,
    **INCEPTIONS, **VITS, **SWINS, **MAXVITS, **VIDEOS, **MVITS,
}  # fmt: skip


def list_backbones() -> list[str]:
    """All names, sorted."""
    return sorted(BACKBONES)


def create_backbone(name: str, dims: int, in_channels: int) -> Backbone:
    """A backbone without classifier, for images (B, in_channels, y, x) or volumes (B, in_channels, z, y, x).

    Raises a config error for a name that is not in list_backbones(), dims it does not have, or no channels.
    """
    return _create(name, dims, in_channels, 0)


def create_classifier(name: str, dims: int, in_channels: int, num_classes: int) -> Backbone:
    """The same with torchvision's classifier, whose output is .logits(x): (B, num_classes)."""
    if num_classes < 1:
        raise config_error(f"num_classes: expected 1 or more, got {num_classes}")
    return _create(name, dims, in_channels, num_classes)


def _create(name: str, dims: int, in_channels: int, num_classes: int) -> Backbone:
    if name not in BACKBONES:
        close = difflib.get_close_matches(name, BACKBONES, 5, 0.4)
        raise config_error(f"backbone: no {name!r}; nearest: {', '.join(close) if close else ', '.join(BACKBONES)}")
    if in_channels < 1:
        raise config_error(f"in_channels: expected 1 or more, got {in_channels}")
    if dims not in (2, 3):
        raise config_error(f"dims: expected 2 or 3, got {dims}")
    return BACKBONES[name](dims, in_channels, num_classes)
