"""Several processes under torchrun, or a group of one: the code above has a single path."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import UserError, config_error, data_error

Item = TypeVar("Item")
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # a cluster may set one of them alone
LOST_PROCESS = re.compile("closed by peer|reset by peer|broken pipe|remote process exited|timed out", re.IGNORECASE)


@contextmanager
def process_group(deterministic: bool) -> Iterator[torch.device]:
    """Join torchrun's group, or found a group of one; leave it at the end, also after an error.

    deterministic: refuse operations whose bits change from run to run (CUDA convolutions stay exact, a little slower).
    Where another process of the group has died, a data error (exit code 1) says so.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS is not deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # saves a pass per tensor
    torch.backends.cudnn.benchmark = not deterministic
    cuda = torch.cuda.is_available()
    if cuda:
        local_rank = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else 0
        if local_rank >= torch.cuda.device_count():
            raise config_error(
                f"torchrun --nproc-per-node: process {local_rank + 1} on a machine of {torch.cuda.device_count()} GPUs; "
                "start at most one process per GPU"
            )
        torch.cuda.set_device(local_rank)
    if all(name in os.environ for name in TORCHRUN):
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    except UserError as error:
        error.met_by_all = False  # what all ranks meet together, first_rank_does and all_ranks_do share out
        raise
    except RuntimeError as error:
        if dist.get_world_size() == 1 or not LOST_PROCESS.search(str(error)):
            raise
        lost = data_error(f"process {dist.get_rank()}: another process of the group ended; its own message says why")
        lost.met_by_all = False
        raise lost from error
    finally:
        dist.destroy_process_group()


def met_by_all(error: UserError) -> UserError:
    """An error that every rank of the group meets at this very place, worded on the first rank only."""
    return error if dist.get_rank() == 0 else UserError(error.exit_code, [])


def all_ranks_do(work: Callable[[], Item]) -> Item:
    """Let every rank work and give each its result; a user error on any rank ends them all, each line printed once."""
    result: list[Item] = []
    error: UserError | None = None
    try:
        result.append(work())
    except UserError as caught:
        error = caught
    errors = [found for found in gather_objects(error) if found is not None]
    if errors:
        problems = list(dict.fromkeys(problem for found in errors for problem in found.problems))
        raise met_by_all(UserError(errors[0].exit_code, problems))
    return result[0]


def first_rank_does(work: Callable[[], None]) -> None:
    """Let the first rank work while the others wait; a user error there ends every rank, and is printed once."""
    all_ranks_do(lambda: work() if dist.get_rank() == 0 else None)


def check_same_step(step: int, folder: Path) -> None:
    """Every process must continue a run at the same step: its folder lies on a disk that all machines share."""
    steps = gather_objects(step)
    if len(set(steps)) > 1:
        raise met_by_all(
            config_error(
                f"run.root: the processes would continue {folder} at the steps {steps}; "
                "give a folder on a disk that all machines share"
            )
        )


def inference_device() -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


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


def gather_objects(item: Item) -> list[Item]:
    """Every rank's item, in rank order, on every rank (pickled between the group's own processes)."""
    items = [item] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items
