"""What several tests share: where the real data lies."""

import os
from pathlib import Path

import pytest
import torch

from common import precision

if "PYTEST_XDIST_WORKER" in os.environ:  # tests side by side, a thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is computed in where it is asked for, on whatever CPU; one without it needs a hundred times as long."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped without it."""
    if "PLAINSCOPE_REAL_DATA" not in os.environ:
        pytest.skip("PLAINSCOPE_REAL_DATA is not set")
    return Path(os.environ["PLAINSCOPE_REAL_DATA"]).resolve()
