"""Each runner against the contract, on a network small enough to compute in plain numpy."""

import mindspore
import numpy as np
import pytest
from helpers.infer_runners import RUNNERS, build_runner
from helpers.numpy_runner import NumpyRunner, random_tensors
from helpers.tiny import tiny_config

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.errors import UserError
from mixtral_ms.infer.runners import cpp_runner
from mixtral_ms.infer.runners.base import NO_BLOCK, RunnerUnavailableError, StepInput
from mixtral_ms.infer.runners.infer_weights import InferWeights
from mixtral_ms.infer.runners.select_runner import select_runner
from mixtral_ms.parallel.grid.mesh import Mesh

BLOCK = 4
CONFIG = tiny_config(seq_length=96, qkv_has_bias=False, head_dim=6, moe_config={"expert_num": 5})
TENSORS = random_tensors(CONFIG)
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=RUNNERS)
def runner(request, device):
    before = mindspore.get_context("mode")
    yield build_runner(request.param, CONFIG, TENSORS, 64, BLOCK)
    mindspore.set_context(mode=before)


def prompt(ids, table, begin=0, with_logits=None):
    """A piece of one sequence's prompt."""
    return StepInput(
        np.array(ids, np.int32),
        np.arange(begin, begin + len(ids), dtype=np.int32),
        np.array([0, len(ids)], np.int32),
        np.array([table], np.int32),
        np.array(range(len(ids)) if with_logits is None else with_logits, np.int32),
    )


def tokens(ids, positions, tables, with_logits=None):
    """One token of each of several sequences."""
    longest = max(map(len, tables))
    return StepInput(
        np.array(ids, np.int32),
        np.array(positions, np.int32),
        np.arange(len(ids) + 1, dtype=np.int32),
        np.array([[*t, *[NO_BLOCK] * (longest - len(t))] for t in tables], np.int32),
        np.array(range(len(ids)) if with_logits is None else with_logits, np.int32),
    )


def ids_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, count)


def expected(ids, config=CONFIG, tensors=TENSORS):
    """Logits of every position from the numpy network."""
    blocks = -(-len(ids) // BLOCK)
    return NumpyRunner(config, tensors, 64, BLOCK).step(prompt(ids, range(blocks)))


def close(got, wanted):
    assert got.dtype == np.float32
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE * np.abs(wanted).max())


@pytest.mark.slow
def test_a_prompt_in_one_piece_and_in_several(runner):
    ids = ids_of(37)
    wanted = expected(ids)
    table = [7, 3, 50, 0, 63, 12, 13, 14, 2, 40]
    close(runner.step(prompt(ids, table)), wanted)
    table = table[::-1]
    for begin in range(0, 37, 12):
        piece = ids[begin : begin + 12]
        close(runner.step(prompt(piece, table, begin)), wanted[begin : begin + 12])


def test_only_the_logits_asked_for(runner):
    ids, table = ids_of(9), [5, 6, 7]
    everything = runner.step(prompt(ids, table))
    some = runner.step(prompt(ids, table, with_logits=[8, 2]))
    np.testing.assert_array_equal(some, everything[[8, 2]])
    assert runner.step(prompt(ids, table, with_logits=[])).shape == (0, CONFIG.vocab_size)


