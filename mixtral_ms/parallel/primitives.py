"""Primitives in place of functions of `mindspore.ops` that fail in a bprop.

ops.zeros_like, ops.cumsum and ops.arange are Python functions with a branch; where a bprop, or a
cell that a bprop calls, uses them in a graph with collectives, compiling ends with "The func graph
is empty". In place of arange take a constant.
"""

from mindspore import ops

zeros_like = ops.ZerosLike()
running_sum = ops.CumSum()
"""x, axis -> the sum up to each place, itself included."""
sum_before = ops.CumSum(exclusive=True)
"""x, axis -> the sum of what comes before each place."""
