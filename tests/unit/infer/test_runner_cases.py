"""Every runner beside the network that is trained, over one table of configurations."""

import functools

import mindspore
import numpy as np
import pytest
from helpers.infer_runners import RUNNERS, build_runner
from helpers.network_cases import NETWORKS
from helpers.numpy_runner import random_tensors
from mindspore import Tensor

from mixtral_ms.infer.runners.base import NO_BLOCK, StepInput
from mixtral_ms.model.mixtral import MixtralForCausalLM

TOLERANCE = 1e-4
LENGTH, BLOCK = 14, 4
COMPILED = ("top 4 of 16", "in turn, not renormalised")
"""Where the graph runner makes graphs; in the other cases its cells run one by one, in a second."""
PIECES = (6, 7)  # of the prompt; what is left is one token to decode


@functools.cache
def expected(name):
    """Weights, ids of two sequences, and the network's logits at each of their positions."""
    config = NETWORKS[name].config(LENGTH)
    tensors = random_tensors(config)
    network = MixtralForCausalLM(config, batch_size=1)
    network.set_train(False)
    for parameter in network.get_parameters():
        if parameter.name in tensors:
            parameter.set_data(Tensor(tensors[parameter.name]))
    ids_NT = np.random.default_rng(1).integers(0, config.vocab_size, (2, LENGTH)).astype(np.int32)
    return tensors, ids_NT, [network(Tensor(ids_T[None])).asnumpy()[0] for ids_T in ids_NT]


def step_of(ids_T, positions_T, starts, tables_NM):
    values = (ids_T, positions_T, starts, tables_NM, range(len(ids_T)))
    return StepInput(*[np.array(value, np.int32) for value in values])


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_the_networks(name, runner, record_error):
    tensors, (ids_T, other_T), (logits_TV, other_TV) = expected(name)
    one = build_runner(runner, NETWORKS[name].config(LENGTH), tensors, 16, BLOCK)
    if name not in COMPILED:
        mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    table, begin = [7, 3, 12, 0], 0
    for piece in PIECES:
        positions_T = np.arange(begin, begin + piece)
        got = one.step(step_of(ids_T[positions_T], positions_T, [0, piece], [table]))
        record_error(f"prompt from {begin}", got, logits_TV[positions_T], TOLERANCE)
        begin += piece
    last = LENGTH - 1
    both = step_of([other_T[0], ids_T[last]], [0, last], [0, 1, 2], [[5, *[NO_BLOCK] * 3], table])
    wanted = np.stack([other_TV[0], logits_TV[last]])
    record_error("decoding step", one.step(both), wanted, TOLERANCE)
