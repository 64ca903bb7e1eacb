"""Damaged files of every kind: the right data, or an error that names the file; no other end.

A few dozen of them in every run, always the same; 500 of each kind with --long.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.fuzz_kinds import KINDS
from helpers.fuzz_worker import FuzzWorker
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

EVIL_BYTES = (
    *(b"\x00", b"\xff", b"\x80", b"\x7f" * 8, b"\xff" * 8, b"\x00" * 64, b"\xef\xbb\xbf"),
    *(b"[" * 3000, b"{" * 300, b"1e999", b"NaN", b"-1", b"9" * 5000, b'"\\ud83d"', b"\r\n"),
    *(b"null", b"true", b'""', b"{}", b"[]", b"../../etc/passwd", b"!!python/name:os.system ''"),
    *(b"\x80\x04\x95", b"cos\nsystem\n", b"&a [*a]", b"PK\x03\x04", b"\x1f\x8b", b"\xed\xa0\x80"),
)
EVIL_VALUES = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, -0.5, 1e308, float("nan")),
    *(float("inf"), "", "x", "\ud83d", "../../x", "/etc/passwd", "a" * 5000, "\n", "\0", [], {}),
    *([None], [[]], {"a": 1}, {"": {}}, [1, "2", None], "F32", "model", 0.1),
)
NUMBER = st.integers(0, 2**32 - 1)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "insert", "delete", "copy", "cut", "zero", "json"]),
              NUMBER, NUMBER),
    min_size=1, max_size=3,
)  # fmt: skip


def damaged(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    """The bytes with something done to them; a "json" change is one value's, where it is JSON."""
    for what, first, second in changes:
        at = first % (len(data) + 1)
        run = second % min(len(data) + 1, 200)
        evil = EVIL_BYTES[second % len(EVIL_BYTES)]
        if what == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << second % 8]) + data[at + 1 :]
        elif what == "set":
            data = data[:at] + evil + data[at + len(evil) :]
        elif what == "insert":
            data = data[:at] + evil + data[at:]
        elif what == "delete":
            data = data[:at] + data[at + run :]
        elif what == "copy":
            data = data[:at] + data[at : at + run] + data[at:]
        elif what == "cut":
            data = data[:at]
        elif what == "zero":
            data = data[:at] + bytes(len(data[at : at + run])) + data[at + run :]
        elif what == "json":
            data = _other_json(data, first, second)
    return data


def _other_json(data: bytes, first: int, second: int) -> bytes:
    """One value replaced or left out, of a JSON file or of one of its lines."""
    lines = data.split(b"\n")
    for text, before, after in (
        (data, b"", b""),
        (lines[first % len(lines)], b"\n".join(lines[: first % len(lines)]), b"\n"),
    ):
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            continue
        holders = list(_holders(tree))
        if holders:
            holder, key = holders[first % len(holders)]
            choice = second % (len(EVIL_VALUES) + 2)
            if choice < len(EVIL_VALUES):
                holder[key] = EVIL_VALUES[choice]
            else:
                del holder[key]
            return before + after + json.dumps(tree).encode() + after
    return data


def _holders(tree: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(tree, dict | list):
        return
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _holders(value)


@pytest.fixture(scope="module")
def worker():
    one = FuzzWorker()
    yield one
    one.close()


@pytest.fixture(scope="module")
def sound(tmp_path_factory, worker):
    """By kind: a folder with a sound file, its path in there, and what is read from it."""
    made = {}

    def of(name: str) -> tuple[Path, Path, str]:
        if name not in made:
            folder = tmp_path_factory.mktemp("sound")
            path = KINDS[name].make(folder)
            outcome = worker.read(name, path)
            assert "data" in outcome, outcome
            made[name] = (folder, path.relative_to(folder), outcome["data"])
        return made[name]

    return of


def outcome_of(name, sound, worker, tmp_path, changes):
    """What came of a changed copy: "right", "other data", "refused", or what is wrong with it."""
    kind = KINDS[name]
    folder, file, right = sound(name)
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    data = (folder / file).read_bytes()
    part = kind.part(data)
    changed = damaged(data[part], changes)
    (copy / file).write_bytes(data[: part.start or 0] + changed + data[part.stop or len(data) :])
    kind.after(copy / file)
    found = worker.read(name, copy / file)
    if "refused" in found:
        # A contradiction between several files of a folder may be said of the folder.
        names = [*(one.name for one in copy.rglob("*.*")), *(one.name for one in file.parents)]
        named = any(one and one in found["refused"] for one in names)
        return "refused" if named else f"names no file: {found['refused']}"
    if "failed" in found:
        return found["failed"]
    return "right" if found["data"] == right else "other data"


def fuzz(name, sound, worker, tmp_path, tries):
    sound(name)

    @settings(
        max_examples=tries,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(CHANGES)
    def run(changes):
        allowed = ["right", "refused"] + ["other data"] * (not KINDS[name].exact)
        assert outcome_of(name, sound, worker, tmp_path, changes) in allowed

    run()


@pytest.mark.parametrize("name", KINDS)
def test_some_damage(name, sound, worker, tmp_path):
    fuzz(name, sound, worker, tmp_path, 8)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_much_damage(name, sound, worker, tmp_path):
    fuzz(name, sound, worker, tmp_path, 500)
