"""Train one network of one trial: model, loss, validation and the loop.

A run is a pure function of its config: composites, augmentation, dropout and learning rate follow from (seed, step) and the
figures so far, so a checkpoint is weights, their average, optimizer, loss scale, step and records. Killed at any moment and
started again, a run ends in the same bits.
"""

import copy
import dataclasses
import math
import shutil
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
from common.parallel import all_ranks_do, check_same_step, gather_objects
from common.schedule import num_plateaus, num_since_best
from common.step import RunningStatistics, agree_on_step, guarded_update
from common.streams import micro_batches, seed_dropout
from histo_mmnet.augmentation import augmented
from histo_mmnet.composites import Composite
from histo_mmnet.config import Config
from histo_mmnet.dataset import Batch, CompositeStream, stack
from histo_mmnet.losses import mixed, training_loss
from histo_mmnet.members import KIND, Member, Network, build_network, pools_patients
from histo_mmnet.places import training_identity
from histo_mmnet.slides import Album, Slide
from histo_mmnet.validation import micro_batch_size, validate

Record = dict[str, float]
MONITOR = "val_balanced_accuracy"  # decides early stop and learning rate, and with val_loss the best weights
BEST = ("kind", "config", "identity", "images", "step", "weights", "measured")
CHECKPOINT = {"identity": str, "images": str, "step": int, "records": list, "losses": list, "weights": dict, "model": dict,
              "optimizer": dict, "scaler": dict}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Material:
    """What a member is trained and validated on."""

    member: Member
    train: list[Slide]
    val: list[Composite]
    album: Album
    digest: str  # of names, roles and sizes of all files


@dataclasses.dataclass
class State:
    """All that changes during a run."""

    model: Network
    average: Network
    optimizer: AdamW
    scaler: GradScaler
    step: int
    records: list[Record]  # one per epoch
    losses: list[float]  # of the steps of the epoch in hand

    def as_checkpoint(self, config: Config, material: Material) -> dict[str, Any]:
        return {
            "kind": KIND,
            "config": as_yaml(config),
            "identity": identity_of(config, material),
            "images": material.digest,
            "step": self.step,
            "records": self.records,
            "losses": self.losses,
            "weights": self.average.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }


def identity_of(config: Config, material: Material) -> str:
    """What a checkpoint must agree on to be continued: the constants, and the member."""
    return f"{training_identity(config)}member: {material.member.name} of trial {material.member.fold}\n"


def steps_per_epoch(config: Config, slides: list[Slide]) -> int:
    """Optimizer steps in which train.epoch_multiplier composites are drawn per photograph of each slide's fullest view."""
    composites = config.train.epoch_multiplier * sum(slide.num_composites for slide in slides)
    return max(1, math.ceil(composites / config.train.batch_size))


def begin(config: Config, member: Member, device: torch.device) -> State:
    """A run's first state: weights drawn from the seed, backbones filled from model.pretrained."""
    torch.manual_seed(config.train.seed)
    model = build_network(member, config.model).to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    groups: list[dict[str, Any]] = []
    for name, decays in (("weights", True), ("biases and norms", False)):
        chosen = [weight for weight in model.parameters() if weight.requires_grad and (weight.dim() > 1) == decays]
        groups.append({"params": chosen, "name": name, "weight_decay": config.train.weight_decay if decays else 0.0})
    scaler = GradScaler(device.type, enabled=config.train.precision == "float16")
    return State(model, average, AdamW(groups, lr=0.0, fused=True), scaler, 0, [], [])


def resume(state: State, path: Path, config: Config, material: Material) -> None:
    """Continue from a checkpoint of the very same run on the very same images."""
    saved = load_checkpoint(path, KIND, CHECKPOINT)
    last = config.train.epochs * steps_per_epoch(config, material.train)
    check_same_run(saved, path, identity_of(config, material), ("images", material.digest), last)
    load_weights(state.model, saved["model"], path)
    load_weights(state.average, saved["weights"], path)
    with parsing(path, "start over with --fresh"):
        load_optimizer(state.optimizer, saved["optimizer"], ("exp_avg", "exp_avg_sq"))
        state.scaler.load_state_dict(saved["scaler"])
        numbers = [*saved["losses"], *(value for record in saved["records"] for value in record.values())]
        if not all(isinstance(value, int | float) for value in numbers):
            raise ValueError("records that are no numbers")
    state.step, state.records, state.losses = saved["step"], saved["records"], saved["losses"]


