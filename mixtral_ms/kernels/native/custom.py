"""The C++ kernels as MindSpore operators (`ops.Custom`, AOT); shapes as in the .cpp files."""

from pathlib import Path

from mindspore import ops

from mixtral_ms.kernels import numpy_experts


def expert_ffn_forward(library: Path | None) -> ops.Custom:
    """x (R, D), w1, w3 (E, F, D), w2 (E, D, F), sizes (E) -> y (R, D), gate (R, F), up (R, F).

    Without a library, in numpy.
    """

    def shapes(x: list, w1: list, _w3: list, _w2: list, _sizes: list) -> tuple:
        return x, [x[0], w1[1]], [x[0], w1[1]]

    def dtypes(x: object, *_: object) -> tuple:
        return x, x, x

    if library is None:
        return ops.Custom(numpy_experts.forward, shapes, dtypes, "pyfunc")
    return ops.Custom(f"{library}:expert_ffn_forward", shapes, dtypes, "aot")


def expert_ffn_backward(library: Path | None) -> ops.Custom:
    """The inputs of the forward, its gate and up, dy (R, D) -> dx, dw1, dw3, dw2.

    Without a library, in numpy.
    """

    def shapes(x: list, w1: list, w3: list, w2: list, *_: list) -> tuple:
        return x, w1, w3, w2

    def dtypes(x: object, *_: object) -> tuple:
        return x, x, x, x

    if library is None:
        return ops.Custom(numpy_experts.backward, shapes, dtypes, "pyfunc")
    return ops.Custom(f"{library}:expert_ffn_backward", shapes, dtypes, "aot")


def attention_forward(library: Path) -> ops.Custom:
    """q (B, S, Hd), k, v (B, S, Kd), cos, sin (P, d), positions, segments (B, S), window (1).

    Returns out (B, S, Hd), the log of each row's sum (B, H, S), rotated q and rotated k.
    """

    def shapes(q: list, k: list, _v: list, cos: list, *_: list) -> tuple:
        return q, [q[0], q[2] // cos[1], q[1]], q, k

    def dtypes(q: object, *_: object) -> tuple:
        return q, q, q, q

    return ops.Custom(f"{library}:attention_forward", shapes, dtypes, "aot")


def attention_backward(library: Path) -> ops.Custom:
    """The forward's inputs (q and k rotated), out, log sums, d_out -> dq, dk, dv."""

    def shapes(q: list, k: list, v: list, *_: list) -> tuple:
        return q, k, v

    def dtypes(q: object, *_: object) -> tuple:
        return q, q, q

    return ops.Custom(f"{library}:attention_backward", shapes, dtypes, "aot")


def rms_norm_forward(library: Path) -> ops.Custom:
    """x (T, D), weight (D), eps (1) -> y (T, D), inverse root mean square (T)."""

    def shapes(x: list, _weight: list, _eps: list) -> tuple:
        return x, [x[0]]

    def dtypes(x: object, *_: object) -> tuple:
        return x, x

    return ops.Custom(f"{library}:rms_norm_forward", shapes, dtypes, "aot")


def rms_norm_backward(library: Path) -> ops.Custom:
    """x (T, D), weight (D), inverse (T), dy (T, D) -> dx (T, D), d_weight (D)."""

    def shapes(x: list, weight: list, *_: list) -> tuple:
        return x, weight

    def dtypes(x: object, *_: object) -> tuple:
        return x, x

    return ops.Custom(f"{library}:rms_norm_backward", shapes, dtypes, "aot")


def softmax_cross_entropy(library: Path) -> ops.Custom:
    """logits (T, V), labels (T) int32 -> loss (T), d_logits (T, V)."""

    def shapes(logits: list, _labels: list) -> tuple:
        return [logits[0]], logits

    def dtypes(logits: object, _labels: object) -> tuple:
        return logits, logits

    return ops.Custom(f"{library}:softmax_cross_entropy", shapes, dtypes, "aot")


def adamw(library: Path) -> ops.Custom:
    """parameter, moments (in place), gradient, rates (6) -> a value without meaning."""

    def shapes(*_: list) -> list:
        return [1]

    def dtypes(parameter: object, *_: object) -> object:
        return parameter

    return ops.Custom(f"{library}:adamw", shapes, dtypes, "aot")
