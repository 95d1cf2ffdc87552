"""Networks by name: what a config's model.architecture may say, and how each is built.

A network of one's own: register_architecture("mine", build) with build(config, out_channels) -> any nn.Module from
(B, in, z, y, x) to (B, out, z, y, x); then model.architecture=mine.
"""

import difflib
from collections.abc import Callable

from torch import Tensor, nn

from common.errors import config_error
from em_segmentation.config import Config
from em_segmentation.model_defs.mednext import SIZES, MedNeXt
from em_segmentation.model_defs.rsunet import RSUNet, kernels_along_z
from em_segmentation.model_defs.swin_unetr import SwinUNETR
from em_segmentation.model_defs.unetr import UNETR
from em_segmentation.model_defs.unets import BasicUNet3d, ResidualUNet3d
from em_segmentation.regions import Region, Triple
from em_segmentation.targets import num_channels

KIND = "em_segmentation"  # of checkpoints with weights of these networks
Builder = Callable[[Config, int], nn.Module]  # the config and the number of output channels
ALIASES = {
    "monai_basic_unet3d": "basic_unet3d",
    "monai_unet": "unet",
    "monai_unetr": "unetr",
    "monai_swin_unetr": "swin_unetr",
}


class SegmentationModel(nn.Module):
    """A network with its name: (B, in, z, y, x) -> (B, out, z, y, x), or in training a list of scales, finest first.

    halo, alignment: how far an output looks and where tiles may begin (z, y, x); None where a whole window matters.
    """

    def __init__(self, architecture: str, network: nn.Module) -> None:
        super().__init__()
        self.architecture = architecture
        self.network = network
        self.halo: Triple | None = getattr(network, "halo", None)
        self.alignment: Triple | None = getattr(network, "alignment", None)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        logits: Tensor | list[Tensor] = self.network(x)
        return logits

    def part(self, x: Tensor, region: Region) -> Tensor:
        """The logits (B, out, ...) in a region z, y, x of the input alone; of a model in eval mode."""
        if isinstance(self.network, RSUNet):
            return self.network.part(x, region)
        logits = self.network(x)
        assert isinstance(logits, Tensor), "Expected a model in eval mode"
        return logits[:, :, region[0], region[1], region[2]]

    def get_model_info(self) -> dict[str, str | int | bool]:
        """Name, class, numbers of parameters, and whether tiles can be exact."""
        parameters = list(self.parameters())
        return {
            "architecture": self.architecture,
            "class": type(self.network).__name__,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "exact_tiles": self.halo is not None,
        }


def build_basic_unet(config: Config, out_channels: int) -> nn.Module:
    filters = config.model.filters
    if len(filters) != 6:
        raise config_error(
            f"model.filters: basic_unet3d takes 6 numbers (five levels and the last), got {list(filters)}"
        )
    check_least(config, 16)
    check_coarsest(config, (31, 31, 31))  # four poolings that leave out what is odd
    six = (filters[0], filters[1], filters[2], filters[3], filters[4], filters[5])
    return BasicUNet3d(config.model.in_channels, out_channels, six, config.model.dropout)


def build_unet(config: Config, out_channels: int) -> nn.Module:
    if len(config.model.filters) < 2:
        raise config_error(f"model.filters: unet takes at least 2 levels, got {list(config.model.filters)}")
    check_multiple(config, 2 ** (len(config.model.filters) - 1))
    return ResidualUNet3d(config.model.in_channels, out_channels, config.model.filters, config.model.dropout)


def build_unetr(config: Config, out_channels: int) -> nn.Module:
    check_multiple(config, 16)
    model, window = config.model, config.inference.window_size
    if window not in (None, config.data.patch_size):
        raise config_error(
            f"inference.window_size: unetr knows positions of its patches only; expected null, or "
            f"{list(config.data.patch_size)} as data.patch_size"
        )
    return UNETR(model.in_channels, out_channels, config.data.patch_size, model.feature_size, model.dropout)


def build_swin_unetr(config: Config, out_channels: int) -> nn.Module:
    check_multiple(config, 32)
    model = config.model
    if model.feature_size % 12:
        raise config_error(f"model.feature_size: swin_unetr takes multiples of 12 (24, 48), got {model.feature_size}")
    return SwinUNETR(model.in_channels, out_channels, model.feature_size, model.dropout)


def build_mednext(config: Config, out_channels: int) -> nn.Module:
    check_multiple(config, 16)
    check_coarsest(config, (16, 16, 16))
    model, size = config.model, SIZES[config.model.mednext_size]
    return MedNeXt(
        model.in_channels,
        out_channels,
        size.base_channels,
        model.mednext_kernel_size,
        size.expansions,
        size.blocks,
        False,
        model.deep_supervision,
        model.activation_checkpointing or size.checkpointing,
    )