def learning_rate(records: list[Record], config: Config) -> float:
    """The rate after the epochs so far: it falls where the monitored figure stays."""
    falls = num_plateaus([record[MONITOR] for record in records], config.train.scheduler_patience, "max")
    return config.train.learning_rate * config.train.scheduler_factor**falls


def ends_early(records: list[Record], config: Config) -> bool:
    """Whether the last train.patience epochs brought no better figure."""
    since = num_since_best([record[MONITOR] for record in records], "max")
    return config.train.patience > 0 and since >= config.train.patience


def best_of(records: list[Record]) -> Record:
    """The epoch of the highest monitored figure, of equals the one of the lowest loss."""
    return max(records, key=lambda record: (record[MONITOR], -record["val_loss"]))


def take_step(
    state: State,
    statistics: RunningStatistics,
    stream: Iterator[Batch],
    stop: StopRequest,
    material: Material,
    config: Config,
) -> tuple[Record, bool]:
    """One optimizer step: accumulate, average over ranks, guard, clip, update.

    Returns the figures, which are means over ranks, and whether any rank was asked to stop.
    """
    train, device, ranks = config.train, next(state.model.parameters()).device, dist.get_world_size()
    rate = learning_rate(state.records, config)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    rounds = train.batch_size // (micro_batch_size(config, device) * ranks)
    seen: list[tuple[Tensor, Tensor]] = []
    statistics.begin_step()
    for number in range(rounds):
        batch = next(stream).mapped(lambda part: part.to(device, non_blocking=True))
        place = number * ranks + dist.get_rank()
        seed_dropout(train.seed, state.step, place)
        images = augmented(batch, config.augment, config.data.normalisation, train.seed)
        shown = mixed(
            images,
            batch.magnification,
            batch.present,
            batch.label,
            config.loss.mixup_alpha,
            train.seed,
            state.step,
            place,
        )
        losses = training_loss(state.model, shown, batch.magnification, config.loss, train.precision)  # (B,)
        state.scaler.scale(losses.mean() / rounds).backward()  # type: ignore[no-untyped-call]
        statistics.end_micro_batch()
        seen.append((losses.detach(), batch.index))
    losses, positions = (torch.cat(parts) for parts in zip(*seen, strict=True))
    finite, drawn = torch.isfinite(losses).tolist(), stream_of(material, config)
    names = ["" if ok else drawn.name(p) for ok, p in zip(finite, positions.tolist(), strict=True)]
    mean_loss, stop_asked = agree_on_step(losses, names, stop.asked)
    statistics.end_step(rounds * ranks)
    for (
        weight
    ) in state.model.parameters():  # a view that no composite of the step shows leaves its layers without gradient
        if weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    norm = guarded_update(state.model, state.optimizer, state.scaler, train.max_gradient_norm)
    update_average(state.average, state.model, train.ema_decay, state.step)
    state.step += 1
    return {"train_loss": mean_loss, "gradient_norm": norm.item(), "learning_rate": rate}, stop_asked


def stream_of(material: Material, config: Config) -> CompositeStream:
    """The training composites of a run."""
    return CompositeStream(
        material.train,
        material.member.magnifications,
        material.album,
        config.augment.missing_view,
        config.model.bag if pools_patients(material.member, config.model) else 0,
        config.train.seed,
    )


def check_hardware(config: Config, device: torch.device) -> None:
    """What only the running processes know: their number and their device must fit the config."""
    size, ranks = micro_batch_size(config, device), dist.get_world_size()
    if config.train.batch_size % (size * ranks):
        raise config_error(
            f"train.batch_size: {config.train.batch_size} does not divide into {ranks} processes x "
            f"train.micro_batch_{device.type}={size}; change one of them"
        )
    if device.type == "cpu" and config.train.precision == "float16":
        raise config_error("train.precision: float16 trains on GPUs only; on a CPU give float32 or bfloat16")


