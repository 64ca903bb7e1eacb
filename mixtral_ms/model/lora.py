"""Low-rank adapters (LoRA, arXiv 2106.09685) beside weights that stay as they are."""

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.config.sections.lora_section import PetSection
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.kernels.kernel_choice import KernelChoice
from mixtral_ms.model.moe.routed_experts import ExpertWeight, RoutedExperts
from mixtral_ms.model.nn.hash_noise import hash_uniform
from mixtral_ms.model.nn.linear import Linear, empty_parameter
from mixtral_ms.parallel.comm.graph_primitives import zeros_like
from mixtral_ms.parallel.grid.sharding_rules import LORA_A, LORA_B

_KEY = ".lora_key"
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
        self.lora_a = empty_parameter("lora_a", pet.lora_rank, inputs)
        self.lora_b = empty_parameter("lora_b", outputs, pet.lora_rank)
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
        kept = hash_uniform(*x.shape, self.lora_key, self.salt) >= self.dropout
        return ops.where(kept, x / (1.0 - self.dropout), zeros_like(x))


def add_adapters(
    layers: nn.CellList, config: MixtralConfig, kernels: KernelChoice, first_layer: int = 0
) -> None:
    """Give the modules that pet_config means their adapters, before the network is filled."""
    pet = config.pet_config
    adapted = set(pet.modules(config.num_layers))
    for number, layer in enumerate(layers, first_layer):
        prefix, salt = f"model.layers.{number}.", number * _SALTS_PER_LAYER
        for index, name in enumerate(("wq", "wk", "wv", "wo")):
            if f"{prefix}attention.{name}" in adapted:
                linear = LoraLinear(getattr(layer.attention, name), pet, salt + index)
                setattr(layer.attention, name, linear)
        routed = layer.feed_forward.routed_experts
        prefix += "feed_forward.routed_experts."
        if f"{prefix}router.dense" in adapted:
            routed.router.dense = LoraLinear(routed.router.dense, pet, salt + 4)
        names = [name for name in ("w1", "w3", "w2") if f"{prefix}ffn.{name}" in adapted]
        _adapt_experts(routed, names, pet, salt + 5, kernels)


def _adapt_experts(
    routed: RoutedExperts, names: list[str], pet: PetSection, salt: int, kernels: KernelChoice
) -> None:
    """Experts that compute no gradient of their weights, and have these adapters."""
    for name in ("w1", "w3", "w2"):
        weight: ExpertWeight = getattr(routed.ffn, name)
        experts, outputs, inputs = weight.weight.shape
        if name in names:
            weight.lora_a = empty_parameter("lora_a", experts, pet.lora_rank, inputs)
            weight.lora_b = empty_parameter("lora_b", experts, outputs, pet.lora_rank)
        else:
            weight.lora_a = weight.lora_b = Tensor([0.0], mstype.float32)
    adapted = ("w1" in names, "w3" in names, "w2" in names)
    routed.adapt(kernels.lora_experts(pet.scale, pet.lora_dropout, salt, adapted))


def is_lora_parameter(parameter: Parameter) -> bool:
    """Whether a parameter is an adapter's A or B."""
    return parameter.name.endswith((LORA_A, LORA_B))


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
