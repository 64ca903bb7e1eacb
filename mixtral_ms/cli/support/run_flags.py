"""Flags of the run command: MindFormers' launcher's, and ours on top.

Every flag is one key of the YAML; the table below says which, and nothing else knows.
"""

import argparse
from collections.abc import Sequence

from mixtral_ms.cli.support.check_config_report import describe
from mixtral_ms.cli.support.flags import Flag, flag
from mixtral_ms.cli.support.generation_flags import GENERATION_FLAGS
from mixtral_ms.config import Override, RunConfig, load_config
from mixtral_ms.config.checks.check_config import check_config
from mixtral_ms.config.loading.overrides import parse_override
from mixtral_ms.config.loading.render import render_config
from mixtral_ms.config.loading.section_builder import nearest
from mixtral_ms.config.sections.run_modes import RUN_MODES
from mixtral_ms.errors import UserError

_EXAMPLE = """\
examples:
  %(prog)s --config research/mixtral_tiny/pretrain_mixtral-tiny.yaml \\
      --train_data wiki256.mindrecord --epochs 3 --set lr_schedule.learning_rate=5e-4

  %(prog)s --config research/mixtral_tiny/predict_mixtral-tiny.yaml \\
      --load_checkpoint output/pretrain_mixtral-tiny/checkpoint \\
      --vocab_file tokenizer.model --predict_data "The import statement"

Flags win over the YAML. Any key can be set: --set section.key=value, lists by number:
--set callbacks.1.save_checkpoint_steps=10
"""


_TRAIN_SAMPLES = "train_dataset.data_loader.num_samples"
_EVAL_SAMPLES = "eval_dataset.data_loader.num_samples"

FLAGS: tuple[Flag, ...] = (
    flag("run_mode", "run_mode", str, "what to do", choices=tuple(RUN_MODES)),
    flag(
        "train_dataset_dir",
        "train_dataset.data_loader.dataset_dir",
        str,
        "records to train on: a .mindrecord file or a folder",
        also=("train_data",),
    ),
    flag(
        "eval_dataset_dir",
        "eval_dataset.data_loader.dataset_dir",
        str,
        "records to evaluate on",
        also=("eval_data",),
    ),
    flag(
        "predict_data",
        "predict_data",
        str,
        'prompts; a file with one a line, or JSON lines with "prompt" (.jsonl); - for stdin',
        many=True,
    ),
    flag("predict_batch_size", "predict_batch_size", int, "most prompts at a time (32)"),
    flag("vocab_file", "processor.tokenizer.vocab_file", str, "sentencepiece tokenizer.model"),
    *GENERATION_FLAGS,
    flag("load_checkpoint", "load_checkpoint", str, "weights, in any format"),
    flag("allow_partial", "allow_partial", bool, "load what fits of them, name what does not"),
    flag("load_ckpt_format", "load_ckpt_format", str, "safetensors or ckpt"),
    flag("resume_training", "resume_training", str, "True, False or a checkpoint's name"),
    flag("auto_trans_ckpt", "auto_trans_ckpt", bool, "split or merge weights to the ranks"),
    flag(
        "no_shared_storage",
        "no_shared_storage",
        bool,
        "each host keeps its own ranks' part of checkpoints",
        also=("no-shared-storage",),
    ),
    flag(
        "src_strategy_path_or_dir",
        "src_strategy_path_or_dir",
        str,
        "strategy files of load_checkpoint",
    ),
    flag(
        "strategy_load_checkpoint",
        "parallel.strategy_ckpt_load_file",
        str,
        "a strategy file (no effect: checkpoints carry theirs)",
    ),
    flag("transform_process_num", "transform_process_num", int, "accepted without effect"),
    flag("only_save_strategy", "only_save_strategy", bool, "accepted without effect"),
    flag("remove_redundancy", "remove_redundancy", bool, "accepted without effect"),
    flag("output_dir", "output_dir", str, "where everything is written"),
    flag("seed", "seed", int, "the same seed gives the same run"),
    flag("use_parallel", "use_parallel", bool, "run over several processes"),
    flag("do_eval", "do_eval", bool, "evaluate during training"),
    flag("epochs", "runner_config.epochs", int, "times through the data"),
    flag("batch_size", "runner_config.batch_size", int, "sequences of a micro batch of one rank"),
    flag(
        "gradient_accumulation_steps",
        "runner_config.gradient_accumulation_steps",
        int,
        "micro batches in a step",
    ),
    flag("sink_mode", "runner_config.sink_mode", bool, "accepted without effect"),
    flag("num_samples", _TRAIN_SAMPLES, int, "records to use", keys=(_EVAL_SAMPLES,)),
    flag("mode", "context.mode", int, "0 graph, 1 operator by operator"),
    flag("device_target", "context.device_target", str, "CPU or Ascend"),
    flag("device_id", "context.device_id", int, "which device"),
    flag("profile", "profile", bool, "accepted without effect"),
    flag("register_path", "register_path", str, "accepted without effect"),
    flag("modal_type", "modal_type", str, "accepted without effect", many=True),
    flag("remote_save_url", "remote_save_url", str, "accepted without effect"),
    flag("adapter_id", "adapter_id", str, "accepted without effect", many=True),
)


