"""One writer per folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.lock import exclusive

ROOT = Path(__file__).resolve().parents[2]
HOLD = "import sys, time; from pathlib import Path; from common.lock import exclusive\n" \
       "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"  # fmt: skip


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another process is writing") as refused, exclusive(folder):
        pass
    assert str(folder) in refused.value.problems[0] and refused.value.exit_code == 2
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with exclusive(folder):
        assert not folder.exists(), "the lock lies beside the folder, not in it"


def test_a_file_in_the_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("no folder")
    with pytest.raises(UserError, match="is a file"), exclusive(tmp_path / "runs"):
        pass


def test_a_link_to_a_folder_is_that_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process"), exclusive(tmp_path / "b"):
            pass
    finally:
        child.kill()
        child.wait()
