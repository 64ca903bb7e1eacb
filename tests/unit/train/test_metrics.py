"""The metrics file under kills and resumes, TensorBoard, FLOPs."""

import json
import math
import sys
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.errors import MissingDependencyError
from mixtral_ms.train.report.flops import flops_per_token, mfu, peak_flops
from mixtral_ms.train.report.metrics import TIMING_FIELDS, MetricsWriter, read_metrics, reproducible


def record(step, **more):
    return {"kind": "train", "step": step, "loss": 0.1 * step, "expert_load": [[0.5, 0.5]], **more}


def write(path, steps, **options):
    with closing(MetricsWriter(path, **options)) as writer:
        for step in steps:
            writer.write(record(step))


def steps_of(path):
    return [item["step"] for item in read_metrics(path)]


def test_a_line_is_in_the_file_when_write_returns(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(record(1))
    assert read_metrics(path) == [record(1)]
    writer.close()


def test_resume_removes_later_steps_and_keeps_earlier_lines_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    kept = path.read_bytes()
    write(path, [3, 4])
    write(path, [3], resume_step=2)
    assert path.read_bytes().startswith(kept)
    assert steps_of(path) == [1, 2, 3]
    write(path, [4])
    assert steps_of(path) == [1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "line",
    [b"", b"1", b"[1]", b"{}", b'{"step": 9}', b'{"kind": "train"}', b'{"kind": 1, "step": 9}',
     b'{"kind": "train", "step": true}', b"[" * 99_999, b'{"step": ' + b"9" * 5000, b"\xff"],
    ids=range(11),
)  # fmt: skip
def test_a_line_that_is_no_record_is_left_out(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    write(path, [1])
    path.write_bytes(line + b"\n" + path.read_bytes())
    assert steps_of(path) == [1]
    assert f"{path}: 1 of 2 lines are no whole records" in capsys.readouterr().err
    write(path, [2], resume_step=1)
    assert f"{path}: 1 of 2 lines are no whole records" in capsys.readouterr().err
    assert steps_of(path) == [1, 2]


@pytest.mark.parametrize("resume_step", [None, 3])
def test_every_tear_of_the_last_line_is_repaired(tmp_path, resume_step):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    whole = path.read_bytes()
    start = whole.rindex(b"{", 0, whole.rindex(b'"kind"'))
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        before = steps_of(path)
        assert before in ([1, 2], [1, 2, 3])
        write(path, [4], resume_step=resume_step)
        assert steps_of(path) == [*before, 4]
        assert all(json.loads(line) for line in path.read_text().splitlines())


@given(st.floats(), st.lists(st.lists(st.floats(), min_size=2, max_size=2), max_size=3))
def test_every_float_comes_back_bit_for_bit_from_strict_json(tmp_path_factory, loss, load):
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    with closing(MetricsWriter(path)) as writer:
        writer.write({"kind": "train", "step": 1, "loss": loss, "expert_load": load})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (back,) = read_metrics(path)
    assert repr(back["loss"]) == repr(loss)
    assert repr(back["expert_load"]) == repr(load)


def test_timing_fields_are_separable():
    timed = record(1, **dict.fromkeys(TIMING_FIELDS, 1.0))
    assert reproducible(timed) == record(1)


def test_tensorboard_gets_every_number_by_layer_and_expert(tmp_path):
    with closing(MetricsWriter(tmp_path / "m.jsonl", tmp_path / "board")) as writer:
        writer.write(record(7, drop_percent=[1.0], mfu=None))
    (event_file,) = (tmp_path / "board").iterdir()
    content = event_file.read_bytes()
    for tag in (b"train/loss", b"expert_load/layer_0/expert_1", b"drop_percent/layer_0"):
        assert tag in content
    assert b"train/mfu" not in content


def test_missing_tensorboard_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "mixtral-ms\[tensorboard\]"'):
        MetricsWriter(tmp_path / "m.jsonl", tmp_path / "board")
    assert list(tmp_path.iterdir()) == []


MIXTRAL_8X7B = {
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "n_kv_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "moe_config": MoEConfig(expert_num=8, num_experts_chosen=2),
}


def test_flops_of_8x7b_are_six_times_its_active_weights_plus_attention():
    """The paper's 12.9 B active parameters include the embedding, whose lookup costs nothing."""
    terms = flops_per_token(MixtralConfig(**MIXTRAL_8X7B), 4096)
    weights = (terms["total"] - terms["attention_scores"]) / 6
    norms = (2 * 32 + 1) * 4096
    assert weights + 32000 * 4096 + norms == 12_879_925_248
    assert terms["attention_scores"] == 12 * 32 * 4096 * 4096 / 2
    assert terms["total"] == sum(value for name, value in terms.items() if name != "total")


def test_window_counts_the_keys_it_leaves():
    sequence, window = 4096, 1024
    config = MixtralConfig(**MIXTRAL_8X7B, sliding_window=window)
    scores = flops_per_token(config, sequence)["attention_scores"]
    keys = sum(min(position + 0.5, window) for position in range(sequence)) / sequence
    assert scores == pytest.approx(12 * 32 * 4096 * keys, rel=1e-3)
    wide = MixtralConfig(**MIXTRAL_8X7B, sliding_window=sequence * 2)
    plain = MixtralConfig(**MIXTRAL_8X7B)
    assert flops_per_token(wide, sequence) == flops_per_token(plain, sequence)


def test_peak_is_measured_given_or_unknown():
    measured = peak_flops("CPU")
    assert 1e9 < measured.flops_per_second < 1e14
    assert "measured" in measured.source
    assert peak_flops("Ascend") is None
    assert peak_flops("Ascend", 256).flops_per_second == 256e12


def test_mfu_shows_numerator_and_denominator():
    use = mfu(1000.0, 5e7, peak_flops("CPU", 0.1), devices=2)
    assert math.isclose(use.ratio, 0.25)
    assert str(use) == "25.0% (50.0 of 200.0 GFLOP/s)"
