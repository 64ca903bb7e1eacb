"""Token-weighted loss and perplexity over a whole data set."""

import dataclasses
import math
import time
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn

from mixtral_ms.config.model import MixtralConfig
from mixtral_ms.data.batch import Batch
from mixtral_ms.errors import UserError
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.progress import progress_bar
from mixtral_ms.train.micro_batches import segment_tensors
from mixtral_ms.train.plan import Loader


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
        batch_size: rows of a full batch.
    """

    def __init__(self, network: MixtralForCausalLM, loader: Loader, batch_size: int) -> None:
        self.loader, self.batch_size = loader, batch_size
        config = dropless(network.config)
        shared = MixtralForCausalLM(config, batch_size=batch_size, share=network)
        self._loss = _SummedLoss(shared)
        self._loss.set_train(False)

    def __call__(self) -> Evaluation:
        """Evaluate over the whole set.

        Raises:
            UserError: the set holds no supervised token.
        """
        start = time.monotonic()
        total, tokens = 0.0, 0
        with progress_bar(len(self.loader), "evaluating", "batch") as bar:
            for batch in self.loader.batches(0):
                full = _filled_up(batch, self.batch_size)
                ids, labels = Tensor(full.input_ids), Tensor(full.labels)
                total += float(self._loss(ids, labels, *segment_tensors(full)))
                tokens += batch.supervised_tokens
                bar.update()
        if tokens == 0:
            raise UserError("the evaluation data holds no supervised token")
        loss = total / tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation(loss, perplexity, tokens, time.monotonic() - start)


def dropless(config: MixtralConfig) -> MixtralConfig:
    """The same network without a capacity limit."""
    moe = dataclasses.replace(config.moe_config, capacity_factor=-1.0, router_jitter=0.0)
    return dataclasses.replace(config, moe_config=moe)


class _SummedLoss(nn.Cell):
    def __init__(self, network: MixtralForCausalLM) -> None:
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(
        self,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        segment_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        return self.network.loss_parts(input_ids_BS, labels_BS, segment_ids_BS, positions_BS)[0]


def _filled_up(batch: Batch, rows: int) -> Batch:
    """A partial batch with unsupervised rows added: one shape compiles once."""
    missing = rows - len(batch.input_ids)
    if missing == 0:
        return batch
    padding = ((0, missing), (0, 0))
    segments = batch.segment_ids
    return Batch(
        np.pad(batch.input_ids, padding),
        np.pad(batch.labels, padding, constant_values=-100),
        None if segments is None else np.pad(segments, padding),
    )
