"""Strategy files there and back, what is wrong with them, and the grid as text."""

import pytest
from helpers.tiny import tiny_config
from hypothesis import given
from hypothesis import strategies as st

from mixtral_ms.checkpoint.formats.strategy_file import (
    read_strategies,
    write_merged_strategy,
    write_strategies,
)
from mixtral_ms.config.sections.parallel_section import ParallelConfig
from mixtral_ms.errors import UserError
from mixtral_ms.parallel.grid.grid_text import format_grid, parse_grid
from mixtral_ms.parallel.grid.placement import Placement
from mixtral_ms.parallel.grid.sharding_rules import MOMENTS, parameter_shapes, placements

MODEL = tiny_config(
    hidden_size=16, intermediate_size=32, n_kv_heads=4, vocab_size=32, tie_word_embeddings=True
)


def strategy(text):
    grid, zero = parse_grid(text)
    names = [prefix + name for prefix in ("", *MOMENTS) for name in parameter_shapes(MODEL)]
    return placements(MODEL, grid, names, zero=zero)


GRIDS = ("dp=1", "dp=2,mp=2,ep=2,pp=2,zero=1", "mp=4,ep=4", "dp=2,mp=4,ep=4,vocab_emb_dp=0")


@pytest.mark.parametrize("text", GRIDS)
def test_a_folder_there_and_back(tmp_path, text):
    written = write_strategies(tmp_path / "strategy", strategy(text))
    grid, _ = parse_grid(text)
    ranks = grid.data_parallel * grid.model_parallel * grid.pipeline_stage
    assert [path.name for path in written] == [f"ckpt_strategy_rank_{r}.ckpt" for r in range(ranks)]
    assert read_strategies(tmp_path / "strategy") == strategy(text)
    assert [path.name for path in tmp_path.iterdir()] == ["strategy"]


@pytest.mark.parametrize("text", GRIDS)
def test_a_merged_file_there_and_back(tmp_path, text):
    write_merged_strategy(tmp_path / "merged.ckpt", strategy(text))
    assert read_strategies(tmp_path / "merged.ckpt") == strategy(text)


@pytest.mark.parametrize(
    "placement",
    [
        Placement((2, 2, 2), ((2, 0), ()), 2, 2),
        Placement((2, 2), ((1, 0),)),
        Placement((2, 2), ((0, 1),)),
        Placement((4,), ()),
        Placement((4,), ((), (), ()), 2, 1),
    ],
)
def test_layouts_that_our_table_does_not_make(tmp_path, placement):
    write_merged_strategy(tmp_path / "one.ckpt", {"a": {0: placement}})
    assert read_strategies(tmp_path / "one.ckpt") == {"a": {0: placement}}


def test_one_file_a_stage_is_enough_and_a_merged_one_may_lie_beside(tmp_path):
    files = write_strategies(tmp_path / "s", strategy("mp=2,pp=2"))
    files[1].unlink()
    files[3].rename(tmp_path / "s" / "stage1.ckpt")
    files[2].unlink()
    assert read_strategies(tmp_path / "s") == strategy("mp=2,pp=2")
    write_merged_strategy(tmp_path / "s" / "merged.ckpt", strategy("mp=2,pp=2"))
    assert read_strategies(tmp_path / "s") == strategy("mp=2,pp=2")


def refused(path, *parts):
    with pytest.raises(UserError) as error:
        read_strategies(path)
    for part in parts:
        assert str(part) in str(error.value)


def layouts_end(content):
    """Where the last layout of a file begins: after it nothing follows."""
    from mindspore.train import node_strategy_pb2  # noqa: PLC0415 - slow

    message = node_strategy_pb2.ParallelStrategyMap()
    message.ParseFromString(content)
    del message.parallel_layout_item[-1]
    return len(message.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda content: b"", ("is empty",)),
        (lambda content: content[:-3], ("cut short",)),
        (lambda content: content[: layouts_end(content)], ("cut short", "38 of 39 layouts")),
        (lambda content: b"not a strategy", ("not a strategy file",)),
        (lambda content: content[:2], ("of no tensor",)),
        (lambda content: content + content, ("twice",)),
    ],
)
def test_damage_is_seen(tmp_path, damage, parts):
    file, _ = write_strategies(tmp_path / "s", dict(list(strategy("mp=2").items())[:39]))
    file.write_bytes(damage(file.read_bytes()))
    refused(file, file, *parts)


def test_weights_are_no_strategy(tmp_path):
    import mindspore  # noqa: PLC0415 - slow

    file = tmp_path / "weights.ckpt"
    tensor = mindspore.Tensor([1.0, 2.0])
    mindspore.save_checkpoint([{"name": "a", "data": tensor}], str(file))
    refused(file, file, "not a strategy file")


def test_what_is_missing_is_named(tmp_path):
    refused(tmp_path / "nothing", "nothing", "no such")
    refused(tmp_path, tmp_path, "no strategy file")
    files = write_strategies(tmp_path / "s", strategy("mp=2,pp=2"))
    files[0].unlink()
    files[1].unlink()
    refused(files[2], "stage 0", "but of 1")
    refused(files[2].parent, files[2].parent, "stage 0", "but of 1")


def test_a_missing_rank_is_named(tmp_path):
    files = write_strategies(tmp_path / "s", strategy("mp=4,pp=2"))
    files[6].unlink()
    refused(tmp_path / "s", tmp_path / "s", "stage 1", "ranks 4 … 7", "rank 6 is missing")


