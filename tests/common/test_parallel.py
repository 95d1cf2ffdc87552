"""Groups of one in this process, and of two in processes of their own: what they exchange is the same on every rank."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.amp import GradScaler

from common.errors import BAD_DATA, WRONG_CALL, UserError, data_error
from common.parallel import (
    all_ranks_do,
    average_gradients,
    check_same_step,
    first_rank_does,
    gather_objects,
    process_group,
    sum_over_ranks,
)
from common.step import RunningStatistics, agree_on_step, guarded_update
from common.streams import micro_batches

RANKS = 2
NO_SCALER = GradScaler("cpu", enabled=False)


def gradients(rank: int) -> list[Tensor]:
    """What each rank finds for `small_model`; their mean is exact in float32."""
    return [torch.arange(6.0).view(2, 3) * (rank + 1), torch.tensor([float(rank), -8.0])]


def small_model(found: list[Tensor]) -> nn.Linear:
    """A linear layer of zeros, with gradients."""
    model = nn.Linear(3, 2)
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        nn.init.zeros_(parameter)
        parameter.grad = gradient.clone()
    return model


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def channels_last_model(rank: int) -> nn.Module:
    """A 3D network whose weights and gradients lie channels last, as on the way to fast convolutions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 3, 3), nn.Conv3d(3, 2, 3)).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    images = torch.randn(RANKS, 1, 2, 6, 6, 6)[rank].contiguous(memory_format=torch.channels_last_3d)
    model(images).square().mean().backward()
    return model  # type: ignore[no-any-return]


def train(rank: int, num_ranks: int, micro_batch_size: int) -> dict[str, Tensor]:
    """Five steps of a batch-normed network on batches of 8 given by their positions; its final state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2)).double()
    images = torch.randn(40, 4, dtype=torch.float64)
    optimizer, statistics = torch.optim.AdamW(model.parameters(), lr=0.1), RunningStatistics(model)
    rounds = 8 // (micro_batch_size * num_ranks)
    plan = micro_batches(0, 5, 8, micro_batch_size, rank, num_ranks)
    for _ in range(5):
        statistics.begin_step()
        for _ in range(rounds):
            (model(images[next(plan)]).square().mean() / rounds).backward()
            statistics.end_micro_batch()
        statistics.end_step(rounds * num_ranks)
        guarded_update(model, optimizer, NO_SCALER, 0.1)
    return model.state_dict()


def batch_norm_after_a_step(parts: list[Tensor], num_micro_batches: int) -> Tensor:
    """A batch norm's mean after a step of these micro-batches, of num_micro_batches over all ranks."""
    norm = nn.BatchNorm1d(2)
    statistics = RunningStatistics(norm)
    statistics.begin_step()
    for part in parts:
        norm(part)
        statistics.end_micro_batch()
    statistics.end_step(num_micro_batches)
    assert norm.running_mean is not None
    return norm.running_mean


def micro_batch(number: int) -> Tensor:
    return torch.arange(6.0).view(3, 2) * 10**number


def failure_of(model: nn.Module) -> str:
    """The name of the error with which an update ends, or nothing."""
    try:
        guarded_update(model, torch.optim.SGD(model.parameters(), lr=1.0), NO_SCALER, 1.0)
    except (UserError, AssertionError, RuntimeError) as error:
        return type(error).__name__
    return ""


def let_the_first_work(bad: bool) -> tuple[bool, int, list[str]]:
    """Whether this rank did the work, and the exit code and problems of the error it met, if any."""
    worked = []

    def work() -> None:
        worked.append(True)
        if bad:
            raise data_error("tomo_1: unreadable", "tomo_2: empty")

    try:
        first_rank_does(work)
    except UserError as error:
        return bool(worked), error.exit_code, error.problems
    return bool(worked), 0, []


def work_together(rank: int, bad: tuple[int, ...]) -> tuple[int, list[str]]:
    """This rank's result, or exit code and problems where the ranks `bad` meet a problem of their own and a shared one."""

    def work() -> int:
        if rank in bad:
            raise data_error("labels.csv: damaged", f"patch_{rank}: damaged")
        return 10 * rank

    try:
        return all_ranks_do(work), []
    except UserError as error:
        return error.exit_code, error.problems


def agreed(rank: int, losses: list[float], stop: bool) -> tuple[float, bool] | list[str]:
    """What agree_on_step says to a rank with these losses, or the problems it meets."""
    try:
        return agree_on_step(torch.tensor(losses), [f"{rank}.{n}" for n in range(len(losses))], stop)
    except UserError as error:
        return error.problems