@dataclasses.dataclass(frozen=True)
class Files:
    """Where a member's files lie in a run's folder."""

    last: Path
    best: Path
    metrics: Path
    scalars: Path

    @classmethod
    def of(cls, folder: Path, member: Member) -> "Files":
        tail = f"{member.prefix}fold_{member.fold}"
        models = folder / "models"
        return cls(models / f"last_{tail}.pth", models / f"best_model_{tail}.pth", folder / "results" / f"{tail}_metrics.csv",
                   folder / "tensorboard" / tail)  # fmt: skip

    def delete(self) -> None:
        """So that the member is trained anew."""
        for path in (self.last, self.best, self.metrics):
            path.unlink(missing_ok=True)
        if self.scalars.exists():
            shutil.rmtree(self.scalars)


def train(material: Material, config: Config, folder: Path, device: torch.device) -> list[Record]:
    """Train, or continue, one member inside a process group; return its records, one per epoch."""
    files, first = Files.of(folder, material.member), dist.get_rank() == 0
    state = all_ranks_do(lambda: begin(config, material.member, device))
    all_ranks_do(lambda: resume(state, files.last, config, material) if files.last.exists() else None)
    check_same_step(state.step, folder)
    all_ranks_do(lambda: check_best(files.best, bool(state.records)))
    per_epoch = steps_per_epoch(config, material.train)
    last = config.train.epochs * per_epoch
    if state.step == last or ends_early(state.records, config):
        if first:
            print(f"{material.member.name} of fold {material.member.fold} is complete", flush=True)
            write_metrics(files.metrics, state.records)  # whatever became of it
        return state.records
    if first and state.step:
        print(
            f"continuing {material.member.name} of fold {material.member.fold} at step {state.step} of {last}",
            flush=True,
        )
    plan = micro_batches(
        state.step,
        last,
        config.train.batch_size,
        micro_batch_size(config, device),
        dist.get_rank(),
        dist.get_world_size(),
    )
    loader = DataLoader(
        stream_of(material, config),
        batch_sampler=plan,  # an iterator serves: it is walked once
        num_workers=config.train.workers,
        collate_fn=stack,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupts,
    )
    scalars = Scalars(files.scalars, state.step) if first else None
    with stop_on_signal() as stop, lost_readers_told("train.workers"):
        run_steps(state, next_batch(loader, "train.workers"), stop, material, config, files, scalars)
    return state.records


def run_steps(
    state: State,
    stream: Iterator[Batch],
    stop: StopRequest,
    material: Material,
    config: Config,
    files: Files,
    scalars: Scalars | None,
) -> None:
    """The loop: step; at every epoch's end validate, keep the best, save; on Ctrl-C or SIGTERM save and end."""
    per_epoch, member = steps_per_epoch(config, material.train), material.member
    last, statistics = config.train.epochs * per_epoch, RunningStatistics(state.model)
    bar = progress(range(last), f"fold {member.fold} {member.name}", last, scalars is not None)
    bar.update(state.step)
    state.model.train()
    at_end = False
    while not at_end:
        measured, stop_asked = take_step(state, statistics, stream, stop, material, config)
        state.losses.append(measured["train_loss"])
        bar.set_postfix(loss=f"{measured['train_loss']:.4f}", refresh=False)
        bar.update()
        if state.step % per_epoch == 0:
            measured |= {"train_loss": sum(state.losses) / len(state.losses)}
            measured |= validate(state.average, material.val, material.album, config)
            state.losses = []
            state.records.append({"epoch": state.step // per_epoch, "step": state.step} | measured)
            at_end = state.step == last or ends_early(state.records, config)
            if scalars is not None:
                scalars.add(state.records[-1])
                save(state, config, material, files)
        elif stop_asked and scalars is not None:
            save(state, config, material, files)
        if stop_asked or (at_end and any(gather_objects(stop.asked))):  # others would follow this member
            raise KeyboardInterrupt
    bar.close()
    if scalars is not None:
        scalars.close()


def save(state: State, config: Config, material: Material, files: Files) -> None:
    """The best weights, if the epoch just ended has them, then what to continue from; the best first, so that it is there."""
    whole = state.as_checkpoint(config, material)
    ended = state.records and state.records[-1]["step"] == state.step
    if ended and best_of(state.records) is state.records[-1]:
        kept = whole | {"measured": state.records[-1]}
        save_checkpoint({name: kept[name] for name in BEST}, files.best)
    write_metrics(
        files.metrics, state.records
    )  # before what says that they were: a run killed between writes them again
    save_checkpoint(whole, files.last)
