"""Low-rank adapters (LoRA, arXiv 2106.09685) beside weights that stay as they are."""

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.derived.parameter_row import is_lora_name
from mixtral_ms.config.derived.parameter_table import (
    EXPERT_DOWN,
    EXPERT_GATE,
    EXPERT_UP,
    KEY,
    OUTPUT,
    QUERY,
    ROUTER,
    VALUE,
    adapted_rows,
)
from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.kernels.kernel_choice import KernelChoice
from mixtral_ms.model.moe.routed_experts import ExpertWeight, RoutedExperts
from mixtral_ms.model.nn.hash_noise import hash_uniform
from mixtral_ms.model.nn.linear import Linear
from mixtral_ms.parallel.comm.device import zero_parameter
from mixtral_ms.parallel.comm.graph_primitives import zeros_like

_KEY = ".lora_key"
_PROJECTIONS = {"wq": QUERY, "wk": KEY, "wv": VALUE, "wo": OUTPUT}
_EXPERTS = {"w1": EXPERT_GATE, "w3": EXPERT_UP, "w2": EXPERT_DOWN}
"""Attributes of the cells, in the order of the experts' arguments."""
_SALTS_PER_LAYER = 8  # one for each module that drops values


class LoraLinear(Linear):
    """y = x W^T + b + scale * dropout(x) A^T B^T.

    Args:
        linear: the layer that it stands for, its weights not yet filled.
        pet: rank, scale and dropout.
        salt: a number of this layer's own, so that layers drop different values.
    """

    def __init__(self, linear: Linear, pet: PetSection, salt: int) -> None:
        outputs, inputs = linear.weight.shape
        bias = linear.bias is not None
        super().__init__(inputs, outputs, bias, linear.compute_dtype, linear.join)
        self.scale, self.dropout, self.salt = pet.scale, pet.lora_dropout, salt
        self.lora_a = zero_parameter("lora_a", pet.lora_rank, inputs)
        self.lora_b = zero_parameter("lora_b", outputs, pet.lora_rank)
        if self.dropout > 0:
            self.lora_key = Parameter(
                Tensor(0, mstype.float32), name="lora_key", requires_grad=False
            )

    def products(self, x: Tensor) -> Tensor:
        """x W^T + scale * dropout(x) A^T B^T of (N, inputs)."""
        y = self.product(x, ops.cast(self.weight, self.compute_dtype))
        if self.dropout > 0 and self.training:
            x = self._dropped(x)
        low = self.product(x, ops.cast(self.lora_a, self.compute_dtype))
        return y + self.scale * self.product(low, ops.cast(self.lora_b, self.compute_dtype))

    def _dropped(self, x: Tensor) -> Tensor:
        kept = hash_uniform(x.shape[0], x.shape[1], self.lora_key, self.salt) >= self.dropout
        return ops.where(kept, x / (1.0 - self.dropout), zeros_like(x))


def add_adapters(
    layers: nn.CellList, config: MixtralConfig, kernels: KernelChoice, first_layer: int = 0
) -> None:
    """Give the modules that pet_config means, if any, their adapters; for an unfilled network."""
    if (pet := config.pet_config) is None:
        return
    adapted = set(adapted_rows(pet, config.num_layers))
    for number, layer in enumerate(layers, first_layer):
        salt, routed = number * _SALTS_PER_LAYER, layer.feed_forward.routed_experts
        for index, (name, row) in enumerate(_PROJECTIONS.items()):
            if (number, row) in adapted:
                linear = LoraLinear(getattr(layer.attention, name), pet, salt + index)
                setattr(layer.attention, name, linear)
        if (number, ROUTER) in adapted:
            routed.router.dense = LoraLinear(routed.router.dense, pet, salt + 4)
        names = [name for name, row in _EXPERTS.items() if (number, row) in adapted]
        _adapt_experts(routed, names, pet, salt + 5, kernels)


def _adapt_experts(
    routed: RoutedExperts, names: list[str], pet: PetSection, salt: int, kernels: KernelChoice
) -> None:
    """Experts that compute no gradient of their weights, and have these adapters."""
    for name in _EXPERTS:
        weight: ExpertWeight = getattr(routed.ffn, name)
        experts, outputs, inputs = weight.weight.shape
        if name in names:
            weight.lora_a = zero_parameter("lora_a", experts, pet.lora_rank, inputs)
            weight.lora_b = zero_parameter("lora_b", experts, outputs, pet.lora_rank)
        else:
            weight.lora_a = weight.lora_b = Tensor([0.0], mstype.float32)
    adapted = ("w1" in names, "w3" in names, "w2" in names)
    routed.adapt(kernels.lora_experts(pet.scale, pet.lora_dropout, salt, adapted))


def is_lora_parameter(parameter: Parameter) -> bool:
    """Whether a parameter is an adapter's A or B."""
    return is_lora_name(parameter.name)


def freeze_weights(network: nn.Cell) -> None:
    """Leave only the adapters to be trained."""
    for parameter in network.get_parameters():
        if not is_lora_parameter(parameter):
            parameter.requires_grad = False


def set_dropout_keys(network: nn.Cell, key: float) -> None:
    """Choose what is dropped until the next call."""
    for parameter in network.get_parameters():
        if parameter.name.endswith(_KEY):
            parameter.set_data(Tensor(key, mstype.float32))
