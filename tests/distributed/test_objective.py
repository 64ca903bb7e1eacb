"""A second objective, of this file alone, trains on every kind of step as PyTorch says.

Run as a program it is a rank of a pipeline:

    bash scripts/msrun_launcher.sh "tests/distributed/test_objective.py FOLDER 2" 2

reads FOLDER/weights.npz and writes FOLDER/rank_R.npz.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import mindspore
import numpy as np
import pytest
from helpers.distributed import start_job
from helpers.tiny import random_ids, shifted, tiny_config
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.comm.process_groups import connect
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.evaluation import Evaluator
from mixtral_ms.train.objectives.objective import Objective
from mixtral_ms.train.step.adamw import AdamW
from mixtral_ms.train.step.train_step import TrainStep

TOLERANCE, MICRO_BATCHES = 1e-5, 4
SMOOTHING, PENALTY, ROUTER_FACTOR = 0.1, 0.02, 0.05
CONFIG = tiny_config(moe_config={"z_loss_factor": ROUTER_FACTOR})


class SmoothedObjective(Objective):
    """Cross entropy of smoothed labels, weighted by token, and a penalty on large logits."""

    batch_fields = ("labels", "token_weights")
    part_names = ("smoothed_loss", "logit_penalty")

    def end_parts(
        self, hidden_BSD: Tensor, labels_BS: Tensor, token_weights_BS: Tensor
    ) -> tuple[Tensor, Tensor]:
        labels_T = self.network.target_ids(labels_BS)
        weight_T = ops.reshape(token_weights_BS, (-1,)) * ops.cast(labels_T >= 0, mstype.float32)
        logits_BSV = ops.cast(self.network.logits(hidden_BSD), mstype.float32)
        logits_TV = ops.reshape(logits_BSV, (-1, logits_BSV.shape[-1]))
        total_T = ops.logsumexp(logits_TV, 1)
        chosen_T1 = ops.expand_dims(ops.maximum(labels_T, 0), 1)
        chosen_T = ops.reshape(ops.gather_elements(logits_TV, 1, chosen_T1), (-1,))
        towards_T = (1 - SMOOTHING) * chosen_T + SMOOTHING * ops.mean(logits_TV, 1)
        penalty = ops.sum(ops.square(total_T) * weight_T)
        return ops.sum((total_T - towards_T) * weight_T), PENALTY * penalty


@dataclass
class WeightedBatch(Batch):
    """A batch whose tokens count differently."""

    token_weights: np.ndarray | None = None


def micro_batches(count, sequences=CONFIG.batch_size):
    """Each with another number of targets, padding behind."""
    made = []
    for seed in range(count):
        ids = random_ids(CONFIG, seed, sequences)
        labels = shifted(ids)
        labels[:, 3 * seed + 2 :] = -100
        weights = np.random.default_rng(seed).uniform(0.5, 2.0, ids.shape).astype(np.float32)
        made.append(WeightedBatch(ids, labels, token_weights=weights))
    return made


class Batches:
    """A loader of batches."""

    def __init__(self, batches):
        self._batches = batches

    def __len__(self):
        return len(self._batches)

    def batches(self, _epoch, start_batch=0):
        return iter(self._batches[start_batch:])


class Keeper:
    """Stands for an optimizer and keeps what it is given."""

    shards = ()

    def __init__(self, network):
        self.kernels = AdamW(network.trainable_params()).kernels

    def update(self, gradients, *_):
        self.gradients = [np.array(one.asnumpy()) for one in gradients]


def train(weights, batches, mesh=None):
    """A step, and an evaluation of a batch that is not full: what came of them, by name."""
    network = MixtralForCausalLM(CONFIG, mesh=mesh)
    for parameter in network.get_parameters():
        parameter.set_data(Tensor(weights[parameter.name]))
    keeper = Keeper(network)
    result = TrainStep(network, keeper, len(batches), objective=SmoothedObjective)(batches, 0.0)
    names = [parameter.name for parameter in network.trainable_params()]
    found = dict(zip(names, keeper.gradients, strict=True))
    loader = Batches(micro_batches(2, CONFIG.batch_size - 1))
    evaluation = Evaluator(network, loader, CONFIG.batch_size, SmoothedObjective)()
    return (
        found
        | result.parts
        | {
            "loss": result.loss,
            "tokens": result.tokens,
            "evaluation": evaluation.loss,
        }
    )


def expected_of(model, batches):
    """PyTorch's gradients and numbers."""
    import torch  # noqa: PLC0415 - not in the ranks
    from helpers import hf  # noqa: PLC0415

    def parts(batch):
        labels_T = torch.from_numpy(batch.labels.astype(np.int64)).flatten()
        weight_T = torch.from_numpy(batch.token_weights).flatten() * (labels_T >= 0)
        ids_BS = torch.from_numpy(batch.input_ids.astype(np.int64))
        output = model(ids_BS, output_router_logits=True)
        logits_TV = output.logits.flatten(0, 1)
        losses_T = torch.nn.functional.cross_entropy(
            logits_TV, labels_T, reduction="none", label_smoothing=SMOOTHING
        )
        penalty = PENALTY * (logits_TV.logsumexp(1) ** 2 * weight_T).sum()
        layers = [(one.logsumexp(-1) ** 2).mean() for one in output.router_logits]
        return (losses_T * weight_T).sum(), penalty, ROUTER_FACTOR * sum(layers)

    tokens = sum(batch.supervised_tokens for batch in batches)
    smoothed, penalty, router = (sum(one) for one in zip(*map(parts, batches), strict=True))
    means = {"smoothed_loss": smoothed / tokens, "logit_penalty": penalty / tokens}
    means |= {"z_loss": router / len(batches)}
    model.zero_grad()
    loss = sum(means.values())
    loss.backward()
    numbers = {name: value.item() for name, value in means.items()}
    numbers |= {"loss": loss.item(), "tokens": tokens, "aux_loss": 0.0}
    with torch.no_grad():
        held_back = micro_batches(2, CONFIG.batch_size - 1)
        total = sum(float(sum(parts(one)[:2])) for one in held_back)
    numbers["evaluation"] = total / sum(one.supervised_tokens for one in held_back)
    return hf.gradients(model, CONFIG) | numbers


