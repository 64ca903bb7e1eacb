"""The weights that a run's configuration names."""

from pathlib import Path

from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.config import RunConfig
from mixtral_ms.convert.formats.weight_view import open_weights
from mixtral_ms.errors import UserError


def open_run_weights(config: RunConfig) -> TensorSource:
    """All of load_checkpoint's tensors under our names, read when they are asked for.

    Raises:
        UserError: load_checkpoint is empty, or does not fit the network.
    """
    if not config.load_checkpoint:
        raise UserError(
            f"run_mode {config.run_mode} needs weights, but load_checkpoint is empty: set "
            "--load_checkpoint"
        )
    strategy = config.src_strategy_path_or_dir
    return open_weights(
        Path(config.load_checkpoint),
        config.model.model_config,
        strategy=Path(strategy) if strategy else None,
        allow_partial=config.allow_partial,
        adapter=Path(config.adapter) if config.adapter else None,
    )
