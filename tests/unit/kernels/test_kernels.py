"""The contract of every kernel: each implementation against plain formulas in float64.

The implementations are those of the device given by `--device`.
"""

import mindspore
import numpy as np
import pytest
import torch
from helpers.compare import assert_close
from helpers.kernels import (
    cpp_kernels,
    gradients_of,
    kernels_of,
    leaf,
    numpy_kernels,
    random,
)
from mindspore import Parameter, Tensor
from mindspore import dtype as mstype

from mixtral_ms.kernels.cells import cross_entropy
from mixtral_ms.kernels.cells.attention import AttentionSizes, CausalAttention
from mixtral_ms.kernels.cells.cross_entropy import LinearCrossEntropy
from mixtral_ms.kernels.cells.elementwise import apply_rotary, rms_norm, rotary_tables, swiglu
from mixtral_ms.kernels.select import select_kernels
from mixtral_ms.kernels.threaded import numpy_cross_entropy

pytestmark = pytest.mark.usefixtures("pynative")

TOLERANCE = 1e-5


# experts


def experts_of(name, device, weights=None):
    """The cell; `weights` are those it will always be given."""
    if device == "Ascend":
        if name != "device":
            pytest.skip("the plain implementations are tested on the CPU")
        return select_kernels("ascend", dropless=True).experts(weights)
    if name == "C++":
        return cpp_kernels().experts(weights)
    if name == "device":
        pytest.skip("that is what C++, numpy and padded are on the CPU")
    if name == "padded":
        return select_kernels("plain", dropless=False).experts(weights)
    return numpy_kernels(device).experts(weights if name == "in place" else None)


def group_slices(layout, sizes, capacity):
    """Where each group's rows are, and the number of rows."""
    begins, begin = [], 0
    for size in sizes:
        begins.append(begin)
        begin += {"packed": size, "padded": capacity}[layout]
    total = begin + {"packed": 3, "padded": 0}[layout]  # unused rows at the end
    return [slice(b, b + size) for b, size in zip(begins, sizes, strict=True)], total


@pytest.mark.parametrize("name", ["C++", "numpy", "in place", "padded", "device"])
@pytest.mark.parametrize(
    "sizes",
    [
        (5, 0, 2),
        (0, 0, 0),
        (0, 9, 0, 0),
        (7,),
        (128, 257, 1),  # a block of rows has 128
        (300, 129),
    ],
    ids=str,
)
def test_experts(name, sizes, device, record_error):
    hidden, intermediate, experts = 10, 14, len(sizes)
    w1, w3 = random(3, experts, intermediate, hidden), random(4, experts, intermediate, hidden)
    w2 = random(5, experts, hidden, intermediate)
    weights = tuple(Parameter(Tensor(value)) for value in (w1, w3, w2))
    cell = experts_of(name, device, lambda: weights)
    groups, rows = group_slices(cell.layout, sizes, max(*sizes, 1))
    x_RD, towards = random(1, rows, hidden), random(2, rows, hidden)
    used = np.zeros((rows, 1), np.float32)
    for group in groups:
        used[group] = 1.0
    # Nothing reads unused rows, so nothing arrives at them: their gradient is zero.
    towards = towards * used
    tokens_per_expert_E = np.array(sizes, np.int32)
    out, grads = gradients_of(cell, [x_RD, w1, w3, w2, tokens_per_expert_E], towards)

    leaves = [leaf(value) for value in (x_RD, w1, w3, w2)]
    x, a, b, c = leaves
    expected = torch.zeros(rows, hidden, dtype=torch.float64)
    for e, group in enumerate(groups):
        inner = torch.nn.functional.silu(x[group] @ a[e].T) * (x[group] @ b[e].T)
        expected[group] = inner @ c[e].T
    if sum(sizes):
        (expected * torch.tensor(towards)).sum().backward()
    record_error("output", out * used, expected.detach().numpy(), TOLERANCE)
    for what, gradient, value in zip(("x", "w1", "w3", "w2"), grads, leaves, strict=True):
        reference = np.zeros(value.shape) if value.grad is None else value.grad.numpy()
        record_error(what, gradient, reference, TOLERANCE)


