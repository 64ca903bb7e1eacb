"""AdamW with decoupled weight decay (arXiv 1711.05101), its state in float32."""

from collections.abc import Mapping

import numpy as np
from mindspore import Parameter, Tensor, ops

from mixtral_ms.errors import UserError
from mixtral_ms.kernels.select import select_update
from mixtral_ms.parallel.comm.device import zero_parameter
from mixtral_ms.parallel.comm.process_groups import gather_tensors, own_part
from mixtral_ms.parallel.grid.mesh import ProcessGroup
from mixtral_ms.parallel.grid.sharding_rules import MOMENTS


class AdamW:
    """AdamW on a network's parameters; norms and biases are not decayed.

    Args:
        parameters: what to train.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, times the learning rate, of weights with two axes or more.
        shards: by parameter, the replicas that share out its moments along axis 0 (ZeRO-1, section
            5.1 of arXiv 1910.02054): each updates its part, then all gather the parts.
        fused: use the device's operator for it, where it has one.
    """

    def __init__(
        self,
        parameters: list[Parameter],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        shards: Mapping[str, ProcessGroup] | None = None,
        *,
        fused: bool = True,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.updates = 0
        self.shards = dict(shards or {})
        self._parameters = parameters
        self._first, self._second = (
            [self._zeros_like(p, prefix) for p in parameters] for prefix in MOMENTS
        )
        # Made now: a Parameter made of a tensor is read by the host.
        self._parts: dict[tuple[int, ...], Parameter] = {}
        for parameter, moment in zip(parameters, self._first, strict=True):
            if parameter.name in self.shards and moment.shape not in self._parts:
                self._parts[moment.shape] = self._zeros_like(parameter, "part_of.")
        self.kernels = select_update(fused=fused)

    def update(self, gradients: tuple[Tensor, ...], learning_rate: float, scale: float) -> None:
        """One step on gradients * scale; each gradient has the shape of its moments.

        The kernels correct no bias. The step size, eps and decay are
        therefore chosen so that the result is that of the corrected formula:
        m / c1 / (sqrt(v / c2) + eps) = (m / (sqrt(v) + eps sqrt(c2))) sqrt(c2) / c1.
        """
        self.updates += 1
        # The kernel's rates are float32: corrected with other ones, 0.999 would be 1e-5 off.
        beta1, beta2 = (float(np.float32(beta)) for beta in self.betas)
        root2 = (1.0 - beta2**self.updates) ** 0.5
        correction = root2 / (1.0 - beta1**self.updates)
        rates = (learning_rate * correction, *self.betas, self.eps * root2)
        decay = self.weight_decay / correction
        # Operator by operator, not as a graph: a graph holds its inputs until it runs again, and
        # the gradients of the next step would stand beside those of this one.
        for parameter, first, second, gradient in zip(
            self._parameters, self._first, self._second, gradients, strict=True
        ):
            decayed = decay if parameter.ndim > 1 else 0.0
            group = self.shards.get(parameter.name)
            own = parameter if group is None else self._part(group, parameter)
            self.kernels.adamw(own, (first, second), gradient, (*rates, decayed, scale))
            if group is not None:
                ops.assign(parameter, ops.concat(gather_tensors(group, own)))

    def _part(self, group: ProcessGroup, parameter: Parameter) -> Parameter:
        """This rank's part of a parameter, in memory that all parts of that shape take in turn.

        A Parameter of its own for each would stay until the garbage collector looks for cycles.
        """
        part = own_part(group, parameter)
        ops.assign(self._parts[part.shape], part)
        return self._parts[part.shape]

    def _zeros_like(self, parameter: Parameter, prefix: str) -> Parameter:
        first, *others = parameter.shape
        group = self.shards.get(parameter.name)
        shape = (first // (group.size if group else 1), *others)
        return zero_parameter(prefix + parameter.name, *shape, requires_grad=False)

    def state_tensors(self) -> dict[str, np.ndarray]:
        """This rank's moments by name: `adam_m.<parameter>` and `adam_v.<parameter>`."""
        return {moment.name: moment.asnumpy() for moment in (*self._first, *self._second)}

    def load_state_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take the moments of a checkpoint.

        Raises:
            UserError: a moment is missing, surplus or of another shape.
        """
        expected = {moment.name: moment for moment in (*self._first, *self._second)}
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
