"""What the reference's models are made of and what they say of one image: files that others wrote, read once."""

import functools
import gzip
import importlib
import importlib.metadata
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

VIDEO = ("swin3d_", "mvit_", "r3d_", "mc3_", "r2plus1d_", "s3d")
NUM_MODELS, NUM_GOLDEN = 89, 80
SIGNATURES = torch.library.Library("torchvision", "FRAGMENT")  # they live as long as this


def folder() -> Path:
    if "PLAINSCOPE_REAL_DATA" not in os.environ:
        pytest.skip("PLAINSCOPE_REAL_DATA is not set")
    return Path(os.environ["PLAINSCOPE_REAL_DATA"]) / "backbones"


@functools.cache
def layouts() -> dict[str, list[tuple[str, list[int], str]]]:
    """Of every model the names, shapes and types of its state dict, in order."""
    with gzip.open(folder() / "torchvision_0.28.0_state_dicts.json.gz", "rt") as file:
        return {name: [tuple(entry) for entry in entries] for name, entries in json.load(file).items()}


@functools.cache
def golden() -> dict[str, dict[str, Any]]:
    """Of a model its input shape and what is known of its float64 logits for the weights of `filled`."""
    found: dict[str, dict[str, Any]] = json.loads((folder() / "golden_logits.json").read_text())
    return found


def dims_of(name: str) -> int:
    return 3 if name.startswith(VIDEO) else 2


def classes_of(name: str) -> int:
    return 400 if name.startswith(VIDEO) else 1000


def drawn(name: str, weight: Tensor) -> Tensor:
    """The float64 value of one entry, drawn by its name; tables that a model computes stay as they are."""
    if not weight.dtype.is_floating_point or name.endswith("relative_coords_table"):
        return weight
    random = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF)
    normal = random.standard_normal(tuple(weight.shape) or 1).reshape(tuple(weight.shape))
    if name.endswith("running_var"):
        value = 1 + 0.1 * np.abs(normal)
    elif name.endswith("running_mean"):
        value = 0.1 * normal
    elif name.endswith("logit_scale"):
        value = np.full(tuple(weight.shape), np.log(10.0))
    elif name.endswith("layer_scale"):
        value = 0.5 + 0.1 * normal
    elif name.endswith(("position_bias_table", "pos_embedding", "class_token")) or "pos_" in name:
        value = 0.02 * normal
    elif weight.dim() >= 2:
        value = normal / np.sqrt(weight[0].numel())
    else:
        value = (1 if name.endswith("weight") else 0) + 0.1 * normal
    return torch.from_numpy(value)


def filled(model: nn.Module) -> nn.Module:
    """The model in float64 and evaluation mode, with drawn weights."""
    model = model.double().eval()
    model.load_state_dict({name: drawn(name, weight) for name, weight in model.state_dict().items()})
    return model


@functools.cache
def torchvision_models() -> Any:
    """torchvision's models; of its compiled part only two signatures are needed to import the rest."""
    try:
        importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torchvision is not installed")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            SIGNATURES.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.models")


def image(shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(1234).standard_normal(shape))