def test_files_of_two_runs_are_not_mixed(tmp_path):
    here = write_strategies(tmp_path / "s", strategy("dp=2,mp=2"))
    there = write_strategies(tmp_path / "t", strategy("dp=2,mp=2,ep=2"))
    here[3].write_bytes(there[3].read_bytes())
    refused(tmp_path / "s", here[0], here[3], "w1.weight")
    other = write_strategies(tmp_path / "u", strategy("mp=2,pp=2"))
    for path in here[1:]:
        path.unlink()
    (tmp_path / "s" / "second.ckpt").write_bytes(other[2].read_bytes())
    refused(tmp_path / "s", "on 2 ranks", "on 4")


@pytest.mark.parametrize(
    ("placed", "parts"),
    [
        ({"a-b": {0: Placement((2,), ((),))}}, ("'a-b'", "rename")),
        ({"a": {1: Placement((2,), ((),), first_rank=2)}}, ("stage 0", "but of 1")),
        ({"a": {0: Placement((2,), ()), 1: Placement((3,), ())}}, ("on 3 ranks", "on 2")),
        ({"a": {0: Placement((2,), ()), 1: Placement((2,), ())}}, ("at rank 2", "not 0")),
        ({}, ("stage 0",)),
    ],
)
def test_what_cannot_be_written(tmp_path, placed, parts):
    for write in (write_strategies, write_merged_strategy):
        with pytest.raises(UserError) as error:
            write(tmp_path / "s", placed)
        for part in parts:
            assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "kept").write_text("kept")
    for write in (write_strategies, write_merged_strategy):
        target = tmp_path if write is write_strategies else tmp_path / "kept"
        with pytest.raises(UserError, match="there already"):
            write(target, strategy("mp=2"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_uneven_parts_and_impossible_layouts_name_file_and_tensor(tmp_path):
    from mindspore.train import node_strategy_pb2  # noqa: PLC0415 - slow

    write_merged_strategy(tmp_path / "good.ckpt", {"a": {0: Placement((2,), ((0,),))}})
    message = node_strategy_pb2.ParallelStrategyMap()
    for change, part in (
        (lambda layout: layout.param_split_shape[0].dim.append(3), "uneven"),
        (lambda layout: layout.tensor_map[0].dim.append(5), "tensor_map [[0], [5]]"),
        (lambda layout: layout.ClearField("dev_matrix"), "names no ranks"),
        (lambda layout: layout.ClearField("tensor_map"), "no axes"),
    ):
        message.ParseFromString((tmp_path / "good.ckpt").read_bytes())
        change(message.parallel_layout_item[0].parallel_layouts)
        (tmp_path / "bad.ckpt").write_bytes(message.SerializeToString())
        refused(tmp_path / "bad.ckpt", "bad.ckpt: a:", part)
    message.ParseFromString((tmp_path / "good.ckpt").read_bytes())
    message.parallel_layout_item[0].param_name = "x-a"
    (tmp_path / "bad.ckpt").write_bytes(message.SerializeToString())
    refused(tmp_path / "bad.ckpt", "bad.ckpt", "'x-a'")


def test_without_strategy_items_current_stage_counts(tmp_path):
    from mindspore.train import node_strategy_pb2  # noqa: PLC0415 - slow

    placed = {"a": {0: Placement((2,), ((0,),))}}
    write_merged_strategy(tmp_path / "good.ckpt", placed)
    message = node_strategy_pb2.ParallelStrategyMap()
    message.ParseFromString((tmp_path / "good.ckpt").read_bytes())
    message.ClearField("parallel_strategy_item")
    message.parallel_layout_item[0].param_name = "a"
    (tmp_path / "bare.ckpt").write_bytes(message.SerializeToString())
    assert read_strategies(tmp_path / "bare.ckpt") == placed
    message.current_stage = 1
    (tmp_path / "bare.ckpt").write_bytes(message.SerializeToString())
    refused(tmp_path / "bare.ckpt", "stage 0", "but of 1")


def test_a_grid_as_text():
    grid, zero = parse_grid("dp=2, tp=4,ep=2,pp=3,zero=1")
    assert (grid, zero) == (ParallelConfig(2, 4, 2, 3), True)
    assert format_grid(grid, zero=zero) == "dp=2,mp=4,ep=2,pp=3,zero=1"
    assert parse_grid("data_parallel=2") == (ParallelConfig(2), False)


@given(st.tuples(*[st.integers(1, 64)] * 5), st.booleans(), st.booleans())
def test_grid_text_there_and_back(sizes, whole, zero):
    grid = ParallelConfig(*sizes, vocab_emb_dp=whole)
    assert parse_grid(format_grid(grid, zero=zero)) == (grid, zero)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dp=2,model_paralel=2", ("'model_paralel'", "did you mean 'model_parallel'", "dp, mp")),
        ("dp=2,mp=two", ("mp is 'two'", "at least 1")),
        ("dp=0", ("dp is '0'", "at least 1")),
        ("dp=-1", ("dp is '-1'",)),
        ("dp", ("dp is ''",)),
        ("zero=2", ("zero is '2'", "0 or 1")),
        ("mp=2,tp=2", ("mp is given twice",)),
        ("", ("empty key", "dp=2,mp=4")),
        ("dp=2,", ("empty key",)),
        ("dp=²", ("dp is '²'",)),
    ],
)
def test_a_wrong_grid_is_named(text, parts):
    with pytest.raises(UserError) as error:
        parse_grid(text, "--dst-grid")
    for part in (f"--dst-grid {text!r}", *parts):
        assert part in str(error.value)
