"""Train a segmentation network: data, model, loss, validation and the loop.

A run is a pure function of its config: patches, augmentation, dropout and learning rate follow from (seed, step), so a
checkpoint is weights, their average, optimizer, loss scale, step and the figures so far. Killed at any moment and started
again, a run ends in the same bits.
"""

import copy
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from common.checkpoint import load_checkpoint, load_optimizer, load_weights, save_checkpoint, update_average
from common.config import as_yaml
from common.errors import config_error, data_error
from common.files import parsing
from common.interrupt import StopRequest, ignore_interrupts, stop_on_signal
from common.loading import next_batch
from common.logbook import Scalars, progress, write_metrics
from common.parallel import all_ranks_do, check_same_step
from common.step import RunningStatistics, agree_on_step, guarded_update
from common.streams import micro_batches, seed_dropout
from em_segmentation.augmentation import Patch, augmented
from em_segmentation.config import Config
from em_segmentation.dataset import PatchStream, Volumes, stack, to_device
from em_segmentation.initial_weights import load_initial_weights
from em_segmentation.model_defs.registry import SegmentationModel, build_model
from em_segmentation.objective import training_loss
from em_segmentation.places import training_identity
from em_segmentation.schedule import ends_early, learning_rate_share, ranked
from em_segmentation.validation import validate

KIND = "em_segmentation"


def build_optimizer(model: SegmentationModel, config: Config) -> Optimizer:
    """AdamW or SGD over two groups: weights, and biases and norms, which do not decay."""
    settings = config.optimizer
    groups: list[dict[str, Any]] = []
    for name, decays in (("weights", True), ("biases and norms", False)):
        chosen = [parameter for parameter in model.parameters() if (parameter.dim() > 1) == decays]
        groups.append({"params": chosen, "name": name, "weight_decay": settings.weight_decay if decays else 0.0})
    if settings.name == "AdamW":
        return AdamW(groups, lr=0.0, fused=True)
    return SGD(groups, lr=0.0, momentum=settings.momentum, nesterov=settings.momentum > 0)


@dataclasses.dataclass
class State:
    """All that changes during a run."""

    model: SegmentationModel
    average: SegmentationModel
    optimizer: Optimizer
    scaler: GradScaler
    step: int
    records: list[dict[str, float]]  # rows of metrics.csv; those of validations hold epoch and val_ figures

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


KEPT = ("kind", "config", "identity", "step", "weights", "measured")  # of the best weights' files
CHECKPOINT = {"identity": str, "volumes": str, "step": int, "records": list, "weights": dict, "model": dict,
              "optimizer": dict, "scaler": dict}  # fmt: skip


def total_steps(config: Config) -> int:
    return config.training.max_epochs * config.training.steps_per_epoch


def begin(config: Config, device: torch.device) -> State:
    """A run's first state: weights drawn from the seed, or loaded from model.start_from."""
    torch.manual_seed(config.system.seed)
    model = build_model(config)
    if config.model.start_from is not None:
        load_initial_weights(model, config.model.start_from)
    model = model.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    average = copy.deepcopy(model).eval().requires_grad_(False)
    scaler = GradScaler(device.type, enabled=config.training.precision == "16-mixed")
    return State(model, average, build_optimizer(model, config), scaler, 0, [])


def resume(state: State, path: Path, config: Config, volumes: Volumes) -> None:
    """Continue from a checkpoint of the very same run on the very same data."""
    saved = load_checkpoint(path, KIND, CHECKPOINT)
    if saved["identity"] != training_identity(config):
        raise data_error(f"{path}: belongs to a run of another config; choose another run.name, or --fresh")
    if saved["volumes"] != volumes.digest:
        raise data_error(
            f"{path}: the volumes or their labels have changed since this run began; "
            "--fresh starts it over with those of now, another run.name keeps both"
        )
    if not 0 <= saved["step"] <= total_steps(config):
        raise data_error(
            f"{path}: is at step {saved['step']} of {total_steps(config)}; damaged, start over with --fresh"
        )
    moments = ("exp_avg", "exp_avg_sq") if config.optimizer.name == "AdamW" else ()
    load_weights(state.model, saved["model"], path)
    load_weights(state.average, saved["weights"], path)
    with parsing(path, "start over with --fresh"):
        if saved["step"]:
            load_optimizer(state.optimizer, saved["optimizer"], moments)
        state.scaler.load_state_dict(saved["scaler"])
        if not all(isinstance(value, int | float) for record in saved["records"] for value in record.values()):
            raise ValueError("records that are no numbers")
    state.step, state.records = saved["step"], saved["records"]
    best = path.with_name("best.pt")
    if ranked(state.records, config) and not best.exists():
        raise data_error(f"{best}: is missing, the best weights so far; restore it, or start over with --fresh")


