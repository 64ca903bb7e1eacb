"""Outputs of commands: one writer, whole or as they were, errors that name them."""

import errno
import os

import pytest

from mixtral_ms.data.mindrecord.writer import RecordWriter
from mixtral_ms.errors import BusyError, UserError
from mixtral_ms.files import new_file, write_aside


def test_a_new_file_is_there_when_the_block_ends(tmp_path):
    path = tmp_path / "made" / "out.json"
    with new_file(path, overwrite=False) as aside:
        aside.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["out.json"]


def test_what_was_there_stays_until_the_new_is_whole(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    with (
        pytest.raises(UserError, match="exists; give --overwrite"),
        new_file(path, overwrite=False),
    ):
        raise AssertionError("not refused")
    with pytest.raises(RuntimeError), new_file(path, overwrite=True) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with new_file(path, overwrite=True) as aside:
        aside.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.json"]


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "out.json"
    with (
        pytest.raises(UserError, match="exists; give --ov"),
        new_file(path, overwrite=False) as aside,
    ):
        aside.write_text("mine")
        path.write_text("theirs")
    assert path.read_text() == "theirs"


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / "out.json"
    with new_file(path, overwrite=True) as aside:
        with pytest.raises(BusyError, match=rf"{path}: wait .*process {os.getpid()} on"):
            new_file(path, overwrite=True).__enter__()
        aside.write_text("first")
    assert path.read_text() == "first"


def test_what_a_killed_writer_left_is_replaced(tmp_path):
    (tmp_path / ".out.json.writing").write_text("a long text that nobody finished")
    (tmp_path / ".out.json.lock").write_text("process 1 on elsewhere")
    written = new_file(tmp_path / "out.json", overwrite=False)
    with written as aside, open(aside, "a", encoding="utf-8") as file:
        file.write("short")
    assert (tmp_path / "out.json").read_text() == "short"
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize("write", [write_aside, lambda path: new_file(path, overwrite=True)])
@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (OSError(errno.EIO, "Input/output error"), False),
        (OSError(errno.ENOSPC, "No space left on device", "another"), False),
    ],
)
def test_a_full_disk_names_the_file_and_keeps_the_old(tmp_path, write, error, named):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match=error.strerror) as caught, write(tmp_path / "a") as aside:
        aside.write_text("new")
        raise error
    assert (caught.value.filename == str(tmp_path / "a")) == named
    assert [one.name for one in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a named pipe"),
        (os.mkdir, "a folder, not a file"),
        (lambda path: os.symlink("/dev/null", path), "a device"),
        (lambda path: os.symlink("nowhere", path), "a symbolic link to nowhere"),
    ],
)
@pytest.mark.parametrize("write", [new_file, RecordWriter])
def test_what_is_no_file_is_not_replaced(tmp_path, write, make, kind):
    path = tmp_path / "out"
    make(path)
    before = os.lstat(path)
    with (
        pytest.raises(UserError, match=rf"out.* is a folder|out: {kind}"),
        write(path, overwrite=True),
    ):
        pass
    assert os.lstat(path) == before
