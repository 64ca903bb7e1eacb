"""Flags of the run command: MindFormers' launcher's, and ours on top.

Every flag is one key of the YAML; the table below says which, and nothing else knows.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixtral_ms.config import Override, RunConfig, load_config
from mixtral_ms.config.build import nearest
from mixtral_ms.config.overrides import parse_override
from mixtral_ms.errors import UserError

_EXAMPLE = """\
example:
  %(prog)s --config research/mixtral_tiny/pretrain_mixtral-tiny.yaml \\
      --train_data wiki256.mindrecord --epochs 3 --set lr_schedule.learning_rate=5e-4

Flags win over the YAML. Any key can be set: --set section.key=value, lists by number:
--set callbacks.1.save_checkpoint_steps=10
"""


@dataclass(frozen=True)
class Flag:
    """One flag and the key (or keys) it sets."""

    names: tuple[str, ...]
    keys: tuple[str, ...]
    kind: type
    help: str
    many: bool = False
    choices: tuple[str, ...] | None = None


def _flag(name: str, key: str, kind: type, text: str, **more: Any) -> Flag:
    names = (name, *more.pop("also", ()))
    return Flag(
        tuple(f"--{one}" for one in names), (key, *more.pop("keys", ())), kind, text, **more
    )


_MODES = ("train", "finetune", "eval", "predict")
_TRAIN_SAMPLES = "train_dataset.data_loader.num_samples"
_EVAL_SAMPLES = "eval_dataset.data_loader.num_samples"

FLAGS: tuple[Flag, ...] = (
    _flag("run_mode", "run_mode", str, "what to do", choices=_MODES),
    _flag(
        "train_dataset_dir",
        "train_dataset.data_loader.dataset_dir",
        str,
        "records to train on: a .mindrecord file or a folder",
        also=("train_data",),
    ),
    _flag(
        "eval_dataset_dir",
        "eval_dataset.data_loader.dataset_dir",
        str,
        "records to evaluate on",
        also=("eval_data",),
    ),
    _flag("predict_data", "predict_data", str, "prompts, or a file with one a line", many=True),
    _flag("predict_batch_size", "predict_batch_size", int, "prompts at a time"),
    _flag("load_checkpoint", "load_checkpoint", str, "weights, in any format"),
    _flag("allow_partial", "allow_partial", bool, "load what fits of them, name what does not"),
    _flag("load_ckpt_format", "load_ckpt_format", str, "safetensors or ckpt"),
    _flag("resume_training", "resume_training", str, "True, False or a checkpoint's name"),
    _flag("auto_trans_ckpt", "auto_trans_ckpt", bool, "split or merge weights to the ranks"),
    _flag(
        "src_strategy_path_or_dir",
        "src_strategy_path_or_dir",
        str,
        "strategy files of load_checkpoint",
    ),
    _flag(
        "strategy_load_checkpoint",
        "parallel.strategy_ckpt_load_file",
        str,
        "a strategy file (no effect: checkpoints carry theirs)",
    ),
    _flag("transform_process_num", "transform_process_num", int, "accepted without effect"),
    _flag("only_save_strategy", "only_save_strategy", bool, "accepted without effect"),
    _flag("remove_redundancy", "remove_redundancy", bool, "accepted without effect"),
    _flag("output_dir", "output_dir", str, "where everything is written"),
    _flag("seed", "seed", int, "the same seed gives the same run"),
    _flag("use_parallel", "use_parallel", bool, "run over several processes"),
    _flag("do_eval", "do_eval", bool, "evaluate during training"),
    _flag("epochs", "runner_config.epochs", int, "times through the data"),
    _flag("batch_size", "runner_config.batch_size", int, "rows of a micro batch of one rank"),
    _flag(
        "gradient_accumulation_steps",
        "runner_config.gradient_accumulation_steps",
        int,
        "micro batches in a step",
    ),
    _flag("sink_mode", "runner_config.sink_mode", bool, "device queue; on Ascend only"),
    _flag("num_samples", _TRAIN_SAMPLES, int, "records to use", keys=(_EVAL_SAMPLES,)),
    _flag("mode", "context.mode", int, "0 graph, 1 operator by operator"),
    _flag("device_target", "context.device_target", str, "CPU or Ascend"),
    _flag("device_id", "context.device_id", int, "which device"),
    _flag("profile", "profile", bool, "accepted without effect"),
    _flag("register_path", "register_path", str, "accepted without effect"),
    _flag("modal_type", "modal_type", str, "accepted without effect", many=True),
    _flag("remote_save_url", "remote_save_url", str, "accepted without effect"),
    _flag("adapter_id", "adapter_id", str, "accepted without effect", many=True),
)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The run command's parser."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train, fine-tune, evaluate or sample a Mixtral from a YAML file.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    for flag in FLAGS:
        parser.add_argument(
            *flag.names,
            type=_bool if flag.kind is bool else flag.kind,
            nargs="+" if flag.many else None,
            choices=flag.choices,
            metavar=None if flag.choices else _metavar(flag),
            help=flag.help,
        )
    own = parser.add_argument_group("any key, and looking without running")
    own.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set one key")
    own.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE", help="set several keys"
    )
    own.add_argument(
        "--check_config", action="store_true", help="check, show what would run and its memory"
    )
    own.add_argument("--print_config", action="store_true", help="print the resolved YAML")
    own.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def overrides_from(args: argparse.Namespace) -> list[Override]:
    """The keys that the flags set, named flags first so that --set wins."""
    overrides = []
    for flag in FLAGS:
        given = getattr(args, flag.names[0].removeprefix("--"))
        if given is None:
            continue
        if flag.keys[0] == "resume_training":
            given = {"true": True, "false": False}.get(given.lower(), given)
        shown = " ".join(given) if isinstance(given, list) else given
        source = f"{flag.names[0]} {shown}"
        # of several keys, those in sections that the YAML leaves out are left out too
        several = len(flag.keys) > 1
        overrides += [Override(key, given, source, if_present=several) for key in flag.keys]
    overrides += [parse_override(text, "--options") for text in args.options]
    overrides += [parse_override(text, "--set") for text in args.set]
    return overrides


def load_from_args(args: argparse.Namespace) -> RunConfig:
    """The YAML of --config with the flags applied; not yet checked for contradictions.

    Raises:
        UserError: as `load_config`, naming the flag where a flag is wrong.
    """
    return load_config(args.config, overrides_from(args))


def _bool(text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise argparse.ArgumentTypeError(f"{text!r} given: write True or False")
    return text.lower() == "true"


def _metavar(flag: Flag) -> str:
    return {bool: "True|False", int: "N", str: "TEXT"}[flag.kind]


def parse_args(
    arguments: Sequence[str] | None = None, prog: str | None = None
) -> argparse.Namespace:
    """Parse the command line; `--section.key value` and `--section.key=value` also set keys.

    Raises:
        UserError: such a flag has no value.
        SystemExit: 2 for other mistakes, as argparse does.
    """
    parser = build_parser(prog)
    args, rest = parser.parse_known_args(arguments)
    while rest:
        name = rest.pop(0)
        key, equals, value = name.removeprefix("--").partition("=")
        if not name.startswith("--") or "." not in key:
            parser.error(f"unrecognized argument: {name}{_nearest_flag(name)}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{name}: give it a value, or write --set {key}=value")
            value = rest.pop(0)
        args.set.append(f"{key}={value}")
    return args


def _nearest_flag(name: str) -> str:
    close = nearest(name, [one for flag in FLAGS for one in flag.names])
    return f"; did you mean {close}?" if close else ""
