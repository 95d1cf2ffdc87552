"""Train MotorIdentifier: data, model, loss, validation and the loop.

A run is a pure function of its config: order, augmentation, dropout and learning rate follow from (seed, step), so a
checkpoint is weights, their average, optimizer, loss scale and step. Killed at any moment and started again, a run ends
in the same bits.
"""

import copy
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import AdamW
from torch.utils.data import DataLoader

from common.checkpoint import (
    check_best,
    check_same_run,
    load_checkpoint,
    load_optimizer,
    load_weights,
    save_checkpoint,
    update_average,
)
from common.config import as_yaml
from common.errors import config_error
from common.files import parsing
from common.interrupt import StopRequest, ignore_interrupts, stop_on_signal
from common.loading import lost_readers_told, next_batch
from common.logbook import Scalars, progress, write_metrics
from common.parallel import all_ranks_do, check_same_step
from common.precision import autocast
from common.schedule import warmup_then_cosine
from common.step import RunningStatistics, agree_on_step, guarded_update
from common.streams import micro_batches, seed_dropout
from motor_detection.augmentation import augmented_batch
from motor_detection.config import Config, Model
from motor_detection.dataset import Patches, PatchStream, Sample, stack, to_device
from motor_detection.losses import heatmap_loss
from motor_detection.model_defs.motoridentifier import MotorIdentifier, count_parameters
from motor_detection.places import training_identity
from motor_detection.validation import validate

KIND = "motor_detection"


def build_model(settings: Model) -> MotorIdentifier:
    return MotorIdentifier(**dataclasses.asdict(settings))


def build_optimizer(model: MotorIdentifier, weight_decay: float) -> AdamW:
    """AdamW over four groups: backbone and head, each with and without weight decay (biases and norms go without)."""
    groups: list[dict[str, Any]] = []
    for name, parameters in model.groups_of_parameters().items():
        for decays in (True, False):
            chosen = [parameter for parameter in parameters if (parameter.dim() > 1) == decays]
            groups.append({"params": chosen, "name": name, "weight_decay": weight_decay if decays else 0.0})
    return AdamW(groups, lr=0.0, fused=True)


@dataclasses.dataclass
class State:
    """All that changes during a run."""

    model: MotorIdentifier
    average: MotorIdentifier
    optimizer: AdamW
    scaler: GradScaler
    step: int
    records: list[dict[str, float]]
    best: float

    def as_checkpoint(self, config: Config, patches: Patches) -> dict[str, Any]:
        return {
            "kind": KIND,
            "config": as_yaml(config),
            "identity": training_identity(config),
            "patches": patches.digest,
            "tomograms": patches.tomograms,
            "step": self.step,
            "records": self.records,
            "best": self.best,
            "weights": self.average.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }


BEST = ("kind", "config", "identity", "tomograms", "step", "weights", "measured")
CHECKPOINT = {"identity": str, "patches": str, "tomograms": list, "step": int, "records": list, "best": float, "weights": dict,
              "model": dict, "optimizer": dict, "scaler": dict}  # fmt: skip


def begin(config: Config, device: torch.device) -> State:
    """A run's first state: weights drawn from the seed, or loaded from train.start_from."""
    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if config.train.start_from is not None:
        saved = load_checkpoint(config.train.start_from, KIND, {"weights": dict})
        load_weights(model, saved["weights"], config.train.start_from)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    scaler = GradScaler(device.type, enabled=config.train.precision == "float16")
    return State(model, average, build_optimizer(model, config.train.weight_decay), scaler, 0, [], -1.0)


