"""The CPU's kernels as MindSpore operators (`ops.Custom`); shapes as in the .cpp files.

Each comes from the built C++ library, or from numpy, which needs no compiler. MindSpore never lets
go of a function that it has made an operator of: what holds weights is behind a weak reference.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, ParamSpec, TypeVar
from weakref import WeakMethod

from mindspore import dtype as mstype
from mindspore import ops

from mixtral_ms.kernels.threaded import (
    numpy_attention,
    numpy_cross_entropy,
    numpy_elementwise,
    numpy_experts,
)

P = ParamSpec("P")
R = TypeVar("R")

NUMPY: Final = "numpy"
Library = Path | Literal["numpy"]

_NUMPY = {
    "expert_ffn_forward": numpy_experts.numpy_experts_forward,
    "expert_ffn_backward": numpy_experts.numpy_experts_backward,
    "attention_forward": numpy_attention.numpy_attention_forward,
    "attention_backward": numpy_attention.numpy_attention_backward,
    "rms_norm_forward": numpy_elementwise.numpy_rms_norm_forward,
    "rms_norm_backward": numpy_elementwise.numpy_rms_norm_backward,
    "softmax_cross_entropy": numpy_elementwise.numpy_softmax_cross_entropy,
}


def _operator(library: Library, name: str, shapes: Callable, dtypes: Callable) -> ops.Custom:
    if library == NUMPY:
        return ops.Custom(_NUMPY[name], shapes, dtypes, "pyfunc")
    return ops.Custom(f"{library}:{name}", shapes, dtypes, "aot")


def _weak(method: Callable[P, R]) -> Callable[P, R]:
    """The method, of whatever has it as long as that lives."""
    reference = WeakMethod(method)

    def run(*inputs: P.args, **options: P.kwargs) -> R:
        if (alive := reference()) is None:
            raise ReferenceError("the kernel of this operator is gone")
        return alive(*inputs, **options)

    return run


def expert_ffn_forward(library: Library) -> ops.Custom:
    """x (R, D), w1, w3 (E, F, D), w2 (E, D, F), sizes (E) -> y (R, D), gate (R, F), up (R, F)."""

    def shapes(x: list, w1: list, _w3: list, _w2: list, _sizes: list) -> tuple:
        return x, [x[0], w1[1]], [x[0], w1[1]]

    def dtypes(x: object, *_: object) -> tuple:
        return x, x, x

    return _operator(library, "expert_ffn_forward", shapes, dtypes)


def expert_ffn_backward(library: Library) -> ops.Custom:
    """The inputs of the forward, its gate and up, dy (R, D) -> dx, dw1, dw3, dw2."""

    def shapes(x: list, w1: list, w3: list, w2: list, *_: list) -> tuple:
        return x, w1, w3, w2

    def dtypes(x: object, *_: object) -> tuple:
        return x, x, x, x

    return _operator(library, "expert_ffn_backward", shapes, dtypes)


def expert_ffn_in_place(
    kernel: numpy_experts.InPlaceExperts, weights: list[list[int]]
) -> tuple[ops.Custom, ops.Custom]:
    """Its forward, x (R, D), sizes (E) -> y, ticket (1), and its backward.

    The backward has x, sizes, ticket, dy -> dx, dw1, dw3, dw2; `weights` are the shapes of w1, w3
    and w2.
    """
    run_forward, run_backward = _weak(kernel.forward), _weak(kernel.backward)

    def forward(x, sizes):  # noqa: ANN001, ANN202 - MindSpore counts the parameters
        return run_forward(x, sizes)

    def backward(x, sizes, ticket, dy):  # noqa: ANN001, ANN202
        return run_backward(x, sizes, ticket, dy)

    def x_and_weights(x: list, *_: list) -> tuple:
        return x, *weights

    def dtypes(x: object, *_: object) -> tuple:
        return x, x, x, x

    return (
        ops.Custom(forward, lambda x, _: (x, [1]), lambda x, _: (x, mstype.int32), "pyfunc"),
        ops.Custom(backward, x_and_weights, dtypes, "pyfunc"),
    )


def attention_forward(library: Library) -> ops.Custom:
    """q (B, S, Hd), k, v (B, S, Kd), cos, sin (P, d), positions, segments (B, S), window (1).

    Returns out (B, S, Hd), the log of each row's sum (B, H, S), rotated q and rotated k, in the
    order and scale that the same library's backward reads.
    """

    def shapes(q: list, k: list, _v: list, cos: list, *_: list) -> tuple:
        return q, [q[0], q[2] // cos[1], q[1]], q, k

    def dtypes(q: object, *_: object) -> tuple:
        return q, q, q, q

    return _operator(library, "attention_forward", shapes, dtypes)


def attention_backward(library: Library) -> ops.Custom:
    """The forward's inputs (q and k rotated), out, log sums, d_out -> dq, dk, dv."""

    def shapes(q: list, k: list, v: list, *_: list) -> tuple:
        return q, k, v

    def dtypes(q: object, *_: object) -> tuple:
        return q, q, q

    return _operator(library, "attention_backward", shapes, dtypes)


