"""The seam for a training objective: the plain, accumulated and pipelined steps, and evaluation.

Legend: B batch, S sequence, D hidden, L layers of the stage.
"""

from collections.abc import Callable, Sequence

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.errors import UserError
from mixtral_ms.model.mixtral import MixtralForCausalLM


class Objective(nn.Cell):
    """A training objective (loss function): sums over targets, and the routers' losses.

    The loss is the sum of its parts, their factors included: what `end_parts` gives, as means over
    the targets of a step, and the routers' aux and z losses, as means over its micro batches. A
    subclass says what a target is and what is computed of the last hidden states; with that it
    trains on every layout.

    Args:
        network: whose outputs the loss is of; of a pipeline, this rank's stage of it.
    """

    batch_fields: tuple[str, ...] = ("labels",)
    """Fields of a Batch, beside what the network reads, that `end_parts` gets in this order."""
    part_names: tuple[str, ...]
    """What each part that `end_parts` gives is called in metrics.jsonl."""

    def __init__(self, network: MixtralForCausalLM) -> None:
        super().__init__(auto_prefix=False)
        self.network = network
        self.is_last_stage = network.mesh.is_last_stage
        self.part_count = len(self.part_names)

    def end_parts(self, hidden_BSD: Tensor, *fields: Tensor) -> tuple[Tensor, ...]:
        """The parts of a micro batch, each a sum over its targets. In the last stage's graph."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> int:
        """How many there are in a batch: its supervised tokens, unless a subclass counts others."""
        return batch.supervised_tokens

    def construct(  # noqa: PLR0913, PLR0917 - of a micro batch and of a stage
        self,
        hidden_BSD: Tensor | None,
        dy_BSD: Tensor | None,
        per_target: Tensor,
        per_micro: Tensor,
        input_ids_BS: Tensor,
        segment_ids_BS: Tensor | None,
        positions_BS: Tensor | None,
        *fields: Tensor,
    ) -> tuple:
        """The scalar whose gradient a micro batch adds, then all parts.

        Args:
            hidden_BSD: what the stage before gave; the first one does not read it.
            dy_BSD: the gradient of what this stage gives; the last one does not read it.
            per_target: weight of the parts at the network's end.
            per_micro: weight of the routers' losses.
            input_ids_BS: with segments and positions the network's inputs.
            fields: `batch_fields`.
        """
        out_BSD, *parts = self.stage_parts(
            hidden_BSD, input_ids_BS, segment_ids_BS, positions_BS, *fields
        )
        scalar = self.weigh(parts, per_target, per_micro)
        if not self.is_last_stage:
            weighted = ops.cast(out_BSD, mstype.float32) * ops.cast(dy_BSD, mstype.float32)
            scalar = scalar + ops.sum(weighted)
        return (scalar, *parts)

    def stage_parts(
        self,
        hidden_BSD: Tensor | None,
        input_ids_BS: Tensor,
        segment_ids_BS: Tensor | None,
        positions_BS: Tensor | None,
        *fields: Tensor,
    ) -> tuple:
        """The stage's hidden states, and all parts of a micro batch.

        Those are the parts at the network's end (0 before the last stage) and, of the stage's
        layers, aux_L, z_L, load_LE, dropped_L and entropy_L.
        """
        hidden_BSD, *router = self.network.model(
            input_ids_BS, segment_ids_BS, positions_BS, hidden_BSD
        )
        if self.is_last_stage:
            return (hidden_BSD, *self.end_parts(hidden_BSD, *fields), *router)
        return (hidden_BSD, *((Tensor(0.0, mstype.float32),) * self.part_count), *router)

    def weigh(self, parts: Sequence[Tensor], per_target: Tensor, per_micro: Tensor) -> Tensor:
        """The weighted sum of all parts."""
        router = ops.sum(parts[self.part_count]) + ops.sum(parts[self.part_count + 1])
        return self.summed(parts) * per_target + router * per_micro

    def summed(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of the parts at the network's end."""
        total = parts[0]
        for index in range(1, self.part_count):
            total = total + parts[index]
        return total

    def means(
        self, sums: Sequence[float], router_sums: Sequence[float], targets: int, micro_batches: int
    ) -> dict[str, float]:
        """What a step reports: each part's mean by name, which add up to the loss.

        Args:
            sums: of the parts at the network's end, over the step.
            router_sums: of the aux and z losses of all layers, over the step.
            targets: of the step, on all ranks.
            micro_batches: of the step, on all ranks.
        """
        means = [float(one) / targets for one in sums]
        means += [float(one) / micro_batches for one in router_sums]
        return dict(zip((*self.part_names, "aux_loss", "z_loss"), means, strict=True))


MakeObjective = Callable[[MixtralForCausalLM], Objective]
"""Gives the objective of a network: a subclass of Objective, or a partial one with its factors."""


def network_tensors(
    network: MixtralForCausalLM, batch: Batch
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the network reads of a batch; no segments and positions where rows are one sample."""
    segments, positions = batch.segment_ids, batch.positions
    if segments is None or positions is None:
        return Tensor(batch.input_ids), None, None
    if (packed := network.model.packed_samples) is not None:
        segments = packed.prepared(segments, positions)
    return Tensor(batch.input_ids), Tensor(segments), Tensor(positions)


def batch_tensors(objective: Objective, batch: Batch) -> tuple[Tensor | None, ...]:
    """What the network and its objective read of a batch, as `Objective.stage_parts` takes it."""
    _require_fitting(objective.network, batch)
    fields = [Tensor(getattr(batch, name)) for name in objective.batch_fields]
    return (*network_tensors(objective.network, batch), *fields)


def _require_fitting(network: MixtralForCausalLM, batch: Batch) -> None:
    prepared = network.model.packed_samples
    limit = None if prepared is None or batch.segment_ids is None else prepared.limit
    if limit is not None and batch.samples > limit:
        raise UserError(
            f"a micro batch holds {batch.samples} packed samples, and the device's attention takes "
            f"{limit} of {batch.input_ids.size} tokens: pack into records of fewer samples (a "
            "shorter --seq_length, or without --packing), or lower runner_config.batch_size"
        )
