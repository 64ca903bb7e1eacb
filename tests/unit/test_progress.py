"""What a progress bar prints where there is no terminal, under a clock that the test turns."""

import itertools

import pytest

from mixtral_ms.progress import progress_bar


@pytest.fixture
def printed(monkeypatch, capsys):
    """Counts of the lines of a bar whose updates come so many seconds apart."""

    def run(seconds, total, updates):
        clock = itertools.count(0, seconds / 2)  # an update that prints asks it twice
        monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
        with progress_bar(total, "work", "B") as bar:
            for _ in range(updates):
                bar.update()
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("work:") for line in lines)
        return [line.split("B")[0].split("/")[0].split()[-1] for line in lines]

    return run


@pytest.mark.parametrize("total", [4, None])
def test_no_line_is_printed_twice(printed, total):
    assert printed(40, total, updates=4) == ["1", "2", "3", "4"]


def test_the_last_line_is_printed_when_updates_did_not(printed):
    lines = printed(4, 9, updates=9)
    assert lines[-1] == "9" and len(lines) == len(set(lines)) < 9


def test_short_work_prints_nothing(printed):
    assert printed(0.001, 9, updates=9) == []
