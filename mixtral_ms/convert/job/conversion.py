"""A conversion from the first look at the input to the output in its place."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mixtral_ms.checkpoint.formats.file_formats import require_dtypes
from mixtral_ms.checkpoint.formats.tensor_source import TensorSource
from mixtral_ms.config.sections.fields import is_dtype
from mixtral_ms.config.sections.model_section import MixtralConfig
from mixtral_ms.convert.adapters.lora_weights import adapted
from mixtral_ms.convert.formats.detect_format import Measured
from mixtral_ms.convert.formats.examine import examine
from mixtral_ms.convert.formats.foreign_config import FoundConfig
from mixtral_ms.convert.formats.found_weights import Flags, find_weights
from mixtral_ms.convert.formats.open_weight_files import open_found
from mixtral_ms.convert.formats.weight_names import FORMATS, NATIVE, OURS, Format
from mixtral_ms.convert.formats.weight_view import open_weights
from mixtral_ms.convert.formats.write_config import to_huggingface, to_yaml_section
from mixtral_ms.convert.job.conversion_plan import ConversionPlan, plan_conversion
from mixtral_ms.convert.job.execute import Outcome, execute
from mixtral_ms.convert.job.output import (
    Destination,
    complete,
    copy_tokenizer,
    destination,
    put_output,
    require_free,
    require_tokenizer,
)
from mixtral_ms.convert.job.output_record import description
from mixtral_ms.convert.job.workspace import open_workspace
from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert and how; the flags' names are for messages."""

    input_path: Path
    output_path: Path
    to: str
    """Name of the target's format."""
    input_flag: str = "--input_path"
    output_flag: str = "--output_path"
    input_format: str | None = None
    """Name of the source's format, where its shapes leave it open."""
    dtype: str | None = None
    """Of the output; None keeps the source's."""
    config: Path | None = None
    """YAML or JSON with the network's configuration, where none lies with the input."""
    strategy_dir: Path | None = None
    max_shard_bytes: int = 5_000_000_000
    merge_lora: Path | None = None
    """A LoRA run's checkpoints, to be added to the weights."""
    workers: int = 2
    overwrite: bool = False
    emit_yaml: Path | None = None


@dataclass(frozen=True)
class Conversion:
    """A conversion that can be done: everything that can be checked before is."""

    options: ConvertOptions
    plan: ConversionPlan
    target: Destination
    found: FoundConfig | None
    """The network's configuration; None where none was found and none is needed."""
    chat_template: Any = None
    """What was written down of it, by the run that made the weights, or the merged adapter."""

    @property
    def config(self) -> MixtralConfig | None:
        """The network's."""
        return None if self.found is None else self.found.config


@dataclass(frozen=True)
class Summary:
    """What was done."""

    outcome: Outcome
    seconds: float
    tokenizer_files: list[str]


def prepare(options: ConvertOptions) -> Conversion:
    """Look at the input and plan the conversion; writes nothing.

    Raises:
        UserError: naming the flag, file, key or tensor that is wrong.
        DamagedFileError: a file is not what its format says.
    """
    to = FORMATS[options.to]
    target = destination(options.output_path, options.output_flag, huggingface=not to.mindspore)
    require_free(target, options.input_path, options.output_flag, options.overwrite)
    flags = Flags(options.input_flag, "--strategy_dir")
    weights = find_weights(options.input_path, flags, options.strategy_dir)
    if weights.is_adapter:
        raise UserError(
            f"{options.input_flag}: {options.input_path} holds an adapter: give the weights that "
            f"it is for, and --merge_lora {options.input_path}"
        )
    source = open_found(weights)
    examined = examine(weights, source, input_format=options.input_format, config=options.config)
    source_format, found = examined.format, examined.found
    if found is None:
        _require_config_not_needed(source, source_format, to, examined.sizes)
    config, dtype = found.config if found else examined.measured, options.dtype
    if adapter := options.merge_lora:
        config.pet_config = None  # a YAML's of the run that made the adapter
        # the input's weights under our names, with the adapter added
        source = adapted(open_weights(weights, config), adapter, config, "--merge_lora")
        source_format = OURS
        dtype = dtype or source.stored_dtype
    plan = plan_conversion(
        source,
        source_format,
        to,
        config,
        dtype=dtype,
        file_pattern=target.file_pattern,
        max_shard_bytes=options.max_shard_bytes if target.kind == "huggingface" else None,
    )
    if target.kind != "file":
        require_tokenizer(source.path)
    dtypes = {one.layout.name: one.info.dtype for one in plan.targets}
    require_dtypes(target.file_format, dtypes, "say with --dtype what they are to have")
    _note_compute_dtype(found, plan)
    _require_yaml_possible(options, found)
    trained = find_weights(adapter).chat_template if adapter else None
    return Conversion(options, plan, target, found, trained or weights.chat_template)