@pytest.mark.parametrize("name", ["C++", "numpy", "padded", "device"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_experts_let_an_overflow_through(name, bad, device):
    """A non-finite value may not turn into a number: the overflow check must see it."""
    cell = experts_of(name, device)
    _, rows = group_slices(cell.layout, (2, 2), 2)
    x_RD = random(1, rows, 4)
    x_RD[0, 0] = bad
    weights = [random(2, 2, 6, 4), random(3, 2, 6, 4), random(4, 2, 4, 6)]
    inputs = [x_RD, *weights, np.array([2, 2], np.int32)]
    towards = np.zeros((rows, 4), np.float32)
    towards[0] = 1.0
    out, grads = gradients_of(cell, inputs, towards)
    assert not np.isfinite(out[0]).all()
    assert not np.isfinite(grads[1][0]).all()


def test_float16_experts_are_computed_in_float32(record_error):
    """Rounded once, at the end: sums in float16 would lose a digit more."""
    cell = select_kernels("plain", dropless=True, dtype=mstype.float16).experts()
    x_RD, w1, w2 = random(1, 7, 300), random(2, 2, 40, 300), random(4, 2, 300, 40)
    w3 = random(3, 2, 40, 300) * 0.01
    halves = [value.astype(np.float16) for value in (x_RD, w1, w3, w2)]
    out = cell(*[Tensor(value) for value in halves], Tensor([4, 3], mstype.int32))
    assert out.dtype == mstype.float16
    x, a, b, c = (torch.tensor(value, dtype=torch.float64) for value in halves)
    for e, rows in enumerate((slice(0, 4), slice(4, 7))):
        inner = torch.nn.functional.silu(x[rows] @ a[e].T) * (x[rows] @ b[e].T)
        record_error(f"expert {e}", out.asnumpy()[rows], (inner @ c[e].T).numpy(), 1e-3)


def test_building_the_cpp_kernels_keeps_denormals(device):
    """Fast-math start-up code would flush them to zero in the whole process."""
    select_kernels(dropless=True)
    tiny = np.full(8, 1e-40, np.float32)
    assert (tiny * np.float32(1.0) > 0).all()
    assert float(torch.tensor(1e-40) * 1.0) > 0


# attention


def visible_pairs(length, window, segments):
    """(B, 1, S, S) by the definition: no look ahead, no further than the window, own segment."""
    batch = 1 if segments is None else len(segments)
    allowed = np.zeros((batch, 1, length, length), bool)
    for b in range(batch):
        for i in range(length):
            for j in range(i + 1):
                near = window is None or i - j < window
                own = segments is None or segments[b, i] == segments[b, j]
                allowed[b, 0, i, j] = near and own
    return allowed


@pytest.mark.parametrize("packed", [False, True], ids=["one segment", "packed"])
@pytest.mark.parametrize("window", [None, 1, 20, 90], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("chunk", [None, 150, 16], ids=lambda c: f"chunk {c}")
def test_attention_in_chunks(chunk, window, packed, record_error):
    batch, heads, kv_heads, length, dim = 2, 6, 2, 150, 8
    cell = CausalAttention(AttentionSizes(length, heads, kv_heads, dim, window), chunk)
    q, k, v = (
        random(seed, batch, n, length, dim) * 2
        for seed, n in ((1, heads), (2, kv_heads), (3, kv_heads))
    )
    segments = None
    if packed:
        segments = np.zeros((batch, length), np.int32)
        segments[0, 70:], segments[1, 3:], segments[1, 149:] = 1, 1, 2
    towards = random(4, batch, heads, length, dim)
    inputs = [q, k, v] if segments is None else [q, k, v, segments]
    out, grads = gradients_of(cell, inputs, towards)

    leaves = [leaf(value) for value in (q, k, v)]
    keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in leaves[1:])
    scores = leaves[0] @ keys.transpose(2, 3) / dim**0.5
    allowed = torch.tensor(visible_pairs(length, window, segments))
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ values
    (expected * torch.tensor(towards)).sum().backward()
    record_error("output", out, expected.detach().numpy(), TOLERANCE)
    for what, gradient, value in zip("qkv", grads, leaves, strict=True):
        record_error(what, gradient, value.grad.numpy(), TOLERANCE)


@pytest.mark.parametrize("name", ["plain", "numpy", "device"])
@pytest.mark.parametrize("sizes", [(6, 2, 150, 8), (2, 2, 7, 4), (5, 1, 65, 12)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 20], ids=lambda w: f"window {w}")
@pytest.mark.parametrize("packed", [False, True], ids=["one segment", "packed"])
def test_rotary_attention(name, sizes, window, packed, device, record_error):
    """Projected queries, keys and values in; positions and segments of packed samples."""
    heads, kv_heads, length, dim = sizes
    batch = 2
    cell = kernels_of(name, device).attention(AttentionSizes(length, heads, kv_heads, dim, window))
    q, k, v = (random(i, batch, length, n * dim) for i, n in enumerate((heads, kv_heads, kv_heads)))
    towards = random(4, batch, length, heads * dim)
    tables = rotary_tables(length, dim, 1e4)
    cos, sin = (Tensor(table) for table in tables)
    segments = positions = None
    more = []
    if packed:
        segments = np.zeros((batch, length), np.int32)
        segments[0, length // 2 :], segments[1, 3:], segments[1, -1:] = 1, 1, 2
        starts = np.array([[np.argmax(row == value) for value in row] for row in segments])
        positions = (np.arange(length) - starts).astype(np.int32)
        more = [positions, segments]

    def with_tables(q, k, v, *packing):
        return cell(q, k, v, cos, sin, *packing)

    out, grads = gradients_of(with_tables, [q, k, v, *more], towards)

    leaves = [leaf(value) for value in (q, k, v)]
    where = np.tile(np.arange(length), (batch, 1)) if positions is None else positions
    cos_64, sin_64 = (torch.tensor(table.astype(np.float64)[where])[:, None] for table in tables)

    def heads_of(value, turned):
        value = value.unflatten(-1, (-1, dim)).transpose(1, 2)
        first, second = value.chunk(2, -1)
        return value * cos_64 + torch.cat([-second, first], -1) * sin_64 if turned else value

    query, key, value = (heads_of(x, turned) for x, turned in zip(leaves, (1, 1, 0), strict=True))
    key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    allowed = torch.tensor(visible_pairs(length, window, segments))
    scores = (query @ key.transpose(2, 3) / dim**0.5).masked_fill(~allowed, -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    (expected * torch.tensor(towards)).sum().backward()
    record_error("output", out, expected.detach().numpy(), TOLERANCE)
    for what, gradient, value in zip("qkv", grads, leaves, strict=True):
        # A window of 1 gives q and k no gradient: what is left is rounding.
        if value.grad.abs().max() < 1e-12:
            assert np.abs(gradient).max() < 1e-5, what
            continue
        record_error(what, gradient, value.grad.numpy(), TOLERANCE)


# cross entropy


CROSS_ENTROPIES = ["plain", "numpy", "in place", "device"]


def cross_entropy_of(name, device, weight_VD):
    if name == "plain":
        return LinearCrossEntropy()
    if name in ("numpy", "in place"):
        weight = Parameter(Tensor(weight_VD))
        stored = (lambda: weight) if name == "in place" else None
        return numpy_kernels(device).cross_entropy(weight=stored)
    if device == "Ascend":
        return select_kernels("ascend", dropless=True).cross_entropy()
    return cpp_kernels().cross_entropy()


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
@pytest.mark.parametrize(
    "chunk, columns",
    [(None, None), (37, 53), (8, 10), (1, 1)],
    ids=str,
)
@pytest.mark.parametrize("ignored", ["some", "none", "all"])
def test_cross_entropy(name, chunk, columns, ignored, device, monkeypatch, record_error):
    tokens, hidden, vocabulary = 37, 6, 53
    if chunk is not None:
        for module in (cross_entropy, numpy_cross_entropy):
            monkeypatch.setattr(module, "_CHUNK_VALUES", chunk * vocabulary)
        monkeypatch.setattr(numpy_cross_entropy, "_COLUMNS", columns)
    hidden_TD, weight_VD = random(1, tokens, hidden), random(2, vocabulary, hidden) * 3
    cell = cross_entropy_of(name, device, weight_VD)
    labels_T = np.random.default_rng(3).integers(0, vocabulary, tokens).astype(np.int32)
    labels_T[:2] = 0, vocabulary - 1
    if ignored == "some":
        labels_T[[3, 7, 8, 15, 16, 36]] = -1  # 7|8 and 15|16: on both sides of chunk borders
    if ignored == "all":
        labels_T[:] = -1
    # 2.5: the gradients made with the forward must still take the factor from above
    out, grads = gradients_of(cell, [hidden_TD, weight_VD, labels_T], np.float32(2.5))

    leaves = [leaf(hidden_TD), leaf(weight_VD)]
    expected = torch.nn.functional.cross_entropy(
        leaves[0] @ leaves[1].T,
        torch.tensor(labels_T.astype(np.int64)),
        ignore_index=-1,
        reduction="sum",
    )
    (2.5 * expected).backward()
    record_error("loss", out, expected.item(), TOLERANCE)
    for what, gradient, value in zip(("hidden", "weight"), grads, leaves, strict=True):
        record_error(what, gradient, value.grad.numpy(), TOLERANCE)


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_cross_entropy_of_large_logits(name, device):
    """The largest logit is taken out first: no overflow at any size."""
    hidden_TD = np.array([[300.0], [-300.0]], np.float32)
    weight_VD = np.array([[1.0], [-1.0], [0.5]], np.float32)
    cell = cross_entropy_of(name, device, weight_VD)
    loss = cell(Tensor(hidden_TD), Tensor(weight_VD), Tensor([1, 1], mindspore.int32))
    assert_close(loss.asnumpy(), 600.0, TOLERANCE, "loss")


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_cross_entropy_lets_an_overflow_through(name, bad, device):
    hidden_TD, weight_VD = random(1, 3, 4), random(2, 5, 4)
    hidden_TD[1, 2] = bad
    cell = cross_entropy_of(name, device, weight_VD)
    labels = np.array([0, 1, 2], np.int32)
    out, grads = gradients_of(cell, [hidden_TD, weight_VD, labels], np.float32(1))
    assert not np.isfinite(out)
    assert not np.isfinite(grads[1]).all()


# elementwise


@pytest.mark.parametrize("name", ["plain", "numpy", "device"])
@pytest.mark.parametrize("shape", [(2, 3, 16), (1, 1, 1), (4, 75, 33)], ids=str)
def test_rms_norm(name, shape, device, record_error):
    x, weight, towards = random(1, *shape) * 5, random(2, shape[-1]), random(3, *shape)
    cell = kernels_of(name, device).rms_norm(1e-3)
    out, grads = gradients_of(cell, [x, weight], towards)
    leaves = [leaf(x), leaf(weight)]
    scale = (leaves[0].square().mean(-1, keepdim=True) + 1e-3).sqrt()
    expected = leaves[0] / scale * leaves[1]
    (expected * torch.tensor(towards)).sum().backward()
    record_error("output", out, expected.detach().numpy(), TOLERANCE)
    record_error("weight", grads[1], leaves[1].grad.numpy(), TOLERANCE)
    if shape[-1] > 1:  # a single value is normalised to its sign: no gradient but that of eps
        record_error("x", grads[0], leaves[0].grad.numpy(), TOLERANCE)


def test_rms_norm_of_float16_is_computed_in_float32():
    """Squares of values above 256 overflow float16."""
    x = Tensor(np.array([[1000.0, -2000.0, 3000.0, 4000.0]], np.float16))
    out = rms_norm(x, Tensor(np.ones(4, np.float32)), 1e-5)
    assert out.dtype == mstype.float16
    expected = np.array([[1000.0, -2000.0, 3000.0, 4000.0]]) / np.sqrt(7.5e6)
    np.testing.assert_allclose(out.asnumpy(), expected, rtol=2e-3)


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rotary_turns_pairs_half_a_head_apart(theta, record_error):
    """As complex numbers: (x_i + j x_{i + d/2}) e^{j position theta^(-2i/d)}."""
    length, dim = 40, 12
    x, towards = random(1, 2, 3, length, dim), random(2, 2, 3, length, dim)
    cos, sin = (Tensor(table) for table in rotary_tables(length, dim, theta))
    out, (d_x,) = gradients_of(lambda a: apply_rotary(a, cos, sin), [x], towards)
    angles = np.arange(length)[:, None] * theta ** (-2.0 * np.arange(dim // 2) / dim)

    def turned(value, direction):
        pairs = value[..., : dim // 2] + 1j * value[..., dim // 2 :].astype(np.float64)
        pairs = pairs * np.exp(1j * direction * angles)
        return np.concatenate([pairs.real, pairs.imag], -1)

    record_error("output", out, turned(x, 1), TOLERANCE)
    record_error("x", d_x, turned(towards, -1), TOLERANCE)  # a rotation's gradient turns back


def test_swiglu(record_error):
    gate, up, towards = random(1, 5, 7) * 4, random(2, 5, 7), random(3, 5, 7)
    out, grads = gradients_of(swiglu, [gate, up], towards)
    leaves = [leaf(gate), leaf(up)]
    expected = torch.nn.functional.silu(leaves[0]) * leaves[1]
    (expected * torch.tensor(towards)).sum().backward()
    record_error("output", out, expected.detach().numpy(), TOLERANCE)
    record_error("gate", grads[0], leaves[0].grad.numpy(), TOLERANCE)
    record_error("up", grads[1], leaves[1].grad.numpy(), TOLERANCE)
