"""The weights and the tokenizer that a run's configuration names."""

from pathlib import Path

from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.config import RunConfig
from mixtral_ms.convert.formats.found_weights import TOKENIZER_FILE, FoundWeights, find_weights
from mixtral_ms.convert.formats.weight_view import open_weights
from mixtral_ms.data.conversations.chat_template import (
    CHAT_TEMPLATE_KEY,
    MISTRAL,
    ChatTemplate,
    template_of_record,
)
from mixtral_ms.errors import UserError


def find_run_weights(config: RunConfig) -> FoundWeights:
    """What load_checkpoint means.

    Raises:
        UserError: it is empty, or does not exist.
    """
    if not config.load_checkpoint:
        raise UserError(
            f"run_mode {config.run_mode} needs weights, but load_checkpoint is empty: set "
            "--load_checkpoint"
        )
    strategy = config.src_strategy_path_or_dir
    return find_weights(Path(config.load_checkpoint), strategy=Path(strategy) if strategy else None)


def open_run_weights(config: RunConfig, found: FoundWeights | None = None) -> TensorSource:
    """All of load_checkpoint's tensors under our names, read when they are asked for.

    Args:
        config: the run.
        found: what `find_run_weights` gave, where that was asked before.

    Raises:
        UserError: load_checkpoint is empty, or does not fit the network.
    """
    return open_weights(
        found or find_run_weights(config),
        config.model.model_config,
        allow_partial=config.allow_partial,
        adapter=Path(config.adapter) if config.adapter else None,
    )


def run_template(config: RunConfig, weights: FoundWeights) -> tuple[str | ChatTemplate, str]:
    """The chat template that an adapter, or else the weights, were trained with; and who says so.

    Mixtral Instruct's own where nothing was written down.

    Raises:
        UserError: what was written down is none.
    """
    places = [find_weights(Path(config.adapter))] if config.adapter else []
    for found in (*places, weights):
        if found.chat_template is not None:
            where = f"{found.record}: {CHAT_TEMPLATE_KEY!r}"
            return template_of_record(found.chat_template, where), f"recorded in {found.record}"
    return MISTRAL, "Mixtral Instruct's own: none is recorded with the weights"


def run_tokenizer(config: RunConfig, weights: FoundWeights) -> Path:
    """processor.tokenizer.vocab_file, whether it exists or not, else what lies with the weights.

    Raises:
        UserError: there is neither.
    """
    if named := config.processor.tokenizer.vocab_file:
        return Path(named)
    if weights.tokenizer is None:
        raise UserError(
            "processor.tokenizer.vocab_file is empty, and there is no "
            f"{TOKENIZER_FILE} beside the weights ({weights.path}): set --vocab_file "
            f"…/{TOKENIZER_FILE}"
        )
    return weights.tokenizer
