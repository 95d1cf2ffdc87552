"""Learning rate, best weights and early stop as pure functions of the step and of the figures so far."""

from common.schedule import num_plateaus, num_since_best, warmup_then_cosine
from em_segmentation.config import Config

Record = dict[str, float]


def total_steps(config: Config) -> int:
    """Optimizer steps of a run that does not stop early."""
    return config.training.max_epochs * config.training.steps_per_epoch


def learning_rate_share(step: int, records: list[Record], config: Config) -> float:
    """The share of optimizer.lr at a step: linear warm-up, then the scheduler's course, which ends at min_lr."""
    scheduler, per_epoch, last = config.scheduler, config.training.steps_per_epoch, total_steps(config)
    warm = min(round(scheduler.warmup_epochs * per_epoch), last - 1)
    floor = min(1.0, scheduler.min_lr / config.optimizer.lr)
    if step < warm or scheduler.name == "cosine":
        return warmup_then_cosine(step, last, warm, floor)
    if scheduler.name == "constant":
        return 1.0
    epoch = step // per_epoch
    falls = epoch // scheduler.step_epochs if scheduler.name == "step" else plateaus_before(records, epoch, config)
    return max(floor, scheduler.factor**falls)


def monitored(records: list[Record], name: str) -> list[Record]:
    """The records of validations that hold a figure, in order."""
    return [record for record in records if "epoch" in record and name in record]


def plateaus_before(records: list[Record], epoch: int, config: Config) -> int:
    """How often, before an epoch, the figure of early stopping had not improved for more than scheduler.patience epochs."""
    settings = config.early_stopping
    values = [r[settings.monitor] for r in monitored(records, settings.monitor) if r["epoch"] <= epoch]
    return num_plateaus(values, config.scheduler.patience, settings.mode)


def ends_early(records: list[Record], config: Config) -> bool:
    """Whether the last early_stopping.patience epochs brought no improvement."""
    settings = config.early_stopping
    values = [record[settings.monitor] for record in monitored(records, settings.monitor)]
    return settings.patience > 0 and num_since_best(values, settings.mode) >= settings.patience


def ranked(records: list[Record], config: Config) -> list[Record]:
    """Validated epochs, best first by checkpoint.monitor, of equals the later; without validation the last is best."""
    settings = config.checkpoint
    epochs = [record for record in records if "epoch" in record]
    sign = 1 if settings.mode == "min" else -1
    if monitored(records, settings.monitor):
        return sorted(epochs, key=lambda record: (sign * record[settings.monitor], -record["epoch"]))
    return sorted(epochs, key=lambda record: -record["epoch"])