def micro_batch_size(config: Config, num_ranks: int) -> int:
    """Patches per device at once. Processes share the forward passes of a step; where there are too few, each batch too.

    So a step sees batch_size * accumulate_grad_batches patches on any number of processes.
    """
    passes, batch = config.training.accumulate_grad_batches, config.data.batch_size
    shares = num_ranks // math.gcd(passes, num_ranks)
    if batch % shares:
        raise config_error(
            f"data.batch_size: {batch} x training.accumulate_grad_batches={passes} patches do not divide among "
            f"{num_ranks} processes; change one of the two"
        )
    return batch // shares


def take_step(
    state: State,
    statistics: RunningStatistics,
    stream: Iterator[Patch],
    stop: StopRequest,
    volumes: Volumes,
    config: Config,
) -> tuple[dict[str, float], bool]:
    """One optimizer step: accumulate, average over ranks, guard, clip, update.

    Returns the figures, which are means over ranks, and whether any rank was asked to stop.
    """
    device, seed = next(state.model.parameters()).device, config.system.seed
    share = learning_rate_share(state.step, state.records, config)
    for group in state.optimizer.param_groups:
        group["lr"] = config.optimizer.lr * share
    ranks = dist.get_world_size()
    rounds = (
        config.data.batch_size * config.training.accumulate_grad_batches // (micro_batch_size(config, ranks) * ranks)
    )
    seen: list[tuple[Tensor, Tensor]] = []  # losses and positions of every micro-batch
    statistics.begin_step()
    for number in range(rounds):
        batch = to_device(next(stream), device)
        seed_dropout(seed, state.step, number * ranks + dist.get_rank())
        with torch.no_grad():
            if config.data.augmentation:
                batch = augmented(batch, config.augmentation, volumes.voxel_size_nm, seed)
        losses = training_loss(state.model, batch, config, volumes.voxel_size_nm)  # (B,)
        state.scaler.scale(losses.mean() / rounds).backward()  # type: ignore[no-untyped-call]
        statistics.end_micro_batch()
        seen.append((losses.detach(), batch.position))
    losses, positions = (torch.cat(parts) for parts in zip(*seen, strict=True))  # (samples of this rank,)
    names = [f"patch {position}" for position in positions.tolist()]
    mean_loss, stop_asked = agree_on_step(losses, names, stop.asked)
    statistics.end_step(rounds * ranks)
    norm = guarded_update(state.model, state.optimizer, state.scaler, config.training.gradient_clip_val)
    update_average(state.average, state.model, config.training.ema_decay, state.step)
    state.step += 1
    return {
        "train_loss": mean_loss,
        "gradient_norm": norm.item(),
        "learning_rate": config.optimizer.lr * share,
    }, stop_asked


def save(state: State, folder: Path, config: Config, volumes: Volumes) -> None:
    """Write last.pt and metrics.csv, on the first rank only."""
    if dist.get_rank() == 0:
        if config.checkpoint.save_last:
            save_checkpoint(state.as_checkpoint(config, volumes), folder / "checkpoints" / "last.pt")
        write_metrics(folder / "metrics.csv", state.records)


def keep_best(state: State, folder: Path, config: Config, volumes: Volumes) -> None:
    """Write the weights of the epoch just validated if they are among the best; best.pt is the first of them."""
    order = ranked(state.records, config)
    kept, now = order[: config.checkpoint.save_top_k], state.records[-1]
    if dist.get_rank() or now not in kept:
        return
    state_now = state.as_checkpoint(config, volumes) | {"measured": now}
    weights = {name: state_now[name] for name in KEPT}
    checkpoints = folder / "checkpoints"
    if now is order[0]:
        save_checkpoint(weights, checkpoints / "best.pt")
    if config.checkpoint.save_top_k > 1:
        names = {epoch_file(record): record for record in kept}
        save_checkpoint(weights, checkpoints / epoch_file(now))
        for path in checkpoints.glob("epoch-*.pt"):
            if path.name not in names:
                path.unlink()


