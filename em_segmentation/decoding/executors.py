"""Where the blocks of a pass are worked on: one after the other, in local processes, or by a dask cluster."""

import concurrent.futures
import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from tqdm import tqdm

from common.errors import config_error, data_error
from common.processes import submit_all, worker_pool

Work = Callable[[int], None]


class Executor(Protocol):
    """Does independent work on blocks, in any order and anywhere; the work leaves its results in files."""

    def map_blocks(self, name: str, work: Work, blocks: Sequence[int]) -> None:
        """Call work(block) for each block; the first error ends it. name: of the progress bar."""


class Serial:
    """One block after the other, in this process."""

    def map_blocks(self, name: str, work: Work, blocks: Sequence[int]) -> None:
        """See Executor."""
        for block in tqdm(blocks, desc=name, unit="block", disable=None):
            work(block)


class Processes:
    """A pool of local processes."""

    def __init__(self, pool: concurrent.futures.ProcessPoolExecutor) -> None:
        self.pool = pool

    def map_blocks(self, name: str, work: Work, blocks: Sequence[int]) -> None:
        """See Executor."""
        futures = submit_all(self.pool, work, [(block,) for block in blocks])
        done = concurrent.futures.as_completed(futures)
        try:
            for future in tqdm(done, total=len(futures), desc=name, unit="block", disable=None):
                future.result()
        finally:
            for future in futures:
                future.cancel()


class Dask:
    """The workers of a dask.distributed client; they must see the files of the volume and of the scratch folder."""

    def __init__(self, client: Any) -> None:  # distributed has no complete types
        self.client = client

    def map_blocks(self, name: str, work: Work, blocks: Sequence[int]) -> None:
        """See Executor."""
        futures = [self.client.submit(work, block, pure=False) for block in blocks]
        for future in tqdm(futures, desc=name, unit="block", disable=None):
            future.result()


@contextlib.contextmanager
def open_executor(kind: str, workers: int, address: str) -> Iterator[Executor]:
    """An executor: serial | processes | dask; workers: processes on this machine.

    address: of a running dask scheduler (tcp://host:port), or empty for a cluster of local processes. Raises a config
    error for an unknown kind and where dask is asked for but not installed.
    """
    if kind not in ("serial", "processes", "dask") or workers < 1:
        raise config_error(f"executor: {kind!r} with {workers} workers (expected serial | processes | dask, 1 or more)")
    if kind == "serial":
        yield Serial()
    elif kind == "processes":
        with worker_pool(workers) as pool:
            try:
                yield Processes(pool)
            except BrokenProcessPool as error:
                raise data_error(
                    "decoding.executor: a process died (out of memory?); what is finished is kept, and the same command "
                    "with smaller decoding.block_size or fewer decoding.workers continues"
                ) from error
    else:
        with _dask_client(workers, address) as client:
            yield Dask(client)


@contextlib.contextmanager
def _dask_client(workers: int, address: str) -> Iterator[Any]:
    try:
        distributed: Any = importlib.import_module("distributed")  # an extra, without complete types
    except ModuleNotFoundError as error:
        raise config_error("executor: dask needs the package distributed: pip install 'dask[distributed]'") from error
    if address:
        with distributed.Client(address) as client:
            yield client
        return
    with (
        distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client