def prepared(runner, lengths):
    """Sequences of these lengths with all but their last token in the cache."""
    sequences, first = [], 0
    for seed, length in enumerate(lengths):
        ids = ids_of(length, seed)
        table = list(range(first, first + -(-length // BLOCK)))
        first += len(table)
        if length > 1:
            runner.step(prompt(ids[:-1], table, with_logits=[]))
        sequences.append((ids, table))
    return sequences


def test_decoding_a_ragged_batch(runner):
    sequences = prepared(runner, [1, 30, 2, 5, 17, 4, 9, 1, 3, 65])
    got = runner.step(
        tokens([s[-1] for s, _ in sequences], [len(s) - 1 for s, _ in sequences],
               [table for _, table in sequences])
    )  # fmt: skip
    close(got, np.stack([expected(ids)[-1] for ids, _ in sequences]))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 16, 21])
def test_a_row_is_the_same_bits_in_any_batch(runner, count):
    lengths = [1, 30, 2, 5, 17, 4, 9, 1, 3, 21, 8, 6, 2, 2, 7, 5, 1, 11, 3, 4, 12]
    sequences = prepared(runner, lengths)

    def decode(chosen):
        return runner.step(
            tokens([sequences[i][0][-1] for i in chosen], [lengths[i] - 1 for i in chosen],
                   [sequences[i][1] for i in chosen])
        )  # fmt: skip

    everything = np.concatenate([decode([i]) for i in range(len(lengths))])
    order = np.random.default_rng(count).permutation(len(lengths))[:count]
    np.testing.assert_array_equal(decode(order), everything[order])


def test_pieces_of_prompts_are_the_same_bits_alone_and_together(runner):
    ids = [ids_of(length, length) for length in (5, 20, 1, 14)]
    tables = [list(range(5 * i, 5 * i + 5)) for i in range(len(ids))]
    alone = [runner.step(prompt(*each)) for each in zip(ids, tables, strict=True)]
    ends = np.cumsum([len(each) for each in ids])
    together = StepInput(
        np.concatenate(ids).astype(np.int32),
        np.concatenate([np.arange(len(each)) for each in ids]).astype(np.int32),
        np.concatenate([[0], ends]).astype(np.int32),
        np.array(tables, np.int32),
        (ends - 1).astype(np.int32)[::-1].copy(),
    )
    wanted = np.stack([each[-1] for each in alone[::-1]])
    np.testing.assert_array_equal(runner.step(together), wanted)


def test_what_other_blocks_hold_does_not_matter(runner):
    ids, table = ids_of(6), [20, 21]
    before = runner.step(prompt(ids, table))
    for other in range(0, 20):
        runner.step(prompt(ids_of(4, other), [other], with_logits=[]))
    np.testing.assert_array_equal(runner.step(prompt(ids, table)), before)
    last = tokens([ids[5]], [5], [table])
    np.testing.assert_array_equal(runner.step(last), runner.step(last))


def test_copied_blocks_continue_alike_and_apart(runner):
    ids, table = ids_of(7), [30, 31]
    runner.step(prompt(ids, table, with_logits=[]))
    runner.copy_blocks([(31, 41), (30, 40)])
    runner.copy_blocks([])
    both = runner.step(tokens([9, 11], [7, 7], [[30, 31], [40, 41]]))
    close(both, np.stack([expected([*ids, one])[-1] for one in (9, 11)]))


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("window", [1, 5, 70])
@pytest.mark.slow
def test_sliding_window(name, window, device):
    config = tiny_config(seq_length=96, sliding_window=window, num_layers=1)
    tensors = random_tensors(config, 1)
    one = build_runner(name, config, tensors, 32, BLOCK)
    ids, table = ids_of(80), list(range(20))
    wanted = expected(ids, config, tensors)
    close(one.step(prompt(ids[:40], table)), wanted[:40])
    close(one.step(prompt(ids[40:79], table, 40)), wanted[40:79])
    close(one.step(tokens(ids[79:], [79], [table])), wanted[79:])


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.slow
def test_narrow_weights(name, dtype, device):
    """The logits are those of a network that has the narrow weights' values in float32."""
    tensors, scales, values = {}, {}, {}
    for key, value in random_tensors(tiny_config(), 2).items():
        tensors[key] = values[key] = value
        if key.endswith(("wq.weight", "wo.weight", "lm_head.weight", "ffn.w1.weight")) or (
            "ffn.w" in key or "attention.w" in key
        ):
            if dtype == "float16":
                tensors[key] = value.astype(np.float16)
                values[key] = tensors[key].astype(np.float32)
            else:
                scales[key] = np.abs(value).max(-1) / np.float32(127)
                tensors[key] = np.rint(value / scales[key][..., None]).astype(np.int8)
                values[key] = tensors[key] * scales[key][..., None]
    config = tiny_config()
    one = build_runner(name, config, InferWeights(dtype, tensors, scales), 16, BLOCK)
    ids, table = ids_of(12), [0, 1, 2]
    wanted = expected(ids, config, values)
    close(one.step(prompt(ids[:11], table)), wanted[:11])
    close(one.step(tokens(ids[11:], [11], [table])), wanted[11:])


def test_the_cpp_runner_is_taken_where_it_can_be_had(device, monkeypatch):
    weights = InferWeights("float32", TENSORS, {})
    assert select_runner(CONFIG, weights).name == "C++"
    assert select_runner(CONFIG, weights).num_blocks == CONFIG.num_blocks
    monkeypatch.setattr(cpp_runner.decoder_library, "build", lambda: None)
    assert select_runner(CONFIG, weights, 8, 4).name == "graph"
    with pytest.raises(RunnerUnavailableError):
        select_runner(CONFIG, weights, backend="C++")
    ranks = Mesh(ParallelConfig(model_parallel=2))
    with pytest.raises(RunnerUnavailableError, match="one process"):
        select_runner(CONFIG, weights, backend="C++", mesh=ranks)
    with pytest.raises(UserError, match=r"'cuda': allowed are auto, C\+\+, graph"):
        select_runner(CONFIG, weights, backend="cuda")
