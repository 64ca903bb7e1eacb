"""The C++ decoder against the network: same numbers, whatever the sizes, chunks and neighbours."""

import numpy as np
import pytest
from helpers.compare import relative_error
from helpers.tiny import tiny_config
from mindspore import Tensor

from mixtral_ms.config.derived.parameter_table import EMBEDDING
from mixtral_ms.errors import UserError
from mixtral_ms.infer.runners.base import NO_BLOCK, StepInput
from mixtral_ms.infer.runners.cpp_runner import CppRunner
from mixtral_ms.infer.runners.infer_weights import InferWeights
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.grid.sharding_rules import parameter_shapes

TOLERANCE = 1e-4
LENGTH = 150  # longer than a piece of the prefill's context
BLOCK = 4
NETWORKS = {
    "plain": {},
    "odd": {
        **{"hidden_size": 21, "intermediate_size": 37, "head_dim": 6, "num_heads": 3},
        **{"n_kv_heads": 1, "moe_config": {"expert_num": 3, "num_experts_chosen": 1}},
    },
    "wide": {
        **{"hidden_size": 40, "head_dim": 18, "num_heads": 10, "n_kv_heads": 2, "vocab_size": 203},
        "moe_config": {"expert_num": 16, "num_experts_chosen": 4},
    },
    "window": {"sliding_window": 13, "theta": 1e6, "n_kv_heads": 4},
    "window over pieces": {"sliding_window": 131},
    "tied": {"tie_word_embeddings": True, "moe_config": {"norm_topk_prob": False}},
    "biases": {"qkv_has_bias": True, "attn_proj_has_bias": True, "num_layers": 3},
    "all experts": {"moe_config": {"expert_num": 5, "num_experts_chosen": 5}},
    "in turn": {"moe_config": {"uniform_routing": True}},
    # sums longer than what a product takes at once
    "deep": {
        **{"hidden_size": 1100, "intermediate_size": 1300, "num_layers": 1},
        "moe_config": {"expert_num": 3},
    },
}


def random_weights(config, seed=0, dtype="float32"):
    """Weights of the given dtype, and the float32 ones that they stand for."""
    rng = np.random.default_rng(seed)
    tensors, scales, exact = {}, {}, {}
    for name, shape in parameter_shapes(config).items():
        spread = min(0.2, shape[-1] ** -0.5)  # long sums stay as moderate as short ones
        value = (rng.standard_normal(shape) * spread).astype(np.float32)
        if "norm" in name:
            value += 1
        tensors[name] = exact[name] = value
        if "norm" in name or "router" in name or name.endswith("bias") or name == EMBEDDING.name:
            continue
        if dtype == "float16":
            tensors[name] = value.astype(np.float16)
            exact[name] = tensors[name].astype(np.float32)
        elif dtype == "int8":
            scale = np.abs(value).max(-1) / 127
            tensors[name] = np.rint(value / scale[..., None]).astype(np.int8)
            scales[name] = scale
            exact[name] = tensors[name] * scale[..., None]
    return InferWeights(dtype, tensors, scales), exact


def runner_of(config, weights, blocks=400, block_size=BLOCK):
    return CppRunner(config, weights, blocks, block_size)