def resume(state: State, path: Path, config: Config, patches: Patches) -> None:
    """Continue from a checkpoint of the very same run on the very same patches."""
    saved = load_checkpoint(path, KIND, CHECKPOINT)
    check_same_run(saved, path, training_identity(config), ("patches", patches.digest), config.train.steps)
    check_best(path.with_name("best.pt"), saved["best"] >= 0)
    load_weights(state.model, saved["model"], path)
    load_weights(state.average, saved["weights"], path)
    with parsing(path, "start over with --fresh"):
        load_optimizer(state.optimizer, saved["optimizer"], ("exp_avg", "exp_avg_sq"))
        state.scaler.load_state_dict(saved["scaler"])
        if not all(isinstance(value, int | float) for record in saved["records"] for value in record.values()):
            raise ValueError("records that are no numbers")
    state.step, state.records, state.best = saved["step"], saved["records"], saved["best"]


def take_step(
    state: State,
    statistics: RunningStatistics,
    stream: Iterator[Sample],
    stop: StopRequest,
    patches: Patches,
    config: Config,
) -> tuple[dict[str, float], bool]:
    """One optimizer step: accumulate, average over ranks, guard, clip, update.

    Returns the figures, which are means over ranks, and whether any rank was asked to stop.
    """
    train, device = config.train, next(state.model.parameters()).device
    share = warmup_then_cosine(state.step, train.steps, int(train.warmup_share * train.steps), train.floor_share)
    peak = {"backbone": train.learning_rate_backbone, "head": train.learning_rate_head}
    for group in state.optimizer.param_groups:
        group["lr"] = peak[group["name"]] * share
    rounds = train.batch_size // (train.micro_batch_size * dist.get_world_size())
    seen: list[tuple[Tensor, Tensor]] = []  # losses and patch numbers of every micro-batch
    statistics.begin_step()
    for number in range(rounds):
        batch = to_device(next(stream), device)
        seed_dropout(train.seed, state.step, number * dist.get_world_size() + dist.get_rank())
        with torch.no_grad():
            images, heat = augmented_batch(
                batch, config.augment, train.seed, config.heatmap.sigma_angstrom, config.model.stride
            )
        with autocast(device, train.precision):
            logits = state.model(images.contiguous(memory_format=torch.channels_last_3d))
        losses = heatmap_loss(logits, heat, config.loss)  # (B,)
        state.scaler.scale(losses.mean() / rounds).backward()  # type: ignore[no-untyped-call]
        statistics.end_micro_batch()
        seen.append((losses.detach(), batch.index))
    losses, numbers = (torch.cat(parts) for parts in zip(*seen, strict=True))  # (samples of this rank,)
    names = [str(patches.train[k]) for k in numbers.tolist()]
    mean_loss, stop_asked = agree_on_step(losses, names, stop.asked)
    statistics.end_step(rounds * dist.get_world_size())
    norm = guarded_update(state.model, state.optimizer, state.scaler, train.max_gradient_norm)
    update_average(state.average, state.model, train.ema_decay, state.step)
    state.step += 1
    return {"loss": mean_loss, "gradient_norm": norm.item(), "learning_rate_share": share}, stop_asked


def save(state: State, folder: Path, config: Config, patches: Patches) -> None:
    """Write metrics.csv, then last.pt, on the first rank only: a run killed between them writes the same rows again."""
    if dist.get_rank() == 0:
        write_metrics(folder / "metrics.csv", state.records)
        save_checkpoint(state.as_checkpoint(config, patches), folder / "checkpoints" / "last.pt")


def keep_if_best(state: State, measured: dict[str, float], folder: Path, config: Config, patches: Patches) -> None:
    """Write best.pt when the average precision is at least as high as ever; of equals the later is kept."""
    if measured["average_precision"] >= state.best:
        state.best = measured["average_precision"]
        if dist.get_rank() == 0:
            best = state.as_checkpoint(config, patches) | {"measured": measured}
            kept = {name: best[name] for name in BEST}
            save_checkpoint(kept, folder / "checkpoints" / "best.pt")


