"""The fiddly parts of one optimizer step: running statistics, the guarded and clipped update."""

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from common.errors import data_error
from common.parallel import average_gradients, gather_objects, met_by_all, sum_over_ranks


class RunningStatistics:
    """Batch-norm buffers updated once per optimizer step, as the mean over its micro-batches and ranks.

    Left alone, a buffer moves once per micro-batch and differs from rank to rank; so the same global batch on other
    hardware would give other buffers. Here every micro-batch starts from the buffers of the step's beginning.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.before: list[Tensor] = []
        self.sums: list[Tensor] = []

    def begin_step(self) -> None:
        self.before = [buffer.clone() for buffer in self.buffers]
        self.sums = [torch.zeros_like(buffer) for buffer in self.buffers]

    def end_micro_batch(self) -> None:
        for buffer, before, total in zip(self.buffers, self.before, self.sums, strict=True):
            total += buffer
            buffer.copy_(before)

    def end_step(self, num_micro_batches: int) -> None:
        """num_micro_batches: of the step, over all ranks."""
        if not self.buffers:
            return
        flat = sum_over_ranks(torch.cat([total.flatten() for total in self.sums])) / num_micro_batches
        for buffer, mean in zip(self.buffers, torch.split(flat, [b.numel() for b in self.buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))


def agree_on_step(losses: Tensor, names: list[str], stop_asked: bool) -> tuple[float, bool]:
    """The mean loss of a step over all ranks, and whether any rank was asked to stop, in one exchange.

    losses: (samples of this rank,); names: what each sample is called. A loss that is not a number stops every rank and
    names the samples.
    """
    assert len(losses) == len(names), f"Expected {len(losses)} names, got {len(names)}"
    bad = ~torch.isfinite(losses)
    mine = [losses.double().sum(), bad.sum().double(), losses.new_tensor(float(len(losses))).double()]
    exchanged = torch.stack([*mine, losses.new_tensor(float(stop_asked)).double()])
    total, num_bad, num_losses, num_asked = sum_over_ranks(exchanged).tolist()
    if num_bad:
        mine_named = [name for name, is_bad in zip(names, bad.tolist(), strict=True) if is_bad]
        everyones = [name for part in gather_objects(mine_named) for name in part]
        raise met_by_all(
            data_error(
                f"train: the loss is not finite on {', '.join(everyones)}; look at these patches, or lower the learning "
                "rates; the last checkpoint is kept"
            )
        )
    return float(total / num_losses), num_asked > 0


def guarded_update(model: nn.Module, optimizer: Optimizer, scaler: GradScaler, max_gradient_norm: float) -> Tensor:
    """Average over ranks, unscale, clip, step; return the gradient norm before clipping.

    Raises a data error on a non-finite norm, unless a loss scale above 1 excuses it (the step is then skipped).
    """
    average_gradients(model)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_gradient_norm)
    if not torch.isfinite(norm) and not (scaler.is_enabled() and scaler.get_scale() > 1):
        raise met_by_all(data_error(f"train: the gradient norm is {norm.item()}; lower the learning rates"))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm
