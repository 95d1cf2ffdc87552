"""Files: whole or absent, forced to disk before they take their name; texts that name themselves when damaged."""

import errno
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from common.errors import BAD_DATA, UserError
from common.files import read_text, write_atomically, write_text


@contextmanager
def data_error_that_names(path: Path) -> Iterator[list[str]]:
    """Expects one problem in one line that begins with the path; its text is in the list afterwards."""
    told: list[str] = []
    with pytest.raises(UserError) as caught:
        yield told
    assert caught.value.exit_code == BAD_DATA
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: ")
    assert "\n" not in problem
    told.append(problem)


def test_a_new_folder_is_made_and_an_old_file_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "note.txt"
    write_text(path, "Å first\n")
    write_text(path, "second\n")
    assert path.read_bytes() == b"second\n"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("torch"),
        ValueError("x"),
        KeyboardInterrupt(),
        pickle.PicklingError("a lambda"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("existed", [True, False])
def test_a_writer_that_fails_half_way_leaves_what_was_there(
    tmp_path: Path, error: BaseException, existed: bool
) -> None:
    path = tmp_path / "state.pt"
    if existed:
        path.write_bytes(b"old")

    def write(file: IO[bytes]) -> None:
        file.write(b"half")
        raise error

    with pytest.raises((type(error), UserError)):
        write_atomically(path, write)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("state.pt", b"old")] * existed


def test_a_full_disk_is_a_data_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with data_error_that_names(tmp_path / "a.txt") as told:
        write_text(tmp_path / "a.txt", "text")
    assert "No space left on device" in told[0]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with data_error_that_names(tmp_path / "file" / "run" / "a.txt"):
        write_text(tmp_path / "file" / "run" / "a.txt", "text")


def test_bytes_are_forced_to_disk_before_the_file_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "a.txt", []
    path.write_text("old")

    def fsync(descriptor: int) -> None:
        seen.append((path.read_text(), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "newer")
    assert seen[0] == ("old", 5)


def test_a_reader_half_way_through_finishes_the_file_that_it_began(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old and long")
    with path.open("rb", buffering=0) as file:
        assert file.read(3) == b"old"
        write_text(path, "new")
        assert file.read() == b" and long"
    assert path.read_text() == "new"


def test_a_text_is_read_with_or_without_a_byte_order_mark_and_anything_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for content in (b"\xef\xbb\xbf\xc3\x85", b"\xc3\x85"):
        path.write_bytes(content)
        assert read_text(path) == "Å"
    path.write_bytes(b"\xff\xfe\x00")
    with data_error_that_names(path) as told:
        read_text(path)
    assert "not a text file in UTF-8" in told[0]
    for absent in (tmp_path / "absent", tmp_path, path / "inside"):
        with data_error_that_names(absent):
            read_text(absent)
