"""Training on several processes gives the losses, norms and gradients of one process."""

import pytest
from helpers.distributed import Case, References, largest_errors

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return References(tmp_path_factory.mktemp("references"))


def check(case, folder, references, report_error, steps=5):
    for model, kinds in largest_errors(case, folder, references, steps).items():
        for kind, (error, where) in kinds.items():
            report_error(f"{case.grid_text} {model} {kind} {where}", error, TOLERANCE)
            assert error <= TOLERANCE, f"{model}, {where}: {error:.1e}"


def test_two_processes_with_other_rows(tmp_path, references, report_error):
    check(Case("dp=2", accumulation=2), tmp_path / "job", references, report_error, steps=2)