def same_step(step: int) -> tuple[int, list[str]]:
    """Exit code and problems of check_same_step, 0 where there is none."""
    try:
        check_same_step(step, Path("runs/a"))
    except UserError as error:
        return error.exit_code, error.problems
    return 0, []


def meet(rank: int, port: int, folder: str) -> None:
    """One of two processes: every exchange once, with what came out saved for the tests below."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same on every machine
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with process_group(True):
        found["rank"] = (dist.get_rank(), dist.get_world_size())
        model = small_model(gradients(rank))
        average_gradients(model)
        found["averaged"] = gradients_of(model)

        opposed = small_model([torch.zeros(2, 3), torch.tensor([30.0, 0.0] if rank == 0 else [-10.0, 0.0])])
        norm = guarded_update(opposed, torch.optim.SGD(opposed.parameters(), lr=1.0), NO_SCALER, 1.0)
        found["clipped"] = (norm.item(), opposed.bias.tolist())

        values = torch.tensor([1.0 + rank, 10.0])
        found["in place"] = sum_over_ranks(values) is values
        found["summed"] = values
        found["gathered"] = gather_objects({"rank": rank, "rows": ["é"] * 1000 * rank})
        found["prepared"] = [let_the_first_work(False), let_the_first_work(True)]
        found["together"] = [work_together(rank, bad) for bad in ((), (1,), (0, 1))]
        found["statistics"] = batch_norm_after_a_step([micro_batch(2 * k + rank) for k in range(2)], 4)
        found["infinite on 1"] = failure_of(
            small_model([torch.full((2, 3), torch.inf if rank else 1.0), torch.ones(2)])
        )
        found["trained"] = train(rank, RANKS, 2)
        found["agreed"] = agreed(rank, [1.0, 2.0] if rank == 0 else [6.0], rank == 1)
        found["not finite"] = agreed(rank, [1.0] if rank == 0 else [2.0, torch.nan], False)
        found["same step"] = [same_step(7), same_step(7 + rank)]
        try:
            average_gradients(channels_last := channels_last_model(rank))
            found["channels last"] = gradients_of(channels_last)
        except RuntimeError as error:
            found["channels last"] = str(error)
    found["left"] = not dist.is_initialized()
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, by rank."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(meet, (port, str(folder)), RANKS)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_both_joined_one_group_and_left_it(two: list[dict[str, Any]]) -> None:
    assert [one["rank"] for one in two] == [(0, 2), (1, 2)]
    assert [one["left"] for one in two] == [True, True]


def test_gradients_are_averaged_on_both(two: list[dict[str, Any]]) -> None:
    for one in two:
        for found, parts in zip(one["averaged"], zip(*map(gradients, range(RANKS)), strict=True), strict=True):
            assert torch.equal(found, sum(parts) / RANKS)


def test_channels_last_gradients_are_averaged_and_stay_channels_last(two: list[dict[str, Any]]) -> None:
    alone = [gradients_of(channels_last_model(rank)) for rank in range(RANKS)]
    assert not alone[0][0].is_contiguous(), "the case is not the plain one"
    for one in two:
        assert isinstance(one["channels last"], list), one["channels last"]
        for found, first, second in zip(one["channels last"], *alone, strict=True):
            torch.testing.assert_close(found, (first + second) / 2)


def test_clipping_follows_the_average(two: list[dict[str, Any]]) -> None:
    """30 and -10 average to 10, clipped to 1; each clipped before, they would cancel."""
    for one in two:
        norm, bias = one["clipped"]
        assert norm == pytest.approx(10)
        assert bias == pytest.approx([-1, 0], rel=1e-5)


def test_sums_and_gathered_objects_are_the_same_on_both(two: list[dict[str, Any]]) -> None:
    for one in two:
        assert one["summed"].tolist() == [3, 20]
        assert one["in place"]
        assert one["gathered"] == [{"rank": 0, "rows": []}, {"rank": 1, "rows": ["é"] * 1000}]


def test_a_step_has_one_loss_and_one_answer_whether_to_stop(two: list[dict[str, Any]]) -> None:
    """The mean over samples, not over ranks; and whoever is asked to stop, all stop."""
    assert [one["agreed"] for one in two] == [(3.0, True), (3.0, True)]


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_the_first_names_it(two: list[dict[str, Any]]) -> None:
    (told,) = two[0]["not finite"]
    assert "the loss is not finite on 1.1;" in told and two[1]["not finite"] == []


def test_processes_that_would_continue_at_different_steps_are_told(two: list[dict[str, Any]]) -> None:
    assert [one["same step"][0] for one in two] == [(0, []), (0, [])]
    (code, (told,)), other = two[0]["same step"][1], two[1]["same step"][1]
    assert code == WRONG_CALL and "at the steps [7, 8]" in told and "all machines share" in told
    assert other == (WRONG_CALL, [])


def test_the_first_rank_works_alone_and_tells_its_problems_once(two: list[dict[str, Any]]) -> None:
    problems = ["tomo_1: unreadable", "tomo_2: empty"]
    assert two[0]["prepared"] == [(True, 0, []), (True, BAD_DATA, problems)]
    assert two[1]["prepared"] == [(False, 0, []), (False, BAD_DATA, [])], "it ends too, and has nothing to print"
    with process_group(False):
        assert [let_the_first_work(False), let_the_first_work(True)] == two[0]["prepared"]


def test_all_ranks_work_and_every_problem_is_told_once_by_the_first(two: list[dict[str, Any]]) -> None:
    """Also one that only the second met: the others would wait for it for ever."""
    of_one, of_both = (
        ["labels.csv: damaged", "patch_1: damaged"],
        ["labels.csv: damaged", "patch_0: damaged", "patch_1: damaged"],
    )
    assert two[0]["together"] == [(0, []), (BAD_DATA, of_one), (BAD_DATA, of_both)]
    assert two[1]["together"] == [(10, []), (BAD_DATA, []), (BAD_DATA, [])]


LOSE = """
import os, sys
sys.path[0] = sys.argv.pop(1)
from common.errors import data_error, run_script
from common.parallel import process_group, sum_over_ranks
import torch
def main(arguments):
    with process_group(True):
        sum_over_ranks(torch.ones(1))
        if os.environ["RANK"] == "1":
            raise data_error("patch_7: damaged")
        sum_over_ranks(torch.ones(1))
    return 0
