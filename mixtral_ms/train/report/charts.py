"""Charts of a training run, drawn from its metrics; one function a picture.

Colours are the Okabe-Ito pair for lines and perceptually ordered maps for layers and loads,
all readable with a colour-vision deficiency. matplotlib is imported when a chart is drawn.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixtral_ms.files import write_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _VERMILLION, _GREY = "#0072B2", "#D55E00", "#666666"
_SIZE_INCHES = (8.0, 4.2)
_DPI = 110
_HEAT_COLUMNS = 160  # time bins of a heat map
_MAX_LOAD = 3.0  # loads above three times the even one are one colour
_SMOOTH_FRACTION = 30  # the smoothed line averages 1/30 of the run

MetricRecords = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A picture of the report: file name, heading, one sentence on how to read it."""

    file: str
    title: str
    reading: str
    draw: Callable[[MetricRecords, MetricRecords, str], "Figure | None"]


def draw_charts(train: MetricRecords, evaluations: MetricRecords, folder: Path) -> list[Chart]:
    """Write a PNG into `folder` for every chart that the records have numbers for."""
    drawn = []
    for chart in CHARTS:
        figure = chart.draw(train, evaluations, chart.title)
        if figure is not None:
            with write_aside(folder / chart.file) as aside:
                figure.savefig(aside, format="png", dpi=_DPI)
            drawn.append(chart)
    return drawn


def series(records: MetricRecords, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one field, in float64; records without the field are left out."""
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    table = np.array(found, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def layer_series(records: MetricRecords, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps (N,) and values (N, layers, …) of a field that has one item a layer."""
    found = [(r["step"], r[key]) for r in records if r.get(key)]
    steps = np.array([step for step, _ in found], np.float64)
    return steps, np.array([value for _, value in found], np.float64)


def _new_axes(title: str, y_label: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # noqa: PLC0415 - only a report needs it
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = Figure(_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(y_label)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, min_n_ticks=1))
    return figure, axes


def _line(axes: "Axes", steps: np.ndarray, values: np.ndarray, label: str) -> None:
    """Every value, faint, and their running mean; one value alone is a dot."""
    width = len(values) // _SMOOTH_FRACTION
    if width < 2:
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=_BLUE, linewidth=1.6, marker=marker, label=label)
        return
    axes.plot(steps, values, color=_BLUE, linewidth=0.8, alpha=0.35, label=label)
    mean = np.convolve(values, np.ones(width) / width, "valid")
    middle = np.convolve(steps, np.ones(width) / width, "valid")
    axes.plot(middle, mean, color=_BLUE, linewidth=1.8, label=f"mean of {width} steps")


def _simple(key: str, y_label: str, from_zero: bool = False) -> Callable[..., "Figure | None"]:
    """A chart of one field of the training records."""

    def draw(train: MetricRecords, _: MetricRecords, title: str) -> "Figure | None":
        steps, values = series(train, key)
        if not len(steps):
            return None
        figure, axes = _new_axes(title, y_label)
        _line(axes, steps, values, "every step")
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
        return figure

    return draw


def _draw_learning_rate(train: MetricRecords, _: MetricRecords, title: str) -> "Figure | None":
    steps, values = series(train, "learning_rate")
    if not len(steps):
        return None
    figure, axes = _new_axes(title, "learning rate")
    axes.plot(steps, values, color=_BLUE, linewidth=1.8, marker="o" if len(steps) == 1 else None)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.set_ylim(bottom=0)
    return figure


def _draw_loss(train: MetricRecords, evaluations: MetricRecords, title: str) -> "Figure | None":
    steps, values = series(train, "loss")
    eval_steps, eval_values = series(evaluations, "loss")
    if not len(steps) and not len(eval_steps):
        return None
    figure, axes = _new_axes(title, "loss (nats per token)")
    if len(steps):
        _line(axes, steps, values, "training, auxiliary losses included")
    if len(eval_steps):
        axes.plot(
            eval_steps,
            eval_values,
            color=_VERMILLION,
            linewidth=1.6,
            marker="o",
            markersize=4,
            label="evaluation",
        )
    axes.legend(frameon=False)
    return figure


def _layer_lines(axes: "Axes", steps: np.ndarray, values_NL: np.ndarray) -> None:
    """One line a layer, coloured by depth, with a colour bar that names the depth."""
    from matplotlib import colormaps  # noqa: PLC0415 - only a report needs it
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import BoundaryNorm  # noqa: PLC0415

    layers = values_NL.shape[1]
    colours = colormaps["viridis"].resampled(layers + 1)  # the last, pale yellow, is not used
    bins = _time_bins(len(steps))
    binned = np.stack([values_NL[part].mean(0) for part in bins])
    at = [steps[part].mean() for part in bins]
    for layer in range(layers):
        marker = "o" if len(at) == 1 else None
        axes.plot(at, binned[:, layer], color=colours(layer), linewidth=1.3, marker=marker)
    norm = BoundaryNorm(np.arange(-0.5, layers + 1), layers + 1)
    bar = axes.figure.colorbar(ScalarMappable(norm, colours), ax=axes, pad=0.02)
    bar.ax.set_ylim(-0.5, layers - 0.5)
    bar.set_ticks(sorted(set(np.linspace(0, layers - 1, min(layers, 8)).round().astype(int))))
    bar.ax.minorticks_off()
    bar.set_label("layer")


