"""A rendered configuration loads to an equal one; no text whatever gives a traceback."""

import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixtral_ms.config import RunConfig, load_config
from mixtral_ms.config.loading.render import render_config
from mixtral_ms.errors import UserError

ROOT = Path(__file__).parents[3]
FILES = [
    *sorted((ROOT / "research").glob("*/*.yaml")),
    ROOT / "tests/data/mindformers_style.yaml",
]


def load_text(text: str) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_come_back_equal(path):
    config = load_config(path)
    again = load_text(render_config(config))
    assert again == config
    assert render_config(again) == render_config(config)


_OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "output_dir": st.text(min_size=1, max_size=8).filter(str.isprintable),
        "resume_training": st.one_of(st.booleans(), st.just("ckpt-3")),
        "optimizer.eps": st.floats(1e-300, 1, allow_nan=False),
        "lr_schedule.learning_rate": st.floats(0, 1, allow_nan=False),
        "runner_config.global_batch_size": st.integers(1, 64),
        "moe_config.capacity_factor": st.floats(-1, 4, allow_nan=False),
        "model.model_config.num_layers": st.integers(1, 9),
        "model.model_config.offset": st.one_of(st.integers(-3, 3), st.lists(st.integers(-3, 3))),
        "model.model_config.head_dim": st.one_of(st.none(), st.integers(2, 64)),
        "runner_wrapper.scale_sense": st.one_of(st.none(), st.floats(1, 1e5)),
        "predict_data": st.one_of(st.none(), st.lists(st.text(max_size=5))),
    },
)


@settings(max_examples=60, deadline=None)
@given(_OVERRIDES)
@example({"predict_data": ["\x85"]})
@pytest.mark.slow
def test_whatever_is_set_comes_back_equal(values):
    overrides = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in values.items()
    ]
    try:
        config = load_config(FILES[-2], overrides)
    except UserError as error:  # text that YAML cannot hold unescaped
        assert "output_dir" in str(error) or "predict_data" in str(error)
        return
    assert load_text(render_config(config)) == config


_ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6)),
    lambda below: st.one_of(
        st.lists(below, max_size=3),
        st.dictionaries(
            st.sampled_from(["seed", "type", "context", "callbacks", "optimizer", "betas", "zz"]),
            below,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(_ANY)
def test_any_yaml_is_read_or_refused(data):
    try:
        assert isinstance(load_text(yaml.safe_dump(data)), RunConfig)
    except UserError as error:
        assert str(error)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="abseed: -[]{}&*!|>%@`'\"#\n\t,?<=.1", max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        assert isinstance(load_text(text), RunConfig)
    except UserError as error:
        assert str(error)
