"""A run's folder: claimed by one identity, its table of figures exact, its progress silent off a terminal."""

import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from common import logbook
from common.errors import BAD_DATA, WRONG_CALL, UserError
from common.logbook import VERSIONED, Scalars, clear_run, environment, open_run, progress, read_metrics, write_metrics

IDENTITY = "train:\nseed: 1\nsteps: 10\nshape:\n- 1\n- - 2\n  - 3\nmodel:\nsteps: 4\n"


@dataclasses.dataclass(frozen=True)
class Constants:
    steps: int = 10
    root: Path = Path("runs")


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_new_run_records_its_config_and_environment(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    open_run(folder, Constants(), IDENTITY, ["train.py", "steps=10"])
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"steps": 10, "root": "runs"}
    assert json.loads((folder / "environment.json").read_text())["command"] == "train.py steps=10"


def test_the_same_run_continues_with_its_first_environment_and_its_latest_config(tmp_path: Path) -> None:
    open_run(tmp_path, Constants(), IDENTITY, ["first"])
    before = content(tmp_path)
    open_run(tmp_path, Constants(root=Path("elsewhere")), IDENTITY, ["second"])
    after = content(tmp_path)
    assert after["environment.json"] == before["environment.json"]
    assert "root: elsewhere" in after["config.yaml"]


def test_a_run_that_continues_elsewhere_says_so_once_and_notes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_run(tmp_path, Constants(), IDENTITY, ["first"])
    here = environment(["second"])
    monkeypatch.setattr(logbook, "environment", lambda arguments: here | {"device": "another", "command": "second"})
    for times in (1, 0):
        open_run(tmp_path, Constants(), IDENTITY, ["second"])
        said = capsys.readouterr().out
        assert said.count("ran with another device before; bits may differ") == times
    noted = json.loads((tmp_path / "environment.json").read_text())
    assert noted["command"] == "first" and [later["device"] for later in noted["continued_on"]] == ["another"]


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"{}", b"[1]", b'{"continued_on": 3}', b'{"continued_on": null}', b"[" * 10**5]
)
def test_a_damaged_environment_is_named(tmp_path: Path, content: bytes) -> None:
    open_run(tmp_path, Constants(), IDENTITY, ["first"])
    (tmp_path / "environment.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, Constants(), IDENTITY, ["second"])
    assert caught.value.exit_code == BAD_DATA
    assert str(tmp_path / "environment.json") in caught.value.problems[0]


def test_a_metrics_table_without_a_wanted_figure_is_named(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv", [{"step": 1, "loss": 0.5}])
    assert len(read_metrics(tmp_path / "metrics.csv", ("step", "loss"))) == 1
    with pytest.raises(UserError, match="metrics.csv: holds no soft_dice; training"):
        read_metrics(tmp_path / "metrics.csv", ("loss", "soft_dice"))


def test_an_empty_identity_is_damage_and_not_another_run(tmp_path: Path) -> None:
    open_run(tmp_path, Constants(), IDENTITY, ["first"])
    (tmp_path / "identity.yaml").write_text("")
    with pytest.raises(UserError, match=r"identity.yaml: is empty") as caught:
        open_run(tmp_path, Constants(), IDENTITY, ["second"])
    assert caught.value.exit_code == BAD_DATA


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b"step,loss\n1,much\n", b"step\n1,2,3\n"])
def test_a_damaged_metrics_table_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_metrics(tmp_path / "metrics.csv", ())
    assert caught.value.exit_code == BAD_DATA and str(tmp_path / "metrics.csv") in caught.value.problems[0]


