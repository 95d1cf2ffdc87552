"""Learning rates as pure functions of the step: nothing to save, nothing to disagree with the optimizer."""

import math


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
