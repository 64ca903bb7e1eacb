"""Hosts that share no folder: each keeps its own ranks' part, on the same and on another layout.

The hosts are two folders of one machine, in which the same command with relative paths is typed.
"""

import shutil

import pytest
from helpers.distributed import free_port
from helpers.hosts import HostJobs
from helpers.jobs import assert_close_records, layout_flags
from helpers.runs import ROOT, make_run, metrics_of

from mixtral_ms.checkpoint.store.folders import list_checkpoints
from mixtral_ms.checkpoint.store.manifest import verify_checkpoint

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
KEYS = (
    "--model.model_config.num_layers=2",
    "--runner_config.max_steps=6",
    "--do_eval=False",
    "--callbacks.0.keep_checkpoint_max=9",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    make_run(folder)
    return folder


def train(folder, hosts, layout, *more):
    """Run to the end on two hosts; returns what the terminals showed."""
    flags = ("--no-shared-storage", "--output_dir=output", *layout_flags(layout), *KEYS, *more)
    order = " ".join(
        map(str, (ROOT / "run_mindformer.py", "--config", folder / "run.yaml", *flags))
    )
    for host in hosts:
        host.mkdir(exist_ok=True)
    place = f"2 1 127.0.0.1 {free_port()} {{}} logs False 90"
    with HostJobs(hosts, order, place) as jobs:
        jobs.finish()
        return jobs.everything


def new_hosts(folder, name, parts=None):
    """Folders of two hosts, with what two others have kept."""
    hosts = [folder / f"{name}_{host}" for host in range(2)]
    for host, given in zip(hosts, parts or (), strict=False):
        shutil.copytree(given / "output", host / "output")
    return hosts


@pytest.fixture(scope="module")
def whole(folder):
    """A run of six steps; returns its hosts."""
    hosts = new_hosts(folder, "whole")
    train(folder, hosts, "dp=2,zero=1")
    return hosts


@pytest.fixture(scope="module")
def stopped(folder):
    """The same run, stopped after three."""
    hosts = new_hosts(folder, "stopped")
    train(folder, hosts, "dp=2,zero=1", "--runner_config.stop_at_step=3")
    return hosts


def test_each_host_keeps_its_own_part_of_one_checkpoint(whole):
    names = [[one.name for one in list_checkpoints(host / "output/checkpoint")] for host in whole]
    assert names[0] == names[1] == [f"mixtral-step_000000{step}" for step in (2, 4, 6)]
    manifests = set()
    for rank, host in enumerate(whole):
        newest = host / "output/checkpoint" / names[0][-1]
        assert [one.name for one in newest.glob("rank_*")] == [f"rank_{rank}"]
        manifests.add((newest / "manifest.json").read_bytes())
        assert len(list((host / "output/strategy").iterdir())) == 2
    assert len(manifests) == 1
    assert not (whole[1] / "output/metrics.jsonl").exists()


def test_the_same_layout_reads_its_own_files_bit_for_bit(folder, whole, stopped):
    hosts = new_hosts(folder, "again", stopped)
    said = train(folder, hosts, "dp=2,zero=1", "--resume_training=True")
    assert "each rank from its own files" in said
    assert metrics_of(hosts[0] / "output") == metrics_of(whole[0] / "output")
    for rank, host in enumerate(hosts):
        part = f"output/checkpoint/mixtral-step_0000006/rank_{rank}"
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (host / part / file).read_bytes() == (whole[rank] / part / file).read_bytes()


@pytest.mark.parametrize("layout", ["mp=2", "pp=2"])
def test_another_layout_gets_the_files_of_the_other_host(
    folder, whole, stopped, layout, report_error
):
    hosts = new_hosts(folder, layout[:2], stopped)
    train(folder, hosts, layout, "--resume_training=True")
    got, expected = (metrics_of(one[0] / "output") for one in (hosts, whole))
    report_error(f"dp=2,zero=1 -> {layout}", assert_close_records(got, expected), 1e-5)
    for host in hosts:
        assert verify_checkpoint(host / "output/checkpoint/mixtral-step_0000003") == []


def test_the_newest_checkpoint_of_all_hosts_is_taken(folder, whole, stopped):
    hosts = new_hosts(folder, "behind", whole)
    shutil.rmtree(hosts[1] / "output/checkpoint/mixtral-step_0000006")
    said = train(folder, hosts, "dp=2,zero=1", "--resume_training=True")
    assert "mixtral-step_0000006 is not on every host: taking mixtral-step_0000004" in said
    assert metrics_of(hosts[0] / "output") == metrics_of(whole[0] / "output")


def test_damage_and_absence_are_named(folder, stopped):
    hosts = new_hosts(folder, "damaged", stopped)
    file = hosts[1] / "output/checkpoint/mixtral-step_0000003/rank_1/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(AssertionError, match="rank_1/model.safetensors: tensor .* was changed"):
        train(folder, hosts, "dp=2,zero=1", "--resume_training=True")
    file.unlink()
    with pytest.raises(AssertionError, match="rank_1/model.safetensors is on no host"):
        train(folder, hosts, "dp=2,zero=1", "--resume_training=True")
    (file.parents[1] / "state.json").write_text("{}")
    with pytest.raises(AssertionError, match="state.json was changed"):
        train(folder, hosts, "dp=2,zero=1", "--resume_training=True")
