"""Records are the old or the new ones, whatever ends the process and at whichever write."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.records import SEQ, make

from mixtral_ms import file_sets, files
from mixtral_ms.data.mindrecord.reader import MindRecords
from mixtral_ms.data.mindrecord.writer import RecordWriter
from mixtral_ms.errors import BusyError, UserError
from mixtral_ms.file_sets import new_file_set, put_set_in_place
from mixtral_ms.files import asked_path

# What a set is written by, after its files: each of these may be the last thing a process does.
WRITES = ("fsync", "replace", "unlink", "chmod")
OLD, NEW = 7, 9


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders with the record `v`: of one file and of two, of old values and of new ones."""
    root = tmp_path_factory.mktemp("sets")
    for value in (OLD, NEW):
        for partitions in (1, 2):
            rows = np.full((5, SEQ + 1), value, np.int32)
            make(root / f"{value} in {partitions}" / "v", rows, partitions=partitions)
    return root


def values(folder):
    records = MindRecords(folder / "v", ["input_ids"])
    assert len(records) == 5
    return {int(one) for record in records.read(list(range(5))) for one in record[0]}


def replace_set(folder, source):
    """What a writer does when all is written: on copies, since MindSpore cannot be forked."""
    new = sorted((one.name for one in source.iterdir()), key=lambda one: one.endswith(".db"))
    old = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
    with new_file_set(folder / "v") as aside:
        for name in new:
            shutil.copy(source / name, aside / name)
        put_set_in_place(aside, new, old)


def killed_at(count, folder, source):
    """Replace a set in a process that ends before its `count`th write; whether it came to that."""
    child = os.fork()
    if child == 0:
        left = count

        def counted(real):
            def call(*arguments, **options):
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return real(*arguments, **options)

            return call

        for name in WRITES:
            setattr(os, name, counted(getattr(os, name)))
        try:
            replace_set(folder, source)
        except BaseException:  # noqa: BLE001 - the test's process must not go on twice
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1)])
def test_killed_at_any_write_old_or_new_is_whole(sets, tmp_path, monkeypatch, before, after):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # counted, but takes no time
    outcomes = []
    count = 1
    while True:
        folder = shutil.copytree(sets / f"{OLD} in {before}", tmp_path / str(count))
        killed = killed_at(count, folder, sets / f"{NEW} in {after}")
        outcomes.append(values(folder))
        if not killed:
            break
        # The next one finds nothing in its way, and leaves nothing.
        replace_set(folder, sets / f"{OLD} in {before}")
        assert sorted(os.listdir(folder)) == sorted(os.listdir(sets / f"{OLD} in {before}"))
        count += 1
    switch = outcomes.index({NEW})
    assert switch > 2
    assert outcomes == [{OLD}] * switch + [{NEW}] * (len(outcomes) - switch)


@pytest.mark.parametrize("operation", WRITES)
def test_an_error_at_any_write_leaves_old_or_new(sets, tmp_path, monkeypatch, operation):
    real = getattr(os, operation)
    calls = []

    def fails(*arguments, **options):
        calls.append(arguments)
        if len(calls) == count:
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(folder / "v"))
        return real(*arguments, **options)

    for count in range(1, 60):
        folder = shutil.copytree(sets / f"{OLD} in 2", tmp_path / str(count))
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, operation, fails)
            try:
                replace_set(folder, sets / f"{NEW} in 1")
            except OSError as error:
                assert asked_path(error.filename) == str(folder / "v")
        assert values(folder) in ({OLD}, {NEW})
        if len(calls) < count:
            break
    assert 1 < count < 59


