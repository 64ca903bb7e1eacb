"""Every collective and its gradient, on real processes."""

from pathlib import Path

from helpers.distributed import start_job

WORKER = Path(__file__).with_name("collectives_worker.py")


def test_collectives_agree_with_numpy(tmp_path):
    start_job(str(WORKER), 3, tmp_path)
    logs = sorted((tmp_path / "logs").glob("worker_*.log"))
    assert len(logs) == 3
    assert all("collectives agree" in log.read_text() for log in logs)
