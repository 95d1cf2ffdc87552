"""Local worker processes that Ctrl-C does not reach and that do not outlive the process that started them."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of freshly started interpreters; give it work by `submit_all`.

    Whatever leaves the block as an error ends the workers at once: their work must be whole or absent.
    """
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        try:
            yield pool
        except BaseException:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def submit_all(
    pool: ProcessPoolExecutor, work: Callable[..., Result], arguments: Sequence[tuple[object, ...]]
) -> list[Future[Result]]:
    """Hand work(*arguments[i]) to the pool for every i.

    The pool starts its processes meanwhile; they inherit which signals are blocked, so Ctrl-C is for this process alone.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return [pool.submit(work, *given) for given in arguments]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """In a worker: end as soon as the process that started it has, even if that was killed and could say nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "Only workers have a parent to end with"

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
