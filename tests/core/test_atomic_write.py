"""A file is written whole or not at all: failures leave the old one, and nothing else."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from placer.core.atomic import write_atomically, write_text_atomically
from placer.core.errors import InputFileError, UsageError


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text("old")
    return path


def only(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def half_then(error: BaseException) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text("ha")
        raise error

    return write


def test_writes_and_replaces(target: Path) -> None:
    write_text_atomically(target, "newé")
    assert target.read_bytes() == "newé".encode()
    only(target.parent, "plan.json")


def test_a_new_file_has_the_mode_that_open_would_give(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text_atomically(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), UsageError("x"), SystemExit(3), MemoryError()])
def test_any_failure_leaves_the_old_file_and_no_other(error: BaseException, target: Path) -> None:
    with pytest.raises(type(error)):
        write_atomically(target, half_then(error))
    assert target.read_text() == "old"
    only(target.parent, "plan.json")


def test_a_full_disk_is_one_line(target: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(InputFileError, match=r"plan\.json: could not be written \(No space left on device\)"):
        write_atomically(target, half_then(full))
    assert target.read_text() == "old"
    only(target.parent, "plan.json")


def test_a_failing_rename_is_one_line(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, other: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InputFileError, match="Invalid cross-device link"):
        write_text_atomically(target, "new")
    monkeypatch.undo()
    assert target.read_text() == "old"
    only(target.parent, "plan.json")


def test_the_old_file_is_whole_while_the_new_one_is_written(target: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("new")
        assert target.read_text() == "old"
        assert path.parent == target.parent, "a rename over another file system is not atomic"

    write_atomically(target, write)
    assert target.read_text() == "new"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"nowhere/plan\.json: cannot write there .*create the folder first"):
        write_text_atomically(tmp_path / "nowhere" / "plan.json", "x")
    only(tmp_path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(InputFileError, match="is a folder; give the name of a file"):
        write_text_atomically(tmp_path / "plan.json", "x")
    only(tmp_path, "plan.json")


def test_a_file_in_the_place_of_the_folder(target: Path) -> None:
    with pytest.raises(InputFileError, match="cannot write there"):
        write_text_atomically(target / "inner.json", "x")
    assert target.read_text() == "old"


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """`-o /dev/null` as root would otherwise turn /dev/null into a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InputFileError, match="is a device or pipe"):
        write_text_atomically(pipe, "x")
    assert pipe.is_fifo()
    with pytest.raises(InputFileError, match="is a device or pipe"):
        write_text_atomically(Path(os.devnull), "x")
    assert not Path(os.devnull).is_file()
    only(tmp_path, "pipe")


def test_a_link_is_followed(tmp_path: Path, target: Path) -> None:
    link = tmp_path / "latest.json"
    link.symlink_to(target.name)
    write_text_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    only(tmp_path, "latest.json", "plan.json")


@pytest.mark.parametrize("length", [250, 255])
def test_long_names_that_the_file_system_takes(length: int, tmp_path: Path) -> None:
    write_text_atomically(tmp_path / ("x" * length), "new")
    only(tmp_path, "x" * length)


def test_names_that_it_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="File name too long"):
        write_text_atomically(tmp_path / ("x" * 256), "new")
    only(tmp_path)