def check_hardware(config: Config, device: torch.device) -> None:
    """What only the running processes know: their number and their device must fit the config."""
    settings = config.train
    if settings.batch_size % (settings.micro_batch_size * dist.get_world_size()):
        share = f"{dist.get_world_size()} processes x train.micro_batch_size={settings.micro_batch_size}"
        raise config_error(
            f"train.batch_size: {settings.batch_size} does not divide into {share}; change one of the two"
        )
    if device.type == "cpu" and settings.precision != "float32":
        # torch 2.13's bfloat16 weight gradients of 3D convolutions are wrong where a map is 3 cells wide
        raise config_error(
            f"train.precision: {settings.precision} trains on GPUs only; on a CPU give train.precision=float32"
        )


def train(config: Config, folder: Path, patches: Patches, device: torch.device) -> list[dict[str, float]]:
    """Train, or continue, one run inside a process group; return its records, one per logged step."""
    settings = config.train
    first = dist.get_rank() == 0
    state = all_ranks_do(lambda: begin(config, device))
    if first:
        counts = f"{len(patches.train)} training and {len(patches.validation)} validation patches"
        where = f"{dist.get_world_size()} x {device.type}"
        print(f"MotorIdentifier, {count_parameters(state.model):,} parameters; {counts}; {where}", flush=True)
    last = folder / "checkpoints" / "last.pt"
    all_ranks_do(lambda: resume(state, last, config, patches) if last.exists() else None)
    check_same_step(state.step, folder)
    if first and state.step == settings.steps:
        print(f"{folder} is complete; --fresh starts it over", flush=True)
    elif first and state.step:
        print(f"continuing {folder} at step {state.step} of {settings.steps}", flush=True)
    plan = micro_batches(
        state.step,
        settings.steps,
        settings.batch_size,
        settings.micro_batch_size,
        dist.get_rank(),
        dist.get_world_size(),
    )
    stream = PatchStream(patches.train, patches.patch_size, patches.max_motors, settings.seed)
    loader = DataLoader(
        stream,
        batch_sampler=plan,  # an iterator serves: it is walked once
        num_workers=settings.workers,
        collate_fn=stack,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupts,
    )
    scalars = Scalars(folder / "tensorboard", state.step) if first else None
    with stop_on_signal() as stop, lost_readers_told("train.workers"):
        run_steps(state, next_batch(loader, "train.workers"), stop, patches, config, folder, scalars)
    return state.records


def run_steps(
    state: State,
    stream: Iterator[Sample],
    stop: StopRequest,
    patches: Patches,
    config: Config,
    folder: Path,
    scalars: Scalars | None,
) -> None:
    """The loop: step, and now and then validate, keep the best, save; on Ctrl-C or SIGTERM save and end."""
    settings, device = config.train, next(state.model.parameters()).device
    statistics = RunningStatistics(state.model)
    bar = progress(range(settings.steps), "training", settings.steps, scalars is not None)
    bar.update(state.step)
    state.model.train()
    while state.step < settings.steps:
        measured, stop_asked = take_step(state, statistics, stream, stop, patches, config)
        bar.set_postfix(loss=f"{measured['loss']:.4f}", best=f"{state.best:.3f}", refresh=False)
        bar.update()
        at_end = state.step == settings.steps
        if state.step % settings.validate_every == 0 or at_end:
            measured |= validate(state.average, patches, config, device)
            keep_if_best(state, measured, folder, config, patches)
            if scalars is not None:
                shown = f"loss {measured['loss']:.4f}  validation {measured['validation_loss']:.4f}"
                print(f"step {state.step:6d}  {shown}  AP {measured['average_precision']:.3f}", flush=True)
        if state.step % settings.log_every == 0 or "validation_loss" in measured:
            state.records.append({"step": state.step} | measured)
            if scalars is not None:
                scalars.add(state.records[-1])
        if state.step % settings.checkpoint_every == 0 or at_end or stop_asked:
            save(state, folder, config, patches)
        if stop_asked and not at_end:
            raise KeyboardInterrupt
    bar.close()
    if scalars is not None:
        scalars.close()
    sys.stdout.flush()
