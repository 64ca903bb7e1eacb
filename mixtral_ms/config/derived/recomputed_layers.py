"""Which decoder layers compute a part of themselves again in the backward pass."""

from collections.abc import Sequence

from mixtral_ms.errors import UserError

Selection = bool | list | dict
"""A value of `recompute_config.select_recompute`."""


def names_operators(value: Selection) -> bool:
    """Whether a value has patterns of MindFormers' operators, which mean nothing here."""
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(one, str) for one in value)
    )


def selected_layers(value: Selection, layers: Sequence[int]) -> list[int]:
    """How many layers of each pipeline stage, its first ones, `select_recompute` means.

    Args:
        value: all or none; or for each stage a number of layers, or all or none of them.
        layers: how many each stage holds.

    Raises:
        UserError: the list does not fit the stages.
    """
    if names_operators(value):
        return [0] * len(layers)
    chosen = value if isinstance(value, list) else [value] * len(layers)
    if len(chosen) != len(layers) or not all(isinstance(one, int) and one >= 0 for one in chosen):
        raise UserError(
            f"recompute_config.select_recompute {value}: give True, False, or a list with a number "
            f"of layers for each of parallel_config.pipeline_stage {len(layers)}"
        )
    return [
        (count if one else 0) if isinstance(one, bool) else min(one, count)
        for one, count in zip(chosen, layers, strict=True)
    ]
