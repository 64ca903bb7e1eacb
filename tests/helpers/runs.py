"""A training run small enough to be started many times, and what it left behind."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from mixtral_ms.checkpoint.reshard.open_checkpoint import open_source
from mixtral_ms.data.mindrecord.writer import RecordWriter
from mixtral_ms.train.report.metrics import read_metrics, reproducible

ROOT = Path(__file__).parents[2]
SEQ_LENGTH, VOCAB, LAYERS, EXPERTS = 32, 512, 1, 4
TRAIN_ROWS, EVAL_ROWS = 22, 7
"""Neither is a multiple of a batch: an epoch leaves rows out, and evaluation ends with a part."""


def write_records(path, rows, seed=0, length=SEQ_LENGTH + 1, vocab=VOCAB):
    """A MindRecord of random ids that a small network can learn something from."""
    # A walk over the vocabulary: the next id is near the last one.
    steps = np.random.RandomState(seed).randint(1, 8, (rows, length))
    ids = np.cumsum(steps, 1) % vocab
    with RecordWriter(path) as writer:
        writer.write(input_ids=ids.astype(np.int32))
    return ids.astype(np.int32)


def tiny_config(folder):
    """The tree of a tiny run's YAML over `folder`'s data: accumulation 2, evaluation, shuffle."""

    def data(name):
        return {
            "data_loader": {"type": "MindDataset", "dataset_dir": str(folder / name)},
            "input_columns": ["input_ids"],
        }

    return {
        "run_mode": "train",
        "seed": 3,
        "output_dir": str(folder / "output"),
        "runner_config": {
            "epochs": 4,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "peak_tflops": 1.0,  # measuring the peak would take longer than the run
        },
        "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "weight_decay": 0.1},
        "lr_schedule": {
            "type": "CosineWithWarmUpLR",
            "learning_rate": 1e-2,
            "lr_end": 1e-3,
            "warmup_steps": 2,
        },
        "runner_wrapper": {"use_clip_grad": True, "max_grad_norm": 1.0},
        "train_dataset": data("train.mindrecord"),
        "eval_dataset": {**data("eval.mindrecord"), "batch_size": 3},
        "do_eval": True,
        "eval_step_interval": 3,
        "eval_epoch_interval": 1,
        "callbacks": [
            {"type": "CheckpointMonitor", "save_checkpoint_steps": 2, "keep_checkpoint_max": 2},
            {"type": "Report", "enabled": False},
        ],
        "model": {
            "model_config": {
                "type": "MixtralConfig",
                "seq_length": SEQ_LENGTH,
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "num_layers": LAYERS,
                "num_heads": 4,
                "n_kv_heads": 2,
                "intermediate_size": 48,
                "pad_token_id": -1,
                "compute_dtype": "float32",
            }
        },
        "moe_config": {
            "expert_num": EXPERTS,
            "num_experts_chosen": 2,
            "aux_loss_factor": 0.02,
            "z_loss_factor": 0.001,
        },
        "context": {"device_target": "CPU", "mode": 0},
    }


def make_run(folder):
    """Data and YAML of a tiny run in `folder`; returns the YAML's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / "train.mindrecord", TRAIN_ROWS)
    write_records(folder / "eval.mindrecord", EVAL_ROWS, seed=1)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_config(folder), sort_keys=False))
    return path


def command(*arguments):
    """The command line of `mixtral_ms run`."""
    return [sys.executable, "-m", "mixtral_ms", "run", *map(str, arguments)]


def environment():
    """An environment in which the package is found from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def heeding_signals():
    """For processes started meanwhile: tests in the background ignore these, and so would they."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(*arguments, cwd=None, timeout=120):
    """Run `mixtral_ms run` to its end in a process of its own."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def metrics_of(output):
    """The metrics of a run without the fields that depend on the clock."""
    return [reproducible(record) for record in read_metrics(Path(output) / "metrics.jsonl")]


def final_tensors(output):
    """Weights and moments of a run's latest checkpoint, by name."""
    tensors = open_source(Path(output) / "checkpoint").tensors
    return {name: np.array(tensors.read(name)) for name in tensors.infos}


def assert_same_run(output, expected):
    """Metrics, final weights and moments of two runs are the same bits."""
    assert metrics_of(output) == metrics_of(expected)
    got, wanted = final_tensors(output), final_tensors(expected)
    assert got.keys() == wanted.keys()
    different = [name for name in wanted if got[name].tobytes() != wanted[name].tobytes()]
    assert not different
