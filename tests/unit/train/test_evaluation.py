"""Evaluation against logits taken row by row and a plain NumPy cross entropy."""

import dataclasses
import math

import numpy as np
import pytest
from mindspore import Tensor

from mixtral_ms.config import MixtralConfig, MoEConfig
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.errors import UserError
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.evaluation import Evaluator

pytestmark = pytest.mark.usefixtures("pynative")
ROWS, SEQ, VOCAB, IGNORED = 7, 12, 61, -7
CONFIG = MixtralConfig(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=24,
    vocab_size=VOCAB,
    seq_length=SEQ,
    pad_token_id=-1,
    ignore_token_id=IGNORED,
    compute_dtype="float32",
    init_method_std=0.5,  # far from uniform logits
    moe_config=MoEConfig(expert_num=4, num_experts_chosen=2),
)


class Rows:
    """A loader over arrays that keeps its last, partial batch."""

    def __init__(self, ids, labels, batch_size):
        self.ids, self.labels, self.size = ids, labels, batch_size

    def __len__(self):
        return math.ceil(len(self.ids) / self.size)

    def batches(self, _epoch, start_batch=0):
        for start in range(start_batch * self.size, len(self.ids), self.size):
            part = slice(start, start + self.size)
            yield Batch(self.ids[part], self.labels[part])


@pytest.fixture(scope="module")
def rows():
    """Ids, and labels of which each row has another number."""
    random = np.random.RandomState(0)
    ids = random.randint(0, VOCAB, (ROWS, SEQ)).astype(np.int32)
    labels = random.randint(0, VOCAB, (ROWS, SEQ)).astype(np.int32)
    for row in range(ROWS):
        labels[row, : row * 2] = IGNORED
    return ids, labels


def network(**moe):
    config = dataclasses.replace(CONFIG, moe_config=dataclasses.replace(CONFIG.moe_config, **moe))
    return MixtralForCausalLM(config, seed=1, batch_size=1)


def evaluate(net, rows, batch_size):
    return Evaluator(net, Rows(*rows, batch_size), batch_size)()


@pytest.fixture(scope="module")
def reference(rows):
    """(loss, tokens) by float64 log softmax over logits of one row at a time."""
    net, losses = network(), []
    net.set_train(False)
    for ids, labels in zip(*rows, strict=True):
        logits = net(Tensor(ids[None])).asnumpy()[0].astype(np.float64)
        top = logits.max(1, keepdims=True)
        log_probs = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
        losses += [-log_probs[s, label] for s, label in enumerate(labels) if label != IGNORED]
    return float(np.mean(losses)), len(losses)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_the_mean_is_over_tokens_whatever_the_batch_size(rows, reference, batch_size):
    result = evaluate(network(), rows, batch_size)
    loss, tokens = reference
    assert result.tokens == tokens
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_capacity_and_jitter_of_the_training_play_no_part(rows, reference):
    net = network(capacity_factor=0.5, router_jitter=0.5)
    net.set_train()
    assert evaluate(net, rows, 3).loss == pytest.approx(reference[0], rel=1e-5)


def test_it_sees_the_weights_as_they_are_when_it_is_called(rows):
    net = network()
    evaluator = Evaluator(net, Rows(*rows, 3), 3)
    before = evaluator().loss
    head = net.lm_head.weight
    head.set_data(Tensor(np.zeros(head.shape, np.float32)))
    assert evaluator().loss == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert before != pytest.approx(math.log(VOCAB), rel=1e-2)


def test_data_without_a_target_is_refused(rows):
    nothing = np.full_like(rows[1], IGNORED)
    with pytest.raises(UserError, match="no supervised token"):
        evaluate(network(), (rows[0], nothing), 3)
