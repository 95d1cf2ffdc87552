"""Files that are whole or absent: written beside, forced to disk, renamed; and texts read with an error that names them."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.errors import UserError, data_error


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file beside the target, force it to disk, rename: a reader finds the old file or the new.

    A full disk raises a data error (exit code 1) that names the file; what was finished before stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or f"the disk is full? {error}"  # numpy's have no number and no words
        raise data_error(f"{path}: cannot be written ({reason}); nothing finished before it is lost") from error
    finally:
        if partial.exists():
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_atomically(path, lambda file: file.write(text.encode()))


def read_text(path: Path) -> str:
    """A whole UTF-8 text file; a data error (exit code 1) names one that is missing or no text."""
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheet programs put a byte order mark in front
    except OSError as error:
        raise data_error(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise data_error(f"{path}: not a text file in UTF-8; it was damaged, or written by something else") from error


def file_digest(path: Path) -> str:
    """The first 16 hex digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextmanager
def parsing(path: Path, remedy: str) -> Iterator[None]:
    """Around the parsing of one file: whatever damage makes a library raise becomes a data error that names the file.

    Parsers meet damage in many ways (zip, YAML, CSV, numpy, Pillow raise over twenty types); hold nothing else inside.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = str(error).partition("\n")[0][:200]
        raise data_error(f"{path}: damaged or of another kind ({type(error).__name__}: {why}); {remedy}") from error
