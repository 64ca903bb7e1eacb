"""Rank grids for a cluster, judged before anything runs: `python -m mixtral_ms plan`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mixtral_ms.cli.support.exit_status import DEBUG_FLAG, run_command
from mixtral_ms.cli.support.flags import whole_number
from mixtral_ms.cli.support.plan.plan_predict_report import predict_as_data, predict_as_text
from mixtral_ms.cli.support.plan.plan_report import as_data, as_text, as_yaml
from mixtral_ms.config import RunConfig, load_config
from mixtral_ms.config.checks.check_config import find_contradictions
from mixtral_ms.config.loading.resolve import rank_count
from mixtral_ms.config.sections.parallel_section import GRID_SIZES
from mixtral_ms.config.sections.run_modes import RUN_MODES
from mixtral_ms.errors import UserError
from mixtral_ms.files import new_file, not_an_input
from mixtral_ms.parallel.planner.layout_search import Layout, LayoutPlan, judge, plan_layouts
from mixtral_ms.parallel.planner.predict_layouts import judge_prediction, plan_prediction
from mixtral_ms.parallel.planner.time_model import Cluster
from mixtral_ms.train.report.flops import flops_per_token

_DESCRIPTION = """\
Which rank grids a run can have on a cluster, the fastest first, what each needs of every device,
and why the others do not fit: of training, or with run_mode predict of answering, in every
weight_dtype. Memory and bytes sent are counted; times are estimates of an analytic model
(docs/parallel.md) whose defaults are round figures of an Atlas 800T A2: rank by them, then measure.
"""
_EXAMPLE = """\
examples:
  python -m mixtral_ms plan --config research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml \\
      --devices 64 --memory 64GB
  without context parallel, and the second layout of the table written to a file:
  python -m mixtral_ms plan --config run.yaml --devices 16 --memory 64GB --fix cp=1 \\
      --choose 2 --write layout.yaml
  tokens a second and memory of a network that answers:
  python -m mixtral_ms plan --config research/mixtral_8x7b/predict_mixtral-8x7b.yaml \\
      --run_mode predict --devices 2 --memory 64GB