def _time_bins(count: int) -> list[np.ndarray]:
    return np.array_split(np.arange(count), min(count, _HEAT_COLUMNS))


def _draw_drop(train: MetricRecords, _: MetricRecords, title: str) -> "Figure | None":
    steps, values_NL = layer_series(train, "drop_percent")
    if not len(steps) or not values_NL.any():
        return None
    figure, axes = _new_axes(title, "dropped assignments (%)")
    _layer_lines(axes, steps, values_NL)
    axes.set_ylim(bottom=0)
    return figure


def _draw_entropy(train: MetricRecords, _: MetricRecords, title: str) -> "Figure | None":
    steps, values_NL = layer_series(train, "router_entropy")
    if not len(steps):
        return None
    figure, axes = _new_axes(title, "entropy (nats)")
    _layer_lines(axes, steps, values_NL)
    loads = layer_series(train, "expert_load")[1]
    if loads.ndim == 3 and loads.shape[2] > 1:
        even = math.log(loads.shape[2])
        axes.axhline(even, color=_GREY, linewidth=1, linestyle="--")
        axes.annotate(
            f"ln {loads.shape[2]}: all experts equally likely",
            (0.01, even),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=_GREY,
            fontsize=8,
        )
        axes.set_ylim(0, even * 1.1)
    return figure


def _draw_expert_load(train: MetricRecords, _: MetricRecords, title: str) -> "Figure | None":
    """A heat map a layer: experts upwards, time to the right, 1 = an even share."""
    steps, loads_NLE = layer_series(train, "expert_load")
    if not len(steps):
        return None
    from matplotlib.colors import TwoSlopeNorm  # noqa: PLC0415 - only a report needs it
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    even = loads_NLE.mean(2, keepdims=True)
    relative = loads_NLE / np.where(even > 0, even, 1)
    heat_TLE = np.stack([relative[part].mean(0) for part in _time_bins(len(steps))])
    layers, experts = heat_TLE.shape[1:]
    columns = min(4, layers)
    rows = math.ceil(layers / columns)
    width = max(_SIZE_INCHES[0], 2.6 * columns)
    figure = Figure((width, 1.2 + 1.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    norm = TwoSlopeNorm(1.0, 0.0, _MAX_LOAD)
    half = max(0.5, (steps[-1] - steps[0]) / max(len(heat_TLE) - 1, 1) / 2)
    extent = (steps[0] - half, steps[-1] + half, -0.5, experts - 0.5)
    for layer, axes in enumerate(grid.flat):
        if layer >= layers:
            axes.set_visible(False)
            continue
        picture = axes.imshow(
            heat_TLE[:, layer].T,
            origin="lower",
            aspect="auto",
            extent=extent,
            cmap="PuOr_r",
            norm=norm,
            interpolation="nearest",
        )
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.tick_params(labelsize=8, labelbottom=layer + columns >= layers)
    figure.supxlabel("optimizer step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    bar = figure.colorbar(
        picture, ax=grid, extend="max", pad=0.02, aspect=12 * rows, ticks=[0, 0.5, 1, 2, 3]
    )
    bar.ax.tick_params(labelsize=8)
    bar.set_label("load, relative to an even share")
    return figure


CHARTS = (
    Chart(
        "loss.png",
        "Loss",
        "Training loss falls; evaluation that rises while training falls is overfitting.",
        _draw_loss,
    ),
    Chart("learning_rate.png", "Learning rate", "As the schedule sets it.", _draw_learning_rate),
    Chart(
        "grad_norm.png",
        "Gradient norm",
        "Global norm before clipping; growing spikes announce divergence.",
        _simple("grad_norm", "L2 norm of all gradients", from_zero=True),
    ),
    Chart(
        "throughput.png",
        "Throughput",
        "Tokens trained on per second, over all devices.",
        _simple("tokens_per_second", "tokens per second", from_zero=True),
    ),
    Chart(
        "expert_load.png",
        "Expert load by layer",
        "White is an even share; purple experts starve, orange ones are overloaded.",
        _draw_expert_load,
    ),
    Chart(
        "drop_percent.png",
        "Dropped assignments by layer",
        "Token-to-expert assignments beyond an expert's capacity.",
        _draw_drop,
    ),
    Chart(
        "router_entropy.png",
        "Router entropy by layer",
        "Near the dashed line the router is undecided; near 0 it always picks the same expert.",
        _draw_entropy,
    ),
)
