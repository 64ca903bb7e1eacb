"""report.html: a run at a glance, from its metrics.jsonl and configuration."""

import base64
import math
import statistics
from pathlib import Path

import numpy as np

from mixtral_ms.errors import UserError
from mixtral_ms.files import write_aside
from mixtral_ms.json_reader import read_json, require_shape
from mixtral_ms.train.report.charts import MetricRecords, draw_charts, layer_series, series
from mixtral_ms.train.report.flops import Mfu
from mixtral_ms.train.report.metrics import METRICS_FILE, read_metrics

REPORT_FILE, SAMPLES_FILE = "report.html", "samples.json"
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_LAST_STEPS = 10


def write_report(
    output_dir: str | Path, config_text: str, metrics: str | Path | None = None
) -> Path:
    """Write report.html and its PNGs into `output_dir`; whatever the metrics lack is left out.

    The page holds its pictures, so that it can be sent alone.

    Args:
        output_dir: the run's folder.
        config_text: the configuration as YAML.
        metrics: the run's metrics file; None means metrics.jsonl in `output_dir`.

    Raises:
        UserError: there is no such file, or no step in it.
    """
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - only a report needs it

    folder = Path(output_dir)
    metrics = Path(metrics or folder / METRICS_FILE)
    if not metrics.is_file():
        raise UserError(
            f"no report: {metrics.parent} holds no {metrics.name}; give a run's output_dir"
        )
    records = read_metrics(metrics)
    train = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    if not records:
        raise UserError(f"no report: {metrics} holds no step yet")
    charts = [
        {"title": chart.title, "reading": chart.reading, "file": chart.file}
        | {"data": base64.b64encode((folder / chart.file).read_bytes()).decode()}
        for chart in draw_charts(train, evaluations, folder)
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        summary=summary_rows(train, evaluations),
        charts=charts,
        samples=read_samples(folder),
        config=config_text,
    )
    with write_aside(folder / REPORT_FILE) as aside:
        aside.write_text(page, encoding="utf-8")
    return folder / REPORT_FILE


def read_samples(folder: Path) -> list[dict[str, str]]:
    """What a run was asked and answered; nothing for a run that was not asked.

    Raises UserError for a file that holds something else.
    """
    path = folder / SAMPLES_FILE
    if not path.is_file():
        return []
    samples: list[dict[str, str]] = read_json(path)
    require_shape(samples, [{str: str}], str(path))
    return samples


def summary_rows(train: MetricRecords, evaluations: MetricRecords) -> list[tuple[str, str]]:
    """(what, value with unit) rows of the report's table, for what the records hold."""
    rows = []
    if train:
        rows.append(("Optimizer steps", f"{train[-1]['step']:,}"))
    losses = series(train, "loss")[1]
    if len(losses):
        mean = losses[-_LAST_STEPS:].mean()
        count = len(losses[-_LAST_STEPS:])
        rows.append(("Training loss, first step logged", f"{losses[0]:.4f} nats per token"))
        rows.append(("Training loss, last step", f"{losses[-1]:.4f} nats per token"))
        rows.append((f"Training loss, mean of the last {count}", f"{mean:.4f} nats per token"))
    return rows + _evaluation_rows(evaluations) + _speed_rows(train) + _health_rows(train)


def _evaluation_rows(evaluations: MetricRecords) -> list[tuple[str, str]]:
    steps, losses = series(evaluations, "loss")
    if not len(steps):
        return []
    best = int(np.where(np.isfinite(losses), losses, np.inf).argmin())
    last = evaluations[-1]
    perplexity = last.get("perplexity", math.exp(losses[-1]))
    tokens = f" over {last['tokens']:,} tokens" if "tokens" in last else ""
    return [
        ("Evaluation loss, last", f"{losses[-1]:.4f} nats per token{tokens}"),
        ("Evaluation perplexity, last", f"{perplexity:,.2f}"),
        ("Evaluation loss, best", f"{losses[best]:.4f} at step {int(steps[best]):,}"),
    ]


def _speed_rows(train: MetricRecords) -> list[tuple[str, str]]:
    rows = []
    for key, label, unit in (
        ("tokens_per_second", "Throughput, median", "tokens/s"),
        ("step_time_ms", "Step time, median", "ms"),
    ):
        values = series(train, key)[1]
        if len(values):
            rows.append((label, f"{statistics.median(values):,.1f} {unit}"))
    achieved = series(train, "achieved_flops_per_second")[1]
    peak = series(train, "peak_flops_per_second")[1]
    if len(achieved) and len(peak):
        use = Mfu(statistics.median(achieved), statistics.median(peak))
        rows.append(("Model FLOPs utilisation, median", f"{use} = tokens/s × FLOPs a token ÷ peak"))
    return rows


def _health_rows(train: MetricRecords) -> list[tuple[str, str]]:
    rows = []
    skipped = sum(bool(record.get("skipped")) for record in train)
    if train:
        rows.append(("Steps skipped (overflow)", f"{skipped:,}"))
    drops = layer_series(train, "drop_percent")[1]
    if drops.any():
        rows.append(("Assignments dropped, mean", f"{drops.mean():.2f} %"))
    return rows
