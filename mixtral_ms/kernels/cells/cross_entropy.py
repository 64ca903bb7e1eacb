"""The loss straight from hidden states: logits are never held whole.

Legend: T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from mixtral_ms.kernels.native import custom_ops
from mixtral_ms.kernels.threaded import numpy_cross_entropy
from mixtral_ms.parallel.comm import transports
from mixtral_ms.parallel.comm.graph_primitives import zeros_like
from mixtral_ms.parallel.grid.mesh import ALONE, ProcessGroup

# Logits held at once, in values: 64 MB in float32.
_CHUNK_VALUES = 1 << 24


class PlainSoftmaxCrossEntropy(nn.Cell):
    """Loss of each token and the gradient of its logits, in plain operators."""

    def construct(self, logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens with a negative label have loss 0 and gradient 0."""
        tokens, vocabulary = logits_TV.shape
        supervised_T1 = ops.cast(ops.expand_dims(labels_T >= 0, 1), mstype.float32)
        safe_T = ops.maximum(labels_T, Tensor(0, mstype.int32))
        shifted = logits_TV - ops.max(logits_TV, 1, keepdims=True)[0]
        exp = ops.exp(shifted)
        total_T1 = ops.sum(exp, 1, keepdim=True)
        picked_T1 = ops.gather_elements(shifted, 1, ops.expand_dims(safe_T, 1))
        loss_T1 = (ops.log(total_T1) - picked_T1) * supervised_T1
        hot_TV = ops.one_hot(
            safe_T, vocabulary, Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)
        )
        gradient_TV = (exp / total_T1 - hot_TV) * supervised_T1
        return ops.reshape(loss_T1, (tokens,)), gradient_TV


class SplitSoftmaxCrossEntropy(nn.Cell):
    """As `PlainSoftmaxCrossEntropy` where ranks have a part of the vocabulary each.

    Args:
        vocabulary: the ranks, in the order of their parts.
    """

    def __init__(self, vocabulary: ProcessGroup) -> None:
        super().__init__()
        self.index = vocabulary.index
        self.gather = transports.all_gather(vocabulary)
        self.sum = transports.all_reduce(vocabulary)

    def construct(self, logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each token, alike on all ranks; the gradient of this rank's logits."""
        tokens, size = logits_TV.shape
        supervised_T1 = ops.cast(ops.expand_dims(labels_T >= 0, 1), mstype.float32)
        local_T = labels_T - self.index * size
        inside_T = ops.logical_and(local_T >= 0, local_T < size)
        inside_T1 = ops.cast(ops.expand_dims(inside_T, 1), mstype.float32)
        safe_T = ops.minimum(ops.maximum(local_T, Tensor(0, mstype.int32)), size - 1)
        peaks_PT1 = self.gather(ops.max(logits_TV, 1, keepdims=True)[0])
        shifted = logits_TV - ops.max(peaks_PT1, 0)[0]
        exp = ops.exp(shifted)
        picked_T1 = ops.gather_elements(shifted, 1, ops.expand_dims(safe_T, 1)) * inside_T1
        sums_T2 = self.sum(ops.cat((ops.sum(exp, 1, keepdim=True), picked_T1), 1))
        total_T1, picked_T1 = sums_T2[:, 0:1], sums_T2[:, 1:2]
        loss_T1 = (ops.log(total_T1) - picked_T1) * supervised_T1
        hot_TV = ops.one_hot(safe_T, size, Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32))
        gradient_TV = (exp / total_T1 - hot_TV * inside_T1) * supervised_T1
        return ops.reshape(loss_T1, (tokens,)), gradient_TV


