"""What the plan command shows: a table, JSON, or the YAML of one layout."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from mixtral_ms.config.loading.resolve import micro_batch_size, rank_count, sequences_per_step
from mixtral_ms.parallel.grid.grid_text import format_grid
from mixtral_ms.parallel.planner.hccl_buffers import hccl_buffers
from mixtral_ms.parallel.planner.layout_search import Layout, LayoutPlan, sections
from mixtral_ms.parallel.planner.memory_model import format_bytes
from mixtral_ms.parallel.planner.time_model import Cluster

_COLUMNS = (
    ("#", 3),
    ("dp", 5),
    ("mp", 4),
    ("ep", 4),
    ("pp", 4),
    ("cp", 4),
    ("micro", 7),
    ("zero", 6),
    ("seq", 5),
    ("recompute", 11),
    ("memory", 11),
    ("sent/step", 11),
    ("bubble", 8),
    ("step", 9),
    ("tokens/s", 11),
)
_LEGEND = (
    "micro: micro batches of a step; zero: optimizer moments cut over replicas; seq: sequence "
    "parallel; memory and bytes sent: of the fullest stage's ranks; step, tokens/s: estimates"
)
_MOST_REASONS = 5
_LONGEST_REASON = 160


def as_text(plan: LayoutPlan, cluster: Cluster, own: Layout | str, top: int) -> str:
    """The table of the best `top`, the file's own layout, and why others do not fit."""
    lines = [
        f"{cluster.devices} devices, {cluster.devices_per_host} a host, "
        f"{format_bytes(int(cluster.memory))} usable on each: {len(plan.fitting)} grids fit",
    ]
    if plan.fitting:
        lines += [_batch(plan.fitting[0]), "", "".join(f"{name:>{w}}" for name, w in _COLUMNS)]
        lines += [_row(str(number), layout) for number, layout in enumerate(plan.fitting[:top], 1)]
        best = plan.fitting[0]
        lines += [_LEGEND, "", f"the step of 1: {_parts(best)}", _assumed(cluster)]
        lines += _buffers(best)
    lines += ["", *_own_lines(plan, cluster, own)]
    if plan.too_large:
        lines += ["", f"too large, of {len(plan.too_large)} the nearest:"]
        lines += [f"  {_why_too_large(one, cluster)}" for one in plan.too_large[:_MOST_REASONS]]
    if plan.refused:
        lines += ["", f"refused, {sum(plan.refused.values())} grids:"]
        reasons = list(plan.refused.items())[:_MOST_REASONS]
        lines += [f"  {count} times: {_short(reason)}" for reason, count in reasons]
    return "\n".join(lines)


def as_data(plan: LayoutPlan, cluster: Cluster, own: Layout | str, top: int) -> dict[str, Any]:
    """The same as plain data: sizes in bytes, times in seconds."""
    return {
        "cluster": dataclasses.asdict(cluster),
        "fitting_grids": len(plan.fitting),
        "fitting": [_data(layout) for layout in plan.fitting[:top]],
        "own": own if isinstance(own, str) else _data(own),
        "too_large": [_data(layout) for layout in plan.too_large[:top]],
        "refused": dict(plan.refused),
    }


def as_yaml(layout: Layout, config: Path) -> str:
    """The sections of a layout as YAML; a comment gives them as flags of the run command."""
    keys = sections(layout)
    flags = [
        f"--set {section}.{key}={value}"
        for section, values in keys.items()
        for key, value in values.items()
    ]
    head = [
        f"# A layout for {rank_count(layout.config)} devices:",
        f"# {_grid(layout)}, {format_bytes(layout.fullest.total)} on the fullest rank.",
        f"# These sections take the place of those in {config.name}. The same as flags:",
        *(f"#   {flag} \\" for flag in ["--use_parallel True", *flags[:-1]]),
        f"#   {flags[-1]}",
    ]
    body = yaml.safe_dump({"use_parallel": True, **keys}, sort_keys=False)
    return "\n".join(head) + "\n" + body


def _grid(layout: Layout) -> str:
    config = layout.config
    return format_grid(config.parallel_config, zero=config.parallel.enable_parallel_optimizer)


