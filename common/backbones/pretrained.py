"""Weights that others trained, from a file of torchvision's names, into a backbone of other channels or dimensions.

Of a 2D kernel in a 3D network either the centre slice holds it and the others are zero, so that slice j of every map is
the 2D map of slice stride * j (Carreira and Zisserman 2017 divide instead: "mean"), or every slice holds its share.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.backbones.backbone import Backbone
from common.backbones.vit import resized_positions
from common.checkpoint import read_plain
from common.errors import config_error, data_error

Inflation = Literal["centre", "mean"]
WRAPPERS = ("state_dict", "model", "weights", "model_state_dict")  # under which trainers keep the weights
OLD_NAMES = (
    (r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),  # DenseNet before 2018
    (r"mlp\.linear_1\.", "mlp.0."),  # vision transformers before 2022
    (r"mlp\.linear_2\.", "mlp.3."),
)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPUTED = ("relative_position_index", "relative_coords_table", "num_batches_tracked")  # never taken from a file
Adapted = tuple[Tensor, str]  # a weight of the backbone's own shape, and what was done to it in words


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Names of the weights that were taken as they are, those that were adapted and how, and those left in the file."""

    taken: list[str]
    adapted: dict[str, str]
    left: list[str]

    def words(self) -> str:
        """One line for a log."""
        ways = sorted(set(self.adapted.values()))
        told = "; ".join(f"{way}: {sum(one == way for one in self.adapted.values())}" for way in ways)
        left = (
            f"; left in the file: {', '.join(self.left[:4])}{' ...' if len(self.left) > 4 else ''}" if self.left else ""
        )
        return f"{len(self.taken)} weights taken, {len(self.adapted)} adapted{f' ({told})' if told else ''}{left}"


def load_pretrained(
    backbone: Backbone, path: Path, classifier: Literal["keep", "drop"], inflation: Inflation
) -> Loaded:
    """Fill a backbone with the weights of a torchvision .pth (or a checkpoint that holds them) and tell what was done.

    classifier: keep takes the file's (of the same number of classes; a config error without a classifier), drop leaves the
    backbone's own as it is. inflation: of 2D kernels in a 3D backbone. Input channels are adapted so that a grey image, the
    same in all channels, gives the same response. Raises a data error for a file that cannot be read, or that does not fill
    the whole backbone, or that holds more than it.
    """
    heads = backbone.classifier_names()
    own = {name: weight for name, weight in backbone.state_dict().items() if not name.endswith(COMPUTED)}
    if classifier == "keep" and not any(name.split(".")[0] in heads for name in own):
        raise config_error(
            "classifier: keep, but the backbone has none; make it with create_classifier, or drop the file's"
        )
    weights = named_weights(content_of(path), path)
    left = [name for name in weights if name.split(".")[0] in heads and (classifier == "drop" or name not in own)]
    wanted = {name: weight for name, weight in own.items() if classifier == "keep" or name.split(".")[0] not in heads}
    given = {name: weight for name, weight in weights.items() if name not in left and not name.endswith(COMPUTED)}
    check_names(backbone, wanted, given, path)
    taken, adapted, filled = [], {}, {}
    for name, weight in wanted.items():
        check_weight(name, given[name], path)
        filled[name] = given[name].to(weight.dtype)
        if weight.shape == filled[name].shape:
            taken.append(name)
        else:
            filled[name], adapted[name] = adapt(backbone, name, filled[name], weight, inflation, path)
        if not bool(torch.isfinite(filled[name]).all()):
            raise data_error(f"{path}: {name} is not finite; give an undamaged file")
    backbone.load_state_dict(filled, strict=False)
    return Loaded(taken, adapted, left)


