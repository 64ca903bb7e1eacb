"""Primitives in place of functions of `mindspore.ops` that fail in a bprop.

ops.zeros_like, cumsum, arange, chunk and others are Python functions with a branch. Where the
forward pass uses such a function and a bprop, or a cell that a bprop calls, uses it again,
compiling may end with "The func graph is empty": there take primitives, for arange a constant.
"""

from mindspore import ops

zeros_like = ops.ZerosLike()
sum_over = ops.ReduceSum()
"""x, axis -> the sum in x's dtype; ops.sum makes int64 of int32, which some kernels do not take."""
running_sum = ops.CumSum()
"""x, axis -> the sum up to each index, itself included."""
sum_before = ops.CumSum(exclusive=True)
"""x, axis -> the sum of what comes before each index."""
