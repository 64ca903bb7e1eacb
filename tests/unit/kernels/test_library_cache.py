"""The cache of built libraries: only what this user built, and as it was built, is loaded."""

import ctypes
import os
import pwd
import shutil
import stat

import pytest

from mixtral_ms.kernels.native import build, library_cache

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
built = build.built_library.__wrapped__
SOURCE = 'extern "C" int answer() { return 42; }\n'
AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="needs root: another user's file")
NOBODY = 65534


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A library's sources, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(SOURCE)
    return folder


CONTENT = b"\x7fELF as it was built" * 999


@pytest.fixture
def builds(monkeypatch):
    """How often something was built; what is built and loaded is no library."""
    times = []

    def compile_(compiler, sources, path):
        times.append(path)
        with library_cache.new_library(path) as aside:
            aside.write_bytes(CONTENT)

    monkeypatch.setattr(build, "_compile", compile_)
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: None)
    return times


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_link(path):
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "100 bytes": lambda path: os.truncate(path, 100),
    "a page": lambda path: os.truncate(path, 4096),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a flipped bit": flip,
    "another": lambda path: path.write_bytes(b"\x7fELF no library"),
    "gone": os.unlink,
    "a link": replace_by_link,
    "writable by all": lambda path: path.chmod(0o777),
    "no hash": lambda path: path.with_name(path.name + ".sha256").unlink(),
    "another hash": lambda path: path.with_name(path.name + ".sha256").write_text("0" * 64),
    "no text as hash": lambda path: path.with_name(path.name + ".sha256").write_bytes(b"\xff"),
    "nobody's": pytest.param(lambda path: os.chown(path, NOBODY, NOBODY), marks=AS_ROOT),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_not_as_it_was_built_is_built_again(sources, builds, damage):
    path = built("answer", sources)
    assert built("answer", sources) == path
    assert len(builds) == 1
    damage(path)
    assert built("answer", sources) == path
    assert len(builds) == 2
    assert path.read_bytes() == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert path.stat().st_uid == os.getuid()


def test_a_library_is_compiled_and_loaded(sources):
    path = built("answer", sources)
    assert ctypes.CDLL(str(path)).answer() == 42
    assert library_cache.is_whole(path)


def test_the_folder_is_private(sources, builds):
    path = built("answer", sources)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.parent.chmod(0o777)
    assert built("answer", sources) == path
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_link_in_place_of_the_lock_is_not_followed(sources, tmp_path, builds, caplog_of):
    path = built("answer", sources)
    mine = tmp_path / "mine"
    mine.write_text("mine")
    lock = path.with_suffix(".lock")
    lock.unlink()
    lock.symlink_to(mine)
    assert built("answer", sources) is None
    assert mine.read_text() == "mine"
    assert "C++ kernels are off, numpy serves: " in caplog_of()


@pytest.fixture
def caplog_of(capsys):
    """What was logged so far."""
    return lambda: capsys.readouterr().err


def others_folder(cache, monkeypatch):
    (cache / "mixtral_ms").mkdir(parents=True)
    os.chown(cache / "mixtral_ms", NOBODY, NOBODY)


def others_base(cache, monkeypatch):
    cache.mkdir()
    os.chown(cache, NOBODY, NOBODY)


def open_base(cache, monkeypatch):
    cache.mkdir()
    cache.chmod(0o777)


def linked(cache, monkeypatch):
    (cache / "elsewhere").mkdir(parents=True)
    (cache / "mixtral_ms").symlink_to("elsewhere")


def a_file(cache, monkeypatch):
    cache.write_text("mine")


def no_home(cache, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)


def empty_home(cache, monkeypatch):
    no_home(cache, monkeypatch)
    monkeypatch.setenv("HOME", "")


@pytest.mark.parametrize(
    ("arrange", "why"),
    [
        pytest.param(others_folder, "mixtral_ms belongs to another user", marks=AS_ROOT),
        pytest.param(others_base, "cache belongs to another user", marks=AS_ROOT),
        (open_base, "cache is writable by all: set XDG_CACHE_HOME"),
        (linked, "mixtral_ms is a link"),
        (a_file, "cache"),
        (no_home, "there is no home folder to keep them in: set HOME or XDG_CACHE_HOME"),
        (empty_home, "there is no home folder"),
    ],
)
def test_without_a_safe_folder_numpy_serves(
    sources, tmp_path, monkeypatch, builds, caplog_of, arrange, why
):
    arrange(tmp_path / "cache", monkeypatch)
    assert built("answer", sources) is None
    said = caplog_of()
    assert "C++ kernels are off, numpy serves: " in said
    assert why in said
    assert builds == []


@pytest.mark.parametrize("home", ["", None])
def test_a_home_that_is_not_set_is_the_accounts(monkeypatch, tmp_path, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    account = pwd.struct_passwd(("me", "x", os.getuid(), 0, "", str(tmp_path), "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: account)
    assert library_cache.private_folder() == tmp_path / ".cache" / "mixtral_ms"


def test_a_cache_folder_that_is_not_absolute_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert library_cache.private_folder() == tmp_path / ".cache" / "mixtral_ms"
