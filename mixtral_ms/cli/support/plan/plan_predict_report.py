"""What the plan command shows of a run that answers: a table or JSON."""

import dataclasses
from typing import Any

from mixtral_ms.parallel.planner.memory_model import format_bytes
from mixtral_ms.parallel.planner.predict_layouts import PredictLayout, PredictPlan
from mixtral_ms.parallel.planner.predict_memory import run_dtypes
from mixtral_ms.parallel.planner.predict_time import TokenStep, assumptions
from mixtral_ms.parallel.planner.time_model import Cluster

_COLUMNS = (
    ("#", 3),
    ("dp", 4),
    ("mp", 4),
    ("ep", 4),
    ("weight_dtype", 14),
    ("memory", 11),
    ("weights", 11),
    ("cache", 11),
)
_OF_STEP = (("step", 10), ("tokens/s", 10), ("bound by", 13))
_MOST = 5


def predict_as_text(plan: PredictPlan, cluster: Cluster, own: PredictLayout | str, top: int) -> str:
    """The table of the best `top`, the file's own layout, and the assumptions."""
    layouts = (*plan.fitting, *plan.too_large)
    lines = [
        f"{cluster.devices} devices, {cluster.devices_per_host} a host, "
        f"{format_bytes(int(cluster.memory))} usable on each: {len(plan.fitting)} grids fit, "
        f"of {len(layouts)} with every weight_dtype"
    ]
    if plan.fitting:
        lines += _table(plan.fitting[:top])
    lines.append("")
    if isinstance(own, str):
        lines.append(f"the file's own layout is not among them: {own}")
    else:
        fits = "fits" if own.memory.total <= cluster.memory else "is too large"
        lines += [f"the file's own layout {fits}:", *_table([own]), *_own_step(own)]
    if plan.too_large:
        lines += ["", f"too large, of {len(plan.too_large)} the nearest:"]
        lines += [
            f"  {_grid(one)}, weight_dtype {one.config.weight_dtype}: "
            f"{format_bytes(one.memory.total)} of {format_bytes(int(cluster.memory))}"
            for one in plan.too_large[:_MOST]
        ]
    if plan.refused:
        lines += ["", f"refused, {sum(plan.refused.values())} grids:"]
        reasons = list(plan.refused.items())[:_MOST]
        lines += [f"  {count} times: {reason}" for reason, count in reasons]
    return "\n".join([*lines, "", "estimates; assumed:", *(f"  {a}" for a in assumptions(cluster))])


def predict_as_data(
    plan: PredictPlan, cluster: Cluster, own: PredictLayout | str, top: int
) -> dict[str, Any]:
    """The same as plain data: bytes and seconds."""
    return {
        "cluster": dataclasses.asdict(cluster),
        "fitting": [_data(one) for one in plan.fitting[:top]],
        "own": own if isinstance(own, str) else _data(own),
        "too_large": [_data(one) for one in plan.too_large[:top]],
        "refused": dict(plan.refused),
        "assumptions": assumptions(cluster),
    }


def _table(layouts: tuple[PredictLayout, ...] | list[PredictLayout]) -> list[str]:
    first = layouts[0]
    counts = [1] if first.batch.sequences == 1 else [1, first.batch.sequences]
    width = sum(width for _, width in _COLUMNS)
    titles = "".join(f"{name:>{w}}" for name, w in (*_COLUMNS, *_OF_STEP * len(counts)))
    of_step = sum(width for _, width in _OF_STEP)
    above = "".join(f"{f'{n} sequence' + 's' * (n > 1):>{of_step}}" for n in counts)
    return [
        " " * width + above,
        titles,
        *(_row(str(number), one) for number, one in enumerate(layouts, 1)),
    ]


def _row(number: str, one: PredictLayout) -> str:
    grid, memory = one.config.parallel_config, one.memory
    values = (
        number,
        grid.data_parallel,
        grid.model_parallel,
        grid.expert_parallel,
        one.config.weight_dtype,
        *(format_bytes(size) for size in (memory.total, memory.weights, memory.cache)),
    )
    cells = "".join(f"{value:>{width}}" for value, (_, width) in zip(values, _COLUMNS, strict=True))
    return cells + "".join(_step_cells(step) for step in _steps(one))


def _steps(one: PredictLayout) -> list[TokenStep]:
    return [one.alone] if one.batch.sequences == 1 else [one.alone, one.batch]


def _step_cells(step: TokenStep) -> str:
    values = (f"{step.seconds * 1e3:.1f} ms", f"{step.tokens_per_second:,.0f}", step.bound_by)
    return "".join(f"{value:>{width}}" for value, (_, width) in zip(values, _OF_STEP, strict=True))


def _own_step(own: PredictLayout) -> list[str]:
    """Where the time of a step goes."""
    dtypes = run_dtypes(own.config)
    lines = [f"  computes in {dtypes.products}, cache in {dtypes.cache}"]
    for step in _steps(own):
        terms = ", ".join(
            f"{name} {getattr(step, name) * 1e3:.2f} ms"
            for name in ("weights", "casts", "cache", "compute", "collectives")
        )
        lines.append(
            f"  {step.sequences} x {step.context} positions: {terms}; "
            f"{step.weight_bytes / 1e9:.1f} GB of weights are met"
        )
    return lines


def _grid(one: PredictLayout) -> str:
    grid = one.config.parallel_config
    return f"dp={grid.data_parallel},mp={grid.model_parallel},ep={grid.expert_parallel}"


def _data(one: PredictLayout) -> dict[str, Any]:
    return {
        "grid": _grid(one),
        "weight_dtype": one.config.weight_dtype,
        "dtypes": dataclasses.asdict(run_dtypes(one.config)),
        "memory": dataclasses.asdict(one.memory) | {"total": one.memory.total},
        "steps": [
            dataclasses.asdict(step)
            | {
                "seconds": step.seconds,
                "tokens_per_second": step.tokens_per_second,
                "bound_by": step.bound_by,
            }
            for step in _steps(one)
        ],
    }
