"""What is trained on a trial: MMNet, or the baseline on one magnification; and the network of each."""

import dataclasses

from torch import nn

from common.backbones.pretrained import load_pretrained
from histo_mmnet.config import Model
from histo_mmnet.model_defs.compact import CompactMMNet
from histo_mmnet.model_defs.mmnet import MMNet
from histo_mmnet.model_defs.single_mag import SingleMagNet
from histo_mmnet.names import MAGNIFICATIONS, Magnification

KIND = "histo_mmnet"
Network = MMNet | CompactMMNet | SingleMagNet


@dataclasses.dataclass(frozen=True)
class Member:
    """One network of a trial."""

    fold: int
    magnifications: tuple[Magnification, ...]  # that it looks at

    @property
    def name(self) -> str:
        """In words and in file names: mmnet, or 40X."""
        return "mmnet" if len(self.magnifications) > 1 else f"{self.magnifications[0]}X"

    @property
    def prefix(self) -> str:
        """Begins the names of its files: of MMNet nothing."""
        return "" if len(self.magnifications) > 1 else f"{self.name}_"


def mmnet_of(fold: int) -> Member:
    """The network of all magnifications."""
    return Member(fold, MAGNIFICATIONS)


def baselines_of(fold: int) -> list[Member]:
    """A network for each magnification."""
    return [Member(fold, (magnification,)) for magnification in MAGNIFICATIONS]


def pools_patients(member: Member, settings: Model) -> bool:
    """Whether the network looks at all photographs of a patient at once, not at a composite of a slide."""
    return settings.architecture == "compact" and len(member.magnifications) > 1


def build_network(member: Member, settings: Model) -> Network:
    """A member's network, its backbones filled from model.pretrained where that is given."""
    network: Network
    if len(member.magnifications) == 1:
        network = SingleMagNet(settings.backbone, settings.stages, settings.dropout)
    elif settings.architecture == "compact":
        network = CompactMMNet(settings.backbone, settings.stages, settings.width, settings.dropout)
    else:
        network = MMNet(settings.backbone, settings.stages, settings.shared, settings.width, settings.dropout)
    if settings.pretrained is not None:
        for backbone in network.extractors.backbones:
            load_pretrained(backbone, settings.pretrained, "drop", "mean")  # type: ignore[arg-type]
    if settings.frozen:
        network.extractors.freeze()
    return network


def count_trainable(network: nn.Module) -> int:
    """Weights that training changes."""
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
