"""MindSpore's own tools against our strategy files and the regions they stand for.

They merge parts that we cut, and cut what we then find where our regions say, bit for bit. Each
grid's transformations run in a process of their own: they fork, and may wait without end.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from helpers.tiny import tiny_config

from mixtral_ms.checkpoint.formats.strategy_file import (
    read_strategies,
    write_merged_strategy,
    write_strategies,
)
from mixtral_ms.parallel.grid import sharding_rules as layout
from mixtral_ms.parallel.grid.grid_text import parse_grid
from mixtral_ms.parallel.grid.placement import Placement

pytestmark = pytest.mark.slow
FORMATS = ("ckpt", "safetensors")
GRIDS = (
    "dp=2,mp=2,pp=2,ep=2,zero=1",
    "mp=4,ep=4,vocab_emb_dp=0",
    "dp=4,ep=2,zero=1",
    "dp=2,mp=4,ep=4,pp=2,zero=1",
)
JOBS = """
import json, sys
import mindspore
for name, arguments in json.loads(sys.argv[1]):
    getattr(mindspore, name)(*arguments)
"""


def network_case(text):
    """Shapes and placements of a small network's parameters and moments on a grid."""
    grid, zero = parse_grid(text)
    model = tiny_config(
        hidden_size=16,
        intermediate_size=32,
        n_kv_heads=4,
        vocab_size=32,
        head_dim=4,
        tie_word_embeddings=grid.pipeline_stage > 1 and grid.model_parallel > 2,
    )
    parameters = layout.parameter_shapes(model)
    shapes = {
        prefix + name: shape
        for prefix in ("", *layout.MOMENTS)
        for name, shape in parameters.items()
    }
    return shapes, layout.placements(model, grid, shapes, zero=zero)


def foreign_case():
    """Placements on 8 ranks that our own table does not make, but a strategy file may hold.

    Left out: an optimizer shard over the leftmost device axis alone, of a tensor whose first axis
    is cut by a device axis further right than its second one is. There MindSpore's tools swap the
    two, which contradicts the same layout without the shard.
    """
    placed = [
        Placement((2, 2, 2), ((2, 0), ())),
        Placement((2, 2, 2), ((0, 2), (1,))),
        Placement((2, 2, 2), ((2, 0), ()), -1, 2),
        Placement((4, 2), ((), (0,)), 2, 2),
        Placement((4, 2), ((1,), ()), -1, 1),
        Placement((2, 2, 2), ((1,), ()), -1, 1),
        Placement((2, 2, 2), ((1,), ()), 2, 1),
        Placement((2, 4), ((1,), ()), 2, 1),
        Placement((2, 2, 2), ((), (2,)), -1, 1),
        Placement((2, 2, 2), ((), ()), -1, 1),
        Placement((2, 2, 2), ((), ()), 4, 1),
        Placement((8,), ((), ()), 2, 1),
        Placement((2, 2, 2), ((1,), (2,)), -1, 1),
    ]
    names = [f"tensor{index}" for index in range(len(placed))]
    return dict.fromkeys(names, (16, 8)), {
        name: {0: one} for name, one in zip(names, placed, strict=True)
    }


def whole_tensors(shapes):
    """Values of all bits; every other tensor's last 16 bits are 0: it is written as bfloat16."""
    rng, tensors = np.random.default_rng(0), {}
    for index, (name, shape) in enumerate(shapes.items()):
        values = rng.standard_normal(shape).astype(np.float32)
        if is_bfloat16(index):
            values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        tensors[name] = values
    return tensors


def is_bfloat16(index):
    return index % 2 == 0


def cut(tensors, placed, rank):
    """What a rank holds, by our regions."""
    return {
        name: tensors[name][one.region(tensors[name].shape, rank)]
        for name, stages in placed.items()
        for one in stages.values()
        if rank in one.ranks
    }


def save(folder, tensors, dtypes, kind):
    import mindspore  # noqa: PLC0415 - seconds

    folder.mkdir(parents=True)
    data = [
        {"name": name, "data": mindspore.Tensor(np.ascontiguousarray(part)).astype(dtypes[name])}
        for name, part in tensors.items()
    ]
    mindspore.save_checkpoint(data, str(folder / f"weights.{kind}"), format=kind)


def assert_same(folder, expected, dtypes, kind):
    import mindspore  # noqa: PLC0415 - seconds

    (file,) = folder.glob(f"*.{kind}")
    found = mindspore.load_checkpoint(str(file), format=kind)
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == dtypes[name], name
        np.testing.assert_array_equal(
            found[name].astype(mindspore.float32).asnumpy(), values, err_msg=name
        )


def run_jobs(jobs):
    done = subprocess.run(
        [sys.executable, "-c", JOBS, json.dumps(jobs, default=str)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("case", [*GRIDS, "foreign"])
def test_mindspore_merges_and_cuts_as_our_regions_say(tmp_path, case):
    import mindspore  # noqa: PLC0415 - seconds

    shapes, placed = foreign_case() if case == "foreign" else network_case(case)
    tensors = whole_tensors(shapes)
    kinds = (mindspore.float32, mindspore.bfloat16)
    dtypes = {name: kinds[is_bfloat16(index)] for index, name in enumerate(shapes)}
    ranks = sorted({r for stages in placed.values() for one in stages.values() for r in one.ranks})
    write_strategies(tmp_path / "strategy", placed)
    write_merged_strategy(tmp_path / "ours.ckpt", placed)
    merged = str(tmp_path / "merged.ckpt")
    jobs = [("merge_pipeline_strategys", [tmp_path / "strategy", merged])]
    for kind in FORMATS:
        here = tmp_path / kind
        for rank in ranks:
            save(here / "parts" / f"rank_{rank}", cut(tensors, placed, rank), dtypes, kind)
        save(here / "whole" / "rank_0", tensors, dtypes, kind)
        merge = [here / "parts", here / "whole_again", "x", merged, None, 1, kind]
        split = [here / "whole", here / "parts_again", "x", None, tmp_path / "ours.ckpt", 1, kind]
        jobs += [("transform_checkpoints", arguments) for arguments in (merge, split)]
    run_jobs(jobs)

    assert read_strategies(tmp_path / "merged.ckpt") == placed
    for kind in FORMATS:
        assert_same(tmp_path / kind / "whole_again" / "rank_0", tensors, dtypes, kind)
        for rank in ranks:
            again = tmp_path / kind / "parts_again" / f"rank_{rank}"
            assert_same(again, cut(tensors, placed, rank), dtypes, kind)
