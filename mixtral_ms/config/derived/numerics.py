"""What weights were trained with that shows in no shape: compared wherever weights are taken up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixtral_ms.config.sections.model_section import MixtralConfig, MoEConfig
from mixtral_ms.log import get_logger

_OF_MODEL = (
    "num_heads",
    "n_kv_heads",
    "head_dim",
    "theta",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
)
_OF_EXPERTS = ("num_experts_chosen", "norm_topk_prob", "routing_policy", "uniform_routing")


@dataclass(frozen=True)
class NumericDifference:
    """A key whose value is not what the weights were trained with."""

    key: str
    was: object
    now: object

    def __str__(self) -> str:
        """`num_heads was 4 and is 2`."""
        return f"{self.key} was {self.was!r} and is {self.now!r}"


def numeric_differences(was: MixtralConfig, now: MixtralConfig) -> list[NumericDifference]:
    """The keys by which the same weights compute something else, in one order.

    Args:
        was: the configuration that was saved with the weights.
        now: the one that is to use them.
    """
    return [
        *_different(_OF_MODEL, was, now),
        *_different(_OF_EXPERTS, was.moe_config, now.moe_config),
    ]


def warn_of_other_numerics(
    where: object, was: MixtralConfig, now: MixtralConfig, names: Mapping[str, str] | None = None
) -> None:
    """Log each difference between what weights were made with and what is to use them.

    Args:
        where: the file that says the former.
        was: the former.
        now: the latter.
        names: our key -> that file's.
    """
    for one in numeric_differences(was, now):
        get_logger().warning(
            "%s says %s %s, this run's configuration %s: the weights were not made for that",
            where,
            (names or {}).get(one.key, one.key),
            one.was,
            one.now,
        )


def _different(
    keys: Sequence[str], was: MixtralConfig | MoEConfig, now: MixtralConfig | MoEConfig
) -> list[NumericDifference]:
    pairs = ((key, getattr(was, key), getattr(now, key)) for key in keys)
    return [NumericDifference(key, one, other) for key, one, other in pairs if one != other]
