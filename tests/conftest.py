"""Options of the test run: the device, and which tests take part."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Derandomised: a failure seen once is seen again, on every machine; how fast it is, is none.
settings.register_profile(
    "default",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    database=None,
)
settings.load_profile("default")

# Every test in these starts jobs of several processes, or another system.
SLOW_FOLDERS = ("distributed", "integrations")


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="CPU", choices=("CPU", "Ascend"), help="device that kernels run on"
    )
    parser.addoption(
        "--data",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "data",
        help="folder with wikitext-2/wiki.valid.tokens; tests on it are skipped without it",
    )
    extent = parser.getgroup("general").addoption
    extent("--long", action="store_true", help="run the tests that take minutes too")
    extent(
        "--fast",
        action="store_true",
        help="leave out what is marked slow, and jobs of several processes and other systems",
    )


def group_of(item):
    """Tests of a file run in one process, and so do files that share what is made once for all."""
    return "graphs of Ascend" if "compiled" in item.fixturenames else item.path.name


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long") and config.getoption("--fast"):
        raise pytest.UsageError("--long and --fast: give one of them")
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    left_out = set() if config.getoption("--long") else {"long"}
    if config.getoption("--fast"):
        left_out.add("slow")
        slow_folders = {Path(__file__).parent / name for name in SLOW_FOLDERS}
        for item in items:
            if slow_folders & set(item.path.parents):
                item.add_marker("slow")
    deselected = [item for item in items if any(map(item.get_closest_marker, left_out))]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]


@pytest.fixture(scope="session")
def device(request):
    """The device target, set in MindSpore; only tests that compute ask for it."""
    import mindspore  # noqa: PLC0415 - seconds that tests of configuration need not wait

    name = request.config.getoption("--device")
    mindspore.set_context(device_target=name)
    return name


@pytest.fixture
def pynative(device):
    """PyNative mode for one test: no compilation, whatever the shapes."""
    import mindspore  # noqa: PLC0415

    before = mindspore.get_context("mode")
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    yield
    mindspore.set_context(mode=before)


@pytest.fixture
def graph(device):
    """Graph mode for one test."""
    import mindspore  # noqa: PLC0415

    before = mindspore.get_context("mode")
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    yield
    mindspore.set_context(mode=before)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, device):
    """A folder with helpers.runs' data and run.yaml, and what its run left in `output`.

    Several files read it: nobody writes into it.
    """
    import mindspore  # noqa: PLC0415
    from helpers.runs import make_run  # noqa: PLC0415 - after pytest has set sys.path

    from mixtral_ms import Trainer, load_config  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("tiny_run")
    before = mindspore.get_context("mode")
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    result = Trainer(load_config(make_run(folder))).train()
    mindspore.set_context(mode=before)
    assert result.signal_number is None
    return folder


@pytest.fixture
def ascend_emulation(device, monkeypatch):
    """Until the test ends, backend "ascend" computes on this CPU, as documented."""
    from helpers.ascend_emulation import emulate_ascend  # noqa: PLC0415 - imports MindSpore

    emulate_ascend(monkeypatch)


@pytest.fixture
def report_error(request):
    """Notes an error and its bound in the test's report; the largest are printed at the end."""

    def report(what, error, tolerance):
        note = (float(error), f"{request.node.name}: {what}", tolerance)
        request.node.user_properties.append(("error", note))

    return report


@pytest.fixture
def record_error(report_error):
    """assert_close that also reports the error."""
    from helpers.compare import assert_close  # noqa: PLC0415 - after pytest has set sys.path

    def check(what, got, expected, tolerance):
        report_error(what, assert_close(got, expected, tolerance, what), tolerance)

    return check


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """What a test printed goes to another process as UTF-8, and some print what is none."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


_seconds = Counter()
_errors = {}


def pytest_runtest_logreport(report):
    _seconds["/".join(report.nodeid.split("/")[:2])] += report.duration
    if report.when == "call":
        test = report.nodeid.partition("[")[0].partition("@")[0]
        for name, note in report.user_properties:
            if name == "error":
                _errors[test] = max(_errors.get(test, (0.0, "", 0.0)), tuple(note))


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.config.getoption("durations") is not None:
        terminalreporter.section("seconds of each folder")
        for folder, seconds in _seconds.most_common():
            terminalreporter.write_line(f"{seconds:6.0f} s  {folder}")
    if not _errors:
        return
    terminalreporter.section("largest errors")
    for error, where, tolerance in _errors.values():
        terminalreporter.write_line(f"{error:.1e} (bound {tolerance:.0e}) {where}")