run_script(main)
"""


def test_when_one_process_fails_alone_the_other_says_so_without_a_traceback() -> None:
    root = Path(__file__).resolve().parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(RANKS):
        where = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # fmt: skip
        command = [sys.executable, "-c", LOSE, str(root)]
        children.append(subprocess.Popen(command, env=os.environ | where, stderr=subprocess.PIPE, text=True))
    said = [child.communicate(timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [BAD_DATA] * RANKS
    assert said[1] == "error: patch_7: damaged\n"
    (line,) = [line for line in said[0].splitlines() if "error" in line.lower()]
    assert line == "error: process 0: another process of the group ended; its own message says why"
    assert "Traceback" not in said[0]


def test_running_statistics_are_the_mean_over_micro_batches_and_ranks(two: list[dict[str, Any]]) -> None:
    with process_group(False):
        alone = batch_norm_after_a_step([micro_batch(number) for number in range(4)], 4)
    torch.testing.assert_close(alone, 0.1 * torch.stack([micro_batch(n).mean(0) for n in range(4)]).mean(0))
    for one in two:
        torch.testing.assert_close(one["statistics"], alone)


def test_a_gradient_that_is_not_finite_on_one_rank_stops_both(two: list[dict[str, Any]]) -> None:
    assert [one["infinite on 1"] for one in two] == ["UserError"] * 2


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_more_processes_change_rounding_only(two: list[dict[str, Any]], micro_batch_size: int) -> None:
    with process_group(False):
        alone = train(0, 1, micro_batch_size)
    for name, value in alone.items():
        assert torch.equal(two[0]["trained"][name], two[1]["trained"][name])
        torch.testing.assert_close(two[0]["trained"][name], value, rtol=1e-9, atol=1e-9)


def test_a_group_of_one_changes_nothing() -> None:
    with process_group(False) as device:
        assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        model = small_model(gradients(1))
        average_gradients(model)
        assert all(torch.equal(a, b) for a, b in zip(gradients_of(model), gradients(1), strict=True))
        values = torch.tensor([1.0, 2.0])
        assert sum_over_ranks(values) is values
        assert values.tolist() == [1, 2]
        item = {"a": [1]}
        assert gather_objects(copy.deepcopy(item)) == [item]
    assert not dist.is_initialized()


def test_a_parameter_without_a_gradient_is_a_fault() -> None:
    with process_group(False), pytest.raises(AssertionError, match="Expected 2 gradients, got 0"):
        average_gradients(nn.Linear(2, 2))


def test_the_group_is_left_after_an_error_and_can_be_founded_again() -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), process_group(False):
            raise ZeroDivisionError
        assert not dist.is_initialized()


def test_deterministic_mode_is_what_the_config_says() -> None:
    try:
        for wanted in (True, False):
            with process_group(wanted):
                assert torch.are_deterministic_algorithms_enabled() == wanted
                assert torch.backends.cudnn.benchmark != wanted
    finally:
        torch.use_deterministic_algorithms(False)
