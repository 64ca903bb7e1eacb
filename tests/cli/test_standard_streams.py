"""Standard streams that are closed, full, narrow or a terminal: what commands print and lose."""

import errno
import io
import os
import pty
import subprocess
import sys
import threading

import pytest
from helpers.runs import environment

from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.cli.support.print_text import show
from mixtral_ms.errors import UserError
from mixtral_ms.log import get_logger
from mixtral_ms.printable import printable, shell_word

# A command that shows a text many times, logs it, and only then writes its result.
COMMAND = """
import os, pathlib, sys
from mixtral_ms.cli.support.exit_status import run_command
from mixtral_ms.log import get_logger
from mixtral_ms.progress import progress_bar

def main(argv):
    with progress_bar(1, "working", "piece") as bar:
        bar.update()
    for _ in range(int(argv[2])):
        print(argv[1])
        get_logger().warning("%s", argv[1])
    sys.stdin.isatty()
    print(argv[1], flush=True)
    pathlib.Path(argv[0]).write_text("the result")

sys.exit(run_command(main, [os.environ["RESULT"], os.environ["TEXT"], os.environ["TIMES"]]))
"""


@pytest.fixture
def shell(tmp_path):
    """Runs the command with a shell's redirections; gives what came of it and the result."""

    def run(redirections, text="text", times=1, **variables):
        (tmp_path / "command.py").write_text(COMMAND)
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {sys.executable} command.py {redirections}"],
            env={**environment(), "RESULT": "result", "TEXT": text, "TIMES": str(times),
                 **variables},
            cwd=tmp_path, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        file = tmp_path / "result"
        return done, file.read_text() if file.exists() else None

    return run


@pytest.mark.parametrize(
    ("redirections", "times"),
    [
        ("| head -1", 9_000),
        ("2>&1 >/dev/null | head -1", 5_000),
        ("| true", 1),
        (">&-", 1),
        ("2>&-", 1),
        ("<&-", 1),
        ("<&- >&- 2>&-", 1),
    ],
)
def test_a_reader_that_goes_away_costs_no_result(shell, redirections, times):
    done, result = shell(redirections, times=times)
    assert (done.returncode, result) == (0, "the result"), done.stderr
    assert b"Error" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_an_escape(shell, encoding):
    done, result = shell("", text="\u4f60\u597d", PYTHONIOENCODING=encoding)
    assert (done.returncode, result) == (0, "the result"), done.stderr
    shown = "\u4f60\u597d" if encoding == "utf-8" else "\\u4f60\\u597d"
    assert done.stdout.decode() == f"{shown}\n" * 2
    assert f"WARNING {shown}\n" in done.stderr.decode()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said(shell):
    done, _ = shell(">/dev/full")
    assert (done.returncode, done.stderr.decode().splitlines()[-1]) == (
        1,
        "failed: standard output: No space left on device",
    )


