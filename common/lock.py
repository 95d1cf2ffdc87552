"""One writer per folder: a second process is told so instead of spoiling the first one's files."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import config_error, data_error


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a lock beside a folder; a config error where another process holds it. The system frees it on any exit.

    Children do not inherit it (lockf, not flock), so a killed run's last loader worker keeps nobody waiting.
    """
    folder = folder.resolve()  # a link to a folder is that folder
    if folder.exists() and not folder.is_dir():
        raise config_error(f"{folder}: is a file (expected a folder, or a new name)")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = (folder.parent / f".{folder.name}.lock").open("w")
    except OSError as error:
        raise data_error(f"{folder}: cannot be written ({error.strerror}); name a folder on a writable disk") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise config_error(
                f"{folder}: another process is writing there; wait for it, or name another folder"
            ) from error
        yield
