"""The commands in the READMEs name scripts, flags and constants that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import configure
from common.errors import UserError
from em_segmentation.config import BASE
from histo_mmnet.config import BREAKHIS
from motor_detection.config import KAGGLE

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted(ROOT.glob("*_*/README.md"))]
CONSTANTS = {"motor_detection": KAGGLE, "em_segmentation": BASE, "histo_mmnet": BREAKHIS, "data": KAGGLE}
HELP: dict[str, str] = {}


def commands() -> list[str]:
    """Every line of a fenced block, and every `python ...` in the text, that calls a script of the project."""
    found = []
    for readme in READMES:
        text = readme.read_text()
        lines = [line for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.splitlines()]
        lines += re.findall(r"`(python [^`]+)`", re.sub(r"```\n.*?```", "", text, flags=re.S))
        found += [line.split("#")[0].strip() for line in lines if re.search(r"(python|torchrun)\b.* \S+\.py", line)]
    return sorted(set(found))


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_a_command_names_what_exists(command: str) -> None:
    script = next(word for word in command.split() if word.endswith(".py"))
    assert (ROOT / script).exists(), f"{script} does not exist"
    if script not in HELP:
        done = subprocess.run(
            [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True
        )
        HELP[script] = done.stdout
    own = command.split(script, 1)[1]
    for flag in re.findall(r"(--[a-z-]+)", own):
        assert flag in HELP[script], f"{script} has no {flag}"
    for name in re.findall(r"\b([a-z]+\.[a-z_]+)=", own):
        with pytest.raises(UserError) as told:  # a section as a value is never right: only the name is judged
            configure(CONSTANTS[script.split("/")[0]], [], [f"{name}={{}}"])
        assert "no such constant" not in str(told.value), f"{name}: {told.value}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(readme: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", readme.read_text()):
        assert (readme.parent / target).exists(), f"{readme.name}: {target} does not exist"
