"""Prediction on Ascend, its operators emulated, beside the network in plain numpy.

Legend: as in tests/unit/infer.
"""

import logging

import mindspore
import numpy as np
import pytest
from helpers.ascend_cache_emulation import emulate_ascend_cache
from helpers.numpy_runner import NumpyRunner, random_tensors
from helpers.tiny import tiny_config

from mixtral_ms.config.derived.parameter_table import row_of
from mixtral_ms.infer.runners.base import NO_BLOCK, StepInput
from mixtral_ms.infer.runners.infer_weights import InferWeights
from mixtral_ms.infer.runners.paged_runner import PagedRunner, open_cache
from mixtral_ms.kernels.select import select_kernels
from mixtral_ms.log import get_logger

pytestmark = [pytest.mark.usefixtures("pynative"), pytest.mark.slow]
BLOCKS, BATCH, LENGTH = 12, 3, 80
SIZES = {
    "seq_length": LENGTH,
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "compute_dtype": "float32",
    "moe_config": {"expert_num": 5},
}
TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2


def build(monkeypatch, tensors, block=16, weight_dtype="float32", **changes):
    """The runner of the emulated device, operator by operator."""
    emulate_ascend_cache(monkeypatch)
    config = tiny_config(**{**SIZES, **changes})
    weights = InferWeights(weight_dtype, tensors, {})
    kernels = select_kernels("ascend", dropless=True)
    cache = open_cache(config, weights, block, kernels)
    runner = PagedRunner(config, weights, BLOCKS, cache, kernels, BATCH)
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    return runner


def step_of(ids, positions, starts, tables, wanted=None):
    longest = max(map(len, tables))
    tables = [[*table, *[NO_BLOCK] * (longest - len(table))] for table in tables]
    wanted = range(len(ids)) if wanted is None else wanted
    return StepInput(*[np.array(one, np.int32) for one in (ids, positions, starts, tables, wanted)])


def close(got, wanted, tolerance=TOLERANCE):
    assert got.dtype == np.float32 and got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, atol=tolerance * np.abs(wanted).max())


CASES = {
    "paged": ({"num_layers": 2}, 16, "paged attention"),
    "blocks of another size": ({}, 8, "block_size 8 is no multiple of 16"),
    "window": ({"sliding_window": 9}, 16, "a sliding_window of 9"),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_network(monkeypatch, caplog, name):
    changes, block, reads = CASES[name]
    config = tiny_config(**{**SIZES, **changes})
    tensors = random_tensors(config)
    monkeypatch.setattr(get_logger(), "propagate", True)
    with caplog.at_level(logging.INFO):
        runner = build(monkeypatch, tensors, block, **changes)
    assert reads in caplog.text and "graphs, each compiled at its first use" in caplog.text
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (2, LENGTH))
    count = -(-LENGTH // block)
    expected = []
    for row in ids:
        whole = NumpyRunner(config, tensors, 64, block)
        begin = [0, LENGTH]
        expected.append(whole.step(step_of(row, range(LENGTH), begin, [range(count)])))
    table = list(range(BLOCKS))[::-1][:count]
    # the first piece, with all logits; a later one, with the last; a token, beside another sequence
    close(runner.step(step_of(ids[0, :40], range(40), [0, 40], [table])), expected[0][:40])
    piece = step_of(ids[0, 40:60], range(40, 60), [0, 20], [table], [19])
    close(runner.step(piece), expected[0][59:60])
    spare = 0
    both = step_of([ids[1, 0], ids[0, 60]], [0, 60], [0, 1, 2], [[spare], table])
    close(runner.step(both), np.stack([expected[1][0], expected[0][60]]))
    # a piece that nobody wants logits of, beside a token of another sequence
    mixed = step_of([*ids[0, 61:64], ids[1, 1]], [61, 62, 63, 1], [0, 3, 4], [table, [spare]], [3])
    close(runner.step(mixed), expected[1][1:2])
    runner.copy_blocks([(spare, 1 if spare + 1 not in table else BLOCKS - count - 1)])
    end = step_of([ids[0, 64]], [64], [0, 1], [table])
    close(runner.step(end), expected[0][64:65])
    for graph in ("a piece of 64 tokens, all with logits", "a token of each of 3 sequences"):
        assert f"graph of {graph}" in caplog.text


def test_float16_stays_near(monkeypatch):
    config = tiny_config(**SIZES)
    tensors = random_tensors(config)
    stored = {
        name: value if row_of(name).always_float32 else value.astype(np.float16)
        for name, value in tensors.items()
    }
    runner = build(monkeypatch, stored, weight_dtype="float16")
    ids = np.random.default_rng(2).integers(0, config.vocab_size, 21)
    expected = NumpyRunner(config, tensors, 64, 16).step(step_of(ids, range(21), [0, 21], [[0, 1]]))
    got = runner.step(step_of(ids[:20], range(20), [0, 20], [[5, 3]]))
    close(got, expected[:20], HALF_TOLERANCE)
    last = runner.step(step_of(ids[20:], [20], [0, 1], [[5, 3]]))
    close(last, expected[20:], HALF_TOLERANCE)
