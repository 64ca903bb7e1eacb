"""The pretraining YAML of Mixtral 8x7B on sixteen ranks, with sizes that a CPU can compute."""

import pytest
from helpers.jobs import Job, assert_close_records, run_order
from helpers.runs import ROOT, metrics_of, run_command, write_records

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

YAML = ROOT / "research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml"
STEPS, SEQ_LENGTH, VOCAB, ROWS = 3, 32, 128, 8
SECONDS = 600
SIZES = {
    "model.model_config.seq_length": SEQ_LENGTH,
    "model.model_config.vocab_size": VOCAB,
    "model.model_config.hidden_size": 32,
    "model.model_config.num_layers": 2,
    "model.model_config.num_heads": 8,
    "model.model_config.n_kv_heads": 4,
    "model.model_config.intermediate_size": 64,
    "model.model_config.compute_dtype": "float32",
    "runner_config.batch_size": 1,
    "runner_config.max_steps": STEPS,
    "runner_config.peak_tflops": 1,
    "runner_config.global_batch_size": ROWS,
}
GRID = {
    "data_parallel": 2,
    "model_parallel": 4,
    "pipeline_stage": 2,
    "expert_parallel": 2,
    "micro_batch_num": 4,
}


def flags(values, prefix=""):
    return [word for key, value in values.items() for word in ("--set", f"{prefix}{key}={value}")]


def test_sixteen_ranks_train_as_one(tmp_path):
    write_records(tmp_path / "rows.mindrecord", ROWS * STEPS, length=SEQ_LENGTH + 1, vocab=VOCAB)
    common = ["--train_data", tmp_path / "rows.mindrecord", "--device_target", "CPU"]
    common += flags(SIZES)
    order = run_order(YAML, tmp_path / "together", *common, *flags(GRID, "parallel_config."))
    with Job(tmp_path, order, 16, SECONDS) as job:
        assert job.finish(SECONDS + 60) == 0, job.text
    alone = run_order(YAML, tmp_path / "alone", *common, "--use_parallel", "False")
    done = run_command(*alone[1:])
    assert done.returncode == 0, done.stderr
    together = metrics_of(tmp_path / "together")
    assert len(together) == STEPS
    assert_close_records(together, metrics_of(tmp_path / "alone"))
