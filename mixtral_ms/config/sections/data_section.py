"""Sections about data: data sets, tokenizer, metric."""

from dataclasses import dataclass, field
from typing import Literal

from mixtral_ms.config.sections.fields import gives_way, inert, unsupported

_LOADER_NO_EFFECT = "the loader is one thread that is faster than the network"


@dataclass
class DataLoaderSection:
    """`train_dataset.data_loader`."""

    type: Literal["MindDataset", "ConversationDataset"] = "MindDataset"
    """MindRecord files; or JSON, JSON Lines or Parquet files of conversations, tokenized with
    processor.tokenizer.vocab_file when the run starts."""
    dataset_dir: str = ""
    """A .mindrecord file, or a folder with such files; for a ConversationDataset those it reads."""
    shuffle: bool = True
    """Another order each epoch, a pure function of (seed, epoch)."""
    num_samples: int | None = None
    """Use only so many records; empty means all."""
    template: str = "vicuna"
    """ConversationDataset: mistral, Mixtral Instruct's own, or one of fschat's templates."""
    long_rows: Literal["cut", "drop", "error"] = "cut"
    """ConversationDataset: what to do with a row of more than seq_length + 1 ids."""
    packing: bool = False
    """ConversationDataset: several samples a record, which do not see each other."""
    num_parallel_workers: int | None = inert(None, _LOADER_NO_EFFECT)
    dataset_files: list[str] | None = inert(None, "dataset_dir names the file or the folder")


@dataclass
class DatasetSection:
    """`train_dataset` and `eval_dataset`."""

    data_loader: DataLoaderSection = field(default_factory=DataLoaderSection)
    input_columns: list[str] = field(default_factory=lambda: ["input_ids"])
    """Columns of a record: ["input_ids"], or ["input_ids", "labels"] for fine-tuning. Packed
    samples have segment_ids, which are read where the files have them, named here or not."""
    num_parallel_workers: int = inert(8, _LOADER_NO_EFFECT)
    drop_remainder: bool | None = None
    """Training leaves out the last records that do not fill a batch, evaluation counts them;
    another value gives a line in the log."""
    batch_size: int | None = gives_way("runner_config.batch_size")
    """Sequences of a micro batch of one rank; runner_config.batch_size wins for training and
    stands in for evaluation where this is empty."""
    repeat: int = inert(1, "runner_config.epochs says how often the data is read")
    eod_reset: bool = unsupported(False, "attention sees the whole record")
    eod_token_id: int | None = inert(None, "model_config.eos_token_id says it")
    seed: int | None = inert(None, "the top-level seed orders the data")
    python_multiprocessing: bool = inert(False, _LOADER_NO_EFFECT)
    numa_enable: bool = inert(False, _LOADER_NO_EFFECT)
    prefetch_size: int = inert(1, _LOADER_NO_EFFECT)
    auto_tune: bool = inert(False, _LOADER_NO_EFFECT)
    filepath_prefix: str = inert("./autotune", _LOADER_NO_EFFECT)
    autotune_per_step: int = inert(10, _LOADER_NO_EFFECT)
    profile: bool = inert(False, "the top-level profile says it")
    dynamic_batch: bool = inert(False, "shapes are fixed")
    divisor: int | None = inert(None, "shapes are fixed")
    remainder: int | None = inert(None, "shapes are fixed")
    max_length: int | None = inert(None, "model_config.seq_length says it")
    tokenizer: dict | None = inert(None, "processor.tokenizer says it")


@dataclass
class DatasetTaskSection:
    """`train_dataset_task` and `eval_dataset_task`."""

    type: Literal["CausalLanguageModelDataset"] = "CausalLanguageModelDataset"
    dataset_config: DatasetSection | None = None
    """An alias of the data set: `*train_dataset`."""


@dataclass
class TokenizerSection:
    """`processor.tokenizer`."""

    type: Literal["LlamaTokenizer", "LlamaTokenizerFast"] = "LlamaTokenizer"
    vocab_file: str | None = None
    """The tokenizer.model; needed only where text is read or written."""
    tokenizer_file: str | None = inert(None, "vocab_file names the tokenizer.model")
    unk_token: str = "<unk>"
    bos_token: str = "<s>"
    eos_token: str = "</s>"
    pad_token: str | None = "<unk>"
    add_bos_token: bool = True
    add_eos_token: bool = False
    legacy: bool = inert(True, "text is split as sentencepiece does")
    clean_up_tokenization_spaces: bool = inert(False, "text comes back as sentencepiece joins it")
    auto_register: str | None = inert(None, "there is one tokenizer")


@dataclass
class ProcessorSection:
    """`processor`."""

    type: Literal["LlamaProcessor"] = "LlamaProcessor"
    return_tensors: Literal["ms", "np"] = inert("ms", "tensors are made where they are used")
    tokenizer: TokenizerSection = field(default_factory=TokenizerSection)


@dataclass
class MetricSection:
    """`metric`."""

    type: Literal["PerplexityMetric", "EmF1Metric"] = "PerplexityMetric"
