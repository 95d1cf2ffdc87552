"""Weights of another run to begin with."""

from pathlib import Path

from common.checkpoint import load_checkpoint, load_weights
from em_segmentation.model_defs.mednext import MedNeXt, up_kernel
from em_segmentation.model_defs.registry import SegmentationModel

KIND = "em_segmentation"


def load_initial_weights(model: SegmentationModel, path: Path) -> None:
    """Load a best.pt into a network of the same shape; a MedNeXt may have larger kernels than the one trained.

    Raises a data error where they do not fit.
    """
    saved = load_checkpoint(path, KIND, {"weights": dict})
    if isinstance(model.network, MedNeXt):
        inner = {name.removeprefix("network."): weight for name, weight in saved["weights"].items()}
        up_kernel(inner, model.network)
        return
    load_weights(model, saved["weights"], path)