def test_a_pipe_that_does_not_block_is_waited_for(monkeypatch):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    text = "text" * 100_000
    got = []

    def read():
        with open(reading) as file:
            got.append(file.read())

    with open(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        reader = threading.Timer(0.1, read)
        reader.start()
        assert run_command(lambda argv: print(text, end=""), []) == 0
    reader.join()
    assert got == [text]


def test_a_terminal_that_goes_away_costs_no_result(tmp_path):
    own, theirs = pty.openpty()
    (tmp_path / "command.py").write_text("import time; time.sleep(0.3)\n" + COMMAND)
    with subprocess.Popen(
        [sys.executable, "command.py"],
        env={**environment(), "RESULT": "result", "TEXT": "text", "TIMES": "9"},
        stdout=theirs, stderr=theirs, cwd=tmp_path,
    ) as process:  # fmt: skip
        os.close(theirs)
        os.close(own)
    assert process.returncode == 0
    assert (tmp_path / "result").read_text() == "the result"


ACTING = "a\x1b]0;title\x07b\x9b2Jc\x7fd\u202ee"
SHOWN = "a\\x1b]0;title\\x07b\\x9b2Jc\\x7fd\\u202ee"


def test_nothing_acts_on_a_terminal_but_colours(tmp_path):
    own, theirs = pty.openpty()
    (tmp_path / "command.py").write_text(COMMAND)
    with subprocess.Popen(
        [sys.executable, "command.py"],
        env={**environment(), "RESULT": "result", "TEXT": f"\x1b[31m{ACTING}\x1b[0m", "TIMES": "0"},
        stdout=theirs, stderr=subprocess.DEVNULL, cwd=tmp_path,
    ):  # fmt: skip
        os.close(theirs)
        shown = os.read(own, 4096).decode()
        os.close(own)
    assert shown == f"\x1b[31m{SHOWN}\x1b[0m\r\n"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (ACTING, SHOWN),
        ("ev\n22:00:00 INFO all is well", "ev\n  22:00:00 INFO all is well"),
        ("a\r22:00:00 INFO all is well", "a\\r22:00:00 INFO all is well"),
        ("half \ud83d", "half \\ud83d"),
        ("\u4f60\u597d, \u0939\u093f \U0001f469\u200d\U0001f467", None),
    ],
    ids=ascii,
)
def test_names_forge_no_message(capsys, name, shown):
    shown = name if shown is None else shown

    def main(argv):
        get_logger().warning("%s is odd", name)
        raise UserError(f"{name} is wrong")

    assert run_command(main, []) == 2
    logged, error = capsys.readouterr().err.split("error: ")
    assert logged.partition("WARNING ")[2] == f"{shown} is odd\n"
    assert error == f"{shown} is wrong\n"
    assert printable(name) == shown.replace("\n  ", "\\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_generated_text_is_bare_on_a_terminal_alone(monkeypatch, terminal):
    stdout = io.StringIO()
    monkeypatch.setattr(stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", stdout)
    text = f"one\n\ttwo \u0645\u200f{ACTING}\x1b[31m\r"
    show(text)
    bare = "one\n\ttwo \u0645\u200fa]0;titleb2Jcde[31m"
    assert stdout.getvalue() == (bare if terminal else text)


@pytest.mark.parametrize(
    ("number", "path", "status", "line"),
    [
        (errno.EROFS, "/mnt/.m.ckpt.converting/lock", 2, "error: /mnt/m.ckpt: Read-only"),
        (errno.EACCES, "/mnt/.a.json.0123abcd.tmp", 2, "error: /mnt/a.json: Permission denied"),
        (errno.ENAMETOOLONG, "x" * 300, 2, f"error: {'x' * 300}: File name too long"),
        (errno.ENOSPC, "/mnt/.hidden", 1, "failed: /mnt/.hidden: No space left"),
        (errno.ENOENT, "a\nb", 2, "error: a\\nb: No such file"),
        (errno.ENOSPC, None, 1, "failed: OSError: [Errno 28] No space"),
    ],
)
def test_the_system_s_refusals_name_what_was_asked_for(capsys, number, path, status, line):
    def main(argv):
        raise OSError(number, os.strerror(number), path)

    assert run_command(main, []) == status
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("out/plain-name_1.json", "out/plain-name_1.json"),
        ("two words", "'two words'"),
        ("a; touch PW", "'a; touch PW'"),
        ("$(touch PW)", "'$(touch PW)'"),
        ("it's", "'it'\"'\"'s'"),
        ("a\ntouch PW", "'a\\ntouch PW'"),
        ("\x1b[2J", "'\\x1b[2J'"),
    ],
)
def test_a_name_in_an_offered_command_is_one_word(tmp_path, name, word):
    assert shell_word(name) == word
    echoed = subprocess.run(
        ["bash", "-c", f"printf '<%s>' {word}"], cwd=tmp_path, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert echoed.stdout == f"<{printable(name)}>"
    assert list(tmp_path.iterdir()) == []