def build_mednext_custom(config: Config, out_channels: int) -> nn.Module:
    check_multiple(config, 16)
    check_coarsest(config, (16, 16, 16))
    model = config.model
    return MedNeXt(
        model.in_channels,
        out_channels,
        model.mednext_base_channels,
        model.mednext_kernel_size,
        model.mednext_exp_r,
        model.mednext_block_counts,
        model.mednext_grn,
        model.deep_supervision,
        model.activation_checkpointing,
    )


def build_rsunet(config: Config, out_channels: int) -> nn.Module:
    model, voxel_size = config.model, config.data.voxel_size_nm
    assert voxel_size is not None, "Expected a config whose voxel size was read from the volumes"
    cell = (voxel_size[0] * model.fold[0], voxel_size[1] * model.fold[1], voxel_size[2] * model.fold[2])  # nm
    kernel_z = model.kernel_z if model.kernel_z else kernels_along_z(cell, len(model.filters))
    network = RSUNet(model.in_channels, out_channels, model.fold, model.filters, kernel_z, model.norm)
    if model.norm == "batch":
        check_coarsest(config, network.alignment)
    return network


ARCHITECTURES: dict[str, Builder] = {
    "basic_unet3d": build_basic_unet,
    "unet": build_unet,
    "unetr": build_unetr,
    "swin_unetr": build_swin_unetr,
    "mednext": build_mednext,
    "mednext_custom": build_mednext_custom,
    "rsunet": build_rsunet,
}
ONE_SCALE = (build_basic_unet, build_unet, build_unetr, build_swin_unetr, build_rsunet)


def edges(config: Config) -> dict[str, Triple]:
    """What a network is given while training and at inference."""
    sizes = {"data.patch_size": config.data.patch_size, "inference.window_size": config.inference.window_size}
    return {name: size for name, size in sizes.items() if size is not None}


def check_least(config: Config, least: int) -> None:
    """A config error where patches or windows are too small for a network's levels."""
    for name, size in edges(config).items():
        if min(size) < least:
            raise config_error(
                f"{name}: {config.model.architecture} takes at least {least} voxels along each axis, got {list(size)}"
            )


def check_multiple(config: Config, multiple: int) -> None:
    """A config error where a network's levels do not fit into patches and windows."""
    for name, size in edges(config).items():
        if any(edge % multiple for edge in size):
            raise config_error(
                f"{name}: {config.model.architecture} takes multiples of {multiple} voxels, got {list(size)}"
            )


def check_coarsest(config: Config, largest: Triple) -> None:
    """A config error where a patch is a single voxel at the coarsest level, as up to `largest` it is: norms erase it."""
    if all(n <= most for n, most in zip(config.data.patch_size, largest, strict=True)):
        raise config_error(
            f"data.patch_size: {list(config.data.patch_size)} is a single voxel at {config.model.architecture}'s coarsest "
            "level; give larger patches, or a network of fewer levels"
        )


def check_scales(config: Config, builder: Builder) -> None:
    """A config error where deep supervision is asked of a network of ours that has one scale."""
    if config.model.deep_supervision and builder in ONE_SCALE:
        raise config_error(
            f"model.deep_supervision: {config.model.architecture} has one scale; expected false, or mednext"
        )


def list_architectures() -> list[str]:
    """The names that model.architecture may have, without aliases."""
    return sorted(ARCHITECTURES)


def print_available_architectures() -> None:
    for name in list_architectures():
        others = ", ".join(alias for alias, meant in ALIASES.items() if meant == name)
        print(f"{name} (also {others})" if others else name)


def register_architecture(name: str, builder: Builder) -> None:
    """Add a network; a config error where the name is taken."""
    if name in ARCHITECTURES or name in ALIASES:
        raise config_error(f"register_architecture: {name} exists already; expected a new name")
    ARCHITECTURES[name] = builder


def get_architecture_builder(name: str) -> Builder:
    """The builder of a name or an alias; a config error lists the nearest names."""
    meant = ALIASES[name] if name in ALIASES else name
    if meant not in ARCHITECTURES:
        close = difflib.get_close_matches(name, [*ARCHITECTURES, *ALIASES], 1, 0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise config_error(
            f"model.architecture: no network {name!r}; expected one of {', '.join(list_architectures())}{hint}"
        )
    return ARCHITECTURES[meant]


def build_model(config: Config) -> SegmentationModel:
    """The network of a config, with as many output channels as its targets need."""
    needed = sum(num_channels(name, config.targets) for name in config.targets.names)
    if config.model.out_channels not in (0, needed):
        raise config_error(
            f"model.out_channels: {', '.join(config.targets.names)} need {needed}, got {config.model.out_channels}; "
            "expected that number, or 0"
        )
    builder = get_architecture_builder(config.model.architecture)
    check_scales(config, builder)
    network = builder(config, needed)
    if not isinstance(network, nn.Module) or not list(network.parameters()):
        raise config_error(
            f"model.architecture: {config.model.architecture}'s builder returned no network with weights"
        )
    return SegmentationModel(config.model.architecture, network)
