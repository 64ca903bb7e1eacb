"""The report on whole and partial metrics."""

import base64
import io
import re
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.image import imread

from mixtral_ms.errors import UserError
from mixtral_ms.train.report import charts
from mixtral_ms.train.report.charts import CHARTS
from mixtral_ms.train.report.metrics import MetricsWriter
from mixtral_ms.train.report.report import read_samples, summary_rows, write_report

CONFIG = "seed: 1\nname: <b>&tiny\n"


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    monkeypatch.setattr(charts, "_DPI", 40)


def train_record(step, layers=3, experts=4):
    return {
        "kind": "train",
        "step": step,
        "loss": 5.0 - 0.01 * step,
        "learning_rate": 1e-3,
        "grad_norm": float("nan") if step == 5 else 1.0,
        "skipped": step == 5,
        "tokens_per_second": 100.0 * (1 + step % 3),
        "step_time_ms": 50.0,
        "achieved_flops_per_second": 2e9,
        "peak_flops_per_second": 8e9,
        "expert_load": [[1 / experts] * experts] * layers,
        "drop_percent": [1.0, 2.0, 3.0][:layers],
        "router_entropy": [1.0] * layers,
    }


def eval_record(step, loss):
    return {"kind": "eval", "step": step, "loss": loss, "perplexity": np.exp(loss), "tokens": 1234}


def report(folder, records):
    with closing(MetricsWriter(folder / "metrics.jsonl")) as writer:
        for item in records:
            writer.write(item)
    return write_report(folder, CONFIG).read_text(encoding="utf-8")


@pytest.mark.slow
def test_full_report_holds_every_chart_the_summary_and_the_configuration(tmp_path):
    records = [train_record(step) for step in range(1, 91)]
    page = report(tmp_path, [*records, eval_record(30, 4.0), eval_record(90, 4.5)])
    embedded = re.findall(r'title="(\S+)" src="data:image/png;base64,([^"]+)"', page)
    assert [name for name, _ in embedded] == [chart.file for chart in CHARTS]
    for name, data in embedded:
        assert base64.b64decode(data) == (tmp_path / name).read_bytes()
        picture = imread(tmp_path / name)
        assert picture[..., :3].std() > 0.01, f"{name} is empty"
    for text in (
        "4.1000 nats per token",
        "4.5000 nats per token over 1,234 tokens",
        "90.02",
        "4.0000 at step 30",
        "200.0 tokens/s",
        "25.0% (2.0 of 8.0 GFLOP/s)",
        "2.00 %",
        "name: &lt;b&gt;&amp;tiny",
    ):
        assert text in page
    assert "src=" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "the page must need no other file"


def drawn(folder):
    return {path.name for path in folder.glob("*.png")}


ALWAYS = {"loss.png", "learning_rate.png", "grad_norm.png", "throughput.png"}


def test_one_step_without_drops_or_evaluation(tmp_path):
    one = train_record(1, layers=1, experts=1) | {"drop_percent": [0.0]}
    page = report(tmp_path, [one])
    assert drawn(tmp_path) == ALWAYS | {"expert_load.png", "router_entropy.png"}
    assert "Evaluation" not in page
    assert "Assignments dropped" not in page


def test_evaluation_only(tmp_path):
    page = report(tmp_path, [eval_record(0, 3.0)])
    assert drawn(tmp_path) == {"loss.png"}
    assert "20.09" in page
    assert "Optimizer steps" not in page


def test_missing_and_null_fields_leave_their_chart_out(tmp_path):
    nothing = {"learning_rate": None, "drop_percent": None, "expert_load": [], "mfu": None}
    records = [{"kind": "train", "step": step, "loss": 1.0, **nothing} for step in (1, 2)]
    report(tmp_path, records)
    assert drawn(tmp_path) == {"loss.png"}


def test_all_not_finite(tmp_path):
    bad = train_record(5) | {"loss": float("nan"), "grad_norm": float("inf")}
    page = report(tmp_path, [bad, eval_record(5, float("nan"))])
    assert "nan nats per token" in page


def test_best_evaluation_ignores_those_that_are_not_finite():
    rows = dict(summary_rows([], [eval_record(1, float("nan")), eval_record(2, 3.0)]))
    assert rows["Evaluation loss, best"] == "3.0000 at step 2"


def test_unbalanced_experts_look_different_from_balanced_ones():
    (chart,) = [chart for chart in CHARTS if chart.file == "expert_load.png"]
    pictures = []
    for load in ([0.25] * 4, [0.97, 0.01, 0.01, 0.01]):
        records = [train_record(step) | {"expert_load": [load] * 2} for step in range(1, 9)]
        buffer = io.BytesIO()
        chart.draw(records, [], chart.title).savefig(buffer, format="png", dpi=40)
        pictures.append(imread(io.BytesIO(buffer.getvalue())))
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.05


def test_no_metrics_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl; give a run's output_dir"):
        write_report(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="holds no step yet"):
        write_report(tmp_path, CONFIG)


def test_skipped_steps_are_counted():
    rows = dict(summary_rows([train_record(step) for step in (4, 5, 6)], []))
    assert rows["Steps skipped (overflow)"] == "1"


def test_matplotlib_is_imported_only_when_a_report_is_written():
    code = "import sys, mixtral_ms.train.report.report; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{}", "an object, but must be a list"),
        ("[1]", r"\[0\]: a whole number, but must be an object"),
        ('[{"prompt": 1}]', "'prompt': a whole number, but must be a text"),
        ('[{"prompt": "a"}, {"prompt": null}]', r"\[1\]: 'prompt': null"),
        ("[" * 9999, "nested"),
        ("no JSON", "not JSON"),
        ("", "empty"),
    ],
)
def test_samples_of_another_shape_are_named(tmp_path, content, part):
    (tmp_path / "samples.json").write_text(content)
    with pytest.raises(UserError, match=f"samples.json.*{part}"):
        read_samples(tmp_path)


def test_samples_of_other_prompts_are_no_beginning(tmp_path):
    from mixtral_ms.train.sample_answers import Samples  # noqa: PLC0415 - MindSpore

    run = SimpleNamespace(
        mesh=SimpleNamespace(rank=0),
        path=tmp_path / "samples.json",
        prompts=["a", "b"],
        _decode=lambda ids: ids,
    )
    (tmp_path / "samples.json").write_text('[{"prompt": "a"}, {"prompt": "b"}]')
    assert len(Samples._kept(run)) == 2
    (tmp_path / "samples.json").write_text('[{"prompt": "a"}]')
    with pytest.raises(UserError, match="samples.json: holds answers to other prompts"):
        Samples._kept(run)
