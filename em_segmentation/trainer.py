"""Train a segmentation network: data, model, loss, validation and the loop.

A run is a pure function of its config: patches, augmentation, dropout and learning rate follow from (seed, step), so a
checkpoint is weights, their average, optimizer, loss scale, step and the figures so far. Killed at any moment and started
again, a run ends in the same bits.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from common.checkpoint import update_average
from common.errors import UserError, config_error
from common.interrupt import StopRequest, ignore_interrupts, stop_on_signal
from common.loading import lost_readers_told, next_batch
from common.logbook import Scalars, progress
from common.parallel import all_ranks_do, check_same_step, first_rank_does, met_by_all
from common.precision import tell_precision
from common.step import RunningStatistics, agree_on_step, guarded_update
from common.streams import micro_batches, seed_dropout
from em_segmentation.augmentation import Patch, augmented
from em_segmentation.config import Config
from em_segmentation.dataset import Volumes, check_stream, patch_stream, stack, to_device
from em_segmentation.model_defs.registry import SegmentationModel
from em_segmentation.objective import PRECISIONS, training_loss
from em_segmentation.schedule import Record, ends_early, learning_rate_share, total_steps
from em_segmentation.state import State, keep_best, resume, save
from em_segmentation.validation import num_readers, validate, validation_loader


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


def accumulate(
    state: State, statistics: RunningStatistics, stream: Iterator[Patch], volumes: Volumes, config: Config
) -> tuple[Tensor, Tensor]:
    """Gradients of this rank's micro-batches of one step; the losses and positions of their samples, (samples,) each."""
    device, seed, ranks = next(state.model.parameters()).device, config.system.seed, dist.get_world_size()
    together = config.data.batch_size * config.training.accumulate_grad_batches
    rounds = together // (micro_batch_size(config, ranks) * ranks)
    seen: list[tuple[Tensor, Tensor]] = []
    statistics.begin_step()
    for number in range(rounds):
        batch = to_device(next(stream), device)
        seed_dropout(seed, state.step, number * ranks + dist.get_rank())
        if config.data.augmentation:
            batch = augmented(batch, config.augmentation, volumes.voxel_size_nm, seed)
        losses = training_loss(state.model, batch, config, volumes.voxel_size_nm)  # (B,)
        state.scaler.scale(losses.mean() / rounds).backward()  # type: ignore[no-untyped-call]
        statistics.end_micro_batch()
        seen.append((losses.detach(), batch.position))
    all_losses, positions = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return all_losses, positions


def check_all_take_part(model: SegmentationModel) -> None:
    """A config error where a weight of a user's own network has no part in the loss."""
    idle = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    if idle:
        raise met_by_all(
            config_error(
                f"model.architecture: {model.architecture}'s {idle[0]} has no part in the loss ({len(idle)} in all); "
                "remove it, or freeze it by requires_grad_(False)"
            )
        )


