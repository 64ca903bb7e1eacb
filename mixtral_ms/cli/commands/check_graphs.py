"""A run's graphs for Ascend, compiled without a device: `python -m mixtral_ms check-graphs`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mixtral_ms.cli.support.exit_status import DEBUG_FLAG, EXIT_FAILURE, EXIT_OK, run_command
from mixtral_ms.cli.support.flags import whole_number
from mixtral_ms.config import RunConfig, load_config
from mixtral_ms.config.checks.check_config import check_config
from mixtral_ms.errors import UserError
from mixtral_ms.graphs.check_ranks import check_ranks, mindspore_version, ranks_of
from mixtral_ms.graphs.graphs_report import graphs_text
from mixtral_ms.graphs.results import CheckResult, RankJob, plain_data

_DESCRIPTION = """\
Compile every graph that a run of a YAML would compile on Ascend, without a device: MindSpore's
front end parses it, infers every type and shape, differentiates and optimises on the CPU, and stops
before it would choose kernels. Weights are not made. Says what each graph has in it, or the line of
code that it fails at; docs/ascend.md tells how to read it and what only a device can show. The
status is 0 when every graph was built, 1 otherwise.
"""
_EXAMPLE = """\
examples:
  python -m mixtral_ms check-graphs --config research/mixtral_8x7b/pretrain_mixtral-8x7b.yaml \\
      --layers 1
  packed samples, evaluation, every kind of rank, for another program to read:
  python -m mixtral_ms check-graphs --config research/mixtral_8x7b/finetune_mixtral-8x7b.yaml \\
      --layers 1 --ranks all --set do_eval=True \\
      --set "train_dataset.input_columns=[input_ids, labels, segment_ids]" --json
"""
_MOST_PROCESSES = 2


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status. Raises UserError for bad input."""
    args = _parser().parse_args(argv)
    config = _ascend_run(args)
    keep = ""
    if args.save_graphs is not None:
        args.save_graphs.mkdir(parents=True, exist_ok=True)
        keep = str(args.save_graphs)
    jobs = [
        RankJob(str(args.config), tuple(args.set), rank, args.layers, keep)
        for rank in ranks_of(args.ranks, config)
    ]
    ranks = check_ranks(jobs, args.processes)
    result = CheckResult(str(args.config), config.run_mode, mindspore_version(), tuple(ranks))
    print(json.dumps(plain_data(result), indent=2) if args.json else graphs_text(result))
    return EXIT_OK if result.built else EXIT_FAILURE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mixtral_ms check-graphs",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="YAML", help="the run")
    add(
        "--ranks",
        default="first,last",
        metavar="LIST",
        help="first, last, all (one of each kind) or numbers (default: first,last)",
    )
    add(
        "--layers",
        type=whole_number,
        metavar="N",
        help="compile at most N layers of each pipeline stage (default: all); they are alike, and "
        "counts of a step are those of the whole run",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the YAML")
    add("--json", action="store_true", help="print JSON instead of tables")
    add(
        "--save_graphs", type=Path, metavar="DIR", help="keep MindSpore's files of the graphs there"
    )
    add(
        "--processes",
        type=whole_number,
        default=min(_MOST_PROCESSES, os.cpu_count() or 1),
        metavar="N",
        help="ranks at a time (default: %(default)s)",
    )
    add(DEBUG_FLAG, action="store_true", help="show the traceback of an error")
    return parser


def _ascend_run(args: argparse.Namespace) -> RunConfig:
    config = load_config(args.config, args.set)
    check_config(config, world_size=None, needs_paths=False)
    if config.context.mode == 1:
        raise UserError(
            "context.mode 1 runs operator by operator and compiles no graph: add --set "
            "context.mode=0"
        )
    return config


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
