"""Convert weights between formats: `python -m mixtral_ms convert`, `python convert_weight.py`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mixtral_ms.checkpoint.formats.file_formats import written_suffixes
from mixtral_ms.cli.support.exit_status import DEBUG_FLAG, run_command
from mixtral_ms.cli.support.flags import true_or_false
from mixtral_ms.convert.formats.open_weight_files import verify_release
from mixtral_ms.convert.formats.weight_names import FORMATS, GMM, HF, OURS, WRITABLE
from mixtral_ms.convert.job.conversion import (
    Conversion,
    ConvertOptions,
    Summary,
    convert,
    prepare,
)
from mixtral_ms.convert.job.conversion_plan import mapping_table
from mixtral_ms.errors import UserError
from mixtral_ms.printable import shell_word

_DESCRIPTION = """\
Convert Mixtral's weights between Hugging Face's format, Mistral's own release and MindSpore's,
with stacked experts or those of the grouped matmul (gmm). Tensors are streamed, so that memory does
not grow with the model. Every weight is checked to be read once and written once, with a hash. The
output appears when it is whole; an interrupted conversion goes on when it is typed again.
"""
_EXAMPLES = """\
examples:
  # Hugging Face or Mistral's release -> MindSpore: a .ckpt, a .safetensors or a checkpoint folder
  python convert_weight.py --model mixtral --input_path Mixtral-8x7B-v0.1/ \\
      --output_path mixtral.ckpt --dtype bf16
  # MindSpore -> Hugging Face
  python convert_weight.py --model mixtral --reversed --input_path mixtral.ckpt --output_path hf/
  # the same from the ranks of a distributed run
  python convert_weight.py --model mixtral --reversed --input_path checkpoint/ --output_path hf/ \\
      --strategy_dir strategy/
  # for the grouped matmul, from PyTorch and from MindSpore; --use_gmm=False goes back
  python convert_weight.py --use_gmm=True --torch_ckpt_dir=hf/ --mindspore_ckpt_path=gmm.ckpt
  python convert_weight.py --use_gmm=True --pre_ckpt_path=mixtral.ckpt \\
      --mindspore_ckpt_path=gmm.ckpt
  # with a LoRA run's adapter added
  python convert_weight.py --model mixtral --input_path mixtral.ckpt --output_path merged.ckpt \\
      --merge_lora output/finetune_mixtral-8x7b/checkpoint
  # what would be done
  python convert_weight.py --model mixtral --input_path hf/ --output_path mixtral/ --dry_run

formats (--to, --input_format):
"""
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_LOSSES_SHOWN = 20


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status. Raises UserError for bad input."""
    arguments = _parser().parse_args(argv)
    options = _options(arguments)
    if arguments.verify_md5:
        print("\n".join(verify_release(options.input_path)))
    conversion = prepare(options)
    if arguments.dry_run:
        print(f"{_headline(conversion)}\n{mapping_table(conversion.plan)}")
        return 0
    print(_headline(conversion), flush=True)
    print(_report(conversion, convert(conversion)))
    return 0


def _parser() -> argparse.ArgumentParser:
    formats = "\n".join(f"  {one.name:16}{one.text}" for one in FORMATS.values())
    parser = argparse.ArgumentParser(
        prog="convert_weight.py",
        description=_DESCRIPTION,
        epilog=f"{_EXAMPLES}{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", choices=("mixtral",), default="mixtral", help="there is only one")
    add("--input_path", type=Path, help="weights: a folder or a file")
    files = ", ".join(f"NAME{suffix}" for suffix in written_suffixes())
    add("--output_path", type=Path, help=f"{files}, or else a folder to make")
    add("--reversed", action="store_true", help="MindSpore to Hugging Face, into a folder")
    add(
        "--dtype",
        choices=tuple(_DTYPES),
        help="of the output (default: as it is; fp16 with --mindspore_ckpt_path)",
    )
    add("--strategy_dir", type=Path, help="strategy files of a distributed input")
    add("--use_gmm", type=true_or_false, metavar="True|False", help="for the grouped matmul?")
    add("--torch_ckpt_dir", type=Path, help="input in the older form of this command")
    add("--pre_ckpt_path", type=Path, help="input from MindSpore in the older form")
    add("--mindspore_ckpt_path", type=Path, help="output in the older form")
    add("--to", choices=WRITABLE, help="the output's format, by name")
    add("--input_format", choices=tuple(FORMATS), help="where the input's shapes leave it open")
    add("--config", type=Path, help="YAML or JSON of the network, where none lies with the input")
    add("--emit_yaml", type=Path, metavar="FILE", help="write the YAML's model section")
    add(
        "--max_shard_size",
        type=_size,
        default=_size("5GB"),
        metavar="SIZE",
        help="most bytes of a file for Hugging Face, such as 500MB (default: 5GB)",
    )
    add("--merge_lora", type=Path, metavar="ADAPTER", help="add a LoRA run's checkpoint, or PEFT's")
    add("--workers", type=_positive, default=2, metavar="N", help="files at a time (default: 2)")
    add("--overwrite", action="store_true", help="replace an existing output when the new is whole")
    add("--dry_run", action="store_true", help="check everything, print the mapping, write nothing")
    add("--verify_md5", action="store_true", help="of Mistral's 8x7B release, before converting it")
    add(DEBUG_FLAG, action="store_true", help="show the traceback of an error")
    return parser


