"""All that changes during a run, its beginning, and its checkpoints: last.pt to continue from, the best weights to keep."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from common.checkpoint import check_best, check_same_run, load_checkpoint, load_optimizer, load_weights, save_checkpoint
from common.config import as_yaml
from common.errors import config_error
from common.files import parsing
from common.logbook import write_metrics
from common.precision import working_precision
from em_segmentation.config import Config
from em_segmentation.dataset import Volumes
from em_segmentation.inference import check_tiling
from em_segmentation.initial_weights import load_initial_weights
from em_segmentation.model_defs.registry import KIND, SegmentationModel, build_model
from em_segmentation.objective import PRECISIONS
from em_segmentation.places import training_identity
from em_segmentation.schedule import Record, ranked, total_steps

BEST = ("kind", "config", "identity", "step", "weights", "measured")  # what the files of the best weights hold
CHECKPOINT = {"identity": str, "volumes": str, "step": int, "records": list, "weights": dict, "model": dict,
              "optimizer": dict, "scaler": dict}  # fmt: skip


@dataclasses.dataclass
class State:
    """All that changes during a run."""

    model: SegmentationModel
    average: SegmentationModel
    optimizer: Optimizer
    scaler: GradScaler
    step: int
    records: list[Record]  # rows of metrics.csv; those of validations hold epoch and val_ figures

    def as_checkpoint(self, config: Config, volumes: Volumes) -> dict[str, Any]:
        return {
            "kind": KIND,
            "config": as_yaml(config),
            "identity": training_identity(config),
            "volumes": volumes.digest,
            "step": self.step,
            "records": self.records,
            "weights": self.average.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }


def build_optimizer(model: SegmentationModel, config: Config) -> Optimizer:
    """AdamW or SGD over two groups: weights, and biases and norms, which do not decay."""
    settings = config.optimizer
    groups: list[dict[str, Any]] = []
    for name, decays in (("weights", True), ("biases and norms", False)):
        chosen = [weight for weight in model.parameters() if weight.requires_grad and (weight.dim() > 1) == decays]
        groups.append({"params": chosen, "name": name, "weight_decay": settings.weight_decay if decays else 0.0})
    if settings.name == "AdamW":
        return AdamW(groups, lr=0.0, fused=True)
    return SGD(groups, lr=0.0, momentum=settings.momentum, nesterov=settings.momentum > 0)


def begin(config: Config, device: torch.device) -> State:
    """A run's first state: weights drawn from the seed, or loaded from model.start_from."""
    torch.manual_seed(config.system.seed)
    model = build_model(config)
    check_precision(model, config, device)
    check_tiling(model, config)
    if config.model.start_from is not None:
        load_initial_weights(model, config.model.start_from)
    model = model.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    average = copy.deepcopy(model).eval().requires_grad_(False)
    scaler = GradScaler(device.type, enabled=config.training.precision == "16-mixed")
    return State(model, average, build_optimizer(model, config), scaler, 0, [])


def check_precision(model: SegmentationModel, config: Config, device: torch.device) -> None:
    """A config error where torch's own bfloat16 convolutions would give wrong gradients on a CPU."""
    own = [module for module in model.modules() if type(module) is torch.nn.Conv3d]
    plain = any(module.kernel_size != module.stride for module in own)
    working = working_precision(PRECISIONS[config.training.precision], device)
    if plain and device.type == "cpu" and working == "bfloat16":
        raise config_error(
            f"training.precision: {config.model.architecture} has torch's Conv3d, whose bfloat16 gradients are wrong on a "
            "CPU; give training.precision=32, or build it of em_segmentation.model_defs.convolution.Conv3d"
        )


def resume(state: State, path: Path, config: Config, volumes: Volumes) -> None:
    """Continue from a checkpoint of the very same run on the very same data."""
    saved = load_checkpoint(path, KIND, CHECKPOINT)
    check_same_run(saved, path, training_identity(config), ("volumes", volumes.digest), total_steps(config))
    load_weights(state.model, saved["model"], path)
    load_weights(state.average, saved["weights"], path)
    with parsing(path, "start over with --fresh"):
        load_optimizer(state.optimizer, saved["optimizer"], moments_of(state, saved, config))
        state.scaler.load_state_dict(saved["scaler"])
        if not all(isinstance(value, int | float) for record in saved["records"] for value in record.values()):
            raise ValueError("records that are no numbers")
    state.step, state.records = saved["step"], saved["records"]
    check_best(path.with_name("best.pt"), bool(ranked(state.records, config)))


def moments_of(state: State, saved: dict[str, Any], config: Config) -> tuple[str, ...]:
    """What the optimizer must remember of each weight; nothing while a loss scale has been too large for every step."""
    if state.scaler.is_enabled() and not saved["optimizer"]["state"]:
        return ()
    if config.optimizer.name == "AdamW":
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if config.optimizer.momentum > 0 else ()


def save(state: State, folder: Path, config: Config, volumes: Volumes) -> None:
    """Write metrics.csv, then last.pt, on the first rank only: a run killed between them writes the same rows again."""
    if dist.get_rank() == 0:
        write_metrics(folder / "metrics.csv", state.records)
        if config.checkpoint.save_last:
            save_checkpoint(state.as_checkpoint(config, volumes), folder / "checkpoints" / "last.pt")


def keep_best(state: State, folder: Path, config: Config, volumes: Volumes) -> None:
    """Write the weights of the epoch just ended if they are among the best save_top_k; best.pt is the first of them.

    With several, each also has its epoch-0001.pt.
    """
    kept, now = ranked(state.records, config)[: config.checkpoint.save_top_k], state.records[-1]
    if dist.get_rank() or now not in kept:
        return
    whole = state.as_checkpoint(config, volumes) | {"measured": now}
    weights = {name: whole[name] for name in BEST}
    checkpoints = folder / "checkpoints"
    if now is kept[0]:
        save_checkpoint(weights, checkpoints / "best.pt")
    if config.checkpoint.save_top_k > 1:
        save_checkpoint(weights, checkpoints / epoch_file(now))
        names = [epoch_file(record) for record in kept]
        for path in checkpoints.glob("epoch-*.pt"):
            if path.name not in names:
                path.unlink()


def epoch_file(record: Record) -> str:
    return f"epoch-{record['epoch']:04g}.pt"
