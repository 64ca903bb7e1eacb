"""scripts/check_types.py: the list of known errors of types only shrinks."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/check_types.py"
CONFIG = '[tool.mypy]\nfiles = ["toy"]\n'
SOURCE = """def half(number: int) -> float:
    return number / 2


half("four")
"""
KNOWN = 'toy/sums.py: Argument 1 to "half" has incompatible type "str"; expected "int" [arg-type]\n'
ANOTHER = 'half(b"four")\n'


@pytest.fixture
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def toy(tmp_path):
    """A package with one error, which is known."""
    pytest.importorskip("mypy", reason="the extra `test` brings it")
    for folder in ("toy", "scripts"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text(CONFIG)
    (tmp_path / "toy/sums.py").write_text(SOURCE)
    (tmp_path / "scripts/mypy_baseline.txt").write_text(KNOWN)
    return tmp_path


def check(root, *options):
    cache = {"MYPY_CACHE_DIR": str(root.parent / "mypy_cache")}  # one for all tests
    done = subprocess.run(
        [sys.executable, SCRIPT, "--root", root, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | cache,
    )
    return done.returncode, done.stdout + done.stderr


def baseline(root):
    lines = (root / "scripts/mypy_baseline.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def finding(script, line, message="wrong"):
    return script["Finding"]("a.py", line, message, "misc")


def test_lines_do_not_count(script):
    found = [finding(script, 3), finding(script, 7, "bad")]
    assert script["compare"](found, ["a.py: wrong [misc]", "a.py: bad [misc]"]) == ([], [])


def test_an_error_once_more_than_known_is_new(script):
    new, gone = script["compare"]([finding(script, 3), finding(script, 9)], ["a.py: wrong [misc]"])
    assert new == ["a.py:3: wrong [misc]", "a.py:9: wrong [misc]"]
    assert gone == []


def test_an_error_less_often_than_known_is_gone(script):
    known = ["a.py: wrong [misc]"] * 3
    assert script["compare"]([finding(script, 3)], known) == ([], known[:2])


def test_known_errors_pass_wherever_they_move(toy):
    assert check(toy)[0] == 0
    (toy / "toy/sums.py").write_text("\n\n" + SOURCE)
    assert check(toy)[0] == 0


def test_a_new_error_fails_with_its_line_and_is_never_added(toy):
    (toy / "toy/sums.py").write_text(SOURCE + ANOTHER)
    for options in ((), ("--update",)):
        status, said = check(toy, *options)
        assert status == 1
        assert 'new: toy/sums.py:6: Argument 1 to "half" has incompatible type "bytes"' in said
        assert baseline(toy) == [KNOWN.rstrip()]


def test_what_is_gone_must_leave_the_list(toy):
    (toy / "toy/sums.py").write_text(SOURCE.replace('"four"', "4"))
    status, said = check(toy)
    assert status == 1
    assert f"gone: {KNOWN.rstrip()}" in said
    assert check(toy, "--update")[0] == 0
    assert baseline(toy) == []
    assert check(toy)[0] == 0


def test_an_update_with_both_takes_off_and_still_fails(toy):
    (toy / "toy/sums.py").write_text(SOURCE.replace('"four"', "4") + ANOTHER)
    assert check(toy, "--update")[0] == 1
    assert baseline(toy) == []


def test_a_file_that_is_no_python_is_said(toy):
    (toy / "toy/sums.py").write_text("def half(:\n")
    status, said = check(toy)
    assert status == 2
    assert "toy/sums.py" in said