_FOR_ANSWERS = {
    *("predict_batch_size", "vocab_file", "load_checkpoint", "src_strategy_path_or_dir", "seed"),
    *("auto_trans_ckpt", "output_dir", "use_parallel", "device_target", "device_id"),
}
ANSWER_FLAGS = tuple(
    one for one in FLAGS if one in GENERATION_FLAGS or one.attribute in _FOR_ANSWERS
)
"""Flags of the commands that only answer."""


def build_parser(
    prog: str | None = None,
    description: str = "Train, fine-tune, evaluate or sample a Mixtral from a YAML file.",
    example: str = _EXAMPLE,
    flags: Sequence[Flag] = FLAGS,
) -> argparse.ArgumentParser:
    """The parser of the run command, or of another that takes some of its flags."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    for one in flags:
        one.add_to(parser)
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
    for one in FLAGS:
        given = getattr(args, one.attribute, None)
        if given is None:
            continue
        if one.keys[0] == "resume_training":
            given = {"true": True, "false": False}.get(given.lower(), given)
        shown = " ".join(given) if isinstance(given, list) else given
        source = f"{one.names[0]} {shown}"
        # of several keys, those in sections that the YAML leaves out are left out too
        several = len(one.keys) > 1
        overrides += [Override(key, given, source, if_present=several) for key in one.keys]
    overrides += [parse_override(text, "--options") for text in args.options]
    overrides += [parse_override(text, "--set") for text in args.set]
    return overrides


def load_from_args(args: argparse.Namespace) -> RunConfig:
    """The YAML of --config with the flags applied; not yet checked for contradictions.

    Raises:
        UserError: as `load_config`, naming the flag where a flag is wrong.
    """
    return load_config(args.config, overrides_from(args))


def looked_at(args: argparse.Namespace, config: RunConfig) -> bool:
    """Do what --print_config and --check_config ask for; False when none was given.

    Raises:
        UserError: the configuration contradicts itself.
    """
    if args.print_config:
        print(render_config(config))
    elif args.check_config:
        check_config(config, world_size=None, needs_paths=False)
        print(describe(config))
    return args.print_config or args.check_config


def parse_args(
    arguments: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Parse the command line; `--section.key value` and `--section.key=value` also set keys.

    Raises:
        UserError: such a flag has no value.
        SystemExit: 2 for other mistakes, as argparse does.
    """
    parser = parser or build_parser()
    args, rest = parser.parse_known_intermixed_args(arguments)
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
    close = nearest(name, [name for one in FLAGS for name in one.names])
    return f"; did you mean {close}?" if close else ""
