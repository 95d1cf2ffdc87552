"""Ctrl-C and a cluster's SIGTERM as a request that a loop grants between two steps, with a clean checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """asked: whether somebody wants the work to end."""

    def __init__(self) -> None:
        self.asked = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal handler. The second signal does not wait for the end of a step."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within it SIGINT and SIGTERM only set `asked`; a signal that the caller ignores stays ignored."""
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, request.note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not Python's own
                signal.signal(number, handler)


def ignore_interrupts(worker: int) -> None:
    """For processes that read for a loop: Ctrl-C reaches them too, but the loop decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
