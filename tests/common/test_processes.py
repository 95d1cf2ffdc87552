"""Workers do not outlive the process that started them, and say nothing at Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.processes import submit_all, worker_pool
from tests.common_runs import ROOT, environment, family

SLEEPERS = """
import time
from common.processes import submit_all, worker_pool
if __name__ == "__main__":
    with worker_pool(2) as pool:
        for future in submit_all(pool, time.sleep, [(600,), (600,)]):
            future.result()
"""


@pytest.mark.parametrize("asked", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(asked: signal.Signals, tmp_path: Path) -> None:
    """Killed, they do not stay behind; at Ctrl-C, which reaches all of them even while they start, they say nothing."""
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    command = [sys.executable, str(tmp_path / "sleepers.py")]
    world = environment() | {"PYTHONPATH": str(ROOT)}
    for moment in (0.0, 0.3, 3.0):
        child = subprocess.Popen(
            command, env=world, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background would ignore it
        )  # fmt: skip
        while len(family(child.pid)) < 4:  # the parent, two workers, and the process that tidies up after them
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(moment)
        members = family(child.pid) - {child.pid}
        os.kill(child.pid, asked) if asked == signal.SIGKILL else os.killpg(child.pid, asked)
        _, told = child.communicate(timeout=60)
        assert "Process Spawn" not in told and (asked == signal.SIGKILL or "KeyboardInterrupt" in told), told
        ends = time.monotonic() + 20
        while any(Path(f"/proc/{process}/cwd").exists() for process in members):
            assert time.monotonic() < ends, "workers outlive the process that started them"
            time.sleep(0.05)


def test_work_is_done_and_errors_come_back() -> None:
    with worker_pool(2) as pool:
        assert [future.result() for future in submit_all(pool, divmod, [(7, 2), (9, 4)])] == [(3, 1), (2, 1)]
    with pytest.raises(ZeroDivisionError), worker_pool(1) as pool:
        submit_all(pool, divmod, [(1, 0)])[0].result()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
