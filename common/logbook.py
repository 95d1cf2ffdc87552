"""A run's folder: config, environment, metrics, progress."""

import csv
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import tqdm

from common.config import as_yaml
from common.errors import config_error, data_error
from common.files import parsing, read_text, write_text

Item = TypeVar("Item")
VERSIONED = ("torch", "numpy", "scipy", "pandas", "scikit-learn", "pillow")


def open_run(folder: Path, config: Any, identity: str, arguments: list[str]) -> None:
    """Make a run's folder with config.yaml and environment.json; an error where it holds another run.

    identity: YAML of the constants that shape the weights; it must equal that of the run begun in this folder.
    A run continued on another machine, device or library version says so, and notes it in environment.json.
    """
    recorded = folder / "identity.yaml"
    if recorded.exists() and read_text(recorded) != identity:
        theirs = read_text(recorded)
        if not theirs.strip():
            raise data_error(f"{recorded}: is empty; it was damaged. Delete it if this folder is the run you mean")
        raise config_error(
            f"run.name: {folder} holds a run of another config ({first_difference(identity, theirs)}); "
            "choose another name, or --fresh"
        )
    write_text(recorded, identity)
    write_text(folder / "config.yaml", as_yaml(config))
    note_environment(folder / "environment.json", environment(arguments))


def first_difference(here: str, there: str) -> str:
    """The first constant in which two identities differ, as words: section.name: value here, another there."""
    ours, theirs = constants_of(here), constants_of(there)
    for name, value in ours.items():
        if name not in theirs:
            return f"{name}: {value} here, unknown there"
        if theirs[name] != value:
            return f"{name}: {value} here, {theirs[name]} there"
    return "there are constants of another version"


def constants_of(identity: str) -> dict[str, str]:
    """section.name -> value of an identity: sections of YAML, each under a line of its own; lists may take many lines."""
    lines = identity.splitlines()
    constants: dict[str, str] = {}
    section = name = ""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        key, _, value = line.partition(":")
        if line[:1] in ("-", " "):
            constants[name] = f"{constants[name]} {line.strip()}".strip()
        elif value or following[:1] in ("-", " "):
            name = f"{section}.{key}" if section else key
            constants[name] = value.strip()
        else:
            section = key
    return constants


def clear_run(folder: Path) -> None:
    """Delete a run's folder, and nothing that is not one."""
    if not folder.exists():
        return
    if not (folder / "config.yaml").exists():
        raise config_error(f"--fresh: {folder} is not a run's folder (no config.yaml in it); nothing was deleted")
    shutil.rmtree(folder)


def note_environment(path: Path, now: dict[str, Any]) -> None:
    """Write where a run began; later, add where it continued if that may change bits."""
    with parsing(path, "delete it, and it is written anew"):
        began: dict[str, Any] = json.loads(read_text(path)) if path.exists() else now | {"continued_on": []}
        later: list[dict[str, Any]] = list(began["continued_on"])
        last = later[-1] if later else began
        changed = [name for name in ("commit", "device", "processes", "versions") if last[name] != now[name]]
    if changed:
        print(f"warning: {path.parent} ran with another {' and '.join(changed)} before; bits may differ from here on")
        began["continued_on"] = [*later, now]
    write_text(path, json.dumps(began, indent=2) + "\n")


def environment(arguments: list[str]) -> dict[str, Any]:
    """Versions, commit, device and command: what else it takes to repeat a run."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ) if shutil.which("git") is not None else None  # fmt: skip
    cuda = torch.cuda.is_available()
    return {
        "command": " ".join(arguments),
        "commit": git.stdout.strip() if git is not None and git.returncode == 0 else "unknown",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processes": int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else 1,
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads",
        "versions": {name: importlib.metadata.version(name) for name in VERSIONED},
    }


def write_metrics(path: Path, records: list[dict[str, float]]) -> None:
    """One row per record; columns in order of first appearance, empty where a record has no such value."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


def read_metrics(path: Path, wanted: tuple[str, ...]) -> list[dict[str, float]]:
    """The records of a metrics.csv; empty cells are left out.

    A data error names a file that is missing or damaged, or in which one of the wanted figures never appears.
    """
    with parsing(path, "training the run to its end writes it anew"):
        rows = list(csv.DictReader(io.StringIO(read_text(path))))
        records = [{name: float(cell) for name, cell in row.items() if cell} for row in rows]
    missing = [name for name in wanted if not any(name in record for record in records)]
    if missing:
        raise data_error(f"{path}: holds no {', '.join(missing)}; training the run to its end writes it anew")
    return records


def progress(items: Iterable[Item], description: str, total: int, shown: bool) -> "tqdm.tqdm[Item]":
    """A progress bar on a terminal, silence elsewhere (and on all ranks but the first: shown)."""
    return tqdm.tqdm(items, description, total, disable=not (shown and sys.stderr.isatty()), leave=False)


class Scalars:
    """TensorBoard's curves of a run, if tensorboard is installed; otherwise nothing."""

    def __init__(self, folder: Path, step: int) -> None:
        """step: where the run begins or continues; curves beyond it, of a killed run, are dropped."""
        self.writer: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self.writer = writer(str(folder), purge_step=step + 1)

    def add(self, record: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in record.items():
                self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Without it the last minutes stay in memory."""
        if self.writer is not None:
            self.writer.close()
