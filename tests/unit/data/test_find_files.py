"""Which files a pattern or a folder stands for: no file twice, none left out without a word."""

import logging
import os

import pytest

from mixtral_ms.data.readers.find_files import files_in_folder, find_inputs
from mixtral_ms.errors import UserError
from mixtral_ms.log import LOGGER_NAME, get_logger


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Files and everything that only looks like one."""
    monkeypatch.setattr(get_logger(), "propagate", True)
    for name in (
        "plain/a.txt", "plain/b.txt", "plain/c.md", "plain/.hidden.txt",
        "part/part1.txt", "part/part[1].txt", "brackets/part1.txt",
        "deep/one.txt", "deep/x/two.txt", "deep/x/y/three.txt", "deep/.git/no.txt",
        "linked/a.txt", "mixed/a.txt", "mixed/sub/b.txt",
        "literal/*.txt", "literal/other.txt", "pipe/a.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "deep/self").symlink_to("../deep")
    (tmp_path / "deep/x/up").symlink_to("..")
    (tmp_path / "deep/again").symlink_to("x")
    (tmp_path / "linked/dangling.txt").symlink_to("/nonexistent/blob")
    (tmp_path / "again").mkdir()
    (tmp_path / "again/a.txt").symlink_to("../plain/a.txt")
    (tmp_path / "again/b.txt").write_text("b")
    os.link(tmp_path / "again/b.txt", tmp_path / "again/c.txt")
    (tmp_path / "again/d.txt").symlink_to("b.txt")
    os.mkfifo(tmp_path / "pipe/b.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


FOUND = {
    "plain/*.txt": ("plain/a.txt plain/b.txt", ""),
    "plain/*": ("plain/a.txt plain/b.txt plain/c.md", ""),
    "plain/a.txt": ("plain/a.txt", ""),
    "{tree}/plain/[ab].txt": ("{tree}/plain/a.txt {tree}/plain/b.txt", ""),
    "~/plain/a.txt": ("{tree}/plain/a.txt", ""),
    "part/part[1].txt": ("part/part[1].txt", "exactly this name"),
    "part/part[[]1].txt": ("part/part[1].txt", ""),
    "brackets/part[1].txt": ("brackets/part1.txt", ""),
    "literal/*.txt": ("literal/*.txt", "exactly this name"),
    "mixed/*": ("mixed/a.txt", "not read: folders"),
    "mixed/**": ("mixed/a.txt mixed/sub/b.txt", ""),
    "mixed/**/b.txt": ("mixed/sub/b.txt", ""),
    "again/*.txt": ("again/a.txt again/b.txt", "again/d.txt is again/b.txt again, by a link"),
}


@pytest.mark.parametrize("pattern", FOUND)
def test_what_a_pattern_stands_for(tree, caplog, pattern):
    expected, said = (one.format(tree=tree) for one in FOUND[pattern])
    caplog.set_level(logging.INFO, LOGGER_NAME)
    found = find_inputs(pattern.format(tree=tree))
    assert " ".join(map(str, found)) == expected
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_links_to_parents_give_each_file_once(tree):
    for name in "abcdefgh":  # with two of them a walk that follows them never ends
        (tree / "deep" / name).symlink_to("../deep")
    for pattern, count in (("deep/**/*.txt", 3), ("**/three.txt", 1), (f"{tree}/deep/**", 3)):
        contents = [one.read_text() for one in find_inputs(pattern)]
        assert len(contents) == len(set(contents)) == count


REFUSED = {
    "linked/*.txt": "linked/dangling.txt: a symbolic link to /nonexistent/blob, which does not",
    "linked/dangling.txt": "a symbolic link to /nonexistent/blob",
    "pipe/*.txt": "pipe/b.txt: a named pipe",
    "pipe/b.txt": "a named pipe",
    "/dev/null": "a device, not a file",
    "plain": r"is a folder; name its files: 'plain/\*'",
    "deep/[x]": "is a folder",
    "plain/nothing*": r"'plain/nothing\*' matches no file .*quote a pattern",
    "plain/part[1].txt": r"matches no file .*a \[ itself is written \[\[\]",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_is_no_file_is_named(tree, pattern):
    with pytest.raises(UserError, match=REFUSED[pattern]):
        find_inputs(pattern)


def test_a_folder_is_read_without_silence(tree, caplog):
    folder = tree / "rows"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jsonl", "F.JSONL", "b.jsonl.gz", "e.txt", "g.jsonl.rows.jsonl", ".h.jsonl"):
        (folder / name).write_text(name)
    found = files_in_folder(folder, {".jsonl", ".json"})
    assert [one.name for one in found] == ["F.JSONL", "a.jsonl"]
    assert "b.jsonl.gz, e.txt, g.jsonl.rows.jsonl and 1 more" in caplog.text
    (folder / "d.jsonl").symlink_to("/nonexistent")
    with pytest.raises(UserError, match="d.jsonl: a symbolic link to /nonexistent"):
        files_in_folder(folder, {".jsonl"})