def rms_norm_forward(library: Library) -> ops.Custom:
    """x (T, D), weight (D), eps (1) -> y (T, D), inverse root mean square (T)."""

    def shapes(x: list, _weight: list, _eps: list) -> tuple:
        return x, [x[0]]

    def dtypes(x: object, *_: object) -> tuple:
        return x, x

    return _operator(library, "rms_norm_forward", shapes, dtypes)


def rms_norm_backward(library: Library) -> ops.Custom:
    """x (T, D), weight (D), inverse (T), dy (T, D) -> dx (T, D), d_weight (D)."""

    def shapes(x: list, weight: list, *_: list) -> tuple:
        return x, weight

    def dtypes(x: object, *_: object) -> tuple:
        return x, x

    return _operator(library, "rms_norm_backward", shapes, dtypes)


def softmax_cross_entropy(library: Library) -> ops.Custom:
    """logits (T, V), labels (T) int32 -> loss (T), d_logits (T, V)."""

    def shapes(logits: list, _labels: list) -> tuple:
        return [logits[0]], logits

    def dtypes(logits: object, _labels: object) -> tuple:
        return logits, logits

    return _operator(library, "softmax_cross_entropy", shapes, dtypes)


def cross_entropy_in_place(
    kernel: numpy_cross_entropy.InPlaceCrossEntropy, weight: list[int]
) -> tuple[ops.Custom, ops.Custom]:
    """Its forward, hidden (T, D), labels (T) int32 -> summed loss, ticket (1 each), and backward.

    The backward has hidden, labels, ticket, factor (1) -> d_hidden, d_weight of shape `weight`.
    """
    run_forward, run_backward = _weak(kernel.forward), _weak(kernel.backward)

    def forward(hidden, labels):  # noqa: ANN001, ANN202
        return run_forward(hidden, labels)

    def backward(hidden, labels, ticket, factor):  # noqa: ANN001, ANN202
        return run_backward(hidden, labels, ticket, factor)

    def hidden_and_weight(hidden: list, *_: list) -> tuple:
        return hidden, weight

    def dtypes(hidden: object, *_: object) -> tuple:
        return hidden, hidden

    return (
        ops.Custom(forward, lambda *_: ([1], [1]), lambda x, _: (x, mstype.int32), "pyfunc"),
        ops.Custom(backward, hidden_and_weight, dtypes, "pyfunc"),
    )


def adamw(library: Path) -> ops.Custom:
    """parameter, moments (in place), gradient, rates (6) -> a value without meaning."""

    def shapes(*_: list) -> list:
        return [1]

    def dtypes(parameter: object, *_: object) -> object:
        return parameter

    return _operator(library, "adamw", shapes, dtypes)
