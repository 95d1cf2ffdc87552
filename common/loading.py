"""Batches from a loader whose items may be errors."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from common.errors import UserError, data_error

Batch = TypeVar("Batch")


@contextmanager
def lost_readers_told(workers_key: str) -> Iterator[None]:
    """Where a reading process dies, a data error says so in one line.

    torch tells of it wherever the main process is at that moment, so this belongs around the whole loop as well.
    workers_key: the constant that says how many processes read.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise data_error(
            f"{workers_key}: a reading process died (out of memory?); the same command with fewer workers continues"
        ) from error


def next_batch(loader: Iterable[Batch | UserError], workers_key: str) -> Iterator[Batch]:
    """The batches of a loader. Errors come as items, because a worker process would wrap what it raises in a traceback.

    workers_key: the constant that says how many processes read, for the error that tells of a dead one.
    """
    with lost_readers_told(workers_key):
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
