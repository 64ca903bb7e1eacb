"""AdamW with decoupled weight decay (arXiv 1711.05101), its state in float32."""

from collections.abc import Mapping

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.errors import UserError

FIRST_MOMENT, SECOND_MOMENT = "adam_m.", "adam_v."


class AdamW:
    """AdamW on a network's parameters; norms and biases are not decayed.

    Args:
        parameters: what to train.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, times the learning rate, of weights with two axes or more.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.updates = 0
        self._names = [p.name for p in parameters]
        self._cells = {
            scaled: _Update(parameters, betas, weight_decay, scaled) for scaled in (False, True)
        }
        self._moments = self._cells[True].share_moments(self._cells[False])

    def update(self, gradients: tuple[Tensor, ...], learning_rate: float, scale: float) -> None:
        """One step on gradients * scale.

        MindSpore's fused AdamWeightDecay corrects no bias. Its step size, eps and decay are
        therefore chosen so that its result is that of the corrected formula:
        m / c1 / (sqrt(v / c2) + eps) = (m / (sqrt(v) + eps sqrt(c2))) sqrt(c2) / c1.
        """
        self.updates += 1
        root2 = (1.0 - self.betas[1] ** self.updates) ** 0.5
        correction = root2 / (1.0 - self.betas[0] ** self.updates)
        # Multiplying by exactly 1 would still read and write every gradient once more.
        cell = self._cells[scale != 1.0]
        cell(
            Tensor(learning_rate * correction, mstype.float32),
            Tensor(self.eps * root2, mstype.float32),
            Tensor(self.weight_decay / correction, mstype.float32),
            Tensor(scale, mstype.float32),
            *gradients,
        )

    def state_tensors(self) -> dict[str, np.ndarray]:
        """Moments by name: `adam_m.<parameter>` and `adam_v.<parameter>`."""
        return {
            prefix + name: moment.asnumpy()
            for prefix, moments in self._moments.items()
            for name, moment in zip(self._names, moments, strict=True)
        }

    def load_state_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take the moments of a checkpoint.

        Raises:
            UserError: a moment is missing, surplus or of another shape.
        """
        expected = {
            prefix + name: moment
            for prefix, moments in self._moments.items()
            for name, moment in zip(self._names, moments, strict=True)
        }
        differing = sorted(expected.keys() ^ tensors.keys())
        if differing:
            raise UserError(
                f"the optimizer state does not fit the network: {len(differing)} moments are in "
                f"only one of them, the first is {differing[0]!r}"
            )
        for name, moment in expected.items():
            if tuple(tensors[name].shape) != moment.shape:
                raise UserError(
                    f"{name} has shape {tuple(tensors[name].shape)} in the checkpoint, "
                    f"{moment.shape} in the network"
                )
            # A copy of its own: the update writes in place, and the source may be a mapped file.
            moment.set_data(Tensor.from_numpy(np.array(tensors[name], np.float32)))


class _Update(nn.Cell):
    """The fused update of every parameter as one graph."""

    def __init__(
        self, parameters: list[Parameter], betas: tuple, weight_decay: float, scaled: bool
    ) -> None:
        super().__init__(auto_prefix=False)
        self.parameters_ = ParameterTuple(parameters)
        self.first = self.second = None
        self.decayed = tuple(weight_decay != 0.0 and len(p.shape) > 1 for p in parameters)
        self.scaled = scaled
        self.beta1 = Tensor(betas[0], mstype.float32)
        self.beta2 = Tensor(betas[1], mstype.float32)
        self.fused = ops.AdamWeightDecay()

    def share_moments(self, other: "_Update") -> dict[str, ParameterTuple]:
        """Make the moments, one set for both cells."""
        for owner in (self, other):
            owner.first = self.first or _zeros(self.parameters_, FIRST_MOMENT)
            owner.second = self.second or _zeros(self.parameters_, SECOND_MOMENT)
        return {FIRST_MOMENT: self.first, SECOND_MOMENT: self.second}

    def construct(
        self,
        learning_rate: Tensor,
        eps: Tensor,
        decay: Tensor,
        scale: Tensor,
        *gradients: Tensor,
    ) -> bool:
        for i in range(len(self.parameters_)):
            gradient = gradients[i] * scale if self.scaled else gradients[i]
            self.fused(
                self.parameters_[i],
                self.first[i],
                self.second[i],
                learning_rate,
                self.beta1,
                self.beta2,
                eps,
                decay if self.decayed[i] else Tensor(0.0, mstype.float32),
                gradient,
            )
        return True


def _zeros(parameters: ParameterTuple, prefix: str) -> ParameterTuple:
    return ParameterTuple(
        [
            Parameter(
                Tensor.from_numpy(np.zeros(p.shape, np.float32)),
                name=prefix + p.name,
                requires_grad=False,
            )
            for p in parameters
        ]
    )