"""
_UNITS = {"": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}


def main(argv: Sequence[str]) -> int:
    """The command; returns 0, or 1 when no layout fits. Raises UserError for bad input."""
    arguments = _parser().parse_args(argv)
    cluster = _cluster(arguments)
    config = _run(arguments)
    if config.mode.answers:
        return _plan_prediction(config, cluster, arguments)
    model = config.model.model_config
    token_flops = flops_per_token(model, model.seq_length)
    plan = plan_layouts(
        config,
        cluster,
        token_flops,
        global_batch_size=arguments.global_batch,
        fixed=_fixed(arguments.fix),
    )
    own = _own(config, cluster, token_flops)
    if arguments.json:
        print(json.dumps(as_data(plan, cluster, own, arguments.top), indent=2))
    else:
        print(as_text(plan, cluster, own, arguments.top))
    if arguments.write is not None:
        _write(arguments, plan)
    return 0 if plan.fitting else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixtral_ms plan",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="YAML", help="the run")
    planned = [name for name, mode in RUN_MODES.items() if mode.trains or mode.answers]
    add("--run_mode", choices=planned, help="(default: the YAML's)")
    add("--devices", type=whole_number, required=True, metavar="N", help="devices of the cluster")
    add("--memory", type=_size, required=True, metavar="SIZE", help="of a device, such as 64GB")
    add(
        "--usable",
        type=_share,
        default=0.9,
        metavar="X",
        help="share of the memory that a run may plan with; the rest is the driver's, buffers and "
        "fragments (default: 0.9)",
    )
    add(
        "--global_batch",
        type=whole_number,
        metavar="SEQUENCES",
        help="of a step (default: the YAML's)",
    )
    add("--fix", default="", metavar="GRID", help="sizes to keep: dp, mp, ep, pp, cp; mp=8,cp=1")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the YAML")
    add("--top", type=whole_number, default=10, metavar="N", help="layouts to show (default: 10)")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--write", type=Path, metavar="FILE", help="write the sections of a layout as YAML")
    add("--overwrite", action="store_true", help="replace an existing file of --write")
    add(
        "--choose",
        type=whole_number,
        default=1,
        metavar="K",
        help="which to write (default: the first)",
    )
    add(DEBUG_FLAG, action="store_true", help="show the traceback of an error")
    _add_device(parser.add_argument_group("a device and its links"))
    return parser


def _add_device(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--devices_per_host", type=whole_number, default=8, metavar="N", help="(default: 8)")
    add(
        "--device_tflops",
        type=_positive,
        default=320.0,
        metavar="X",
        help="peak of a device in compute_dtype, TFLOP/s (default: 320)",
    )
    add(
        "--efficiency",
        type=_share,
        default=0.4,
        metavar="X",
        help="share of the peak that matrix products reach (default: 0.4)",
    )
    rates = {
        "--memory_bandwidth": (1600.0, "between a device and its memory"),
        "--bandwidth_inside": (150.0, "from a device to others of its host"),
        "--bandwidth_between": (25.0, "from a device to other hosts"),
    }
    for name, (default, what) in rates.items():
        text = f"GB/s {what} (default: {default:g})"
        add(name, type=_positive, default=default, metavar="X", help=text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if 0 < value < float("inf"):
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")


def _share(text: str) -> float:
    value = _positive(text)
    if value <= 1:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a share: it must be at most 1")


def _size(text: str) -> float:
    """Bytes; GB means 2^30, as context.max_device_memory does."""
    number = text.upper().rstrip("BKMGT")
    unit = text.upper()[len(number) :]
    if unit not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64GB")
    return _positive(number) * _UNITS[unit]


def _run(arguments: argparse.Namespace) -> RunConfig:
    mode = [f"run_mode={arguments.run_mode}"] if arguments.run_mode else []
    config = load_config(arguments.config, [*arguments.set, *mode])
    if not config.mode.trains and not config.mode.answers:
        raise UserError(
            f"run_mode {config.run_mode}: layouts are planned for training and for prediction; "
            "give --run_mode train or predict"
        )
    # what is wrong without a grid is wrong on every one
    alone = replace(
        config,
        use_parallel=False,
        runner_config=replace(config.runner_config, global_batch_size=None),
    )
    if problems := find_contradictions(alone):
        raise UserError(problems[0])
    return config


def _plan_prediction(config: RunConfig, cluster: Cluster, arguments: argparse.Namespace) -> int:
    for flag in ("write", "global_batch"):
        if getattr(arguments, flag) is not None:
            raise UserError(f"--{flag} with run_mode predict: it is for layouts of training")
    on_device = replace(config, context=replace(config.context, device_target="Ascend"))
    plan = plan_prediction(on_device, cluster, _fixed(arguments.fix))
    own = _not_on(config, cluster) or judge_prediction(on_device, cluster)
    if arguments.json:
        print(json.dumps(predict_as_data(plan, cluster, own, arguments.top), indent=2))
    else:
        print(predict_as_text(plan, cluster, own, arguments.top))
    return 0 if plan.fitting else 1


def _cluster(arguments: argparse.Namespace) -> Cluster:
    return Cluster(
        devices=arguments.devices,
        memory=arguments.memory * arguments.usable,
        devices_per_host=arguments.devices_per_host,
        flops=arguments.device_tflops * 1e12,
        efficiency=arguments.efficiency,
        memory_bandwidth=arguments.memory_bandwidth * 1e9,
        bandwidth_inside=arguments.bandwidth_inside * 1e9,
        bandwidth_between=arguments.bandwidth_between * 1e9,
    )


def _fixed(text: str) -> dict[str, int]:
    fixed = {}
    for item in filter(None, text.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in GRID_SIZES or not value.isdecimal():
            raise UserError(
                f"--fix {text!r}: write it as {', '.join(GRID_SIZES)} with sizes: mp=8,cp=1"
            )
        fixed[GRID_SIZES[key]] = int(value)
    return fixed


def _own(config: RunConfig, cluster: Cluster, token_flops: dict[str, float]) -> Layout | str:
    """The file's layout as it stands, or why it cannot be judged on this cluster."""
    return _not_on(config, cluster) or judge(config, cluster, token_flops)


def _not_on(config: RunConfig, cluster: Cluster) -> str:
    """Why the file's layout cannot be judged on this cluster; empty where it can."""
    ranks = rank_count(config)
    if ranks != cluster.devices:
        return f"for {ranks} device{'s' * (ranks > 1)}"
    return next(iter(find_contradictions(config)), "")


def _write(arguments: argparse.Namespace, plan: LayoutPlan) -> None:
    if arguments.choose > len(plan.fitting):
        raise UserError(
            f"--choose {arguments.choose}: {len(plan.fitting)} layouts fit; nothing was written"
        )
    text = as_yaml(plan.fitting[arguments.choose - 1], arguments.config)
    if arguments.config:
        not_an_input(arguments.write, "--write", [("--config", str(arguments.config))])
    with new_file(arguments.write, overwrite=arguments.overwrite) as aside:
        aside.write_text(text, encoding="utf-8")
    print(f"written: {arguments.write}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
