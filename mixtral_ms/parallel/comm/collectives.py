"""Collectives of tensor, sequence and expert parallel (all-to-all), with their gradients.

A rank differentiates its own copy of the loss. What all ranks of a group hold alike has the same
gradient on each; a gradient is "partial" where each rank has only its own share of it, and the sum
is the whole. Each cell says which it takes and gives; the pairs are those of Megatron-LM
(arXiv 1909.08053, 2205.05198).
"""

from mindspore import Tensor, nn, ops

from mixtral_ms.parallel.comm import transports
from mixtral_ms.parallel.comm.graph_primitives import zeros_like
from mixtral_ms.parallel.grid.mesh import ProcessGroup


class CopyToRanks(nn.Cell):
    """x, alike on all ranks, which now compute different things with it: their gradients sum."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.sum = transports.all_reduce(group)

    def construct(self, x: Tensor) -> Tensor:
        """x as it is."""
        return x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """The sum of the partial gradients."""
        return (self.sum(dout),)


class SumOverRanks(nn.Cell):
    """The ranks' terms -> their sum, alike on all of them."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.sum = transports.all_reduce(group)

    def construct(self, x: Tensor) -> Tensor:
        """The sum."""
        return self.sum(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """Each term has the gradient of the sum."""
        return (dout,)


class SplitToRanks(nn.Cell):
    """x, alike on all ranks -> each rank's part of an axis."""

    def __init__(self, group: ProcessGroup, axis: int) -> None:
        super().__init__()
        self.index, self.parts = group.index, _Parts(group.size, axis)
        self.gather = transports.all_gather(group)

    def construct(self, x: Tensor) -> Tensor:
        """The own part."""
        return self.parts(x)[self.index]

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """The gradients of all parts."""
        return (self.parts.joined(self.gather(dout)),)


class GatherFromRanks(nn.Cell):
    """Each rank's part of an axis -> the whole, alike on all ranks.

    Args:
        group: the ranks.
        axis: of which each has a part.
        partial: whether the whole's gradient is partial, as where ranks go on with different
            things; otherwise it is alike on all of them.
    """

    def __init__(self, group: ProcessGroup, axis: int, *, partial: bool) -> None:
        super().__init__()
        self.index, self.partial, self.parts = group.index, partial, _Parts(group.size, axis)
        self.gather = transports.all_gather(group)
        self.scatter = transports.reduce_scatter(group)

    def construct(self, x: Tensor) -> Tensor:
        """The whole."""
        return self.parts.joined(self.gather(x))

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """The own part of the gradient."""
        if self.partial:
            return (self.scatter(self.parts.stacked(dout)),)
        return (self.parts(dout)[self.index],)


class SumScatter(nn.Cell):
    """The ranks' terms -> each rank's part, along an axis, of their sum."""

    def __init__(self, group: ProcessGroup, axis: int) -> None:
        super().__init__()
        self.parts = _Parts(group.size, axis)
        self.gather = transports.all_gather(group)
        self.scatter = transports.reduce_scatter(group)

    def construct(self, x: Tensor) -> Tensor:
        """The own part of the sum."""
        return self.scatter(self.parts.stacked(x))

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """Each term has the gradient of the whole sum."""
        return (self.parts.joined(self.gather(dout)),)


class EnterSplit(nn.Cell):
    """Megatron's f: copy to the tensor-parallel region, where ranks compute different things.

    Gradients are partial. With sequence parallel x is each rank's part of axis 1, and the result is
    the whole sequence.
    """

    def __init__(self, group: ProcessGroup, *, sequence: bool) -> None:
        super().__init__()
        self.index, self.sequence, self.parts = group.index, sequence, _Parts(group.size, 1)
        self.sum = transports.all_reduce(group)
        self.gather = transports.all_gather(group)
        self.scatter = transports.reduce_scatter(group)

    def construct(self, x: Tensor) -> Tensor:
        """x for what differs."""
        return self.parts.joined(self.gather(x)) if self.sequence else x

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """The partial gradients' sum."""
        if not self.sequence:
            return (self.sum(dout),)
        return (self.scatter(self.parts.stacked(dout)),)


class EnterSplitTwice(EnterSplit):
    """As `EnterSplit`, for what all ranks compute alike too, whose gradient is not partial.

    Not for one of both: the gradient of what nobody uses is a constant of zeros as large as x.
    """

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for what differs, x for what does not."""
        whole = self.parts.joined(self.gather(x)) if self.sequence else x
        return whole, whole

    def bprop(self, x: Tensor, out: tuple, dout: tuple) -> tuple:
        """The partial gradients' sum, and the other one once."""
        partial, alike = dout
        if not self.sequence:
            return (self.sum(partial) + alike,)
        return (self.scatter(self.parts.stacked(partial)) + self.parts(alike)[self.index],)


class LeaveSplit(nn.Cell):
    """Megatron's g: reduce from the tensor-parallel region, whose terms are summed."""

    def __init__(self, group: ProcessGroup, *, sequence: bool) -> None:
        super().__init__()
        self.leave = SumScatter(group, 1) if sequence else SumOverRanks(group)

    def construct(self, x: Tensor) -> Tensor:
        """The sum, or with sequence parallel the own part of it."""
        return self.leave(x)


class AllToAll(nn.Cell):
    """All-to-all of rows to the ranks they are for (`transports`); the gradients go back.

    Args:
        group: the ranks.
        rows_in: N of what is given.
        rows_out: N of what comes, at least as many as can come.
    """

    def __init__(self, group: ProcessGroup, rows_in: int, rows_out: int) -> None:
        super().__init__()
        self.send = transports.all_to_all(group, rows_in, rows_out)
        self.send_back = transports.all_to_all(group, rows_out, rows_in)

    def construct(self, x_ND: Tensor, sent_PP: Tensor) -> Tensor:
        """Returns (rows_out, D)."""
        return self.send(x_ND, sent_PP)

    def bprop(self, x_ND: Tensor, sent_PP: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """Each row's gradient comes from where it went."""
        return self.send_back(dout, ops.transpose(sent_PP, (1, 0))), zeros_like(sent_PP)


class EqualAllToAll(nn.Cell):
    """All-to-all of equal blocks (`transports.equal_all_to_all`); so do the gradients go back."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.exchange = transports.equal_all_to_all(group)

    def construct(self, x: Tensor) -> Tensor:
        """x (P, ...) -> (P, ...)."""
        return self.exchange(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple:
        """Each block's gradient comes from where it went."""
        return (self.exchange(dout),)


class _Parts(nn.Cell):
    """A tensor's equal parts along an axis; primitives only (see primitives.py)."""

    def __init__(self, size: int, axis: int) -> None:
        super().__init__()
        self.split, self.concat = ops.Split(axis, size), ops.Concat(axis)
        self.stack, self.unstack = ops.Stack(), ops.Unstack()

    def construct(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.split(x)

    def stacked(self, x: Tensor) -> Tensor:
        return self.stack(self.split(x))

    def joined(self, parts: Tensor) -> Tensor:
        return self.concat(self.unstack(parts))
