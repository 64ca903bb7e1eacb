"""The C++ kernels as MindSpore operators (`ops.Custom`, AOT); shapes as in kernels.cpp."""

from pathlib import Path

from mindspore import ops


def expert_ffn_forward(library: Path) -> ops.Custom:
    """x (R, D), w1, w3 (E, F, D), w2 (E, D, F), sizes (E) -> y (R, D), gate (R, F), up (R, F)."""

    def shapes(x: list, w1: list, _w3: list, _w2: list, _sizes: list) -> tuple:
        return x, [x[0], w1[1]], [x[0], w1[1]]

    def dtypes(x: object, *_: object) -> tuple:
        return x, x, x

    return ops.Custom(f"{library}:expert_ffn_forward", shapes, dtypes, "aot")


def expert_ffn_backward(library: Path) -> ops.Custom:
    """The inputs of the forward, its gate and up, dy (R, D) -> dx, dw1, dw3, dw2."""

    def shapes(x: list, w1: list, w3: list, w2: list, *_: list) -> tuple:
        return x, w1, w3, w2

    def dtypes(x: object, *_: object) -> tuple:
        return x, x, x, x

    return ops.Custom(f"{library}:expert_ffn_backward", shapes, dtypes, "aot")


def softmax_cross_entropy(library: Path) -> ops.Custom:
    """logits (T, V), labels (T) int32 -> loss (T), d_logits (T, V)."""

    def shapes(logits: list, _labels: list) -> tuple:
        return [logits[0]], logits

    def dtypes(logits: object, _labels: object) -> tuple:
        return logits, logits

    return ops.Custom(f"{library}:softmax_cross_entropy", shapes, dtypes, "aot")
