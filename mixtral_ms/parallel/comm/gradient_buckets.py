"""Gradient buckets: small gradients that go the same way are reduced in one message."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mindspore import Parameter, Tensor, ops

from mixtral_ms.parallel.comm.gradient_reduction import GradientRule

_BYTES = 4  # gradients are float32


@dataclass
class Bucket:
    """Gradients, by number, that are reduced together."""

    rule: GradientRule
    numbers: list[int] = field(default_factory=list)
    bytes: int = 0


class GradientReduction:
    """Sums gradients over ranks as their rules say.

    Args:
        rules: of the gradients, in their order.
        bucket_bytes: most bytes of a bucket; a larger gradient goes by itself, with 0 each does.
    """

    def __init__(self, rules: Sequence[GradientRule], bucket_bytes: int = 0) -> None:
        self.rules, self.bucket_bytes = list(rules), bucket_bytes

    def __call__(self, gradients: list[Tensor]) -> list[Tensor]:
        """Each replaced by its reduced one, in place where it keeps its shape.

        One by one, so that only one gradient is there twice. Of buckets two are, so that one is
        under way while the next is filled.
        """
        under_way: list[tuple[Bucket, Tensor]] = []
        for bucket in self.buckets([one.shape for one in gradients]):
            under_way.append((bucket, self._reduced(bucket, gradients)))
            if len(under_way) > bool(self.bucket_bytes):
                self._put_back(*under_way.pop(0), gradients)
        for one in under_way:
            self._put_back(*one, gradients)
        return gradients

    def buckets(self, shapes: Sequence[tuple[int, ...]]) -> Iterator[Bucket]:
        """In the order in which they are sent. All ranks of a group must fill theirs alike.

        So what is counted in the norm, which differs between them, has no part in it.
        """
        filling: dict[tuple, Bucket] = {}
        for number, (rule, shape) in enumerate(zip(self.rules, shapes, strict=True)):
            size = _BYTES * math.prod(shape)
            if size > self.bucket_bytes or all(group.size == 1 for group in rule.groups):
                yield Bucket(rule, [number], size)
                continue
            way = (*(group.ranks for group in rule.groups), rule.shard and rule.shard.ranks)
            bucket = filling.setdefault(way, Bucket(rule))
            if bucket.bytes + size > self.bucket_bytes:
                yield bucket
                bucket = filling[way] = Bucket(rule)
            bucket.numbers.append(number)
            bucket.bytes += size
        yield from filling.values()

    def _reduced(self, bucket: Bucket, gradients: list[Tensor]) -> Tensor:
        members = [gradients[number] for number in bucket.numbers]
        if len(members) == 1:
            return bucket.rule.reduce(members[0])
        # with shards a row for each of them, in which it has its part of every gradient
        rows = (bucket.rule.shard.size,) if bucket.rule.shard else ()
        flat = [ops.reshape(one, (*rows, -1)) for one in members]
        return bucket.rule.reduce(ops.concat(flat, len(rows)))

    def _put_back(self, bucket: Bucket, reduced: Tensor, gradients: list[Tensor]) -> None:
        if len(bucket.numbers) == 1:
            self._replace(bucket.numbers[0], reduced, gradients)
            return
        shards, begin = bucket.rule.shard.size if bucket.rule.shard else 1, 0
        flat = ops.reshape(reduced, (-1,))
        for number in bucket.numbers:
            first, *others = gradients[number].shape
            shape = (first // shards, *others)
            end = begin + math.prod(shape)
            self._replace(number, ops.reshape(flat[begin:end], shape), gradients)
            begin = end

    def _replace(self, number: int, reduced: Tensor, gradients: list[Tensor]) -> None:
        own = gradients[number]
        if reduced is not own and isinstance(own, Parameter) and own.shape == reduced.shape:
            ops.assign(own, reduced)  # sums of micro batches stay where they are
        else:
            gradients[number] = reduced
