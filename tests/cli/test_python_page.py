"""docs/python.md: its examples run, one after the other, as a program would."""

import re
from pathlib import Path

from helpers.answering import make_model
from helpers.runs import metrics_of

from mixtral_ms.checkpoint.formats.strategy_file import read_strategies

PAGE = Path(__file__).parents[2] / "docs/python.md"


def test_the_examples_run(tiny_run, tmp_path, monkeypatch, capsys):
    predict = make_model(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    names, printed = {}, []
    for block in blocks:
        filled = block.replace('"PREDICT"', repr(str(predict)))
        filled = filled.replace('"RUN/', f'"{tiny_run / "output"}/')
        exec(filled, names)
        printed.append(capsys.readouterr().out.splitlines())
    answered, stepped, metrics, tensors, _ = printed
    assert [line.split()[-1] for line in answered] == ["length", "length"]
    assert len(stepped) == 8  # tokens of the request that was not cancelled
    assert all(line.startswith("True") for line in stepped)
    assert len(metrics) == len(metrics_of(tiny_run / "output"))
    assert any(line.startswith("model.tok_embeddings.") for line in tensors)
    assert len({rank for one in read_strategies("merged.ckpt").values() for rank in one}) == 2