class LinearCrossEntropy(nn.Cell):
    """sum over tokens of cross_entropy(hidden weight^T, label), with logits a chunk at a time.

    The gradients of hidden and weight are computed with the forward, where each chunk of logits
    is at hand (the method of Liger Kernel, arXiv 2410.10989); without a gradient graph they are
    dead code and pruned.

    Args:
        library: where the kernels are; None for plain operators.
        vocabulary: ranks that have a part each of the weight's rows; the gradient of hidden is then
            partial.
    """

    def __init__(
        self, library: custom_ops.Library | None = None, vocabulary: ProcessGroup = ALONE
    ) -> None:
        super().__init__()
        self.with_gradients = _LossAndGradients(library, vocabulary)

    def construct(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        """Returns the summed loss, a float32 scalar; negative labels are left out."""
        return self.with_gradients(hidden_TD, weight_VD, labels_T)[0]


class ZeroCopyCrossEntropy(nn.Cell):
    """As `LinearCrossEntropy` of one process in numpy, on a parameter that is read where it lies.

    One operator makes the loss and the gradients: MindSpore would copy each chunk of logits into
    such an operator and out of it.

    Args:
        weight: gives the float32 parameter, for which another one may stand in meanwhile;
            `construct` is given this and nothing else.
    """

    def __init__(self, weight: Callable[[], Parameter]) -> None:
        super().__init__()
        self.with_gradients = _InPlaceLoss(weight)

    def construct(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
        """As `LinearCrossEntropy`."""
        return self.with_gradients(hidden_TD, weight_VD, labels_T)[0]


class _LossAndGradients(nn.Cell):
    def __init__(self, library: custom_ops.Library | None, vocabulary: ProcessGroup) -> None:
        super().__init__()
        if vocabulary.size > 1:
            self.loss = SplitSoftmaxCrossEntropy(vocabulary)
        elif library is not None:
            self.loss = custom_ops.softmax_cross_entropy(library)
        else:
            self.loss = PlainSoftmaxCrossEntropy()
        self.logits = ops.MatMul(transpose_b=True)
        self.to_hidden = ops.MatMul()
        self.to_weight = ops.MatMul(transpose_a=True)

    def construct(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> tuple:
        tokens = hidden_TD.shape[0]
        chunk = max(1, min(tokens, _CHUNK_VALUES // weight_VD.shape[0]))
        # Chunks of equal size: one shape compiles once, and no small rest is left over.
        count = -(-tokens // chunk)
        loss = Tensor(0.0, mstype.float32)
        d_hidden: tuple[Tensor, ...] = ()
        d_weight = None
        for i in range(count):
            begin, end = tokens * i // count, tokens * (i + 1) // count
            hidden = hidden_TD[begin:end]
            logits = ops.cast(self.logits(hidden, weight_VD), mstype.float32)
            losses, d_logits = self.loss(logits, labels_T[begin:end])
            d_logits = ops.cast(d_logits, hidden_TD.dtype)
            loss = loss + ops.sum(losses)
            d_hidden += (ops.cast(self.to_hidden(d_logits, weight_VD), mstype.float32),)
            part = ops.cast(self.to_weight(d_logits, hidden), mstype.float32)
            d_weight = part if d_weight is None else d_weight + part
        return loss, (d_hidden[0] if count == 1 else ops.cat(d_hidden, 0)), d_weight

    def bprop(
        self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, out: tuple, dout: tuple
    ) -> tuple:
        _, d_hidden, d_weight = out
        scale = dout[0]
        return (
            ops.cast(d_hidden * scale, hidden_TD.dtype),
            ops.cast(d_weight * scale, weight_VD.dtype),
            zeros_like(labels_T),
        )


class _InPlaceLoss(nn.Cell):
    """In numpy; the weight is an input only so that it has a gradient."""

    def __init__(self, weight: Callable[[], Parameter]) -> None:
        super().__init__()
        self.kernel = numpy_cross_entropy.InPlaceCrossEntropy(
            lambda: weight().asnumpy(), lambda: self.training
        )
        shape = list(weight().shape)
        self.forward, self.backward = custom_ops.cross_entropy_in_place(self.kernel, shape)

    def construct(self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> tuple:
        loss, ticket = self.forward(hidden_TD, labels_T)
        return ops.reshape(loss, ()), ticket

    def bprop(
        self, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, out: tuple, dout: tuple
    ) -> tuple:
        factor = ops.reshape(dout[0], (1,))
        d_hidden, d_weight = self.backward(hidden_TD, labels_T, out[1], factor)
        return d_hidden, d_weight, zeros_like(labels_T)
