"""Training speed of the networks of em_segmentation: forward and backward of one patch, beside the references.

Same weights, one process; the rounds alternate between the reference in float32, ours in float32 and ours in the default
precision (bfloat16 autocast), and the best of each counts. Seconds are the processor's, of one thread: on a shared
machine they stay what they are, while those of the wall clock and of threads that wait for each other do not.
Run alone for figures: python -m pytest -m slow tests/benchmarks/test_em_networks.py -s
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.memory import keep_freed_memory
from em_segmentation.model_defs.mednext import MedNeXt, mednext_key, size_arguments
from em_segmentation.model_defs.swin_unetr import SwinUNETR, swin_unetr_key
from em_segmentation.model_defs.unetr import UNETR, unetr_key
from em_segmentation.model_defs.unets import BasicUNet3d, ResidualUNet3d, basic_unet_key, residual_unet_key
from tests.hardware import COMPUTES_BFLOAT16

ROUNDS = 6  # the first two are slow: memory is handed out for the first time
FEW_ROUNDS = 3  # of MedNeXt, where the reference takes much longer
FILTERS = (32, 64, 128, 256, 512)
Case = tuple[Callable[[Any], nn.Module], Callable[[], nn.Module], Callable[[str], str | None], int]


def mednext_case(size: str, kernel_size: int, edge: int) -> Case:
    return (
        lambda nets: nets.mednext.create_mednext(size, in_channels=1, out_channels=3, kernel_size=kernel_size),
        lambda: MedNeXt(1, 3, kernel_size=kernel_size, deep_supervision=False, **size_arguments(size)),
        mednext_key,
        edge,
    )


CASES: dict[str, Case] = {
    "basic_unet3d": (
        lambda nets: nets.BasicUNet(3, 1, 3),
        lambda: BasicUNet3d(1, 3, (32, 32, 64, 128, 256, 32), 0.0),
        basic_unet_key,
        64,
    ),
    "unet": (
        lambda nets: nets.UNet(3, 1, 3, FILTERS, (2, 2, 2, 2), num_res_units=2),
        lambda: ResidualUNet3d(1, 3, FILTERS, 0.0),
        lambda name: residual_unet_key(name, len(FILTERS)),
        64,
    ),
    "unetr f16": (
        lambda nets: nets.UNETR(1, 3, (64, 64, 64), feature_size=16),
        lambda: UNETR(1, 3, (64, 64, 64), 16, 0.0),
        unetr_key,
        64,
    ),
    "swin_unetr f24": (
        lambda nets: nets.SwinUNETR(1, 3, feature_size=24),
        lambda: SwinUNETR(1, 3, 24, 0.0),
        swin_unetr_key,
        64,
    ),
    "mednext S k3": mednext_case("S", 3, 64),
    "mednext S k5": mednext_case("S", 5, 48),
    "mednext B k3": mednext_case("B", 3, 48),
    "mednext L k3": mednext_case("L", 3, 48),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seconds(model: nn.Module, volume: Tensor, precision: torch.dtype) -> float:
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        logits = model(volume)
    logits.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    return time.process_time() - began


def best_seconds(case: Case, nets: Any, count: int) -> tuple[float, float, float]:
    """Of the reference, ours in float32 and ours in bfloat16 (infinite on a CPU without it)."""
    build_theirs, build_ours, key, edge = case
    torch.manual_seed(0)
    theirs, ours = build_theirs(nets), build_ours()
    named = {key(name): weight for name, weight in theirs.state_dict().items()}
    ours.load_state_dict({name: weight for name, weight in named.items() if name is not None})
    volume = torch.randn(1, 1, edge, edge, edge)
    runs = ((theirs, torch.float32), (ours, torch.float32), (ours, torch.bfloat16))[: 2 + COMPUTES_BFLOAT16]
    rounds = [tuple(seconds(model, volume, precision) for model, precision in runs) for _ in range(count)]
    reference, float32, *bfloat16 = (min(times) for times in zip(*rounds, strict=True))
    return reference, float32, bfloat16[0] if bfloat16 else math.inf


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", list(CASES))
def test_training_is_faster_than_the_reference(name: str) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    rounds = FEW_ROUNDS if name.startswith("mednext") else ROUNDS
    keep_freed_memory()  # as training does; the reference gains from it too
    reference, float32, default = best_seconds(CASES[name], nets, rounds)
    print(f"\n{name:16} {CASES[name][3]}^3  reference {reference:6.2f} s  float32 {float32:6.2f} s "
          f"({float32 / reference:.2f})  bfloat16 {default:6.2f} s ({default / reference:.2f})")  # fmt: skip
    assert float32 / reference <= 1.0
    assert default / reference <= 0.6 or not COMPUTES_BFLOAT16
