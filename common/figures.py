"""Pictures written whole or not at all."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.files import write_atomically


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically, and free it."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110, bbox_inches="tight"))
    plt.close(figure)
