"""Packed samples train exactly as in rows of their own; on real rows where there are any."""

import json

import numpy as np
import pytest
from helpers.tiny import tiny_config
from mindspore import Tensor

from mixtral_ms.data.conversations.conversation_samples import ConversationOptions, Conversations
from mixtral_ms.data.conversations.sample_packing import lay_out, one_a_record, pack
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.data.readers.row_log import RowLog
from mixtral_ms.data.tokenizer.example_tokenizer import find_example_tokenizer
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.evaluation import Evaluator
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.train_step import TrainStep

pytestmark = pytest.mark.slow

SEQ, SAMPLES, TOLERANCE = 255, 6, 1e-5
CONFIG = {
    "seq_length": SEQ,
    "vocab_size": 32000,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_config": {"capacity_factor": -1.0, "aux_loss_factor": 0.0},
}


@pytest.fixture(scope="module")
def samples(request, tmp_path_factory):
    """Short real rows; made up ones where the data is absent."""
    path = request.config.getoption("--data") / "alpaca" / "alpaca_100.json"
    if not path.is_file():
        path = tmp_path_factory.mktemp("rows") / "a.json"
        answers = ["one two three " * number for number in range(1, 9)]
        rows = [{"instruction": "Count.", "output": one} for one in answers]
        path.write_text(json.dumps(rows))
    options = ConversationOptions(str(find_example_tokenizer()), SEQ, "mistral")
    found = Conversations([path], options, RowLog()).samples(lambda _: None)
    return [one for one in found if len(one.ids) < 120][:SAMPLES]


def batch_of(rows, packed):
    columns = lay_out(rows, SEQ + 1, 0, packed=packed)
    segments = columns["segment_ids"][:, :-1] if packed else None
    labels = np.ascontiguousarray(columns["labels"][:, 1:])
    return Batch(np.ascontiguousarray(columns["input_ids"][:, :-1]), labels, segments)


@pytest.fixture(scope="module")
def batches(samples):
    """The same samples one a row, and packed."""
    packed = list(pack(samples, SEQ + 1))
    assert len(packed) < len(samples) // 2 + 1
    return batch_of(list(one_a_record(samples)), packed=False), batch_of(packed, packed=True)


def network(batch):
    config = tiny_config(**CONFIG, batch_size=len(batch.input_ids))
    return MixtralForCausalLM(config, seed=3)


def gradients_of(batch):
    """Result and gradients of one step."""
    net = network(batch)
    optimizer = AdamW(net.trainable_params(), eps=1e-2)
    kept = {}

    def keep(gradients, learning_rate, scale):
        names = [one.name for one in net.trainable_params()]
        kept.update(zip(names, (one.asnumpy() * scale for one in gradients), strict=True))

    optimizer.update = keep
    return TrainStep(net, optimizer)([batch], 0.01), kept


def test_loss_and_every_gradient_are_equal(batches, graph, record_error):
    (plain, expected), (packed, got) = map(gradients_of, batches)
    assert plain.tokens == packed.tokens > 50
    record_error("loss", packed.parts["lm_loss"], plain.parts["lm_loss"], TOLERANCE)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        record_error(name, value, expected[name], TOLERANCE)


def test_each_tokens_logits_are_equal_and_neighbours_matter_without_segments(
    batches, pynative, record_error
):
    plain, packed = batches
    logits = [_supervised_logits(one, one.segment_ids) for one in batches]
    record_error("logits", logits[1], logits[0], TOLERANCE)
    seen = _supervised_logits(packed, None)
    assert np.abs(seen - logits[0]).max() > 100 * TOLERANCE
    assert plain.segment_ids is None


def _supervised_logits(batch, segments):
    """Logits of the supervised tokens by sample and position: the labels tell them apart."""
    net = network(batch)
    net.set_train(False)
    packed = () if segments is None else (Tensor(segments), Tensor(batch.positions))
    logits = net(Tensor(batch.input_ids), *packed).asnumpy()
    found = {}
    for ids, labels, row, segment in zip(
        batch.input_ids,
        batch.labels,
        logits,
        batch.input_ids if batch.segment_ids is None else batch.segment_ids,
        strict=True,
    ):
        begins = 0
        for position, label in enumerate(labels):
            if (
                batch.segment_ids is not None
                and position
                and segment[position] != segment[position - 1]
            ):
                begins = position
            if label >= 0:
                found[tuple(ids[begins : position + 1])] = row[position]
    return np.stack([found[key] for key in sorted(found)])


def test_evaluation_is_equal_and_fills_up_its_last_batch(batches, graph, record_error):
    plain, packed = batches
    losses = []
    for batch in batches:
        # half a batch is missing and is filled up
        evaluate = Evaluator(network(batch), _Once(batch), len(batch.input_ids) + 1)
        losses.append(evaluate())
    assert losses[0].tokens == losses[1].tokens == plain.supervised_tokens
    record_error("loss", losses[1].loss, losses[0].loss, TOLERANCE)
    assert packed.supervised_tokens == plain.supervised_tokens


class _Once:
    """A loader of one batch."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 1

    def batches(self, _epoch, _start_batch=0):
        yield self.batch