def take_step(
    state: State,
    statistics: RunningStatistics,
    stream: Iterator[Patch],
    stop: StopRequest,
    volumes: Volumes,
    config: Config,
) -> tuple[Record, bool]:
    """One optimizer step: accumulate, average over ranks, guard, clip, update.

    Returns the figures, which are means over ranks, and whether any rank was asked to stop.
    """
    learning_rate = config.optimizer.lr * learning_rate_share(state.step, state.records, config)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    losses, positions = accumulate(state, statistics, stream, volumes, config)
    check_all_take_part(state.model)
    finite, places = torch.isfinite(losses).tolist(), patch_stream(volumes, config)
    names = ["" if ok else places.name(p) for ok, p in zip(finite, positions.tolist(), strict=True)]
    mean_loss, stop_asked = agree_on_step(losses, names, stop.asked)
    statistics.end_step(len(losses) * dist.get_world_size() // micro_batch_size(config, dist.get_world_size()))
    norm = guarded_update(state.model, state.optimizer, state.scaler, config.training.gradient_clip_val)
    update_average(state.average, state.model, config.training.ema_decay, state.step)
    state.step += 1
    return {"train_loss": mean_loss, "gradient_norm": norm.item(), "learning_rate": learning_rate}, stop_asked


def check_hardware(config: Config, device: torch.device) -> None:
    """What only the running processes know: their number and their device must fit the config."""
    share = micro_batch_size(config, dist.get_world_size())
    normalises = config.model.architecture == "rsunet" and config.model.norm == "batch"
    if normalises and share < config.data.batch_size and dist.get_rank() == 0:
        print(
            f"note: each of {dist.get_world_size()} processes normalises over {share} of {config.data.batch_size} patches; "
            "training.accumulate_grad_batches as many as processes gives the steps of one",
            flush=True,
        )
    if config.system.num_gpus and dist.get_world_size() > config.system.num_gpus and device.type == "cuda":
        raise config_error(
            f"system.num_gpus: {config.system.num_gpus}, but torchrun started {dist.get_world_size()} processes; "
            "expected at most that many"
        )
    if device.type == "cpu" and config.training.precision == "16-mixed":
        raise config_error("training.precision: 16-mixed trains on GPUs only; on a CPU give training.precision=32")


def train(state: State, config: Config, folder: Path, volumes: Volumes) -> list[Record]:
    """Train, or continue, one run from its first state inside a process group; return its records, one per logged step."""
    first, device = dist.get_rank() == 0, next(state.model.parameters()).device
    if first:
        announce(state.model, volumes, config, device)
    last = folder / "checkpoints" / "last.pt"
    all_ranks_do(lambda: resume(state, last, config, volumes) if last.exists() else None)
    check_same_step(state.step, folder)
    if state.step == total_steps(config) or ends_early(state.records, config):
        if first:
            print(f"{folder} is complete; --fresh starts it over", flush=True)
        return state.records
    if first and state.step:
        print(f"continuing {folder} at step {state.step} of {total_steps(config)}", flush=True)
    first_rank_does(lambda: check_stream(patch_stream(volumes, config)))
    batches = next_batch(training_loader(state.step, volumes, config, device), "data.num_workers")
    scalars = Scalars(folder / "tensorboard", state.step) if first else None
    with stop_on_signal() as stop, lost_readers_told("data.num_workers"):
        run_steps(state, batches, stop, volumes, config, folder, scalars)
    return state.records


def announce(model: SegmentationModel, volumes: Volumes, config: Config, device: torch.device) -> None:
    """Say what is trained on what and where, before it takes hours."""
    info = model.get_model_info()
    counts = f"{len(volumes.train)} training and {len(volumes.val)} validation volumes"
    where = f"{dist.get_world_size()} x {device.type}"
    steps = f"{config.training.max_epochs} epochs of {config.training.steps_per_epoch} steps"
    print(f"{info['architecture']}, {info['parameters']:,} parameters; {counts}; {steps}; {where}", flush=True)
    tell_precision(PRECISIONS[config.training.precision], device)
    if not volumes.val:
        print("no validation volumes: the last weights are best, and monitors are ignored", flush=True)


def training_loader(
    first_step: int, volumes: Volumes, config: Config, device: torch.device
) -> DataLoader[Patch | UserError]:
    """This rank's micro-batches from a step to the run's end."""
    ranks = dist.get_world_size()
    plan = micro_batches(
        first_step,
        total_steps(config),
        config.data.batch_size * config.training.accumulate_grad_batches,
        micro_batch_size(config, ranks),
        dist.get_rank(),
        ranks,
    )
    return DataLoader(
        patch_stream(volumes, config),
        batch_sampler=plan,  # an iterator serves: it is walked once
        num_workers=num_readers(config),
        collate_fn=stack,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupts,
    )


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
    statistics, fixed_patches = RunningStatistics(state.model), validation_loader(volumes, config)
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
            measured |= {"epoch": state.step // epoch_steps}
            measured |= validate(state.average, fixed_patches, volumes, config, folder)
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


def told(record: Record) -> str:
    """One line of an epoch's figures."""
    figures = {name: value for name, value in record.items() if name == "train_loss" or name.startswith("val_")}
    return f"epoch {record['epoch']:4g}  " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
