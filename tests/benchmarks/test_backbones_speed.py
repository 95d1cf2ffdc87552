"""Training speed of backbones: forward and backward of a small batch in float32, beside torchvision's modules.

Same weights, same input, one process, two threads; rounds alternate, and the medians of seven count after two to warm up.
Run alone for figures: python -m pytest -m slow tests/benchmarks/test_backbones_speed.py -s
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.backbones.create import create_classifier
from common.memory import keep_freed_memory
from tests.common.backbone_reference import torchvision_models

ROUNDS, WARM_UP = 7, 2
MOST = 1.05  # of the reference's time
NAMES = ("resnet50", "densenet121", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16")
ATTEMPTS = 3  # a machine's other work may spoil one
CLIP = (2, 3, 16, 112, 112)  # what the reference's video network is made for
VOLUME = (2, 3, 128, 160, 160)  # a piece of a CT


@pytest.fixture(scope="module")
def reference() -> Any:
    return torchvision_models()


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    keep_freed_memory()  # as training does; the reference gains from it too
    yield
    torch.set_num_threads(before)


def seconds(forward: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> float:
    began = time.perf_counter()
    forward(x).square().mean().backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def medians(theirs: nn.Module, ours: Any, x: Tensor, count: int) -> tuple[float, float]:
    """Seconds of both, in turns."""
    rounds = [(seconds(theirs, theirs, x), seconds(ours.logits, ours, x)) for _ in range(count + WARM_UP)]
    first, second = zip(*rounds[WARM_UP:], strict=True)
    return statistics.median(first), statistics.median(second)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", NAMES)
def test_no_slower_than_the_reference(reference: Any, name: str) -> None:
    torch.manual_seed(0)
    theirs, ours = reference.get_model(name, weights=None).train(), create_classifier(name, 2, 3, 1000).train()
    ours.load_state_dict(theirs.state_dict())
    for _ in range(ATTEMPTS):
        first, second = medians(theirs, ours, torch.randn(2, 3, 224, 224), ROUNDS)
        print(f"\n{name:16} torchvision {first:.3f} s, ours {second:.3f} s ({second / first:.2f})")
        if second / first <= MOST:
            break
    assert second / first <= MOST


def operations(forward: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """1e9 floating-point operations of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        forward(x).sum().backward()  # type: ignore[no-untyped-call]
    return counter.get_total_flops() / 1e9


@pytest.mark.slow
@pytest.mark.alone
def test_3d_beside_the_reference_per_operation(reference: Any) -> None:
    """On volumes of about as many operations: strides along z too make ours eight times cheaper on the same volume."""
    torch.manual_seed(0)
    theirs, ours = reference.video.r3d_18(weights=None).train(), create_classifier("resnet18", 3, 3, 400).train()
    clip, volume = torch.randn(CLIP), torch.randn(VOLUME)
    work = operations(theirs, clip), operations(ours.logits, volume)
    for _ in range(ATTEMPTS):
        rounds = [(seconds(theirs, theirs, clip), seconds(ours.logits, ours, volume)) for _ in range(5)]
        first, second = (statistics.median(times[1:]) for times in zip(*rounds, strict=True))
        rates = work[0] / first, work[1] / second
        print(f"\n3D: r3d_18 {first:.3f} s, {rates[0]:.0f} GFLOP/s; resnet18 {second:.3f} s, {rates[1]:.0f} GFLOP/s")
        if rates[1] >= rates[0]:
            break
    assert rates[1] >= rates[0]
