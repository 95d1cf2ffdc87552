"""A whole volume through basic_unet3d: our windows against MONAI's sliding_window_inference, same weights, one process.

MONAI: windows of 96^3, overlap 0.5, float32, its defaults otherwise. Ours: larger windows with a quarter of overlap,
Gaussian weights, bfloat16 (float32 on CPUs without it), channels last. Both masks are compared with the one of the untiled
float32 network, which instance norm sees whole. One round of MONAI's beside the slowest of three of ours. Two threads; run
alone for figures:
python -m pytest -m slow tests/benchmarks/test_em_inference.py -s
"""

import copy
import time
from collections.abc import Callable

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from common.memory import keep_freed_memory
from common.metrics.segmentation import dice, mask_overlap
from common.tiling import Box, blended_planes
from em_segmentation.model_defs.unets import BasicUNet3d, basic_unet_key
from tests.hardware import COMPUTES_BFLOAT16, DEFAULT

SHAPE = (160, 224, 224)
WINDOW = (96, 128, 128)  # voxels of ours
OVERLAP = 0.25
ROI, ROI_OVERLAP = (96, 96, 96), 0.5
TRAINING_STEPS = 20
TIMES_FASTER = 6.0 if COMPUTES_BFLOAT16 else 2.5  # (2 / 1.33)^3 = 3.4 fewer voxels in any format
DICE_TOLERANCE = 0.002


def blobs() -> tuple[Tensor, Tensor]:
    """A grey volume (1, 1, z, y, x) and the mask of what is to be found in it: textured blobs among plain ones."""
    random = np.random.default_rng(0)
    smooth = scipy.ndimage.gaussian_filter(random.standard_normal(SHAPE, dtype=np.float32), 5.0)
    texture = scipy.ndimage.gaussian_filter(random.standard_normal(SHAPE, dtype=np.float32), 1.0)
    objects = smooth > 1.2 * smooth.std()
    image = 1.5 * objects + texture / texture.std() + 0.5 * random.standard_normal(SHAPE, dtype=np.float32)
    normal = (image - image.mean()) / image.std()
    return torch.from_numpy(normal.astype(np.float32))[None, None], torch.from_numpy(objects)[None, None]


def trained(image: Tensor, mask: Tensor) -> BasicUNet3d:
    """A network that has learnt enough for its masks to mean something."""
    torch.manual_seed(0)
    model = BasicUNet3d(1, 1, (32, 32, 64, 128, 256, 32), 0.0).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(TRAINING_STEPS):
        z, y, x = (7 * step % 100, 31 * step % 160, 53 * step % 160)
        where = (..., slice(z, z + 48), slice(y, y + 48), slice(x, x + 48))
        patch = image[where].contiguous(memory_format=torch.channels_last_3d)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(patch), mask[where].float())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


@pytest.mark.slow
@pytest.mark.alone
@torch.inference_mode()
def test_windows_are_six_times_faster_than_the_references_at_equal_dice() -> None:
    inferers = pytest.importorskip("monai.inferers")
    nets = pytest.importorskip("monai.networks.nets")
    keep_freed_memory()
    image, mask = blobs()
    with torch.inference_mode(False):
        model = trained(image.clone(), mask.clone())
    reference = nets.BasicUNet(3, 1, 1).eval()
    ours = {basic_unet_key(name): name for name in reference.state_dict()}
    reference.load_state_dict({ours[name]: weight for name, weight in model.state_dict().items()})
    fast = copy.deepcopy(model).to(DEFAULT)

    def read(box: Box) -> Tensor:
        (z0, y0, x0), (z1, y1, x1) = box
        return image[:, :, z0:z1, y0:y1, x0:x1].to(DEFAULT).contiguous(memory_format=torch.channels_last_3d)

    def windows() -> Tensor:
        planes = blended_planes(fast, read, SHAPE, WINDOW, 1, OVERLAP, (0, SHAPE[0]))
        return torch.cat([part for _, part in planes], 1)

    def sliding() -> Tensor:
        found: Tensor = inferers.sliding_window_inference(image, ROI, 1, reference, ROI_OVERLAP)
        return found[0]

    first, reference_round, *others = (timed(work) for work in (windows, sliding, windows, windows))
    seconds = [max(one[0] for one in (first, *others)), reference_round[0]]
    whole = (model(image.contiguous(memory_format=torch.channels_last_3d))[0, 0] > 0).numpy()
    masks = [(one[1][0].float() > 0).numpy() for one in (first, reference_round)]
    scores = [dice(mask_overlap(whole, found, np.ones_like(whole))) for found in masks]
    voxels = np.prod(SHAPE) / 1e3
    print(
        f"\n{list(SHAPE)} voxels: ours {seconds[0]:.1f} s ({voxels / seconds[0]:.0f} kvoxel/s, Dice {scores[0]:.4f}), "
        f"MONAI {seconds[1]:.1f} s ({voxels / seconds[1]:.0f} kvoxel/s, Dice {scores[1]:.4f}): "
        f"{seconds[1] / seconds[0]:.1f} times"
    )
    assert scores[0] >= scores[1] - DICE_TOLERANCE
    assert seconds[1] >= TIMES_FASTER * seconds[0]
