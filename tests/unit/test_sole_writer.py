"""One process writes to a place: the second is refused, and nothing is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_ms.errors import UserError
from mixtral_ms.files import sole_writer

HOLD = """
import sys, time
from pathlib import Path
from mixtral_ms.files import sole_writer
with sole_writer(Path(sys.argv[1]), "place"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def lock(tmp_path):
    return tmp_path / "new" / "deeper" / ".lock"


def test_a_second_one_is_refused_by_name_and_the_next_one_let_in(lock):
    with sole_writer(lock, "place: choose another"):
        who = rf"place: wait \(process {os.getpid()} on .+ writes there"
        with pytest.raises(UserError, match=who), sole_writer(lock, "place: wait"):
            pass
        assert lock.exists()
    with sole_writer(lock, "place"):
        pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_what_it_made_goes_unless_something_came_into_it(lock, kept, fails):
    try:
        with sole_writer(lock, "place"):
            if kept:
                (lock.parent / "result").write_text("")
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert not lock.exists()
    assert lock.parent.parent.exists() == kept


def test_a_killed_process_is_in_nobodys_way(lock):
    order = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(order, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on"), sole_writer(lock, "place"):
            pass
        holder.kill()
        holder.wait(30)
    assert lock.exists()
    with sole_writer(lock, "place"):
        pass
    assert not lock.exists()


def test_a_file_system_without_locks_is_said(lock, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with sole_writer(lock, "place"):
        pass
    assert f"{lock.parent} cannot be locked (Operation not supported)" in capsys.readouterr().err


def test_a_file_where_a_folder_should_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    lock = tmp_path / "file" / ".lock"
    with pytest.raises(UserError, match="file: cannot be written to"), sole_writer(lock, "place"):
        pass


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_a_folder_that_takes_no_files_is_an_error():
    with (
        pytest.raises(UserError, match="/proc: cannot be written to"),
        sole_writer(Path("/proc/.place.lock"), "place"),
    ):
        pass