@pytest.mark.parametrize(
    ("identity", "shown"),
    [
        (IDENTITY.replace("seed: 1", "seed: 2").replace("10", "11"), "train.seed: 2 here, 1 there"),
        (IDENTITY.replace("- 3", "- 9"), "train.shape: - 1 - - 2 - 9 here, - 1 - - 2 - 3 there"),
        (IDENTITY + "rate: 3\n", "model.rate: 3 here, unknown there"),
        (IDENTITY.replace("steps: 4", "steps: 5"), "model.steps: 5 here, 4 there"),
        ("train:\nseed: 1\n", "there are constants of another version"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_left_as_it_is(tmp_path: Path, identity: str, shown: str) -> None:
    open_run(tmp_path, Constants(), IDENTITY, ["first"])
    before = content(tmp_path)
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, Constants(steps=11), identity, ["second"])
    assert caught.value.exit_code == WRONG_CALL
    (problem,) = caught.value.problems
    assert problem.startswith(f"run.name: {tmp_path} holds a run of another config ({shown});")
    assert content(tmp_path) == before


def test_the_environment_names_what_it_takes_to_repeat_a_run() -> None:
    found = environment(["python", "train.py"])
    assert found.keys() == {"command", "commit", "python", "platform", "processes", "device", "versions"}
    assert found["command"] == "python train.py"
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.fullmatch(r"unknown|\S*[0-9a-f]{7,}\S*", found["commit"])
    assert found["versions"] == {name: importlib.metadata.version(name) for name in VERSIONED}
    assert json.loads(json.dumps(found)) == found


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert environment([])["commit"] == "unknown"


def test_metrics_come_back_as_they_were(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    records = [
        {"step": float(step), "loss": float(draw.normal() * 10.0 ** draw.integers(-300, 300))} for step in range(50)
    ]
    records += [{"step": 50.0, "f_beta": 0.1 + 0.2}, {"f_beta": math.inf, "best, of all": -0.0}]
    write_metrics(tmp_path / "metrics.csv", records)
    assert read_metrics(tmp_path / "metrics.csv", ()) == records
    assert math.copysign(1, read_metrics(tmp_path / "metrics.csv", ())[-1]["best, of all"]) == -1


def test_a_figure_that_is_not_a_number_stays_one(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv", [{"step": 1, "dice": math.nan}])
    (record,) = read_metrics(tmp_path / "metrics.csv", ())
    assert math.isnan(record["dice"])


def test_columns_stand_in_order_of_first_appearance_and_cells_may_be_empty(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.csv", [{"step": 1, "loss": np.float64(0.5)}, {"dice": 0.25, "step": 2}])
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,dice\n1,0.5,\n2,,0.25\n"
    write_metrics(tmp_path / "metrics.csv", [])
    assert read_metrics(tmp_path / "metrics.csv", ()) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "shown", "speaks"), [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)]
)
def test_progress_is_shown_on_a_terminal_only(
    stream: io.StringIO, shown: bool, speaks: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress(iter("abc"), "reading", 3, shown)) == ["a", "b", "c"]
    assert ("reading" in stream.getvalue()) == speaks
    assert speaks or stream.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_without_tensorboard_curves_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    scalars = Scalars(tmp_path, 1)
    scalars.add({"step": 2, "loss": 1.0})
    scalars.close()
    assert not list(tmp_path.iterdir())


def test_with_tensorboard_a_killed_and_continued_run_shows_one_curve(tmp_path: Path) -> None:
    """What the killed run logged beyond its last checkpoint is dropped; nothing waits in memory at the end."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for begin, values in ((0, (4.0, 3.0, 9.0)), (2, (2.0, 1.0))):
        scalars = Scalars(tmp_path, begin)
        for step, value in enumerate(values, start=begin + 1):
            scalars.add({"step": step, "loss": value})
        scalars.close()
        time.sleep(1.1)  # TensorBoard orders files by their second
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]


def test_a_run_is_cleared_and_nothing_that_is_none(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    clear_run(run)  # there is nothing yet
    open_run(run, Constants(), IDENTITY, ["train.py"])
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.pt").write_bytes(b"1")
    clear_run(run)
    assert not run.exists()
    other.mkdir()
    (other / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match=r"--fresh: .*other is not a run's folder .* nothing was deleted") as caught:
        clear_run(other)
    assert caught.value.exit_code == WRONG_CALL and (other / "thesis.tex").exists()
