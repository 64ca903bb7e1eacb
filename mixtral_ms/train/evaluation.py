"""Token-weighted loss and perplexity over a whole data set."""

import dataclasses
import math
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.errors import UserError
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.comm.process_groups import compile_together, sum_values
from mixtral_ms.progress import progress_bar
from mixtral_ms.train.objectives.causal_lm import CausalLMObjective
from mixtral_ms.train.objectives.objective import MakeObjective, Objective, batch_tensors
from mixtral_ms.train.step.gradients import Graphs
from mixtral_ms.train.step.pipeline_gradients import Neighbours
from mixtral_ms.train.step_plan import Loader

_NO_TARGET = (
    "eval_dataset holds no supervised token: all its labels are ignore_token_id or pad_token_id; "
    "give it other data"
)


@dataclass(frozen=True)
class Evaluation:
    """The objective's mean over targets, its exponential, and what it is of.

    Of causal language modelling: cross entropy in nats and perplexity, over supervised tokens. The
    routers' losses are no part of it.
    """

    loss: float
    perplexity: float
    tokens: int
    seconds: float
    exact_perplexity: float | None = None
    """With the weights as they are, where these were rounded to another dtype."""

    def record(self, step: int) -> dict[str, Any]:
        """Its line of metrics.jsonl."""
        return {
            "kind": "eval",
            "step": step,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "eval_seconds": self.seconds,
        }


class Evaluator:
    """Evaluates a network's current weights.

    It has a graph of its own (dropless whatever the training, so that an answer does not depend
    on its neighbours in the batch), but shares the network's parameters.

    Args:
        network: whose weights to evaluate.
        loader: the data, its last batch perhaps partial.
        batch_size: sequences of a full batch.
        objective: what is evaluated.
    """

    def __init__(
        self,
        network: MixtralForCausalLM,
        loader: Loader,
        batch_size: int,
        objective: MakeObjective = CausalLMObjective,
    ) -> None:
        self.loader, self.batch_size = loader, batch_size
        config = dropless(network.config)
        self._network = MixtralForCausalLM(config, batch_size=batch_size, share=network)
        self._objective = objective(self._network)
        self._loss = _SummedLoss(self._objective)
        self._loss.set_train(False)
        self._compiled = False

    def __call__(self) -> Evaluation:
        """Evaluate over the whole set; on several ranks all must call, each over its own records.

        Raises:
            UserError: the set holds no target.
        """
        start = time.monotonic()
        sums = np.zeros(2)
        with progress_bar(len(self.loader), "evaluating", "batch") as bar:
            for batch in self.loader.batches(0):
                sums += self._loss_of(batch), self._objective.targets(batch)
                bar.update()
        mesh = self._network.mesh
        if mesh.tensor_index > 0 or not mesh.is_last_stage:
            sums[:] = 0.0  # its tokens are counted on another rank
        total, tokens = sum_values(mesh.world, sums)
        if tokens == 0:
            raise UserError(_NO_TARGET)
        loss = float(total / tokens)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation(loss, perplexity, int(tokens), time.monotonic() - start)

    def require_targets(self) -> None:
        """Look for the first batch with a target, as a run should not find out behind its steps.

        Raises:
            UserError: there is none on any rank. All must ask.
        """
        with closing(self.loader.batches(0)) as batches:
            own = any(self._objective.targets(batch) for batch in batches)
        if not sum_values(self._network.mesh.world, float(own)):
            raise UserError(_NO_TARGET)

    def graphs(self, batch: Batch) -> Graphs:
        """What is compiled for batches like this one, with its inputs."""
        hidden = Neighbours(self._network, batch).empty_input()
        return {self._loss: (hidden, *batch_tensors(self._objective, batch))}

    def _loss_of(self, batch: Batch) -> float:
        """The objective's sum over targets; 0 before the last stage of a pipeline."""
        full = _filled_up(batch, self.batch_size)
        beside = Neighbours(self._network, full)
        rest = batch_tensors(self._objective, full)
        if not self._compiled:
            compile_together(self._network.mesh, self.graphs(full))
            self._compiled = True
        outputs = self._loss(beside.input_of_stage(), *rest)
        beside.pass_on(outputs[0])
        return float(outputs[1])


def dropless(config: MixtralConfig) -> MixtralConfig:
    """The same network without a capacity limit."""
    moe = dataclasses.replace(
        config.moe_config, capacity_factor=-1.0, router_jitter=0.0, comp_comm_parallel=False
    )
    return dataclasses.replace(config, moe_config=moe)


class _SummedLoss(nn.Cell):
    """The stage's output and the objective's sum over targets."""

    def __init__(self, objective: Objective) -> None:
        super().__init__(auto_prefix=False)
        self.objective = objective

    def construct(self, *inputs: Tensor | None) -> tuple:
        """Of what `Objective.stage_parts` takes."""
        parts = self.objective.stage_parts(*inputs)
        return parts[0], self.objective.summed(parts[1:])


def _filled_up(batch: Batch, sequences: int) -> Batch:
    """A partial batch with unsupervised sequences added: one shape compiles once."""
    missing = sequences - len(batch.input_ids)
    if missing == 0:
        return batch
    filled = {
        name: np.pad(array, ((0, missing), (0, 0)), constant_values=-100 if name == "labels" else 0)
        for name, array in batch.arrays().items()
        if name != "positions"  # made anew of the segments
    }
    return dataclasses.replace(batch, positions=None, **filled)
