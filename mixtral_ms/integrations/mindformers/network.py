"""Our network as a MindFormers `PreTrainedModel`.

Legend: B sequences of a batch, S sequence, D hidden, V vocabulary.
"""

from typing import Any

import mindspore
import numpy as np
from mindformers.models import PreTrainedModel
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.errors import UserError
from mixtral_ms.integrations.mindformers.config import MindFormersMixtralConfig, network_config
from mixtral_ms.integrations.mindformers.cpu import work_around_missing_operators
from mixtral_ms.log import get_logger
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.train.evaluation import dropless
from mixtral_ms.train.objectives.causal_lm import CausalLMLoss


class MindFormersMixtral(PreTrainedModel):
    """Mixtral that MindFormers' Trainer trains, evaluates and generates with.

    A graph for training has a fixed batch size, from which the experts' slots are counted. So
    there is a network for each batch size, all with the same parameters: the first with the
    configuration's `batch_size`, others as `fit_batch_size` is told. A smaller batch is filled
    up with padding. Evaluation and generation drop no token, as in our Trainer, whatever the
    capacity factor: one network more, which takes any batch size.

    Args:
        config: MindFormers' configuration.

    Raises:
        UserError: the configuration asks for something that Mixtral has not.
    """

    config_class = MindFormersMixtralConfig
    base_model_prefix = "model"

    def __init__(self, config: MindFormersMixtralConfig) -> None:
        # Without prefixes: parameters keep the names that checkpoints have.
        super().__init__(config, auto_prefix=False)
        work_around_missing_operators(self)
        if config.use_past:
            get_logger().info(
                "use_past True has no effect inside MindFormers: each new token reads the whole "
                "text again; mixtral-ms predict has a cache"
            )
            config.use_past = False
        self._sizes = network_config(config)
        first = MixtralForCausalLM(self._sizes, seed=mindspore.get_seed() or 0)
        self.batch_sizes: tuple[int, ...] = (self._sizes.batch_size,)
        self.losses = _cells(CausalLMLoss(first))
        self.answering = MixtralForCausalLM(dropless(self._sizes), share=first)
        self.seq_length, self.input_sliced_sig = config.seq_length, config.input_sliced_sig
        self.pad_token_id, self.ignore_token_id = config.pad_token_id, config.ignore_token_id
        self.load_checkpoint(config)

    def fit_batch_size(self, batch_size: int) -> None:
        """Make it take training batches of this size."""
        if batch_size in self.batch_sizes:
            return
        shared = self.losses[0].network
        network = MixtralForCausalLM(self._sizes, batch_size=batch_size, share=shared)
        loss = CausalLMLoss(network)
        loss.set_train(self.training)
        sizes = (*self.batch_sizes, batch_size)
        known = dict(zip(sizes, (*self.losses, loss), strict=True))
        self.batch_sizes = tuple(sorted(known))
        self.losses = _cells(*(known[size] for size in self.batch_sizes))

    def prepare_inputs_for_generation(self, input_ids: np.ndarray, **kwargs: Any) -> dict:
        """The padded ids, and how many each sequence has: only the last one needs logits."""
        lengths = kwargs["valid_length_each_example"]
        return {
            "input_ids": Tensor(input_ids, mstype.int32),
            "batch_valid_length": Tensor(lengths, mstype.int32),
        }

    def prepare_inputs_for_predict_layout(self, input_ids: np.ndarray, **_: Any) -> tuple:
        """Inputs that show MindFormers the shapes when it transforms a checkpoint."""
        return (Tensor(input_ids, mstype.int32),)

    def construct(  # noqa: PLR0913, PLR0917 - names and order of LlamaForCausalLM's inputs
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        input_position: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_embeds: Tensor | None = None,
        init_reset: Tensor | None = None,
        batch_valid_length: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor | tuple:
        """The loss in training; otherwise logits, ids, and 1 for each id that counts.

        Args:
            input_ids: int32 (B, S + 1) in training, (B, S) with labels and `input_sliced_sig`;
                in evaluation either.
            labels: as long as input_ids, each the id at its own position (with `input_sliced_sig`
                the id that follows); None takes input_ids. `ignore_token_id` and padding count
                for nothing.
            batch_valid_length: int32 (B), ids of each sequence; logits are then of its last one.
            loss_mask: as long as labels, 0 where a label does not count.
        """
        if position_ids is not None or attention_mask is not None or input_embeds is not None:
            raise ValueError("Mixtral takes no position_ids, attention_mask or input_embeds")
        if self.training:
            return self._loss(input_ids, labels, loss_mask)
        hidden_BSD = self.answering.model(input_ids[:, : self.seq_length])[0]
        if batch_valid_length is not None:
            hidden_BSD = _last(hidden_BSD, batch_valid_length)
        logits = ops.cast(self.answering.logits(hidden_BSD), mstype.float32)
        if batch_valid_length is None and input_ids.shape[1] > self.seq_length:
            # MindFormers' metrics leave out the last position: here it is the one without logits.
            logits = ops.cat((logits, logits[:, -1:]), 1)
        counts = ops.not_equal(input_ids, self.pad_token_id)
        if labels is not None:
            counts = ops.logical_and(counts, ops.not_equal(labels, self.ignore_token_id))
        return logits, input_ids, ops.cast(counts, mstype.float32)

    def _loss(self, input_ids: Tensor, labels: Tensor | None, loss_mask: Tensor | None) -> Tensor:
        sliced = self.input_sliced_sig and labels is not None
        labels = input_ids if labels is None else labels
        if not sliced:
            input_ids, labels = input_ids[:, :-1], labels[:, 1:]
            loss_mask = None if loss_mask is None else loss_mask[:, 1:]
        counts = ops.not_equal(labels, self.pad_token_id)
        if loss_mask is not None:
            counts = ops.logical_and(counts, loss_mask > 0)
        labels = ops.where(counts, labels, ops.full_like(labels, self.ignore_token_id))
        chosen = _first_with(self.batch_sizes, input_ids.shape[0])
        missing = self.batch_sizes[chosen] - input_ids.shape[0]
        if missing > 0:
            shape = (missing, input_ids.shape[1])
            input_ids = ops.cat((input_ids, _filled(self.pad_token_id, shape)))
            labels = ops.cat((labels, _filled(self.ignore_token_id, shape)))
        return self.losses[chosen](input_ids, labels)[0]


# as in config.py: MindFormers' name for it
MindFormersMixtral.__name__ = "MixtralForCausalLM"


def _cells(*losses: CausalLMLoss) -> nn.CellList:
    return nn.CellList(list(losses), auto_prefix=False)


@ops.constexpr
def _first_with(sizes: tuple[int, ...], sequences: int) -> int:
    """Which of the ascending sizes is the first with room for so many sequences."""
    for index, size in enumerate(sizes):
        if size >= sequences:
            return index
    raise UserError(
        f"a batch of {sequences} sequences, but the network was built for {sizes[-1]} at most: set "
        "batch_size in its configuration, or call its fit_batch_size first"
    )


def _filled(value: int, shape: tuple[int, int]) -> Tensor:
    return ops.full(shape, value, dtype=mstype.int32)


def _last(hidden_BSD: Tensor, lengths_B: Tensor) -> Tensor:
    """(B, 1, D), the hidden state of each sequence's last token."""
    sequences, length, width = hidden_BSD.shape
    last_B = ops.arange(0, sequences * length, length, dtype=mstype.int32) + lengths_B - 1
    hidden_BD = ops.gather(ops.reshape(hidden_BSD, (-1, width)), last_B, 0)
    return ops.reshape(hidden_BD, (sequences, 1, width))
