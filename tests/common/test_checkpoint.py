"""Checkpoints: whole or absent, no pickle executed, foreign weights named; the average's formula."""

import copy
import os
import pickle
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from torch import nn

from common.checkpoint import load_checkpoint, load_optimizer, load_weights, save_checkpoint, update_average
from common.files import write_atomically
from tests.common.test_files import data_error_that_names


class TouchesAFile:
    """A pickle that runs code when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.marker,)


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def network(seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model[1].running_mean.normal_(generator=generator)
        model[1].num_batches_tracked += seed
    return model


def test_a_disk_that_fills_up_while_torch_saves_keeps_the_old_checkpoint_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint({"kind": "a", "step": 1}, path)
    with small_disk(1 << 16), data_error_that_names(path) as told:
        save_checkpoint({"kind": "a", "step": 2, "weights": torch.zeros(1 << 18)}, path)
    assert "File too large" in told[0], "not torch's own words for it"
    assert load_checkpoint(path, "a", {})["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint({"kind": "a", "step": 1}, path)

    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        file.flush()
        os._exit(9)

    child = os.fork()
    if child == 0:
        write_atomically(path, write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert load_checkpoint(path, "a", {})["step"] == 1
    save_checkpoint({"kind": "a", "step": 2}, path)  # what the dead process left is in nobody's way
    assert load_checkpoint(path, "a", {})["step"] == 2


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = network(1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    state = {
        "kind": "a",
        "step": 7,
        "best": float("nan"),
        "config": "x: 1\n",
        "records": [{"step": 1, "loss": 0.1}],
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    save_checkpoint(state, tmp_path / "a.pt")
    again = load_checkpoint(tmp_path / "a.pt", "a", {})
    assert np.isnan(again["best"])
    for name in ("kind", "step", "config", "records"):
        assert again[name] == state[name]
    assert torch.equal(again["half"].view(torch.int16), state["half"].view(torch.int16))  # type: ignore[attr-defined]
    assert all(torch.equal(again["model"][name], value) for name, value in model.state_dict().items())
    fresh = torch.optim.AdamW(copy.deepcopy(model).parameters())
    fresh.load_state_dict(again["optimizer"])
    for moments, own in zip(fresh.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(moments[name], own[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("container", ["zip", "bare"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, container: str) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    state = {"kind": "a", "weights": TouchesAFile(marker)}
    torch.save(state, path) if container == "zip" else path.write_bytes(pickle.dumps(state, 2))
    with data_error_that_names(path) as told:
        load_checkpoint(path, "a", {})
    assert "not a checkpoint of plain tensors" in told[0]
    assert not marker.exists()
    if container == "zip":
        torch.load(path, weights_only=False)
        assert marker.exists(), "it would have run elsewhere"


def test_a_truncated_file_is_a_data_error_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint({"kind": "a", "weights": torch.arange(300.0), "config": "x"}, path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 1, 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with data_error_that_names(path):
            load_checkpoint(path, "a", {})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"\0" * 500, b"step,loss\n1,2\n" * 50, bytes(range(256)) * 8, b"PK\3\4"])
def test_any_other_file_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with data_error_that_names(path):
        load_checkpoint(path, "a", {})


def test_absent_files_and_folders_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pt", tmp_path):
        with data_error_that_names(path) as told:
            load_checkpoint(path, "a", {})
        assert ("is a folder" if path.is_dir() else "no such checkpoint") in told[0]


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"kind": "ct_retrieval"}, "ct_retrieval"),
        ({"step": 3}, "something else"),
        ([1], "something else"),
        (3, "something else"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path, state: Any, found: str) -> None:
    path = tmp_path / "a.pt"
    torch.save(state, path)
    with data_error_that_names(path) as told:
        load_checkpoint(path, "motor_detection", {})
    assert f"expected a checkpoint of motor_detection, found {found};" in told[0]


def test_matching_weights_are_loaded(tmp_path: Path) -> None:
    model, other = network(0), network(1)
    load_weights(model, other.state_dict(), tmp_path / "a.pt")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_foreign_weights_are_refused_with_the_differences(tmp_path: Path) -> None:
    model, weights = network(0), network(1).state_dict()
    before = copy.deepcopy(model.state_dict())
    del weights["0.bias"]
    weights |= {f"head.{n}": torch.zeros(1) for n in range(4)} | {"2.weight": torch.zeros(2, 5)}
    with data_error_that_names(tmp_path / "a.pt") as told:
        load_weights(model, weights, tmp_path / "a.pt")
    assert "lacks 0.bias (1 in all)" in told[0]
    assert "holds unknown head.0, head.1, head.2 (4 in all)" in told[0]
    assert "has other shapes 2.weight (2, 5) for (2, 4) (1 in all)" in told[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_real_differences_are_named(tmp_path: Path) -> None:
    weights = network(1).state_dict()
    weights["2.bias"] = torch.zeros(7)
    with data_error_that_names(tmp_path / "a.pt") as told:
        load_weights(network(0), weights, tmp_path / "a.pt")
    assert not re.search("lacks|unknown", told[0])


@pytest.mark.parametrize(
    ("step", "decay", "used"), [(0, 0.999, 0.1), (8, 0.999, 0.5), (90, 0.5, 0.5), (10**6, 0.9, 0.9)]
)
def test_one_move_of_the_average(step: int, decay: float, used: float) -> None:
    average, model = network(0), network(5)
    before = [parameter.detach().clone() for parameter in average.parameters()]
    update_average(average, model, decay, step)
    for a, old, w in zip(average.parameters(), before, model.parameters(), strict=True):
        torch.testing.assert_close(a, used * old + (1 - used) * w, rtol=1e-6, atol=1e-6)
    for a, w in zip(average.buffers(), model.buffers(), strict=True):
        assert torch.equal(a, w), "batch norm's figures and counts are copied"


def test_the_average_of_a_run_is_the_formula_applied_step_by_step() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    average = copy.deepcopy(model).requires_grad_(False)
    expected = model.weight.item()
    for step in range(200):
        with torch.no_grad():
            model.weight.fill_(np.sin(step))
        update_average(average, model, 0.95, step)
        decay = min(0.95, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * np.sin(step)
    assert average.weight.item() == pytest.approx(expected, abs=1e-12)
    assert model.weight.item() == np.sin(199), "the model itself is only read"


@pytest.mark.parametrize("state", [{"step": 1}, {"step": 1, "weights": [1.0]}, {"step": "1", "weights": {}}])
def test_a_checkpoint_that_lacks_entries_or_holds_odd_ones_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    save_checkpoint({"kind": "a"} | state, tmp_path / "a.pt")
    with data_error_that_names(tmp_path / "a.pt") as told:
        load_checkpoint(tmp_path / "a.pt", "a", {"step": int, "weights": dict})
    assert "lacks " + ("step" if state["step"] == "1" else "weights") in told[0]


def stepped(name: str, seed: int) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """A network of two groups of weights after two steps of an optimizer."""
    model = network(seed)
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() > 1) == decays], "name": kind}
        for kind, decays in (("weights", True), ("biases", False))
    ]
    made: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, lr=0.1) if name == "AdamW" else torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    )
    for _ in range(2):
        model(torch.ones(3, 3)).square().sum().backward()
        made.step()
        made.zero_grad()
    return model, made


MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}


@pytest.mark.parametrize("name", MOMENTS)
def test_an_optimizer_goes_on_where_it_was(name: str) -> None:
    model, optimizer = stepped(name, 1)
    again, other = copy.deepcopy(model), stepped(name, 2)[1]
    names = dict(zip(model.parameters(), again.parameters(), strict=True))
    for group in other.param_groups:
        group["params"] = [
            names[p] for own in optimizer.param_groups if own["name"] == group["name"] for p in own["params"]
        ]
    load_optimizer(other, copy.deepcopy(optimizer.state_dict()), MOMENTS[name])
    for one, stepping in ((model, optimizer), (again, other)):
        one(torch.ones(3, 3)).square().sum().backward()
        stepping.step()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", MOMENTS)
def test_an_optimizer_that_does_not_fit_is_a_value_error(name: str) -> None:
    whole = stepped(name, 1)[1].state_dict()
    moment = MOMENTS[name][-1]
    for damage in ("shape", "moment", "group", "state", "name"):
        spoiled = copy.deepcopy(whole)
        if damage == "shape":
            spoiled["state"][1][moment] = torch.zeros(7)
        elif damage == "moment":
            del spoiled["state"][1][moment]
        elif damage == "group":
            spoiled["param_groups"].pop()
        elif damage == "state":
            spoiled["state"] = {}
        else:
            spoiled["param_groups"][0]["name"] = "another"
        with pytest.raises((ValueError, KeyError)):
            load_optimizer(stepped(name, 2)[1], spoiled, MOMENTS[name])
    del whole["state"][0]["step" if name == "AdamW" else moment]
    with pytest.raises((ValueError, KeyError)):
        load_optimizer(stepped(name, 2)[1], whole, MOMENTS[name])