class Sequence:
    """A sequence with cache blocks of its own, shuffled."""

    def __init__(self, runner, ids, seed=0, blocks=None):
        self.runner, self.ids, self.done = runner, np.asarray(ids, np.int32), 0
        count = -(-len(ids) // runner.block_size)
        free = np.arange(runner.num_blocks) if blocks is None else np.asarray(blocks)
        self.table = np.random.default_rng(seed).permutation(free)[:count].astype(np.int32)

    def feed(self, count):
        """Logits of the next `count` ids, as a chunk."""
        positions = np.arange(self.done, self.done + count, dtype=np.int32)
        self.done += count
        with_logits = np.arange(count, dtype=np.int32)
        starts = np.array([0, count], np.int32)
        return self.runner.step(
            StepInput(self.ids[positions], positions, starts, self.table[None], with_logits)
        )


def decode(runner, sequences):
    """Logits of one id of each."""
    width = max(len(s.table) for s in sequences)
    tables = np.full((len(sequences), width), NO_BLOCK, np.int32)
    for table, sequence in zip(tables, sequences, strict=True):
        table[: len(sequence.table)] = sequence.table
    positions = np.array([s.done for s in sequences], np.int32)
    ids = np.array([s.ids[s.done] for s in sequences], np.int32)
    for sequence in sequences:
        sequence.done += 1
    with_logits = np.arange(len(sequences), dtype=np.int32)
    starts = np.arange(len(sequences) + 1, dtype=np.int32)
    return runner.step(StepInput(ids, positions, starts, tables, with_logits))


def feed_all(runner, sequences, counts):
    """Logits of the next ids of each, so many of each, in one step."""
    tables = np.full((len(sequences), max(len(s.table) for s in sequences)), NO_BLOCK, np.int32)
    positions = []
    for table, sequence, count in zip(tables, sequences, counts, strict=True):
        table[: len(sequence.table)] = sequence.table
        positions.append(np.arange(sequence.done, sequence.done + count, dtype=np.int32))
        sequence.done += count
    ids = np.concatenate([s.ids[p] for s, p in zip(sequences, positions, strict=True)])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    with_logits = np.arange(len(ids), dtype=np.int32)
    return runner.step(StepInput(ids, np.concatenate(positions), starts, tables, with_logits))


def random_ids(config, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, length).astype(np.int32)


def network_logits(config, exact, ids):
    network = MixtralForCausalLM(config, batch_size=1, seq_length=len(ids))
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(exact[parameter.name]))
    return network(Tensor(ids[None])).asnumpy()[0]


def network_config(name):
    return tiny_config(pad_token_id=-1, **NETWORKS[name])


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_the_networks(name, record_error):
    config = network_config(name)
    weights, exact = random_weights(config)
    ids = random_ids(config)
    expected = network_logits(config, exact, ids)
    got = Sequence(runner_of(config, weights), ids).feed(LENGTH)
    record_error("logits", got, expected, TOLERANCE)


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("name", ["odd", "wide", "biases"])
def test_short_weights_stand_for_their_values(dtype, name, record_error):
    config = network_config(name)
    weights, exact = random_weights(config, dtype=dtype)
    ids = random_ids(config)
    expected = network_logits(config, exact, ids)
    runner = runner_of(config, weights)
    chunk = Sequence(runner, ids)
    record_error("prefill", chunk.feed(LENGTH), expected, TOLERANCE)
    alone = Sequence(runner, ids)
    got = np.concatenate([alone.feed(1) for _ in range(LENGTH)])
    record_error("decode", got, expected, TOLERANCE)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [2, 3, 140, 5], [64, 64, 22], [149, 1]])
