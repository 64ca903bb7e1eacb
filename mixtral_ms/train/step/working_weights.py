"""Working weights: a copy of the matrices in the compute dtype, cast once a step.

Without them every micro batch casts every matrix, forward and, where layers are recomputed, again.
"""

from mindspore import Parameter, ops

from mixtral_ms.config.derived.parameter_table import row_of
from mixtral_ms.model.mixtral import MixtralForCausalLM


class WorkingWeights:
    """The network that computes: its matrices are copies, all else is the float32 network's own.

    Router, norms, biases and adapters are read in float32. Nor has the embedding a copy: the
    gradients of a token's row are added where it lies, and would be in the compute dtype.

    Args:
        masters: the float32 network, which is updated, evaluated and saved.
        network: made with `share=masters`, like it in all else; it has the copies from now on.
    """

    def __init__(self, masters: MixtralForCausalLM, network: MixtralForCausalLM) -> None:
        self.network = network
        self._trained: list[tuple[Parameter, Parameter]] = []
        self._frozen: list[tuple[Parameter, Parameter]] = []
        copied = {one.name for one in masters.weights() if row_of(one.name).is_cast}
        for cell in network.cells_and_names():
            parameters = cell[1]._params  # noqa: SLF001 - there is no public way
            for attribute, master in list(parameters.items()):
                if master.name in copied:
                    # in one expression, or MindSpore would copy it by the host
                    copy = Parameter(
                        ops.zeros(master.shape, network.dtype), master.name, master.requires_grad
                    )
                    setattr(cell[1], attribute, copy)
                    pairs = self._trained if master.requires_grad else self._frozen
                    pairs.append((master, copy))

    def refresh(self) -> None:
        """Cast what may have changed since the last time; what is frozen only at the first."""
        for master, copy in (*self._trained, *self._frozen):
            ops.assign(copy, ops.cast(master, copy.dtype))
        self._frozen = []