@pytest.fixture(scope="module")
def model():
    from helpers import hf  # noqa: PLC0415 - not in the ranks

    return hf.reference_model(CONFIG)


@pytest.fixture(scope="module")
def weights(model):
    from helpers import hf  # noqa: PLC0415 - not in the ranks

    tensors = {name: value.detach().numpy() for name, value in model.named_parameters()}
    return hf.to_our_names(tensors, CONFIG)


def compare(record_error, got, expected):
    for name, value in got.items():
        record_error(name, value, expected[name], TOLERANCE)


@pytest.mark.parametrize("count", [1, MICRO_BATCHES])
def test_plain_and_accumulated_steps(count, model, weights, graph, record_error):
    batches = micro_batches(count)
    expected, got = expected_of(model, batches), train(weights, batches)
    assert got.keys() == expected.keys()
    compare(record_error, got, expected)


def test_a_pipeline(model, weights, tmp_path, record_error):
    np.savez(tmp_path / "weights.npz", **weights)
    start_job(f"{__file__} {tmp_path} 2", 2, tmp_path)
    expected = expected_of(model, micro_batches(MICRO_BATCHES))
    ranks = [dict(np.load(tmp_path / f"rank_{rank}.npz")) for rank in range(2)]
    assert ranks[0].keys() | ranks[1].keys() == expected.keys()
    for got in ranks:
        compare(record_error, got, expected)


def main(folder: Path, stages: int) -> None:
    """One rank."""
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    mindspore.set_device("CPU")
    mesh: Mesh = connect(ParallelConfig(pipeline_stage=stages, micro_batch_num=MICRO_BATCHES))
    found = train(np.load(folder / "weights.npz"), micro_batches(MICRO_BATCHES), mesh)
    np.savez(folder / f"rank_{mesh.rank}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
