"""Which tests take part: conftest's --fast and --long."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

TESTS = Path(__file__).parents[1]


class Item:
    def __init__(self, file, *marks):
        self.path, self.marks, self.fixturenames = TESTS / file, set(marks), ()

    def add_marker(self, mark):
        self.marks.add(getattr(mark, "name", mark))

    def get_closest_marker(self, name):
        return name if name in self.marks else None


def chosen(items, **options):
    """The files whose items are left, and those of which pytest is told that they are not."""
    told = []

    def tell(items):
        told.extend(items)

    config = SimpleNamespace(
        getoption=lambda name: options.get(name.strip("-"), False),
        hook=SimpleNamespace(pytest_deselected=tell),
    )
    left = list(items)
    runpy.run_path(str(TESTS / "conftest.py"))["pytest_collection_modifyitems"](config, left)
    assert {*left, *told} == {*items} and not {*left} & {*told}
    return [str(item.path.relative_to(TESTS)) for item in left]


@pytest.fixture
def items():
    return [
        Item("unit/quick.py"),
        Item("unit/slow.py", "slow"),
        Item("cli/long.py", "long"),
        Item("distributed/jobs.py"),
        Item("integrations/others.py"),
    ]


def test_long_tests_are_asked_for(items):
    assert "cli/long.py" not in chosen(items)
    assert len(chosen(items)) == 4
    assert len(chosen(items, long=True)) == 5


def test_fast_leaves_out_slow_ones_jobs_and_other_systems(items):
    assert chosen(items, fast=True) == ["unit/quick.py"]


def test_not_both_at_once(items):
    with pytest.raises(pytest.UsageError, match="--long and --fast"):
        chosen(items, fast=True, long=True)