def _require_yaml_possible(options: ConvertOptions, found: FoundConfig | None) -> None:
    if options.emit_yaml is None:
        return
    if found is None:
        raise UserError("--emit_yaml: no configuration lies with the input; give one with --config")
    if options.emit_yaml.exists() and not options.overwrite:
        raise UserError(
            f"--emit_yaml: {options.emit_yaml} exists: add --overwrite, or name another"
        )


def _require_config_not_needed(
    source: TensorSource, source_format: Format, to: Format, sizes: dict[str, Measured]
) -> None:
    """Without a configuration only MindSpore's formats are converted into one another.

    Raises:
        UserError: it is needed; the message has all sizes that the tensors show.
    """
    if source_format.mindspore and to.mindspore:
        return
    if not source_format.mindspore:
        name = "params.json" if source_format.name.startswith(NATIVE.name) else "config.json"
        raise UserError(
            f"{source.path}: there is no {name}, so rope_theta and the number of heads are not "
            f"known: put the release's {name} there or give --config a YAML or JSON that has them"
        )
    known = {
        "vocab_size": sizes["vocab_size"].value,
        "hidden_size": sizes["hidden_size"].value,
        "intermediate_size": sizes["intermediate_size"].value,
        "num_hidden_layers": sizes["num_layers"].value,
        "num_local_experts": sizes["expert_num"].value,
    }
    widths = (
        f"num_attention_heads * head_dim is {sizes['query_width'].value}, "
        f"num_key_value_heads * head_dim is {sizes['key_value_width'].value}"
    )
    raise UserError(
        f"{source.path}: no configuration lies with it, and config.json needs num_attention_heads, "
        "num_key_value_heads, num_experts_per_tok, rms_norm_eps and rope_theta, which tensors do "
        "not show: give --config the YAML that the network was trained with, or a JSON file with "
        f"these and {json.dumps(known)} ({widths})"
    )


def _note_compute_dtype(found: FoundConfig | None, plan: ConversionPlan) -> None:
    """Compute in what the weights are stored in, where no YAML says other."""
    stored = plan.targets[0].info.dtype
    if found is not None and found.names and is_dtype(stored):  # from another system's file
        found.config.compute_dtype = stored


def convert(conversion: Conversion) -> Summary:
    """Carry out a conversion; the output is at its place when all of it is whole.

    Raises:
        UserError: not enough disk space, or another process converts to the same place.
        ConversionError: the disk is full or cannot be written; a rerun goes on.
    """
    options, plan, target = conversion.options, conversion.plan, conversion.target
    began = time.monotonic()
    with open_workspace(target.path) as workspace:
        # Another conversion may have come and gone since this one was prepared.
        require_free(target, options.input_path, options.output_flag, options.overwrite)
        outcome = execute(plan, workspace, options.workers)
        tokenizer: list[str] = []
        if target.kind != "file":
            tokenizer = copy_tokenizer(plan.source.path, workspace.output)
        complete(
            workspace.output,
            target,
            outcome.files,
            description(plan, conversion.found, conversion.chat_template),
            _huggingface_files(conversion),
        )
        require_free(target, options.input_path, options.output_flag, options.overwrite)
        put_output(workspace.output, target)
    if options.emit_yaml and conversion.config:
        section = to_yaml_section(conversion.config)
        with write_aside(options.emit_yaml) as aside:
            aside.write_text(yaml.safe_dump(section, sort_keys=False))
    return Summary(outcome, time.monotonic() - began, tokenizer)


def _huggingface_files(conversion: Conversion) -> dict[str, dict[str, Any]]:
    """What transformers reads beside the tensors; nothing where the output is not for it."""
    if conversion.target.kind != "huggingface":
        return {}
    found = conversion.found
    if found is None:
        raise ValueError("a folder for transformers was planned without a configuration")
    return to_huggingface(found.config, found.others, conversion.plan.targets[0].info.dtype)
