"""`~` and variables at the front of a path of the configuration, which no shell has seen."""

from pathlib import Path
from typing import Any

from mixtral_ms.config.sections.run_section import RunConfig
from mixtral_ms.errors import UserError

_PATHS = (
    "output_dir",
    "load_checkpoint",
    "adapter",
    "src_strategy_path_or_dir",
    "train_dataset.data_loader.dataset_dir",
    "eval_dataset.data_loader.dataset_dir",
    "processor.tokenizer.vocab_file",
    "context.save_graphs_path",
    "context.ascend_config.op_precision_mode",
    "tensorboard.tensorboard_dir",
)
_CALLBACK_PATHS = ("directory", "path", "log_dir")


def expand_homes(config: RunConfig) -> None:
    """Put the home folder in place of `~` wherever a key names a file or folder.

    Raises:
        UserError: there is no such home, or a path begins with a variable.
    """
    for key in _PATHS:
        *sections, name = key.split(".")
        node: Any = config
        for one in sections:
            node = getattr(node, one, None)
        _expand(node, name, key)
    for number, callback in enumerate(config.callbacks):
        for name in _CALLBACK_PATHS:
            _expand(callback, name, f"callbacks.{number}.{name}")


def _expand(section: Any, name: str, key: str) -> None:
    value = getattr(section, name, None)
    if not isinstance(value, str) or not value.startswith(("~", "$")):
        return
    if value.startswith("$"):
        raise UserError(
            f"{key} {value}: variables are a shell's, and not read here: write the whole path, or "
            f"./{value}"
        )
    try:
        setattr(section, name, str(Path(value).expanduser()))
    except RuntimeError:
        raise UserError(
            f"{key} {value}: there is no such home folder: write the whole path, or ./{value}"
        ) from None
