"""Process groups: this process among the ranks, and those that it shares work with.

Rank order is MindFormers': rank = ((stage * data_parallel + data) * context_parallel + context)
* model_parallel + tensor.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from mixtral_ms.config.derived.expert_grid import exchange_ranks, expert_matrix
from mixtral_ms.config.sections.parallel_section import ParallelConfig


@dataclass(frozen=True)
class ProcessGroup:
    """Ranks that take part in a collective, this one among them."""

    ranks: tuple[int, ...]
    """In ascending order."""
    index: int
    """This rank's index among them."""
    name: str = ""
    """MindSpore's group; empty where there is nobody to talk to."""
    kind: str = ""
    """What it is for: its name in `Mesh`."""

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.ranks)


ALONE = ProcessGroup((0,), 0)
Connect = Callable[[tuple[int, ...], str], str]


@dataclass(frozen=True)
class Mesh:
    """One rank's position in the grid, and its groups. Without arguments: one process alone.

    Args:
        grid: sizes of the rank grid.
        rank: this process.
        connect: makes MindSpore's group of some ranks, for what `ProcessGroup.kind` says, and
            returns its name (`comm.process_groups`); None for a rank that is only simulated.
    """

    grid: ParallelConfig = field(default_factory=ParallelConfig)
    rank: int = 0
    connect: Connect | None = None
    _names: dict[tuple[int, ...], str] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.grid.pipeline_stage * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return self.grid.data_parallel * self.grid.context_parallel * self.grid.model_parallel

    @property
    def stage(self) -> int:
        """Pipeline stage of this rank."""
        return self.rank // self.stage_size

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank has the embedding."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stage == self.grid.pipeline_stage - 1

    @property
    def data_index(self) -> int:
        """Which sequences of the batch this rank sees."""
        per_group = self.grid.context_parallel * self.grid.model_parallel
        return self.rank % self.stage_size // per_group

    @property
    def context_index(self) -> int:
        """Which part of the sequence this rank has."""
        return self.rank // self.grid.model_parallel % self.grid.context_parallel

    @property
    def tensor_index(self) -> int:
        """Which part of heads and widths this rank has."""
        return self.rank % self.grid.model_parallel

    @cached_property
    def world(self) -> ProcessGroup:
        """All ranks."""
        return self._group("world", range(self.world_size))

    @cached_property
    def tensor(self) -> ProcessGroup:
        """Ranks that split heads, widths and vocabulary."""
        first = self.rank - self.tensor_index
        return self._group("tensor", range(first, first + self.grid.model_parallel))

    @cached_property
    def context(self) -> ProcessGroup:
        """Ranks that split the sequence."""
        step = self.grid.model_parallel
        first = self.rank - self.context_index * step
        return self._group("context", range(first, first + self.grid.context_parallel * step, step))

    @cached_property
    def tokens(self) -> ProcessGroup:
        """Ranks of the stage that hold the same weights outside the experts, for other tokens."""
        first = self._stage_begin + self.tensor_index
        return self._group(
            "tokens", range(first, self._stage_begin + self.stage_size, self.grid.model_parallel)
        )

    @cached_property
    def stage_ranks(self) -> ProcessGroup:
        """All ranks of the pipeline stage."""
        return self._group(
            "stage_ranks", range(self._stage_begin, self._stage_begin + self.stage_size)
        )

    @cached_property
    def exchange(self) -> ProcessGroup:
        """Ranks of `tokens` that exchange tokens for the experts each of them has (all-to-all)."""
        step = self.grid.model_parallel
        size = exchange_ranks(self.grid)
        among_tokens = (self.rank - self._stage_begin) // step
        first = self._stage_begin + among_tokens // size * size * step + self.tensor_index
        return self._group("exchange", range(first, first + size * step, step))

    @cached_property
    def expert_copies(self) -> ProcessGroup:
        """Ranks that hold the same part of the experts."""
        copies, parts, width = expert_matrix(self.grid)
        step = parts * width
        first = self._stage_begin + (self.rank - self._stage_begin) % step
        return self._group("expert_copies", range(first, first + copies * step, step))

    @cached_property
    def expert_ranks(self) -> ProcessGroup:
        """Ranks that hold all experts once, this one among them."""
        _, parts, width = expert_matrix(self.grid)
        step = parts * width
        first = self._stage_begin + (self.rank - self._stage_begin) // step * step
        return self._group("expert_ranks", range(first, first + step))

    @property
    def expert_part(self) -> int:
        """Which of the expert_parallel parts of the experts this rank has."""
        _, parts, width = expert_matrix(self.grid)
        return (self.rank - self._stage_begin) // width % parts

    def beside(self, stage: int) -> int:
        """The rank with this one's position on another stage."""
        return self.rank + (stage - self.stage) * self.stage_size

    def pair(self, rank: int) -> ProcessGroup:
        """This rank and another one."""
        return self._group("pair", sorted((self.rank, rank)))

    def group(self, ranks: Iterable[int]) -> ProcessGroup:
        """Any ranks, this one among them, in ascending order.

        All of them must ask for their groups in the same order.
        """
        return self._group("replicas", ranks)

    def make_groups(self) -> None:
        """Make all groups that a run needs, at once and in one order.

        Members that make their groups in different orders would wait for each other for ever.
        """
        for kind in ("world", "tensor", "context", "tokens", "stage_ranks", "exchange"):
            getattr(self, kind)
        _ = self.expert_copies, self.expert_ranks
        last = self.grid.pipeline_stage - 1
        for stage in range(last):  # neighbours, in the order of the pipeline
            if self.stage in (stage, stage + 1):
                self.pair(self.beside(2 * stage + 1 - self.stage))
        if self.stage in (0, last) and last > 1:
            self.pair(self.beside(last - self.stage))  # a tied embedding's two ends

    @property
    def _stage_begin(self) -> int:
        return self.stage * self.stage_size

    def _group(self, kind: str, ranks: Iterable[int]) -> ProcessGroup:
        ranks = tuple(ranks)
        if ranks not in self._names:
            meets = self.connect if len(ranks) > 1 else None
            self._names[ranks] = "" if meets is None else meets(ranks, kind)
        return ProcessGroup(ranks, ranks.index(self.rank), self._names[ranks], kind)
