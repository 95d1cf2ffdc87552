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

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import AdamW
from torch.utils.data import DataLoader, Subset

from common.checkpoint import load_checkpoint, load_weights, save_checkpoint, update_average
from common.config import as_yaml
from common.errors import config_error, data_error
from common.logbook import Scalars, progress, write_metrics
from common.metrics.detection import ScoredTomogram, average_precision, precision_recall_curve
from common.metrics.heatmaps import comprehensive_heatmap_metric, soft_dice_score, topk_accuracy
from common.parallel import gather_objects, sum_over_ranks
from common.schedule import warmup_then_cosine
from common.step import RunningStatistics, autocast, guarded_update
from common.streams import micro_batches, seed_dropout
from motor_detection.augmentation import augmented_batch, plain_batch
from motor_detection.config import Config, Model
from motor_detection.dataset import PatchList, PatchStream, Sample, list_patches, stack, to_device
from motor_detection.labels import LabelledTomogram
from motor_detection.losses import heatmap_loss
from motor_detection.model_defs.motoridentifier import MotorIdentifier
from motor_detection.peaks import find_peaks
from motor_detection.places import convert_settings, tomograms_of_fold, training_identity

KIND = "motor_detection"
MIN_PEAK = 0.1  # of a target: below it a patch holds no motor whose place could be found
PEAK_SCALE_CELLS = 60.0  # of the comprehensive heat-map metric, as published
TOP_CELLS = 10  # of the top-k accuracy


@dataclasses.dataclass(frozen=True)
class Patches:
    """The patch files of one run, and the most motors that any of them can hold."""

    train: list[Path]
    validation: list[Path]
    max_motors: int


def choose_patches(config: Config, folder: Path, tomograms: list[LabelledTomogram]) -> Patches:
    """Training patches of all folds but the validation and the test fold."""
    data = config.data
    held_out = (data.validation_fold, data.test_fold)
    train = [tomogram for tomogram in tomograms if tomogram.fold not in held_out]
    if not train:
        raise config_error("data.validation_fold: with the test fold it takes all tomograms; none is left to train on")
    validation = tomograms_of_fold(tomograms, data.validation_fold, "data.validation_fold")
    if not any(len(tomogram.motors) for tomogram in validation):
        raise config_error(
            f"data.validation_fold: no motor in fold {data.validation_fold}; choose a fold that has some"
        )
    settings = convert_settings(config)
    most = max(1, max(len(tomogram.motors) for tomogram in tomograms))
    return Patches(list_patches(folder, settings, train), list_patches(folder, settings, validation), most)


def build_model(settings: Model) -> MotorIdentifier:
    return MotorIdentifier(**dataclasses.asdict(settings))


def build_optimizer(model: MotorIdentifier, weight_decay: float) -> AdamW:
    """AdamW over four groups: backbone and head, each with and without weight decay (biases and norms go without)."""
    groups: list[dict[str, Any]] = []
    for name, parameters in model.groups_of_parameters().items():
        for decays in (True, False):
            chosen = [parameter for parameter in parameters if (parameter.dim() > 1) == decays]
            groups.append({"params": chosen, "name": name, "weight_decay": weight_decay if decays else 0.0})
    return AdamW(groups, lr=0.0)


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

    def as_checkpoint(self, config: Config) -> dict[str, Any]:
        return {
            "kind": KIND,
            "config": as_yaml(config),
            "identity": training_identity(config),
            "step": self.step,
            "records": self.records,
            "best": self.best,
            "weights": self.average.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }


def begin(config: Config, device: torch.device) -> State:
    """A run's first state: weights drawn from the seed, or loaded from train.start_from."""
    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if config.train.start_from is not None:
        load_weights(model, load_checkpoint(config.train.start_from, KIND)["weights"], config.train.start_from)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    scaler = GradScaler(device.type, enabled=config.train.precision == "float16")
    return State(model, average, build_optimizer(model, config.train.weight_decay), scaler, 0, [], -1.0)


def resume(state: State, path: Path, config: Config) -> None:
    """Continue from a checkpoint of the very same run."""
    saved = load_checkpoint(path, KIND)
    if "optimizer" not in saved or saved["identity"] != training_identity(config):
        raise data_error(f"{path}: belongs to a run of another config; choose another run.name, or --fresh")
    load_weights(state.model, saved["model"], path)
    load_weights(state.average, saved["weights"], path)
    state.optimizer.load_state_dict(saved["optimizer"])
    state.scaler.load_state_dict(saved["scaler"])
    state.step, state.records, state.best = saved["step"], saved["records"], saved["best"]


