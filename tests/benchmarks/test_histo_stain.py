"""Stain normalisation of a batch of 16 fields of 700 x 460 pixels beside torchstain's, one process, the same threads.

Both map real fields to the stain of one of them; torchstain takes images one by one, as it has to. Run alone for figures:
python -m pytest -m slow tests/benchmarks/test_histo_stain.py -s
"""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.memory import keep_freed_memory
from histo_mmnet.colours import read_picture
from histo_mmnet.scan import find_breast, scan
from histo_mmnet.stain import macenko, reinhard

BATCH, SIZE = 16, (460, 700)


@pytest.fixture(scope="module")
def batch() -> Tensor:
    """Bytes (16, 3, 460, 700)."""
    if "PLAINSCOPE_REAL_DATA" not in os.environ:
        pytest.skip("PLAINSCOPE_REAL_DATA is not set")
    images = scan(find_breast(Path(os.environ["PLAINSCOPE_REAL_DATA"]) / "histo" / "BreaKHis_v1"))
    pixels = [torch.from_numpy(read_picture(image.path).copy()).permute(2, 0, 1) for image in images]
    return torch.stack([one for one in pixels if one.shape[1:] == SIZE][:BATCH])


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(("name", "times"), [("macenko", 10), ("reinhard", 9)])  # Reinhard: 10.4 to 11.2 measured
def test_many_times_the_images_per_second_of_torchstain(batch: Tensor, name: str, times: int) -> None:
    torchstain = pytest.importorskip("torchstain")
    keep_freed_memory()  # the reference gains from it too
    assert len(batch) == BATCH
    ours = {"macenko": macenko, "reinhard": reinhard}[name]
    kind = {"macenko": "MacenkoNormalizer", "reinhard": "ReinhardNormalizer"}[name]
    peer = getattr(torchstain.normalizers, kind)(backend="torch")
    peer.fit(batch[0].float() if name == "macenko" else batch[0])

    def theirs() -> None:
        for image in batch:
            peer.normalize(image.float(), stains=False) if name == "macenko" else peer.normalize(image)

    brightness = batch.float() / 255
    ours(brightness)
    rounds = [(seconds(lambda: ours(brightness)), seconds(theirs), seconds(lambda: ours(brightness))) for _ in range(3)]
    own = statistics.median(time for first, _, second in rounds for time in (first, second))
    reference = statistics.median(time for _, time, _ in rounds)
    print(
        f"\n{name}: ours {BATCH / own:.1f} images/s, torchstain {BATCH / reference:.1f} images/s ({reference / own:.1f} x)"
    )
    assert reference > times * own
