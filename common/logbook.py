"""A run's folder: config, environment, metrics, progress."""

import csv
import importlib
import importlib.metadata
import importlib.util
import io
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import tqdm

from common.checkpoint import write_text
from common.config import as_yaml
from common.errors import config_error

Item = TypeVar("Item")
VERSIONED = ("torch", "numpy", "scipy", "pandas", "scikit-learn", "pillow")


def open_run(folder: Path, config: Any, identity: str, arguments: list[str]) -> None:
    """Make a run's folder with config.yaml and environment.json; an error where it holds another run.

    identity: YAML of the constants that shape the weights; it must equal that of the run begun in this folder.
    """
    recorded = folder / "identity.yaml"
    if recorded.exists() and recorded.read_text() != identity:
        theirs = recorded.read_text().splitlines()
        differs = next(
            (line.strip() for line in identity.splitlines() if line not in theirs), "another version's names"
        )
        raise config_error(
            f"run.name: {folder} holds a run of another config (here {differs}); choose another name, or --fresh"
        )
    write_text(recorded, identity)
    write_text(folder / "config.yaml", as_yaml(config))
    if not (folder / "environment.json").exists():
        write_text(folder / "environment.json", json.dumps(environment(arguments), indent=2) + "\n")


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


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.csv; empty cells are left out."""
    with path.open(newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def progress(items: Iterable[Item], description: str, total: int, shown: bool) -> "tqdm.tqdm[Item]":
    """A progress bar on a terminal, silence elsewhere (and on all ranks but the first: shown)."""
    return tqdm.tqdm(items, description, total, disable=not (shown and sys.stderr.isatty()), leave=False)


class Scalars:
    """TensorBoard's curves of a run, if tensorboard is installed; otherwise nothing."""

    def __init__(self, folder: Path, records: list[dict[str, float]]) -> None:
        self.writer: Any = None
        if importlib.util.find_spec("tensorboard") is None:
            return
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
        for record in records:
            self.add(record)

    def add(self, record: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in record.items():
                self.writer.add_scalar(name, value, record["step"])