def content_of(path: Path) -> Any:
    """What torch.save wrote into a file."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "no such file"
        raise data_error(f"{path}: {kind}; expected weights as torchvision publishes them (.pth)")
    return read_plain(path)


def check_weight(name: str, weight: Tensor, path: Path) -> None:
    """A data error for a tensor that holds no plain numbers."""
    plain = weight.layout == torch.strided and weight.device.type == "cpu" and not weight.is_quantized
    if not plain or weight.dtype not in FLOATING or not weight.numel():
        kind = f"{weight.dtype} {weight.layout} {tuple(weight.shape)}".replace("torch.", "")
        raise data_error(f"{path}: {name} is {kind}; expected real numbers of 16, 32 or 64 bits")


def named_weights(content: Any, path: Path) -> dict[str, Tensor]:
    """The weights in a file by their present names."""
    while isinstance(content, dict) and (wrapper := next((w for w in WRAPPERS if w in content), None)) is not None:
        content = content[wrapper]
    if not isinstance(content, dict) or not content:
        found = "nothing" if content == {} else type(content).__name__
        raise data_error(f"{path}: expected named weights, found {found}; give a state dict")
    odd = next((name for name, one in content.items() if not (isinstance(name, str) and isinstance(one, Tensor))), None)
    if odd is not None:
        raise data_error(f"{path}: expected named weights, found {odd!r} that holds no tensor; give a state dict")
    return {present_name(name): weight for name, weight in content.items()}


def present_name(name: str) -> str:
    """The name that torchvision uses today, without the prefixes of data-parallel training and of compilation."""
    name = name.removeprefix("module.").removeprefix("_orig_mod.")
    for old, new in OLD_NAMES:
        name = re.sub(old, new, name)
    return name


def check_names(backbone: Backbone, wanted: dict[str, Tensor], given: dict[str, Tensor], path: Path) -> None:
    """A data error where the file is of another network."""
    lacking, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if lacking or unknown:
        parts = [("lacks", lacking), ("holds unknown", unknown)]
        found = "; ".join(f"{what} {', '.join(names[:3])} ({len(names)} in all)" for what, names in parts if names)
        raise data_error(
            f"{path}: expected the {len(wanted)} weights of {type(backbone).__name__}; the file {found}; "
            "give the weights of the same network"
        )


def adapt(backbone: Backbone, name: str, weight: Tensor, own: Tensor, inflation: Inflation, path: Path) -> Adapted:
    """A weight of another shape as the backbone's own; a data error where there is no way."""
    module, kind = backbone.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    stem = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    fitted, ways = weight, []
    if isinstance(module, nn.Conv3d) and weight.dim() == 4:
        fitted = inflated(weight, own.shape[2], int(module.padding[0]), inflation)
        ways.append(f"kernels inflated ({inflation})")
    if module is stem and fitted.dim() == own.dim() and fitted.shape[1] != own.shape[1]:
        fitted = with_channels(fitted, own.shape[1])
        ways.append(f"{weight.shape[1]} channels to {own.shape[1]}")
    elif kind == "pos_embedding" and weight.dim() == 3 and weight.shape[::2] == own.shape[::2]:
        fitted = positions_like(weight, own.shape[1] - 1, backbone.dims)
        ways.append("positions resized")
    elif kind == "relative_position_bias_table" and weight.dim() == 2 and weight.shape[1] == own.shape[1]:
        fitted = offsets_like(weight, len(own), backbone.dims)
        ways.append("tables of offsets resized")
    elif kind == "layer_scale":
        fitted = weight.reshape(-1, *[1] * backbone.dims)
        ways.append("scales reshaped")
    elif name.endswith("cpb_mlp.0.weight") and backbone.dims == 3:
        fitted = nn.functional.pad(weight, (1, 0))  # offsets along z say nothing at first
        ways.append("offsets along z ignored")
    elif (
        backbone.dims == 3 and weight.dim() == own.dim() and own.shape[-1] == 2 * weight.shape[-1]
    ):  # merges of 2 x 2 x 2 cells instead of 2 x 2
        fitted = torch.cat([weight, weight], -1) / (2 if kind == "weight" and weight.dim() == 2 else 1)
        ways.append("merges of twice the cells")
    if fitted.shape != own.shape:
        raise data_error(
            f"{path}: {name} has shape {tuple(weight.shape)}, expected {tuple(own.shape)}; give weights of the same network"
        )
    return fitted, ", ".join(ways)


def inflated(kernel: Tensor, depth: int, padding: int, inflation: Inflation) -> Tensor:
    """(outs, ins, y, x) -> (outs, ins, depth, y, x); padding: of the convolution along z, the place of its centre slice.

    An even kernel without padding (patches) has no centre: its first slice is taken.
    """
    if inflation == "mean":
        return (kernel / depth)[:, :, None].expand(-1, -1, depth, -1, -1)
    deep = kernel.new_zeros(*kernel.shape[:2], depth, *kernel.shape[2:])
    deep[:, :, padding] = kernel
    return deep


def with_channels(kernel: Tensor, channels: int) -> Tensor:
    """(outs, ins, ...) -> (outs, channels, ...), repeated in turns; a grey image keeps its response."""
    ins = kernel.shape[1]
    if channels == 1:
        return kernel.sum(1, keepdim=True)
    turns = torch.arange(channels) % ins
    if channels < ins:  # the channels that are not there are shared out among those that are
        return kernel[:, :channels] + kernel[:, channels:].sum(1, keepdim=True) / channels
    counts = turns.bincount(minlength=ins).to(kernel.dtype)
    return kernel[:, turns] / counts[turns].view(-1, *[1] * (kernel.dim() - 2))


def positions_like(table: Tensor, cells: int, dims: int) -> Tensor:
    """(1, 1 + old cells, C) -> (1, 1 + cells, C) by interpolation; those of a plane are repeated along z.

    Both grids cover the same image, so cells lie by their middles (align_corners=False). A table of neither a square nor a
    cube stays as it is.
    """
    edge, old = root_of(cells, dims), table.shape[1] - 1
    plane = root_of(old, 2)
    if plane and edge:
        flat = table if plane == edge else resized_positions(table, (plane,) * 2, (edge,) * 2)
        return flat if dims == 2 else torch.cat([flat[:, :1], flat[:, 1:].repeat(1, edge, 1)], 1)
    cube = root_of(old, 3)
    return resized_positions(table, (cube,) * 3, (edge,) * 3) if dims == 3 and cube and edge else table


def offsets_like(table: Tensor, offsets: int, dims: int) -> Tensor:
    """(old offsets, heads) -> (offsets, heads) by interpolation; those of a plane are repeated along z.

    The outermost offsets stay the outermost (align_corners=True). A table that is no square stays as it is.
    """
    edge, old_edge = root_of(offsets, dims), root_of(len(table), 2)
    if not edge or not old_edge:
        return table
    plane = table.T.reshape(1, -1, old_edge, old_edge)
    if old_edge != edge:
        plane = nn.functional.interpolate(plane, (edge, edge), mode="bicubic", align_corners=True)
    flat = plane[0].flatten(1).T
    return flat if dims == 2 else flat.repeat(edge, 1)


def root_of(number: int, power: int) -> int:
    """The whole number of which it is the power; 0 where there is none."""
    root = round(max(0, number) ** (1 / power))
    return root if root**power == number else 0
