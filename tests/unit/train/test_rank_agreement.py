"""What ranks agree on; the other ranks' answers are played here, and real in tests/distributed."""

import signal

import pytest
from helpers.runs import make_run

from mixtral_ms.config import load_config
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.mesh import Mesh
from mixtral_ms.train.state import rank_agreement as agreement
from mixtral_ms.train.state.rank_agreement import (
    StepSync,
    Storage,
    agree_on_storage,
    configuration_facts,
    require_same_on_all_ranks,
)


@pytest.fixture
def others(monkeypatch):
    """Sets what the other ranks have."""

    def play(*facts):
        def gather(world, value):
            if isinstance(value, dict):
                return [value, *facts]
            return [value, *map(repr, facts)]  # hashes, of which one differs

        monkeypatch.setattr(agreement, "gather_objects", gather)

    return play


def test_every_key_is_a_fact_but_the_device(tmp_path):
    config = load_config(make_run(tmp_path))
    facts = configuration_facts(config)
    assert facts["seed"] == 3
    assert facts["callbacks.0.save_checkpoint_steps"] == 2
    assert facts["model.model_config.num_layers"] == 1
    assert "context.device_id" not in facts
    config.context.device_id = 5
    assert configuration_facts(config) == facts


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"a": 1, "b": 3}, "\n  b: 3 on rank 2, 2 on rank 0"),
        ({"a": 1}, "\n  b: None on rank 2, 2 on rank 0"),
        ({"a": 1, "b": 2, "c": 4}, "\n  c: 4 on rank 2, None on rank 0"),
        (dict.fromkeys("abcdefg", 0), " and 2 more"),
    ],
)
def test_a_rank_that_differs_is_named(others, theirs, said):
    others({"a": 1, "b": 2}, theirs)
    with pytest.raises(UserError) as caught:
        require_same_on_all_ranks(Mesh().world, {"a": 1, "b": 2})
    assert str(caught.value).startswith("rank 2 was started with something else than rank 0:")
    assert said in str(caught.value)


def test_one_process_agrees_with_itself(tmp_path):
    require_same_on_all_ranks(Mesh().world, {"a": 1})
    folder = tmp_path / "none"
    assert agree_on_storage(Mesh(), folder, shared=True) == Storage() and not folder.exists()
    sync = StepSync(Mesh())
    sync.wait()
    assert sync(None, False) == (None, False, False)
    assert sync(None, True) == (None, True, False)
    assert sync(signal.SIGTERM, False) == (signal.SIGTERM, False, False)
    assert sync(signal.SIGINT, True) == (signal.SIGINT, True, False)
