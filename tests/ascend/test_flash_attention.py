"""Attention by Ascend's operator against the plain one: masks, packed samples, parts of a sequence.

Legend: B batch, S positions, d head_dim.
"""

import mindspore
import numpy as np
import pytest
from helpers.compare import assert_close
from helpers.tiny import tiny_config
from mindspore import Tensor

from mixtral_ms.data.loader.batch import Batch
from mixtral_ms.errors import UserError
from mixtral_ms.kernels.ascend import packed_samples
from mixtral_ms.kernels.ascend.flash_attention import FlashRotaryAttention
from mixtral_ms.kernels.ascend.packed_samples import SampleEnds
from mixtral_ms.kernels.ascend.window_blocks import HiddenInBlocks
from mixtral_ms.kernels.cells.attention import AttentionSizes, PlainRotaryAttention
from mixtral_ms.kernels.cells.elementwise import rotary_tables
from mixtral_ms.model.mixtral import MixtralForCausalLM
from mixtral_ms.parallel.grid.mesh import ProcessGroup
from mixtral_ms.train.objectives.causal_lm import CausalLMObjective
from mixtral_ms.train.objectives.objective import batch_tensors

pytestmark = pytest.mark.usefixtures("pynative", "ascend_emulation")

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 24, 4, 2, 16
SAMPLES = np.array([[0] * 5 + [1] * 1 + [2] * 18, [0] * 20 + [1] * 2 + [2] * 2], np.int32)
TOLERANCE = 1e-5


def positions_of(segments_BS):
    columns = np.arange(segments_BS.shape[1])
    first = np.array([[row.tolist().index(s) for s in row] for row in segments_BS])
    return (columns[None, :] - first).astype(np.int32)


def inputs():
    random = np.random.default_rng(0)
    widths = (HEADS, KV_HEADS, KV_HEADS)
    qkv = [
        random.standard_normal((BATCH, LENGTH, heads * HEAD_DIM)).astype(np.float32)
        for heads in widths
    ]
    tables = rotary_tables(LENGTH, HEAD_DIM, 1e4)
    return [Tensor(x) for x in (*qkv, *tables)]


def sizes_of(window, length=LENGTH):
    return AttentionSizes(length, HEADS, KV_HEADS, HEAD_DIM, window)


def with_gradients(attention, tensors, *rest):
    towards = Tensor(np.cos(np.arange(tensors[0].size, dtype=np.float32)).reshape(tensors[0].shape))

    def objective(q, k, v):
        out = attention(q, k, v, *tensors[3:], *rest)
        return (out * towards[:, : out.shape[1]]).sum(), out

    (_, out), grads = mindspore.value_and_grad(objective, (0, 1, 2), None, has_aux=True)(
        *tensors[:3]
    )
    return [one.asnumpy() for one in (out, *grads)]


def prepared(sizes, context, segments, positions):
    """As the host prepares a micro batch, and the graph makes it ready for all layers."""
    if sizes.window is None:
        cell = SampleEnds(len(segments), sizes, context)
    else:
        cell = HiddenInBlocks(sizes.seq_length, sizes.window, context)
    return cell(Tensor(cell.prepared(segments, positions)))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_output_and_gradients(window, packed):
    tensors, sizes = inputs(), sizes_of(window)
    segments, positions, ready = None, None, None
    if packed:
        given = positions_of(SAMPLES)
        ready = prepared(sizes, ProcessGroup((0,), 0), SAMPLES, given)
        segments, positions = Tensor(SAMPLES), Tensor(given)
    expected = with_gradients(PlainRotaryAttention(sizes), tensors, positions, segments)
    got = with_gradients(FlashRotaryAttention(sizes), tensors, positions, ready)
    for what, ours, theirs in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert_close(ours, theirs, TOLERANCE, what)


class Whole(mindspore.nn.Cell):
    """What a rank gathers, known beforehand: keys first, then values."""

    def __init__(self, *wholes):
        super().__init__()
        self.wholes = list(wholes)

    def construct(self, x):
        whole = self.wholes.pop(0)
        assert x.size < whole.size
        return whole


