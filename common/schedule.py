"""Learning rates as pure functions of the step: nothing to save, nothing to disagree with the optimizer."""

import math
from typing import Literal

Mode = Literal["min", "max"]  # whether a figure is better when it is lower or higher


def warmup_then_cosine(step: int, total_steps: int, warmup_steps: int, floor_share: float) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then half a cosine down to the floor.

    Step 0 already has 1/warmup_steps of the peak; the last step has the floor, if any step follows the warm-up
    (Loshchilov & Hutter 2017, eq. 5).
    """
    assert 0 <= step < total_steps and warmup_steps < total_steps, f"step {step} of {total_steps}, {warmup_steps} warm"
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return floor_share + (1 - floor_share) * (0.5 + 0.5 * math.cos(math.pi * progress))


def better(value: float, than: float, mode: Mode) -> bool:
    return value < than if mode == "min" else value > than


def num_plateaus(values: list[float], patience: int, mode: Mode) -> int:
    """How often torch's ReduceLROnPlateau (threshold 0) would have lowered the rate.

    It does after more than `patience` validations without a better figure, the counting starting anew each time.
    """
    waited = plateaus = 0
    for number, value in enumerate(values):
        if all(better(value, before, mode) for before in values[:number]):
            waited = 0
            continue
        waited += 1
        if waited > patience:
            plateaus, waited = plateaus + 1, 0
    return plateaus


def num_since_best(values: list[float], mode: Mode) -> int:
    """Validations since the best figure, of equals the first; 0 where there is none."""
    pick = min if mode == "min" else max
    return len(values) - 1 - values.index(pick(values)) if values else 0
