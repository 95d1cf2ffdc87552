"""Files that are whole or absent: checkpoints and texts written beside, forced to disk, renamed; averaged weights."""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from common.errors import data_error


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file beside the target, force it to disk, rename: a reader finds the old file or the new.

    A full disk raises a data error (exit code 1) that names the file; what was finished before stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise data_error(f"{path}: cannot be written ({error.strerror}); nothing finished before it is lost") from error
    finally:
        if partial.exists():
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Save tensors, numbers, text and lists of them atomically."""
    buffer = io.BytesIO()  # torch reports a full disk in words of its own; from memory the system's stay
    torch.save(state, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: Path, kind: str) -> dict[str, Any]:
    """Load a checkpoint of one kind (its "kind" entry) without executing any pickle; a data error names what is wrong."""
    if not path.is_file():
        raise data_error(f"{path}: no such checkpoint; expected the .pt file that train.py wrote (checkpoints/best.pt)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise data_error(f"{path}: not a readable checkpoint ({reason})") from error
    except Exception as error:  # UnpicklingError of several modules: a pickle that would have run code
        raise data_error(f"{path}: not a checkpoint of plain tensors ({type(error).__name__}); refused") from error
    if not isinstance(state, dict) or "kind" not in state or state["kind"] != kind:
        found = state["kind"] if isinstance(state, dict) and "kind" in state else "something else"
        raise data_error(f"{path}: expected a checkpoint of {kind}, found {found}; give the .pt file of such a run")
    return state


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load weights that must match name by name and shape by shape; the first differences are named."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    resized = [f"{n} {tuple(weights[n].shape)} for {tuple(own[n].shape)}" for n in own.keys() & weights.keys()
               if weights[n].shape != own[n].shape]  # fmt: skip
    if missing or unexpected or resized:
        parts = [("lacks", missing), ("holds unknown", unexpected), ("has other shapes", sorted(resized))]
        found = "; ".join(f"{what} {', '.join(names[:3])} ({len(names)} in all)" for what, names in parts if names)
        raise data_error(f"{path}: the weights belong to another model: the file {found}; give the model's own config")
    model.load_state_dict(weights)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move averaged weights towards the model's: a = d a + (1 - d) w with d = min(decay, (1 + step) / (10 + step)).

    The ramp forgets the random start (Polyak averaging; the ramp as in TensorFlow's ExponentialMovingAverage).
    Buffers are copied.
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