def test_chunks_agree_with_one_pass(name, chunks, record_error):
    config = network_config(name)
    runner = runner_of(config, random_weights(config)[0])
    ids = random_ids(config)
    whole = Sequence(runner, ids).feed(LENGTH)
    parts = Sequence(runner, ids, seed=1)
    record_error("logits", np.concatenate([parts.feed(n) for n in chunks]), whole, TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", ["plain", "odd", "wide", "window", "biases"])
def test_decoding_does_not_depend_on_neighbours(name, dtype):
    config = network_config(name)
    runner = runner_of(config, random_weights(config, dtype=dtype)[0], 33 * 40)
    prompts = [1 + 7 * i % 131 for i in range(32)]
    ids = [random_ids(config, prompt + 6, seed=i) for i, prompt in enumerate(prompts)]

    def prefilled():
        blocks = np.random.default_rng(3).permutation(runner.num_blocks).reshape(33, -1)
        sequences = [Sequence(runner, row, i, blocks[i]) for i, row in enumerate(ids)]
        for sequence, prompt in zip(sequences, prompts, strict=True):
            sequence.feed(prompt)
        return sequences

    alone = [np.concatenate([decode(runner, [s]) for _ in range(6)]) for s in prefilled()]
    for count in (2, 3, 5, 8, 13, 32):
        together = prefilled()[-count:][::-1]
        got = np.stack([decode(runner, together) for _ in range(6)], 1)
        np.testing.assert_array_equal(got, np.stack(alone[-count:][::-1]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_prompts_that_share_a_step_do_not_depend_on_each_other(name, dtype):
    config = network_config(name)
    runner = runner_of(config, random_weights(config, dtype=dtype)[0], 600)
    lengths = [[40, 12, 3, 90, 1, 17], [13, 60, 25, 1, 1, 50]]  # of two chunks of each
    ids = [
        random_ids(config, sum(each), seed=i) for i, each in enumerate(zip(*lengths, strict=True))
    ]
    blocks = np.arange(600).reshape(len(ids), -1)

    def sequences():
        return [Sequence(runner, row, i, blocks[i]) for i, row in enumerate(ids)]

    alone = [
        [s.feed(n) for n in each]
        for s, each in zip(sequences(), zip(*lengths, strict=True), strict=True)
    ]
    together = sequences()
    for chunk, each in enumerate(lengths):
        got = feed_all(runner, together, each)
        np.testing.assert_array_equal(got, np.concatenate([one[chunk] for one in alone]))


def test_a_prompt_does_not_depend_on_its_blocks_or_the_logits_asked_for():
    config = network_config("wide")
    runner = runner_of(config, random_weights(config)[0])
    ids = random_ids(config)
    first = Sequence(runner, ids).feed(LENGTH)
    other = Sequence(runner, ids, seed=5)
    positions = np.arange(LENGTH, dtype=np.int32)
    with_logits = np.array([LENGTH - 1, 7], np.int32)
    starts = np.array([0, LENGTH], np.int32)
    got = runner.step(StepInput(ids, positions, starts, other.table[None], with_logits))
    np.testing.assert_array_equal(got, first[with_logits])


def test_a_step_without_logits_fills_the_cache():
    config = network_config("plain")
    runner = runner_of(config, random_weights(config)[0])
    ids = random_ids(config, 20)
    whole = Sequence(runner, ids).feed(20)
    sequence = Sequence(runner, ids, seed=1)
    none = np.array([], np.int32)
    first = np.arange(12, dtype=np.int32)
    starts = np.array([0, 12], np.int32)
    step = StepInput(ids[:12], first, starts, sequence.table[None], none)
    assert runner.step(step).shape == (0, config.vocab_size)
    sequence.done = 12
    assert relative_error(sequence.feed(8), whole[12:]) < TOLERANCE


def test_a_copied_block_serves_as_its_source():
    config = network_config("plain")
    runner = runner_of(config, random_weights(config)[0], 12)
    ids = random_ids(config, 13)
    source = Sequence(runner, ids, blocks=range(6))
    source.feed(12)
    fork = Sequence(runner, ids, blocks=range(6, 12))
    fork.done = 12
    runner.copy_blocks(zip(source.table[:3].tolist(), fork.table[:3].tolist(), strict=True))
    np.testing.assert_array_equal(decode(runner, [fork]), decode(runner, [source]))


def test_the_cache_of_others_is_left_alone():
    config = network_config("plain")
    runner = runner_of(config, random_weights(config)[0], 40)
    runner._cache[:] = np.nan
    runner._cache[..., config.head_dim :] = 0
    got = Sequence(runner, random_ids(config, 70), blocks=range(5, 30)).feed(70)
    assert np.isfinite(got).all()
    assert np.isnan(runner._cache[:, :, :5, ..., : config.head_dim]).all()
    assert np.isnan(runner._cache[:, :, 30:, ..., : config.head_dim]).all()


def test_nan_in_a_weight_reaches_the_logits():
    config = network_config("plain")
    weights, _ = random_weights(config)
    weights.tensors["model.layers.0.attention.wk.weight"][3] = np.nan
    runner = runner_of(config, weights)
    sequence = Sequence(runner, random_ids(config, 20))
    assert np.isnan(sequence.feed(19)).all()
    assert np.isnan(decode(runner, [sequence])).all()


def test_equal_probabilities_go_to_the_first_experts():
    config = network_config("plain")
    weights, _ = random_weights(config)
    for name, tensor in weights.tensors.items():
        if "router" in name:
            tensor[:] = 0
    ids = random_ids(config, 20)
    before = Sequence(runner_of(config, weights), ids).feed(20)
    for name, tensor in weights.tensors.items():
        if ".ffn.w" in name:
            tensor[2:] = 9  # of the experts that lose the tie
    np.testing.assert_array_equal(Sequence(runner_of(config, weights), ids).feed(20), before)


# wrong input


def valid_step(**changes):
    values = {
        "token_ids_T": [3, 4, 5],
        "positions_T": [0, 1, 2],
        "starts": [0, 3],
        "block_tables_NM": [[2, NO_BLOCK]],
        "logit_tokens_R": [2],
    }
    return StepInput(**{n: np.array(v, np.int32) for n, v in (values | changes).items()})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"token_ids_T": [3, 61, 5]}, "token id 61 is not between 0 and 60"),
        ({"token_ids_T": [3, -1, 5]}, "token id -1"),
        ({"positions_T": [6, 7, 8]}, "position 8 is not between 0 and 7"),
        ({"positions_T": [2, 3, 4]}, "block -1"),
        ({"positions_T": [0, 2, 3]}, "positions"),
        ({"positions_T": [0, 1]}, "positions"),
        ({"block_tables_NM": [[8, 9]]}, "block 8 is not between 0 and 7"),
        ({"block_tables_NM": [[1], [2]]}, "block tables"),
        ({"logit_tokens_R": [3]}, "token with logits 3"),
        ({"starts": [0, 2]}, r"starts \[0, 2\] of 3 tokens"),
        ({"starts": [0, 0, 3], "block_tables_NM": [[1], [2]]}, r"starts \[0, 0, 3\]"),
        ({"starts": [0, 1, 3], "block_tables_NM": [[1], [NO_BLOCK]]}, "block -1"),
        (
            {
                "positions_T": [0, 0, 2],
                "starts": [0, 1, 3],
                "block_tables_NM": [[1], [2]],
            },
            "positions",
        ),
    ],
)
def test_a_wrong_step_is_refused(changes, message):
    config = network_config("plain")
    runner = runner_of(config, random_weights(config)[0], 8)
    assert np.isfinite(runner.step(valid_step())).all()
    with pytest.raises(ValueError, match=message):
        runner.step(valid_step(**changes))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda t: t.pop("lm_head.weight"), "have no 'lm_head.weight'"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T}), r"has shape \(24, 61\)"),
        (lambda t: t.update({EMBEDDING.name: t[EMBEDDING.name].astype(np.float16)}), "is float16"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(int)}), "is int64"),
        (
            lambda t: t.update({"lm_head.weight": np.asfortranarray(t["lm_head.weight"])}),
            "must be row-major",
        ),
    ],
)
def test_a_wrong_weight_is_refused(wrong, message):
    config = network_config("plain")
    weights, _ = random_weights(config)
    wrong(weights.tensors)
    with pytest.raises(UserError, match=message):
        runner_of(config, weights)


def test_int8_weights_need_scales():
    config = network_config("plain")
    weights, _ = random_weights(config, dtype="int8")
    weights.scales.pop("lm_head.weight")
    with pytest.raises(UserError, match="'lm_head.weight' is int8"):
        runner_of(config, weights)


def test_weights_are_used_where_they_lie(tmp_path):
    config = network_config("plain")
    weights, _ = random_weights(config)
    expected = Sequence(runner_of(config, weights), random_ids(config)).feed(LENGTH)
    mapped = {}
    for name, tensor in weights.tensors.items():
        tensor.tofile(tmp_path / name)
        mapped[name] = np.memmap(tmp_path / name, np.float32, "r", shape=tensor.shape)
    runner = runner_of(config, InferWeights("float32", mapped, {}))
    np.testing.assert_array_equal(Sequence(runner, random_ids(config)).feed(LENGTH), expected)
