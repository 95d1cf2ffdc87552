"""Several processes under torchrun, or a group of one: the code above has a single path."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError


@contextmanager
def process_group(deterministic: bool) -> Iterator[torch.device]:
    """Join torchrun's group, or found a group of one; leave it at the end, also after an error.

    deterministic: refuse operations whose bits change from run to run (CUDA convolutions stay exact, a little slower).
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # saves a pass per tensor
    torch.backends.cudnn.benchmark = not deterministic
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else 0)
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    finally:
        dist.destroy_process_group()


def first_rank_does(work: Callable[[], None]) -> None:
    """Let the first rank work while the others wait; a user error there ends every rank, and is printed once."""
    outcome: list[UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0] if dist.get_rank() == 0 else UserError(outcome[0].exit_code, [])


def average_gradients(model: nn.Module) -> None:
    """Average over ranks in one exchange of fixed layout; DDP would lay out its buckets anew after a restart."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    expected = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(gradients) == expected, f"Expected {expected} gradients, got {len(gradients)}: a parameter has no part"
    if dist.get_world_size() == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))  # its own memory format stays


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place; the same on every rank."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(item: object) -> list[object]:
    """Every rank's item, in rank order, on every rank (pickled between the group's own processes)."""
    items: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items