def take_step(
    state: State, statistics: RunningStatistics, stream: Iterator[Sample], patches: Patches, config: Config
) -> dict[str, float]:
    """One optimizer step: accumulate, average over ranks, guard, clip, update; the figures are means over ranks."""
    train, device = config.train, next(state.model.parameters()).device
    share = warmup_then_cosine(state.step, train.steps, int(train.warmup_share * train.steps), train.floor_share)
    peak = {"backbone": train.learning_rate_backbone, "head": train.learning_rate_head}
    for group in state.optimizer.param_groups:
        group["lr"] = peak[group["name"]] * share
    rounds = train.batch_size // (train.micro_batch_size * dist.get_world_size())
    mean_loss = torch.zeros((), device=device)
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
        refuse_non_finite(losses, batch, patches.train)
        state.scaler.scale(losses.mean() / rounds).backward()  # type: ignore[no-untyped-call]
        statistics.end_micro_batch()
        mean_loss += losses.detach().mean() / rounds / dist.get_world_size()
    statistics.end_step(rounds * dist.get_world_size())
    norm = guarded_update(state.model, state.optimizer, state.scaler, train.max_gradient_norm)
    update_average(state.average, state.model, train.ema_decay, state.step)
    state.step += 1
    return {"loss": sum_over_ranks(mean_loss).item(), "gradient_norm": norm.item(), "learning_rate_share": share}


def refuse_non_finite(losses: Tensor, batch: Sample, files: list[Path]) -> None:
    """Stop at a loss that is not a number, and name the patches."""
    if not torch.isfinite(losses).all():
        bad = [str(files[index]) for index in batch.index[~torch.isfinite(losses)].tolist()]
        raise data_error(
            f"train: the loss is not finite on {', '.join(bad)}; look at these patches, or lower the learning rates; "
            "the last checkpoint is kept"
        )


@torch.inference_mode()
def validate(model: nn.Module, patches: Patches, config: Config, device: torch.device) -> dict[str, float]:
    """Loss, heat-map metrics and detection over all validation patches, each scored exactly once on any ranks.

    average_precision is that of all picks, matched one to one within two sigma of the heat map (or the evaluation's
    tolerance, if that is stricter): the metric that decides which weights are best.
    """
    mine = list(range(dist.get_rank(), len(patches.validation), dist.get_world_size()))
    loader = DataLoader(
        Subset(PatchList(patches.validation, patches.max_motors), mine),
        batch_size=config.train.micro_batch_size,
        num_workers=config.train.workers,
        collate_fn=stack,
    )
    rows: list[tuple[int, list[float], ScoredTomogram]] = []
    for host_batch in loader:
        batch = to_device(host_batch, device)
        images, heat = plain_batch(batch, config.heatmap.sigma_angstrom, config.model.stride)
        with autocast(device, config.train.precision):
            logits = model(images.contiguous(memory_format=torch.channels_last_3d)).float()
        if not torch.isfinite(logits).all():
            raise data_error("train: the validation output is not finite; lower the learning rates")
        rows += score_patches(host_batch, logits, heat, config)
    together = sorted((row for part in gather_objects(rows) for row in part), key=lambda row: row[0])  # type: ignore[attr-defined]
    scores = np.array([row[1] for row in together])
    tolerance = min(config.evaluation.tolerance_angstrom, 2 * config.heatmap.sigma_angstrom)
    curve = precision_recall_curve([row[2] for row in together], tolerance, config.evaluation.beta)
    names = ("validation_loss", "soft_dice", "heatmap_metric", "top_10_accuracy")
    figures = {name: float(np.nanmean(scores[:, column])) for column, name in enumerate(names)}
    return figures | {"average_precision": average_precision(curve)}


def score_patches(
    batch: Sample, logits: Tensor, heat: Tensor, config: Config
) -> list[tuple[int, list[float], ScoredTomogram]]:
    """Number, figures and picks of every patch of a validation batch."""
    probabilities = logits.sigmoid()
    figures = torch.stack(
        [
            heatmap_loss(logits, heat, config.loss),
            soft_dice_score(probabilities, heat).where(heat.flatten(1).amax(1) >= MIN_PEAK, torch.nan),
            comprehensive_heatmap_metric(probabilities, heat, PEAK_SCALE_CELLS, MIN_PEAK),
            topk_accuracy(probabilities, heat, TOP_CELLS, MIN_PEAK),
        ],
        1,
    ).tolist()
    size = np.array(batch.voxels.shape[2:])
    rows = []
    for number, index in enumerate(batch.index.tolist()):
        spacing = batch.spacing_angstrom[number].double().numpy()
        peaks = find_peaks(
            probabilities[number, 0].cpu().numpy(), config.model.stride, spacing, config.heatmap.sigma_angstrom,
            config.inference.min_distance_angstrom, config.inference.min_score, config.inference.max_picks,
        )  # fmt: skip
        motors = batch.motors[number].double().numpy()
        inside = ((motors >= -0.5) & (motors <= size - 0.5)).all(1)  # NaN is never inside
        rows.append((index, figures[number], ScoredTomogram(peaks.points, peaks.scores, motors[inside], spacing)))
    return rows


def save(state: State, folder: Path, config: Config) -> None:
    """Write last.pt and metrics.csv, on the first rank only."""
    if dist.get_rank() == 0:
        save_checkpoint(state.as_checkpoint(config), folder / "checkpoints" / "last.pt")
        write_metrics(folder / "metrics.csv", state.records)


def keep_if_best(state: State, measured: dict[str, float], folder: Path, config: Config) -> None:
    """Write best.pt when the average precision is at least as high as ever; of equals the later is kept."""
    if measured["average_precision"] >= state.best:
        state.best = measured["average_precision"]
        if dist.get_rank() == 0:
            best = {"kind": KIND, "config": as_yaml(config), "identity": training_identity(config)}
            weights = {"step": state.step, "weights": state.average.state_dict(), "measured": measured}
            save_checkpoint(best | weights, folder / "checkpoints" / "best.pt")


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
        raise config_error(f"train.precision: {settings.precision} trains on GPUs only; on this CPU expected float32")


def train(config: Config, folder: Path, patches: Patches, device: torch.device) -> list[dict[str, float]]:
    """Train, or continue, one run inside a process group; return its records, one per logged step."""
    settings = config.train
    first = dist.get_rank() == 0
    state = begin(config, device)
    last = folder / "checkpoints" / "last.pt"
    if last.exists():
        resume(state, last, config)
        if first and state.step == settings.steps:
            print(f"{folder} is complete; --fresh starts it over", flush=True)
        elif first:
            print(f"continuing {folder} at step {state.step} of {settings.steps}", flush=True)
    plan = micro_batches(
        state.step,
        settings.steps,
        settings.batch_size,
        settings.micro_batch_size,
        dist.get_rank(),
        dist.get_world_size(),
    )
    stream = PatchStream(patches.train, patches.max_motors, settings.seed)
    loader = DataLoader(
        stream,
        batch_sampler=plan,  # an iterator serves: it is walked once
        num_workers=settings.workers,
        collate_fn=stack,
        pin_memory=device.type == "cuda",
    )
    scalars = Scalars(folder / "tensorboard", state.records) if first else None
    run_steps(state, iter(loader), patches, config, folder, scalars)
    return state.records


def run_steps(
    state: State, stream: Iterator[Sample], patches: Patches, config: Config, folder: Path, scalars: Scalars | None
) -> None:
    """The loop: step, and now and then validate, keep the best, save."""
    settings, device = config.train, next(state.model.parameters()).device
    statistics = RunningStatistics(state.model)
    bar = progress(range(settings.steps), "training", settings.steps, scalars is not None)
    bar.update(state.step)
    state.model.train()
    while state.step < settings.steps:
        measured = take_step(state, statistics, stream, patches, config)
        bar.set_postfix(loss=f"{measured['loss']:.4f}", best=f"{state.best:.3f}", refresh=False)
        bar.update()
        at_end = state.step == settings.steps
        if state.step % settings.validate_every == 0 or at_end:
            measured |= validate(state.average, patches, config, device)
            keep_if_best(state, measured, folder, config)
            if scalars is not None:
                shown = f"loss {measured['loss']:.4f}  validation {measured['validation_loss']:.4f}"
                print(f"step {state.step:6d}  {shown}  AP {measured['average_precision']:.3f}", flush=True)
        if state.step % settings.log_every == 0 or "validation_loss" in measured:
            state.records.append({"step": state.step} | measured)
            if scalars is not None:
                scalars.add(state.records[-1])
        if state.step % settings.checkpoint_every == 0 or at_end:
            save(state, folder, config)
    bar.close()
    sys.stdout.flush()
