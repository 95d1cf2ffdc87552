"""What the tests of several tasks do with entry scripts: start them, kill them, compare what they leave behind."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import as_yaml
from common.errors import run_script

ROOT = Path(__file__).resolve().parents[1]
Main = Callable[[list[str]], int]


def script_command(script: Path, preset: str, config: Any, folder: Path, processes: int, words: list[str]) -> list[str]:
    """The command line of an entry script under a config, written into a folder; 0 processes: without torchrun."""
    written = folder / f"{script.name}.yaml"
    written.write_text(as_yaml(config))
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, str(script), "--preset", preset, "--config", str(written), *words]


def run_command(command: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run to the end; from a folder that is not the repository, on one thread."""
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment(), check=False)


def run_as_a_user(folder: Path, *words: str) -> None:
    """One script (a path within the repository, then its words) from a folder, with as many threads as a user's."""
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=clean, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def said(main: Main, words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, list[str]]:
    """Exit code, output and error lines of a script's main; no traceback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *words])
        with pytest.raises(SystemExit) as left:
            run_script(main)
    printed = capsys.readouterr()
    return left.value.code, printed.out, [line for line in printed.err.splitlines() if line.startswith("error: ")]


def family(ancestor: int) -> set[int]:
    """A process and all its living descendants; torchrun gives its workers sessions of their own."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    members = {ancestor}
    while more := {child for child, parent in parents.items() if parent in members} - members:
        members |= more
    return members & (parents.keys() | {ancestor})


def kill_at_random(command: list[str], folder: Path, dice: random.Random, longest: float) -> bool:
    """kill -9 every process of a run at most `longest` seconds after it opened its folder; False where it had finished."""
    before = (folder / "config.yaml").stat().st_mtime_ns if (folder / "config.yaml").exists() else 0
    child = subprocess.Popen(command, cwd="/", env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "config.yaml").exists() or (folder / "config.yaml").stat().st_mtime_ns == before:
        assert child.poll() is None, "it ended before it opened its folder"
        time.sleep(0.01)
    time.sleep(dice.uniform(0.0, longest))
    if child.poll() is not None:
        return False
    members = family(child.pid)
    for process in members:
        os.kill(process, signal.SIGKILL)
    child.wait()
    while any(Path(f"/proc/{process}/cwd").exists() for process in members):
        time.sleep(0.02)
    return True


def stop_when_saved(command: list[str], folder: Path, asked: signal.Signals) -> None:
    """Ask a run to stop after its first checkpoint; check that it says one line, ends with 130 and leaves no process."""
    child = subprocess.Popen(
        command, cwd="/", env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background would ignore it
    )  # fmt: skip
    while not (folder / "checkpoints/last.pt").exists():
        assert child.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.01)
    members = family(child.pid)
    if asked == signal.SIGINT:
        os.killpg(child.pid, asked)  # as a terminal does, to all of the group
    else:
        child.send_signal(asked)  # as a cluster does
    _, told = child.communicate(timeout=60)
    assert child.returncode == 130 and "Traceback" not in told, told
    assert told.splitlines()[-1].startswith("interrupted")
    assert not [process for process in members if Path(f"/proc/{process}/cwd").exists()]


def killed_until_complete(
    command: list[str], folder: Path, dice: random.Random, kills: int, longest: float
) -> list[int]:
    """Kill a run so many times at random moments, then let it end; the steps that last.pt was at after each kill."""
    steps = []
    last = folder / "checkpoints" / "last.pt"
    for _ in range(kills):
        if not kill_at_random(command, folder, dice, longest):
            break
        steps.append(torch.load(last, weights_only=True)["step"] if last.exists() else 0)
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    print(f"\nkilled when the last checkpoint was of step {steps}")
    return steps


def differing(one: Any, other: Any, path: str) -> list[str]:
    """Paths inside two nested states whose values differ in any bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys(), f"{path}: {one.keys() ^ other.keys()}"
        return [place for key in one for place in differing(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), f"{path}: {len(one)} and {len(other)}"
        return [place for i in range(len(one)) for place in differing(one[i], other[i], f"{path}/{i}")]
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    return [] if one == other or (one != one and other != other) else [path]  # NaN equals NaN here