@pytest.mark.parametrize("window", [None, 7, 15])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_part_of_the_sequence(rank, window, packed, monkeypatch):
    monkeypatch.setattr(packed_samples, "_SHORTEST_MEAN", 2)  # so short a part may hold 4 samples
    tensors, context = inputs(), ProcessGroup((0, 1, 2), rank)
    q, k, v, cos, sin = tensors
    part = slice(rank * LENGTH // 3, (rank + 1) * LENGTH // 3)
    positions = positions_of(SAMPLES)
    given = (Tensor(positions), Tensor(SAMPLES)) if packed else (None, None)
    expected = PlainRotaryAttention(sizes_of(window))(*tensors, *given)
    whole = positions if packed else np.arange(LENGTH, dtype=np.int32)[None]
    tables = [Tensor(table.asnumpy()[whole][:, None]) for table in (cos, sin)]
    rotated = FlashRotaryAttention(sizes_of(window))._rotated(k, KV_HEADS, *tables)

    sizes = sizes_of(window, LENGTH // 3)
    attention = FlashRotaryAttention(sizes, context)
    attention.gather = Whole(rotated, v)
    own, ready = None, None
    if packed:
        ready = prepared(sizes, context, SAMPLES[:, part], positions[:, part])
        own = Tensor(positions[:, part])
    got = attention(q[:, part], k[:, part], v[:, part], cos, sin, own, ready)
    assert_close(got.asnumpy(), expected.asnumpy()[:, part], TOLERANCE, "out")


def test_ends_of_samples():
    cell = SampleEnds(BATCH, sizes_of(None), ProcessGroup((0,), 0))
    ends = cell.prepared(SAMPLES, positions_of(SAMPLES))
    assert ends[:6].tolist() == [5, 6, 24, 44, 46, 48]
    assert (np.diff(ends) > 0).all()
    assert ends[-1] == BATCH * LENGTH + cell.most
    assert len(ends) == cell.most


def test_ends_of_samples_that_began_on_another_rank():
    """Row 0: of 8 keys before, 2 of its first sample; row 1: all of its one sample."""
    cell = SampleEnds(BATCH, sizes_of(None, 8), ProcessGroup((0, 1, 2), 1))
    queries, keys = cell.prepared(SAMPLES[:, 8:16], positions_of(SAMPLES)[:, 8:16])
    assert queries[:4].tolist() == [1, 9, 10, 18]
    assert keys[:4].tolist() == [1 + 6, 17, 17 + 1, 34]
    assert queries[-1] == 18 + cell.most
    assert keys[-1] == 34 + cell.most
    assert (np.diff(queries) > 0).all()
    assert (np.diff(keys) >= np.diff(queries)).all()


def test_as_many_samples_as_there_may_be():
    cell = SampleEnds(BATCH, sizes_of(None), ProcessGroup((0,), 0))
    segments = np.minimum(np.arange(LENGTH), cell.limit - 2)[None].repeat(BATCH, 0)
    segments[1] = 0
    ends = cell.prepared(segments, positions_of(segments)).tolist()
    assert ends == [*range(1, cell.limit - 1), 24, 48, 48 + cell.most]


def test_segment_ids_are_refused_where_ends_belong():
    cell = SampleEnds(BATCH, sizes_of(None), ProcessGroup((0,), 0))
    with pytest.raises(ValueError, match="as `prepared` gives them"):
        cell(Tensor(SAMPLES))


def test_more_samples_than_the_operator_takes():
    config = tiny_config(moe_config={"capacity_factor": -1.0})
    objective = CausalLMObjective(MixtralForCausalLM(config, backend="ascend"))
    ids = np.ones((config.batch_size, config.seq_length), np.int32)
    segments = np.arange(ids.size, dtype=np.int32).reshape(ids.shape)
    with pytest.raises(UserError, match="32 packed samples.*takes 5 of 32 tokens"):
        batch_tensors(objective, Batch(ids, ids, segments))
    batch_tensors(objective, Batch(ids, ids, segments // 8))