def _positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+) *([KMGT]?B?)", text.upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    unit = match[2].removesuffix("B") + "B" * (match[2] not in ("", "B"))
    return int(match[1]) * _UNITS[unit]


def _options(arguments: argparse.Namespace) -> ConvertOptions:
    input_flag, input_path = _one_of(
        arguments, ("--input_path", "--torch_ckpt_dir", "--pre_ckpt_path")
    )
    output_flag, output_path = _one_of(arguments, ("--output_path", "--mindspore_ckpt_path"))
    older = output_flag == "--mindspore_ckpt_path"
    if older == (input_flag == "--input_path"):
        raise UserError(
            f"{input_flag} does not go with {output_flag}: give --input_path and --output_path, or "
            "--torch_ckpt_dir or --pre_ckpt_path and --mindspore_ckpt_path"
        )
    dtype = arguments.dtype or ("fp16" if older else None)
    return ConvertOptions(
        input_path=input_path,
        output_path=output_path,
        to=_target_format(arguments, output_flag),
        input_flag=input_flag,
        output_flag=output_flag,
        input_format=arguments.input_format,
        dtype=dtype and _DTYPES[dtype],
        config=arguments.config,
        strategy_dir=arguments.strategy_dir,
        max_shard_bytes=arguments.max_shard_size,
        merge_lora=arguments.merge_lora,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        emit_yaml=arguments.emit_yaml,
    )


def _one_of(arguments: argparse.Namespace, flags: Sequence[str]) -> tuple[str, Path]:
    """The one flag of several that is given, and its path."""
    values = {flag: getattr(arguments, flag.removeprefix("--")) for flag in flags}
    given = {flag: value for flag, value in values.items() if value is not None}
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} were both given: give one of them")
    if not given:
        raise UserError(f"one of {', '.join(flags)} must be given; see --help")
    return next(iter(given.items()))


def _target_format(arguments: argparse.Namespace, output_flag: str) -> str:
    gmm = arguments.use_gmm
    given = {
        "--reversed": arguments.reversed,
        f"--use_gmm {gmm}": gmm is not None,
        f"--to {arguments.to}": arguments.to is not None,
    }
    named = [flag for flag, is_given in given.items() if is_given]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} contradict each other: give one of them")
    if arguments.reversed and output_flag != "--output_path":
        raise UserError(f"--reversed goes with --input_path and --output_path, not {output_flag}")
    if arguments.reversed:
        return HF.name
    return arguments.to or (GMM.name if gmm else OURS.name)


def _headline(conversion: Conversion) -> str:
    plan = conversion.plan
    files = f"{len(plan.shards)} file{'s' if len(plan.shards) > 1 else ''}"
    return (
        f"{plan.source.path}: {plan.source_format.name} ({plan.source_format.text})\n"
        f"-> {conversion.target.path}: {plan.target_format.name} ({plan.target_format.text})\n"
        f"{len(plan.source_layouts)} tensors -> {len(plan.targets)} tensors in {files}, "
        f"{plan.nbytes:,} bytes"
    )


def _report(conversion: Conversion, summary: Summary) -> str:
    plan, outcome, path = conversion.plan, summary.outcome, conversion.target.path
    rate = outcome.written_bytes / max(summary.seconds, 1e-9) / 1e6
    lines = [
        f"written:   {path} in {summary.seconds:.1f} s, {rate:,.0f} MB/s",
        f"audit:     each of {len(plan.source_layouts)} tensors read once, "
        f"each of {len(plan.targets)} written once",
    ]
    if outcome.resumed:
        lines.append(f"resumed:   {outcome.resumed} files were finished by an earlier run")
    if outcome.peak_memory:
        lines.append(
            f"memory:    at most {outcome.peak_memory / 1e6:,.0f} MB, without mapped files"
        )
    if plan.left_out:
        first = plan.left_out[0]
        lines.append(f"left out:  {len(plan.left_out)} tensors that are no weights, as {first}")
    if summary.tokenizer_files:
        lines.append(f"tokenizer: {', '.join(summary.tokenizer_files)}")
    if conversion.config is None:
        lines.append("note:      no configuration lay with the input, so none is kept")
    lines += _losses(outcome.losses)
    return "\n".join([*lines, f"next:      {_next(conversion)}"])


def _losses(losses: dict[str, tuple[int, int]]) -> list[str]:
    if not losses:
        return []
    worst = sorted(losses.items(), key=lambda item: (-item[1][0], -item[1][1]))
    lines = [f"WARNING:   float16 cannot hold values of {len(losses)} tensors; --dtype bf16 can"]
    lines.append(f"{'became inf':>12} {'became 0':>12}  tensor")
    lines += [f"{over:12,} {under:12,}  {name}" for name, (over, under) in worst[:_LOSSES_SHOWN]]
    if len(worst) > _LOSSES_SHOWN:
        lines.append(f"{'':25}  and {len(worst) - _LOSSES_SHOWN} more")
    return lines


def _next(conversion: Conversion) -> str:
    path, kind = conversion.target.path, conversion.target.kind
    if kind == "huggingface":
        return f"transformers.AutoModelForCausalLM.from_pretrained({str(path)!r})"
    if kind == "checkpoint" and conversion.plan.target_format is OURS:
        return f"python run_mindformer.py --config YOUR.yaml --load_checkpoint {shell_word(path)}"
    file = path / conversion.target.file_pattern if kind == "checkpoint" else path
    return conversion.target.file_format.loading.format(file=str(file))


def command() -> int:
    """Entry point of the tool."""
    return run_command(main, sys.argv[1:])
