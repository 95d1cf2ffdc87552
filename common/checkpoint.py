"""Checkpoints of plain tensors, numbers and text, whole or absent; averaged weights."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common.errors import data_error
from common.files import write_atomically


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Save tensors, numbers, text and lists of them atomically."""
    buffer = io.BytesIO()  # torch reports a full disk in words of its own; from memory the system's stay
    torch.save(state, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def read_plain(path: Path) -> Any:
    """What torch.save wrote, without executing any pickle; a data error names what is wrong."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise data_error(f"{path}: not a readable checkpoint ({reason})") from error
    except Exception as error:  # UnpicklingError of several modules: a pickle that would have run code
        raise data_error(f"{path}: not a checkpoint of plain tensors ({type(error).__name__}); refused") from error


def load_checkpoint(path: Path, kind: str, entries: dict[str, type]) -> dict[str, Any]:
    """Load a checkpoint of one kind (its "kind" entry) without executing any pickle; a data error names what is wrong.

    entries: names that it must hold, and their types.
    """
    if path.is_dir():
        raise data_error(f"{path}: is a folder; expected the .pt file in it that train.py wrote (checkpoints/best.pt)")
    if not path.is_file():
        raise data_error(f"{path}: no such checkpoint; expected the .pt file that train.py wrote (checkpoints/best.pt)")
    state = read_plain(path)
    if not isinstance(state, dict) or "kind" not in state or state["kind"] != kind:
        found = state["kind"] if isinstance(state, dict) and "kind" in state else "something else"
        raise data_error(f"{path}: expected a checkpoint of {kind}, found {found}; give the .pt file of such a run")
    odd = [name for name, kind_of in entries.items() if name not in state or not isinstance(state[name], kind_of)]
    if odd:
        raise data_error(f"{path}: lacks {', '.join(odd)}; expected a checkpoint as train.py writes it")
    return state


def check_same_run(saved: dict[str, Any], path: Path, identity: str, data: tuple[str, str], last_step: int) -> None:
    """Raise a data error unless a run may go on from a checkpoint: of its identity, on its data, at one of its steps.

    data: the entry that holds the data's digest, named as the task names its data ("patches"), and the digest of now.
    """
    entry, digest = data
    if saved["identity"] != identity:
        raise data_error(f"{path}: belongs to a run of another config; choose another run.name, or --fresh")
    if saved[entry] != digest:
        raise data_error(
            f"{path}: the {entry} or their labels have changed since this run began; "
            "--fresh starts it over with those of now, another run.name keeps both"
        )
    if not 0 <= saved["step"] <= last_step:
        raise data_error(f"{path}: is at step {saved['step']} of {last_step}; damaged, start over with --fresh")


def check_best(best: Path, has_best: bool) -> None:
    """Raise a data error where a run that goes on had best weights and their file is not there any more."""
    if has_best and not best.exists():
        raise data_error(f"{best}: is missing, the best weights so far; restore it, or start over with --fresh")


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load finite weights that match name by name and shape by shape; a data error names the first differences."""
    own = model.state_dict()
    odd = [
        n for n, w in weights.items() if not (isinstance(n, str) and isinstance(w, torch.Tensor) and not w.is_sparse)
    ]
    if odd:
        raise data_error(f"{path}: {odd[0]!r} holds no plain weights; give an undamaged checkpoint")
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    resized = [f"{n} {tuple(weights[n].shape)} for {tuple(own[n].shape)}" for n in own.keys() & weights.keys()
               if weights[n].shape != own[n].shape]  # fmt: skip
    if missing or unexpected or resized:
        parts = [("lacks", missing), ("holds unknown", unexpected), ("has other shapes", sorted(resized))]
        found = "; ".join(f"{what} {', '.join(names[:3])} ({len(names)} in all)" for what, names in parts if names)
        raise data_error(f"{path}: the weights belong to another model: the file {found}; give the model's own config")
    damaged = next((name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())), None)
    if damaged is not None:
        raise data_error(f"{path}: {damaged} is not finite; the run diverged (lower its learning rates) or was damaged")
    model.load_state_dict(weights)


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any], moments: tuple[str, ...]) -> None:
    """Load an optimizer's state that fits: groups by name, the named moments by shape; a ValueError says what does not.

    Hold it inside files.parsing: a damaged state makes torch raise in many ways.
    """
    names = [group["name"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    if [group["name"] for group in optimizer.param_groups] != names:
        raise ValueError(f"expected groups {names}")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if any(state[name].shape != parameter.shape for name in moments):
                raise ValueError("moments of another shape")
            if "exp_avg" in moments and "step" not in state:
                raise ValueError("no step")


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