def _batch(layout: Layout) -> str:
    sequences, size = sequences_per_step(layout.config), micro_batch_size(layout.config)
    tokens = sequences * layout.config.model.model_config.seq_length
    return (
        f"a step of {sequences:,} sequences, {tokens:,} tokens; micro batches of "
        f"{size} sequence{'s' * (size > 1)}"
    )


def _row(number: str, layout: Layout) -> str:
    config, grid = layout.config, layout.config.parallel_config
    values = (
        number,
        grid.data_parallel,
        grid.model_parallel,
        grid.expert_parallel,
        grid.pipeline_stage,
        grid.context_parallel,
        layout.micro_batches,
        _yes(config.parallel.enable_parallel_optimizer),
        _yes(grid.use_seq_parallel),
        _yes(config.recompute_config.recompute),
        format_bytes(layout.fullest.total),
        f"{layout.most_sent.total / 1e9:.1f} GB",
        f"{layout.time.bubble:.1%}",
        f"{layout.time.step:.3g} s",
        f"{layout.tokens_per_second:,.0f}",
    )
    return "".join(f"{value:>{width}}" for value, (_, width) in zip(values, _COLUMNS, strict=True))


def _yes(value: bool) -> str:
    return "yes" if value else "-"


def _own_lines(plan: LayoutPlan, cluster: Cluster, own: Layout | str) -> list[str]:
    if isinstance(own, str):
        return [f"the file's own layout is not among them: {_short(own)}"]
    if own.fullest.total > cluster.memory:
        return [f"the file's own layout is too large: {_why_too_large(own, cluster)}"]
    faster = sum(layout.time.step < own.time.step for layout in plan.fitting)
    return [
        f"the file's own layout fits; {faster} are estimated to be faster:",
        _row("", own),
        f"its step: {_parts(own)}",
    ]


def _parts(layout: Layout) -> str:
    """What the step is made of, and what is hidden behind it."""
    time = layout.time
    shown = [f"{name} {seconds:.3g} s" for name, seconds in time.exposed.items() if seconds]
    hidden = [f"{name} {seconds:.3g} s" for name, seconds in time.hidden.items() if seconds]
    behind = f"; behind the products: {', '.join(hidden)}" if hidden else ""
    return ", ".join(shown) + behind


def _assumed(cluster: Cluster) -> str:
    return (
        f"assumed: {cluster.flops / 1e12:g} TFLOP/s at {cluster.efficiency:.0%}, memory "
        f"{cluster.memory_bandwidth / 1e9:g} GB/s, links {cluster.bandwidth_inside / 1e9:g} GB/s "
        f"inside a host and {cluster.bandwidth_between / 1e9:g} between; even experts; of what is "
        "sent only the experts' exchange in parts is hidden; the optimizer's time is not in it"
    )


def _buffers(layout: Layout) -> list[str]:
    """What of the memory that is kept back HCCL takes."""
    if layout.config.context.device_target == "CPU":
        return []
    groups, size = hccl_buffers(layout.config.parallel_config)
    return [
        f"not in the memory: HCCL's buffers, {format_bytes(size)} for {groups} groups of a "
        "rank of 1, out of what --usable keeps back (parallel_config.hccl_buffer_size)"
    ]


def _why_too_large(layout: Layout, cluster: Cluster) -> str:
    part, size = layout.largest_part()
    limit = format_bytes(int(cluster.memory))
    recomputed = ", recompute" if layout.config.recompute_config.recompute else ""
    return (
        f"{_grid(layout)}{recomputed}: stage {layout.fullest.stage} needs "
        f"{format_bytes(layout.fullest.total)} of {limit}, most of it {part}, {format_bytes(size)}"
    )


def _short(reason: str) -> str:
    return reason if len(reason) <= _LONGEST_REASON else reason[: _LONGEST_REASON - 1] + "…"


def _data(layout: Layout) -> dict[str, Any]:
    return {
        "grid": _grid(layout),
        "sections": sections(layout),
        "micro_batches": layout.micro_batches,
        "memory": [dataclasses.asdict(rank) | {"total": rank.total} for rank in layout.memory],
        "traffic": [dataclasses.asdict(one) | {"total": one.total} for one in layout.traffic],
        "time": dataclasses.asdict(layout.time),
        "tokens_per_second": layout.tokens_per_second,
        "hccl_buffer_bytes": hccl_buffers(layout.config.parallel_config)[1],
    }
