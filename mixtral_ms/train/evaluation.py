"""Token-weighted loss and perplexity over a whole data set."""

import dataclasses
import math
import time
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn

from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.errors import UserError
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.comm.process_groups import compile_together, sum_values
from mixtral_ms.progress import progress_bar
from mixtral_ms.train.step.gradients import segment_tensors
from mixtral_ms.train.step.pipeline_gradients import Neighbours
from mixtral_ms.train.step_plan import Loader


@dataclass(frozen=True)
class Evaluation:
    """Mean cross entropy per supervised token, in nats, its exponential, and what it is of."""

    loss: float
    perplexity: float
    tokens: int
    seconds: float
    exact_perplexity: float | None = None
    """With the weights as they are, where these were rounded to another dtype."""


class Evaluator:
    """Evaluates a network's current weights.

    It has a graph of its own (dropless whatever the training, so that an answer does not depend
    on its neighbours in the batch), but shares the network's parameters.

    Args:
        network: whose weights to evaluate.
        loader: the data, its last batch perhaps partial.
        batch_size: sequences of a full batch.
    """

    def __init__(self, network: MixtralForCausalLM, loader: Loader, batch_size: int) -> None:
        self.loader, self.batch_size = loader, batch_size
        config = dropless(network.config)
        self._network = MixtralForCausalLM(config, batch_size=batch_size, share=network)
        self._loss = _SummedLoss(self._network)
        self._loss.set_train(False)
        self._compiled = False

    def __call__(self) -> Evaluation:
        """Evaluate over the whole set; on several ranks all must call, each over its own records.

        Raises:
            UserError: the set holds no supervised token.
        """
        start = time.monotonic()
        sums = np.zeros(2)
        with progress_bar(len(self.loader), "evaluating", "batch") as bar:
            for batch in self.loader.batches(0):
                sums += self._loss_of(batch), batch.supervised_tokens
                bar.update()
        mesh = self._network.mesh
        if mesh.tensor_index > 0 or not mesh.is_last_stage:
            sums[:] = 0.0  # its tokens are counted on another rank
        total, tokens = sum_values(mesh.world, sums)
        if tokens == 0:
            raise UserError("the evaluation data holds no supervised token")
        loss = float(total / tokens)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation(loss, perplexity, int(tokens), time.monotonic() - start)

    def _loss_of(self, batch: Batch) -> float:
        """Summed cross entropy; 0 before the last stage of a pipeline."""
        full = _filled_up(batch, self.batch_size)
        beside = Neighbours(self._network, full)
        rest = (Tensor(full.input_ids), Tensor(full.labels), *segment_tensors(full))
        if not self._compiled:
            compile_together(self._network.mesh, {self._loss: (beside.empty_input(), *rest)})
            self._compiled = True
        outputs = self._loss(beside.input_of_stage(), *rest)
        beside.pass_on(outputs[0])
        return float(outputs[1])


def dropless(config: MixtralConfig) -> MixtralConfig:
    """The same network without a capacity limit."""
    moe = dataclasses.replace(config.moe_config, capacity_factor=-1.0, router_jitter=0.0)
    return dataclasses.replace(config, moe_config=moe)


class _SummedLoss(nn.Cell):
    """The stage's output and the summed cross entropy."""

    def __init__(self, network: MixtralForCausalLM) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(
        self,
        hidden_BSD: Tensor,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> tuple:
        return self.network.stage_parts(
            hidden_BSD, input_ids_BS, labels_BS, segment_ids_BS, positions_BS
        )[:2]


def _filled_up(batch: Batch, sequences: int) -> Batch:
    """A partial batch with unsupervised sequences added: one shape compiles once."""
    missing = sequences - len(batch.input_ids)
    if missing == 0:
        return batch
    padding = ((0, missing), (0, 0))
    segments = batch.segment_ids
    return Batch(
        np.pad(batch.input_ids, padding),
        np.pad(batch.labels, padding, constant_values=-100),
        None if segments is None else np.pad(segments, padding),
    )
