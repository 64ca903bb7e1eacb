"""`pet_config`: parameter-efficient tuning, of which there is one way, LoRA (arXiv 2106.09685)."""

from dataclasses import dataclass
from typing import Literal

from mixtral_ms.config.sections.fields import advised, inert, unsupported

_NAMES = "target_modules says which modules are adapted"


@dataclass
class PetSection:
    """`model.model_config.pet_config`: trains low-rank adapters and leaves the weights alone.

    An adapted y = x W^T becomes y = x W^T + lora_alpha / lora_rank * dropout(x) A^T B^T.
    """

    pet_type: Literal["lora"] = "lora"
    lora_rank: int = 8
    """Rows of A and columns of B."""
    lora_alpha: float = 16.0
    """The adapter is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.01
    """Part of an adapter's inputs that is dropped in training."""
    target_modules: str = advised(
        ".*wq|.*wk|.*wv|.*wo",
        ": one regular expression, such as '.*wq|.*wv', in place of PEFT's list; ours are "
        "wq, wk, wv, wo of attention, w1, w3, w2 (gate, up, down) of experts",
    )
    """A regular expression for the whole name of what is adapted: model.layers.0.attention.wq (wk,
    wv, wo) and model.layers.0.feed_forward.routed_experts.ffn.w1 (w2, w3). The router is adapted
    only by a pattern that has the word router."""
    lora_a_init: str = inert("kaiming_uniform", "A is drawn from uniform(-1, 1) / sqrt(inputs)")
    lora_b_init: Literal["zero", "zeros"] = inert("zero", "B begins with zeros")
    param_init_type: str = inert("float32", "adapters are kept in float32")
    compute_dtype: str = inert("float32", "adapters are computed in model_config.compute_dtype")
    exclude_layers: str | list | None = unsupported(None, _NAMES)
    freeze_include: str | list | None = unsupported(None, _NAMES)
    freeze_exclude: str | list | None = unsupported(None, _NAMES)

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by."""
        return self.lora_alpha / self.lora_rank