def epoch_file(record: dict[str, float]) -> str:
    return f"epoch-{round(record['epoch']):04d}.pt"


def check_hardware(config: Config, device: torch.device) -> None:
    """What only the running processes know: their number and their device must fit the config."""
    micro_batch_size(config, dist.get_world_size())
    if config.system.num_gpus and dist.get_world_size() > config.system.num_gpus and device.type == "cuda":
        raise config_error(
            f"system.num_gpus: {config.system.num_gpus}, but torchrun started {dist.get_world_size()} processes"
        )
    if device.type == "cpu" and config.training.precision == "16-mixed":
        raise config_error("training.precision: 16-mixed trains on GPUs only; on a CPU give training.precision=32")


def train(config: Config, folder: Path, volumes: Volumes, device: torch.device) -> list[dict[str, float]]:
    """Train, or continue, one run inside a process group; return its records, one per logged step."""
    first = dist.get_rank() == 0
    state = all_ranks_do(lambda: begin(config, device))
    if first:
        info = state.model.get_model_info()
        counts = f"{len(volumes.train)} training and {len(volumes.val)} validation volumes"
        where = f"{dist.get_world_size()} x {device.type}"
        print(f"{info['architecture']}, {info['parameters']:,} parameters; {counts}; {where}", flush=True)
    last = folder / "checkpoints" / "last.pt"
    all_ranks_do(lambda: resume(state, last, config, volumes) if last.exists() else None)
    check_same_step(state.step, folder)
    finished = state.step == total_steps(config) or ends_early(state.records, config)
    if first and finished:
        print(f"{folder} is complete; --fresh starts it over", flush=True)
    elif first and state.step:
        print(f"continuing {folder} at step {state.step} of {total_steps(config)}", flush=True)
    stream = PatchStream(volumes.train, config.data, config.targets.label_channels[0], config.system.seed)
    plan = micro_batches(
        state.step,
        total_steps(config),
        config.data.batch_size * config.training.accumulate_grad_batches,
        micro_batch_size(config, dist.get_world_size()),
        dist.get_rank(),
        dist.get_world_size(),
    )
    loader = DataLoader(
        stream,
        batch_sampler=plan,  # an iterator serves: it is walked once
        num_workers=config.data.num_workers,
        collate_fn=stack,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupts,
    )
    if not finished:
        scalars = Scalars(folder / "tensorboard", state.step) if first else None
        with stop_on_signal() as stop:
            run_steps(state, next_batch(loader, "data.num_workers"), stop, volumes, config, folder, scalars)
    return state.records


def run_steps(
    state: State,
    stream: Iterator[Patch],
    stop: StopRequest,
    volumes: Volumes,
    config: Config,
    folder: Path,
    scalars: Scalars | None,
) -> None:
    """The loop: step, and at every epoch's end validate, keep the best, save; on Ctrl-C or SIGTERM save and end."""
    last, epoch_steps = total_steps(config), config.training.steps_per_epoch
    statistics = RunningStatistics(state.model)
    bar = progress(range(last), "training", last, scalars is not None)
    bar.update(state.step)
    state.model.train()
    at_end = False
    while not at_end:
        measured, stop_asked = take_step(state, statistics, stream, stop, volumes, config)
        bar.set_postfix(loss=f"{measured['train_loss']:.4f}", refresh=False)
        bar.update()
        epoch_ends = state.step % epoch_steps == 0
        if epoch_ends:
            measured |= {"epoch": state.step // epoch_steps} | validate(state.average, volumes, config, folder)
        if epoch_ends or state.step % config.logging.log_every_n_steps == 0:
            state.records.append({"step": state.step} | measured)
            if scalars is not None:
                scalars.add(state.records[-1])
        if epoch_ends:
            keep_best(state, folder, config, volumes)
            if scalars is not None:
                print(told(state.records[-1]), flush=True)
        at_end = state.step == last or (epoch_ends and ends_early(state.records, config))
        if state.step % config.checkpoint.every_n_steps == 0 or at_end or stop_asked:
            save(state, folder, config, volumes)
        if stop_asked and not at_end:
            raise KeyboardInterrupt
    bar.close()
    if scalars is not None:
        scalars.close()
    sys.stdout.flush()


def told(record: dict[str, float]) -> str:
    """One line of an epoch's figures."""
    figures = {name: value for name, value in record.items() if name == "train_loss" or name.startswith("val_")}
    return f"epoch {record['epoch']:4g}  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
