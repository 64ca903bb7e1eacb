"""Files and folders a configuration names must exist before a run starts."""

import os
from collections.abc import Iterator
from pathlib import Path

from mixtral_ms.config.sections.run_section import RunConfig


def check_paths(config: RunConfig) -> list[str]:
    """What is missing on disk for this run_mode, each with the flag that sets it."""
    return [
        *_check_dataset(config, "train_dataset", "--train_data"),
        *_check_dataset(config, "eval_dataset", "--eval_dataset_dir"),
        *_check_optional(config.load_checkpoint, "load_checkpoint", "--load_checkpoint"),
        *_check_optional(
            config.src_strategy_path_or_dir,
            "src_strategy_path_or_dir",
            "--src_strategy_path_or_dir",
        ),
        *_check_tokenizer(config),
        *_check_output(config.output_dir),
    ]


def _check_dataset(config: RunConfig, name: str, flag: str) -> Iterator[str]:
    evaluated = name == "eval_dataset" and config.mode.trains and config.do_eval
    if not evaluated and name not in config.mode.datasets:
        return
    why = f"run_mode {config.run_mode}" + (" with do_eval" if config.do_eval else "")
    dataset = getattr(config, name)
    path = dataset.data_loader.dataset_dir if dataset else ""
    conversations = dataset is not None and dataset.data_loader.type == "ConversationDataset"
    what = "conversations (.json, .jsonl, .parquet)" if conversations else ".mindrecord"
    key = f"{name}.data_loader.dataset_dir"
    if not path:
        yield f"{key} is empty, but {why} reads it: set {flag} to a {what} file or folder"
    elif not Path(path).exists():
        yield f"{key}: path does not exist: {path}: set {flag} to a {what} file or folder"
    if conversations:
        yield from _check_vocab_file(config)


def _check_optional(path: str | None, key: str, flag: str) -> Iterator[str]:
    if path and not Path(path).exists():
        yield f"{key}: path does not exist: {path}: set {flag}"


def _check_tokenizer(config: RunConfig) -> Iterator[str]:
    """Prediction reads and writes text; without a vocab_file by what lies with the weights."""
    path = config.processor.tokenizer.vocab_file
    if config.mode.answers and path and not Path(path).is_file():
        yield f"processor.tokenizer.vocab_file: file does not exist: {path}: set --vocab_file"


def _check_vocab_file(config: RunConfig) -> Iterator[str]:
    path = config.processor.tokenizer.vocab_file
    if not path or not Path(path).is_file():
        found = "is empty" if not path else f": file does not exist: {path}"
        yield (
            f"processor.tokenizer.vocab_file {found}: give --set "
            "processor.tokenizer.vocab_file=…/tokenizer.model"
        )


def _check_output(path: str) -> Iterator[str]:
    if not path:
        yield "output_dir is empty: set --output_dir"
        return
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        yield f"output_dir {path}: {existing} is a file, not a folder: set --output_dir"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"output_dir {path}: {existing} cannot be written to: set --output_dir"