def test_no_room_for_the_list_of_what_is_whole_leaves_the_old(sets, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = Path(shutil.copytree(sets / f"{OLD} in 1", tmp_path / "full"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left") as caught:
            replace_set(folder, sets / f"{NEW} in 1")
    assert asked_path(caught.value.filename) == str(folder / "v")
    assert values(folder) == {OLD}
    assert sorted(os.listdir(folder)) == ["v", "v.db"]


def test_two_writers_of_one_record(tmp_path):
    rows = np.ones((3, SEQ + 1), np.int32)
    with RecordWriter(tmp_path / "v") as first:
        first.write(input_ids=rows)
        second = RecordWriter(tmp_path / "v")
        with pytest.raises(BusyError, match=f"{tmp_path / 'v'}: wait for its writer"):
            second.__enter__()
    assert len(MindRecords(tmp_path / "v", ["input_ids"])) == 3


@pytest.mark.parametrize("beside", ["v", "v.db", "v.rows.jsonl"])
def test_what_came_while_records_were_written_is_kept(tmp_path, beside):
    writer = RecordWriter(tmp_path / "v", beside=(".rows.jsonl",))
    with pytest.raises(UserError, match=f"{beside} exists; give --overwrite"), writer:
        writer.write(input_ids=np.ones((3, SEQ + 1), np.int32))
        (tmp_path / beside).write_text("theirs")
    assert (tmp_path / beside).read_text() == "theirs"
    assert os.listdir(tmp_path) == [beside]


def test_what_belongs_to_records_goes_with_them(tmp_path):
    for text in ("rows", None):
        with RecordWriter(tmp_path / "v", overwrite=True, beside=(".rows.jsonl",)) as writer:
            writer.write(input_ids=np.ones((3, SEQ + 1), np.int32))
            if text:
                writer.beside(".rows.jsonl").write_text(text)
        names = {"v", "v.db"} | ({"v.rows.jsonl"} if text else set())
        assert set(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_records_have_the_mode_that_the_umask_leaves(tmp_path, mask):
    (tmp_path / ".v.writing").mkdir()
    (tmp_path / ".v.writing" / "lock").touch(0o640)  # of a killed writer
    before = os.umask(mask)
    try:
        make(tmp_path / "v", np.ones((3, SEQ + 1), np.int32))
    finally:
        os.umask(before)
    assert {one.stat().st_mode & 0o777 for one in tmp_path.iterdir()} == {0o666 & ~mask}


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path):
    """A limit on the size of files is what a full disk is to MindSpore."""
    import resource  # noqa: PLC0415

    make(tmp_path / "v", np.full((5, SEQ + 1), OLD, np.int32))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"bytes are free there\): '{tmp_path}/v'"):
            make(tmp_path / "v", np.full((5, SEQ + 1), NEW, np.int32), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert values(tmp_path) == {OLD}
    assert sorted(os.listdir(tmp_path)) == ["v", "v.db"]


def test_a_folder_that_cannot_be_is_named_and_not_the_hidden_one(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "v"
    with pytest.raises(UserError, match=rf"^{path}: cannot be written to: Not a directory$"):
        make(path, np.ones((3, SEQ + 1), np.int32))


def test_a_link_in_place_of_the_hidden_folder_is_not_followed(tmp_path):
    """Where everybody may write, somebody else may have put it there."""
    (tmp_path / "dear").mkdir()
    (tmp_path / "dear" / "whole").write_text("letters")
    (tmp_path / ".v.writing").symlink_to("dear")
    for use in (lambda: make(tmp_path / "v"), lambda: values(tmp_path)):
        with pytest.raises(UserError, match=r"\.v\.writing is a link"):
            use()
    assert os.listdir(tmp_path / "dear") == ["whole"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_hidden_folder_of_another_user_is_not_believed(tmp_path):
    """It says what is to be removed and what takes its place."""
    make(tmp_path / "v", np.full((5, SEQ + 1), OLD, np.int32))
    aside = tmp_path / ".v.writing"
    aside.mkdir()
    (aside / "whole").write_bytes(b"/v\0v.db")
    os.chown(aside, 65534, 65534)
    for use in (lambda: make(tmp_path / "v", overwrite=True), lambda: values(tmp_path)):
        with pytest.raises(UserError, match=r"\.v\.writing is another user's"):
            use()
    shutil.rmtree(aside)
    assert values(tmp_path) == {OLD}


def test_a_reader_without_permission_says_who_can_finish(sets, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(sets / f"{OLD} in 1", tmp_path / "of another"))

    def refuse(lock, refusal):
        raise UserError(f"{lock.parent}: cannot be written to: Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(file_sets, "_finish", lambda folder: None)
        replace_set(folder, sets / f"{NEW} in 1")
    monkeypatch.setattr(file_sets, "sole_writer", refuse)
    with pytest.raises(UserError, match=r"Permission denied; the writer of .* are whole in"):
        values(folder)


def test_a_reader_waits_for_a_writer_that_lives(sets, tmp_path, monkeypatch):
    """For as long as files are moved, and not for the next one that writes."""
    folder = Path(shutil.copytree(sets / f"{OLD} in 1", tmp_path / "busy"))
    real = files.sole_writer
    tries = []

    def sometimes(lock, refusal):
        tries.append(lock)
        if len(tries) < 3:
            raise BusyError(refusal)
        return real(lock, refusal)

    with monkeypatch.context() as patch:
        patch.setattr(file_sets, "_finish", lambda folder: None)
        replace_set(folder, sets / f"{NEW} in 1")
    monkeypatch.setattr(file_sets, "sole_writer", sometimes)
    assert values(folder) == {NEW}
    assert len(tries) == 3
