"""Weights of another run to begin with."""

from pathlib import Path

from common.checkpoint import load_checkpoint, load_weights
from common.errors import UserError, data_error
from em_segmentation.model_defs.mednext import MedNeXt, up_kernel
from em_segmentation.model_defs.registry import KIND, SegmentationModel


def load_initial_weights(model: SegmentationModel, path: Path) -> None:
    """Load a best.pt into a network of the same shape; a MedNeXt may have larger kernels than the one trained.

    Raises a data error where they do not fit.
    """
    weights = load_checkpoint(path, KIND, {"weights": dict})["weights"]
    if isinstance(model.network, MedNeXt):
        try:
            up_kernel({name.removeprefix("network."): weight for name, weight in weights.items()}, model.network)
        except UserError as error:
            raise data_error(*(f"{path}: {problem}" for problem in error.problems)) from error
        weights = model.state_dict()  # as they are now, to be looked at like any others
    load_weights(model, weights, path)
